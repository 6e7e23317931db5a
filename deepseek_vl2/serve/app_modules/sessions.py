"""Who is there: one session a page, each with a conversation of its own."""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from deepseek_vl2.serve.app_modules.conversation import Question, Turn
from deepseek_vl2.serve.app_modules.engine import Job
from deepseek_vl2.serve.app_modules.texts import ENGLISH

MAX_SESSIONS = 500


def _is_set() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass(eq=False)
class Session:
    """One open page, or one client of the API.

    Attributes:
        turns: the conversation.
        num_left_out: turns at its beginning that had no room once; they are not tried again.
        job: the answer that is being made.
        unanswered: a question that got no answer and has yet to go back into the text box.
        all_is_shown: set as soon as the page has been sent all of the last answer; what is sent before might be
            overtaken.
        language: of the page.
        file_address: what a file's path is put behind, to be fetched.
        key: the secret hash that the page has.
    """

    turns: list[Turn] = field(default_factory=list)
    num_left_out: int = 0
    job: Job | None = None
    unanswered: Question | None = None
    all_is_shown: asyncio.Event = field(default_factory=_is_set)
    language: str = ENGLISH
    file_address: str = "gradio_api/file="
    key: str = ""

    def clear(self) -> None:
        """Begin a new conversation, and delete what was made for the old one."""
        for turn in self.turns:
            turn.delete_files()
        self.turns.clear()
        self.num_left_out = 0

    def remove_last(self) -> Turn | None:
        """Take the last turn away, and delete what was made for it."""
        if not self.turns:
            return None
        (turn,) = self.take_out(len(self.turns) - 1)
        turn.delete_files()
        return turn

    def take_out(self, start: int) -> list[Turn]:
        """Take the turns from a place on out of the conversation; their files stay."""
        taken = self.turns[start:]
        del self.turns[start:]
        # Those before may have room again; the last answer among them knows of the ones that had none then.
        answered = [turn.answer for turn in self.turns if turn.answer is not None]
        self.num_left_out = answered[-1].num_left_out if answered else 0
        return taken


class Sessions:
    """The sessions of all users, by the secret hash that each page has; the ones unused for longest are forgotten.

    Args:
        on_drop: is called with every session that is forgotten.
        capacity: how many are kept.
    """

    def __init__(self, on_drop: Callable[[Session], None], capacity: int = MAX_SESSIONS) -> None:
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()
        self._on_drop = on_drop
        self._capacity = capacity

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, key: str) -> Session:
        """Find a session, or begin one."""
        dropped: list[Session] = []
        with self._lock:
            session = self._sessions.setdefault(key, Session(key=key))
            self._sessions.move_to_end(key)
            while len(self._sessions) > self._capacity:
                dropped.append(self._sessions.popitem(last=False)[1])
        for old in dropped:
            self._on_drop(old)
        return session

    def drop(self, key: str) -> None:
        """Forget a session."""
        with self._lock:
            session = self._sessions.pop(key, None)
        if session is not None:
            self._on_drop(session)
