"""One question of a batch run, whatever it was read from."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from deepseek_vl2.batch.pdf import PdfPage
from deepseek_vl2.models.chat_format import ASSISTANT_NAMES, USER_NAMES, content_text
from deepseek_vl2.models.processor_inputs import check_messages
from deepseek_vl2.models.special_tokens import IMAGE, USER
from deepseek_vl2.serve.questions import place_image_marks
from deepseek_vl2.utils.data_files import with_full_paths
from deepseek_vl2.utils.pictures import picture_sources

CONVERSATION_FIELDS = ("conversation", "conversations", "messages")
PROMPT_FIELD = "prompt"
ID_FIELD = "id"

# A path, a data URI, the encoded bytes of a picture, or a page.
ItemPicture: TypeAlias = str | bytes | PdfPage


@dataclass(frozen=True)
class Item:
    """A question with its pictures.

    Attributes:
        index: place in the input, from 0.
        id: what the input calls it.
        messages: as the processor takes them; the pictures are given beside them.
        pictures: in the order of their marks.
        problem: why the question cannot be asked; empty if it can.
    """

    index: int
    id: str
    messages: tuple[Mapping[str, Any], ...] = ()
    pictures: tuple[ItemPicture, ...] = ()
    problem: str = ""

    @property
    def question(self) -> str:
        """Text of the last message, without marks of pictures; empty if there is none."""
        return content_text(self.messages[-1].get("content")).replace(IMAGE, "").strip() if self.messages else ""


class PromptTemplate:
    """A question with fields such as `{name}`, filled in for each item. Braces are written twice: `{{`.

    Args:
        text: the question.

    Raises:
        ValueError: it is empty, or a field is not a plain name.
    """

    def __init__(self, text: str) -> None:
        if not text.replace(IMAGE, "").strip():
            raise ValueError("the prompt is empty: ask something, or leave it out to get pictures described")
        try:
            self.parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"the prompt is no template ({error}); write {{{{ and }}}} for braces") from error
        for _, name, form, conversion in self.parts:
            if name is not None and (not name.strip() or form or conversion or set(name) & set(".[]")):
                raise ValueError(f"the prompt's field {{{name}}} must be a plain name; write {{{{ and }}}} for braces")
        self.text = text
        self.fields = frozenset(name for _, name, _, _ in self.parts if name is not None)

    def fill(self, values: Mapping[str, Any]) -> str:
        """Puts values into the fields.

        Raises:
            ValueError: a field has no value.
        """
        filled = []
        for literal, name, _, _ in self.parts:
            filled.append(literal)
            if name is not None:
                if values.get(name) is None:
                    known = ", ".join(key for key, value in values.items() if isinstance(value, (str, int, float)))
                    raise ValueError(f"the prompt's field {{{name}}} has no value here; there is: {known or 'nothing'}")
                filled.append(str(values[name]))
        return "".join(filled)


def ask_about(prompt: str, pictures: Sequence[ItemPicture]) -> tuple[Mapping[str, Any], ...]:
    """The messages of one question about pictures.

    Raises:
        ValueError: the question is empty, or has marks, but not as many as pictures.
    """
    if not prompt.replace(IMAGE, "").strip():
        raise ValueError("the prompt is empty")
    return ({"role": USER, "content": place_image_marks(prompt, len(pictures))},)


def asked_conversation(messages: Any, folder: Path) -> tuple[tuple[Mapping[str, Any], ...], tuple[ItemPicture, ...]]:
    """A conversation that waits for an answer, and its pictures.

    Args:
        messages: of the input.
        folder: what paths of pictures are relative to.

    Raises:
        ValueError: it is no conversation, or does not end with a question.
        OSError: a picture is not there.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise ValueError(f"a conversation must be a list of messages with role and content, not {messages!r:.80}")
    check_messages(messages)
    for message in messages:
        content_text(message.get("content"))  # refuses what is neither text nor parts, wherever it stands
    last = messages[-1]
    if last.get("role") in ASSISTANT_NAMES and not content_text(last.get("content")).strip():
        messages = messages[:-1]
    if not messages or messages[-1].get("role") not in USER_NAMES:
        raise ValueError("the conversation must end with a question of the user")
    full = tuple(with_full_paths(message, folder) for message in messages)
    return full, tuple(picture_sources(full))
