"""Conversations that are read only from where they differ from the turn before, and a pool of them for many users."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.serve.inference import deepseek_generate
from deepseek_vl2.serve.picture_features import PictureFeatures
from deepseek_vl2.serve.prompt_memory import PromptMemory, Reuse
from deepseek_vl2.serve.streaming import AnswerStream

DEFAULT_MAX_CACHE_BYTES = 2**30


class ChatSession:
    """A conversation with a model, which keeps the cache between its turns.

    Each answer is asked for with the whole conversation, so turns may be added, changed and removed at will; the model
    reads what comes after the first difference. Pictures are encoded once, however often they are asked about.

    Args:
        model: The model; whoever changes its weights calls `clear`.
        processor: Its processor.
        features: Where features of pictures are kept, to share them with other sessions; its own if None.

    Attributes:
        memory: The cache, for `deepseek_generate` and `AnswerStream`.
    """

    def __init__(
        self,
        model: DeepseekVLV2ForCausalLM,
        processor: DeepseekVLV2Processor,
        features: PictureFeatures | None = None,
    ) -> None:
        self.memory = PromptMemory(model, features)
        self._processor = processor

    @property
    def last_reuse(self) -> Reuse | None:
        """What was known of the last prompt, and what had to be computed; None before the first."""
        return self.memory.last_reuse

    @property
    def num_bytes(self) -> int:
        """Memory that the cache takes, features of pictures not counted."""
        return self.memory.num_bytes

    def answer(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        stop_words: Sequence[str] = (),
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
        chunk_size: int = -1,
    ) -> AnswerStream:
        """Answers a conversation, piece by piece, as `deepseek_generate` does.

        Args:
            conversation: All messages up to the open answer.
            stop_words: Texts that end the answer and are not part of it.
            max_new_tokens: Length of the answer at most.
            temperature: 0 for the likeliest token each time.
            top_p: Share of the likeliest tokens that sampling draws from.
            repetition_penalty: Above 1 for fewer repetitions.
            chunk_size: Tokens to prefill at once, -1 for all.

        Raises:
            ValueError: If the conversation or a number does not make sense, or the prompt is too long.
            RuntimeError: With the first piece, if another answer of this session is under way.
        """
        return deepseek_generate(
            conversation,
            self.memory.model,
            self._processor,
            self._processor.tokenizer,
            stop_words,
            max_new_tokens,
            temperature,
            top_p,
            repetition_penalty,
            chunk_size,
            self.memory,
        )

    def clear(self) -> None:
        """Forgets everything, the features of pictures too, also where other sessions share them.

        Raises:
            RuntimeError: If an answer is under way.
        """
        self.memory.clear()


class ChatSessionPool:
    """The sessions of several users, whose caches share a limited memory; the ones unused for longest are given up.

    A user whose session was given up gets the same answers, only later.

    Args:
        model: The model.
        processor: Its processor.
        max_cache_bytes: Memory for caches between answers, those of answers under way not counted; 0 to keep none.

    Attributes:
        features: Features of the pictures of all users.

    Raises:
        ValueError: If `max_cache_bytes` is negative.
    """

    def __init__(
        self,
        model: DeepseekVLV2ForCausalLM,
        processor: DeepseekVLV2Processor,
        max_cache_bytes: int = DEFAULT_MAX_CACHE_BYTES,
    ) -> None:
        if max_cache_bytes < 0:
            raise ValueError(f"max_cache_bytes {max_cache_bytes} must be at least 0, which keeps no cache.")
        self.features = PictureFeatures(model)
        self._model = model
        self._processor = processor
        self._max_cache_bytes = max_cache_bytes
        self._idle: OrderedDict[str, ChatSession] = OrderedDict()
        self._lent: dict[str, ChatSession] = {}
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Memory that the caches take between answers."""
        with self._lock:
            return self._num_idle_bytes()

    @contextmanager
    def lend(self, user: str) -> Iterator[ChatSession]:
        """Gives a user's session for one answer; an empty one to who has none, or is using it already."""
        with self._lock:
            session = self._idle.pop(user, None) or ChatSession(self._model, self._processor, self.features)
            self._lent.setdefault(user, session)
        try:
            yield session
        finally:
            with self._lock:
                if self._lent.get(user) is session:
                    del self._lent[user]
                    self._idle[user] = session
                    self._give_up_the_oldest()

    def forget(self, user: str) -> None:
        """Gives a user's session up, one that is in use when it comes back."""
        with self._lock:
            self._idle.pop(user, None)
            self._lent.pop(user, None)

    def _give_up_the_oldest(self) -> None:
        while self._idle and self._num_idle_bytes() > self._max_cache_bytes:
            self._idle.popitem(last=False)

    def _num_idle_bytes(self) -> int:
        return sum(session.num_bytes for session in self._idle.values())
