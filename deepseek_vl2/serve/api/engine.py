"""The model behind the server: one thread answers all questions, those under way together, step by step."""

import logging
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import torch

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.models.generation import check_chunk_size, room_for_answer
from deepseek_vl2.models.processing_deepseek_vl_v2 import DeepseekVLV2Processor, VLChatProcessorOutput
from deepseek_vl2.serve.continuous_batch import ContinuousBatch, ReadPrompts, read_prompts
from deepseek_vl2.serve.fair_queue import FairQueue
from deepseek_vl2.serve.picture_features import PictureFeatures
from deepseek_vl2.serve.row_sampling import RowSampler, Sampling, choose_tokens, likeliest_tokens
from deepseek_vl2.serve.streaming import left_when, stop_between_layers
from deepseek_vl2.serve.text_pieces import LetterDecoder, StopWordFilter
from deepseek_vl2.utils.io import LoadedModel

logger = logging.getLogger(__name__)

# What the model's work raises: bad input, memory, devices.
EXPECTED_ERRORS = (ValueError, TypeError, OSError, MemoryError, RuntimeError)

STOP, LENGTH = "stop", "length"


class EngineStoppedError(RuntimeError):
    """The engine takes no more questions."""


@dataclass(frozen=True)
class Question:
    """A prepared prompt and how it is answered.

    Attributes:
        inputs: the processor's output for the prompt.
        sampling: how tokens are chosen.
        max_new_tokens: most tokens of the answer; fewer where the model has no positions left.
        stop_words: texts that end the answer and are not part of it.
    """

    inputs: VLChatProcessorOutput
    sampling: Sampling
    max_new_tokens: int
    stop_words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Some more text of an answer."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The end of an answer: `stop` or `length`, and its tokens, the end-of-sentence token included."""

    reason: str
    num_new_tokens: int


@dataclass(frozen=True)
class Failed:
    """An answer that could not be given."""

    error: Exception


Event: TypeAlias = Piece | Finished | Failed


class Answering:
    """One answer on its way.

    Args:
        question: what is asked.
        emit: takes the events in the engine's thread; `Finished` or `Failed` is the last, or none after `cancel`.
    """

    def __init__(self, question: Question, emit: Callable[[Event], None]) -> None:
        self.question = question
        self.emit = emit
        self.is_cancelled = threading.Event()


class _Row:
    """An answer that the model works on."""

    def __init__(self, answering: Answering, sampler: RowSampler, decoder: LetterDecoder, max_new_tokens: int) -> None:
        self.answering = answering
        self.sampler = sampler
        self.last_token = 0
        self._decoder = decoder
        self._stop = StopWordFilter(answering.question.stop_words)
        self._max_new_tokens = max_new_tokens
        self._num_new_tokens = 0

    def take(self, token: int, eos_token: int) -> bool:
        """Takes the next token; returns whether the answer is over with it."""
        self.last_token = token
        self._num_new_tokens += 1
        is_eos = token == eos_token
        is_full = self._num_new_tokens >= self._max_new_tokens
        text = "" if is_eos else self._stop.feed(self._decoder.feed(token))
        if is_eos or is_full:
            text += self._stop.feed(self._decoder.flush())
            text += self._stop.flush()
        if text:
            self.answering.emit(Piece(text))
        if not (is_eos or is_full or self._stop.is_over):
            return False
        reason = STOP if is_eos or self._stop.is_over else LENGTH
        self.answering.emit(Finished(reason, self._num_new_tokens))
        return True


class BatchEngine:
    """Answers questions in fair order, up to `max_batch` of them at the same time.

    Greedy answers are those of the model for the question alone; sampled ones depend on their own seed only. Both hold
    up to the rounding of the device, which may differ with the number of rows.

    Args:
        loaded: the model.
        max_batch: answers at the same time.
        chunk_size: tokens of a prompt to read at once, -1 for all.
        on_step: is told the number of rows of each step.

    Raises:
        ValueError: if `chunk_size` is none, or larger than the model's context.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        max_batch: int = 8,
        chunk_size: int = -1,
        on_step: Callable[[int], None] = lambda num_rows: None,
    ) -> None:
        check_chunk_size(chunk_size, loaded.model.config.language_config.max_position_embeddings)
        self._model: DeepseekVLV2ForCausalLM = loaded.model
        self._processor: DeepseekVLV2Processor = loaded.processor
        self._max_batch = max_batch
        self._chunk_size = chunk_size
        self._on_step = on_step
        self._features = PictureFeatures(self._model)
        self._batch = ContinuousBatch(self._model)
        self._rows: list[_Row] = []
        self._reading: Answering | None = None
        self._queue: FairQueue[Answering] = FairQueue()
        self._changed = threading.Condition()
        self._is_closed = False
        stop_between_layers(self._model)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="deepseek_vl2-engine")
        self._executor.submit(self._run).add_done_callback(_log_end)

    @property
    def is_alive(self) -> bool:
        """Whether it takes questions."""
        return not self._is_closed

    @property
    def num_running(self) -> int:
        """Answers that the model works on."""
        return len(self._rows) + (self._reading is not None)

    @property
    def num_waiting(self) -> int:
        """Questions in the queue."""
        with self._changed:
            return len(self._queue)

    def submit(self, client: Hashable, question: Question, emit: Callable[[Event], None]) -> Answering:
        """Puts a question into the queue.

        Args:
            client: whose it is, for fairness.
            question: what is asked.
            emit: see `Answering`.

        Raises:
            EngineStoppedError: the engine is closed.
        """
        answering = Answering(question, emit)
        with self._changed:
            if self._is_closed:
                raise _going_down()
            self._queue.push(client, answering)
            self._changed.notify()
        return answering

    def cancel(self, answering: Answering) -> None:
        """Ends an answer that nobody wants any more: at once in the queue, else at the next layer or token."""
        answering.is_cancelled.set()
        with self._changed:
            self._queue.remove(answering)
            self._changed.notify()

    def close(self) -> None:
        """Ends all answers and the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._reading is not None:
            self._reading.is_cancelled.set()
        self._executor.shutdown()

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._drop_cancelled()
                self._admit()
                if self._rows:
                    self._step()
        finally:
            self._end_all()

    def _wait_for_work(self) -> bool:
        """Waits until there is something to do; returns whether to go on."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._rows or len(self._queue))
            return not self._is_closed

    def _drop_cancelled(self) -> None:
        self._leave([place for place, row in enumerate(self._rows) if row.answering.is_cancelled.is_set()])

    def _leave(self, places: list[int]) -> None:
        if not places:
            return
        self._rows = [row for place, row in enumerate(self._rows) if place not in set(places)]
        try:
            self._batch.leave(places)
        except EXPECTED_ERRORS as error:
            # Rows may have left some layers only, so that those that stay cannot go on.
            self._fail_all(error)

    def _fail_all(self, error: Exception) -> None:
        """Ends the answers under way."""
        for row in self._rows:
            row.answering.emit(Failed(error))
        self._rows = []
        self._batch.leave(range(len(self._batch)))

    def _admit(self) -> None:
        """Takes one question up, so that those under way wait for one prompt at most between two tokens."""
        with self._changed:
            if len(self._rows) >= self._max_batch or not len(self._queue):
                return
            self._reading = answering = self._queue.pop()
        try:
            self._begin(answering)
        except EXPECTED_ERRORS as error:
            answering.emit(Failed(error))
        self._reading = None  # after another error it is still there for `_end_all`

    def _begin(self, answering: Answering) -> None:
        read: ReadPrompts | None = None
        with left_when(answering.is_cancelled):
            read = self._read(answering.question.inputs)
        if read is None or answering.is_cancelled.is_set():
            if self._is_closed:
                answering.emit(Failed(_going_down()))
            return
        row = self._row(answering)
        (token,) = choose_tokens(read.logits, [row.sampler])
        if not row.take(token, self._processor.eos_id):
            self._batch.join(read)
            self._rows.append(row)

    def _read(self, sample: VLChatProcessorOutput) -> ReadPrompts:
        inputs = self._processor.batchify([sample]).to(self._model.device, dtype=self._model.dtype)
        embeds = self._features.embed(**dict(inputs.items()))
        return read_prompts(self._model, embeds, inputs["attention_mask"], self._chunk_size)

    def _row(self, answering: Answering) -> _Row:
        question = answering.question
        room = room_for_answer(len(question.inputs), self._model.config.language_config)
        sampler = RowSampler(question.sampling, question.inputs.input_ids, self._model.device)
        decoder = LetterDecoder(self._processor.tokenizer)
        return _Row(answering, sampler, decoder, min(question.max_new_tokens, room))

    def _step(self) -> None:
        self._on_step(len(self._rows))
        try:
            logits = self._batch.step([row.last_token for row in self._rows])
            likeliest = likeliest_tokens(logits)
        except EXPECTED_ERRORS as error:
            # The cache may have grown in some layers only, so that none of the answers can go on.
            self._fail_all(error)
            return
        self._leave(
            [place for place, row in enumerate(self._rows) if self._is_over(row, logits[place], likeliest[place])]
        )

    def _is_over(self, row: _Row, logits: torch.Tensor, likeliest: int) -> bool:
        """Gives a row its next token; returns whether its answer is over with it. An error ends this answer only."""
        try:
            return row.take(row.sampler.choose(logits, likeliest), self._processor.eos_id)
        except EXPECTED_ERRORS as error:
            row.answering.emit(Failed(error))
            return True

    def _end_all(self) -> None:
        """Tells everybody whose answer is open that it does not come any more."""
        with self._changed:
            self._is_closed = True
            reading = [] if self._reading is None else [self._reading]
            left = [*(row.answering for row in self._rows), *reading, *self._queue.in_turn()]
        for answering in left:
            answering.emit(Failed(_going_down()))


def _going_down() -> EngineStoppedError:
    return EngineStoppedError("the server is going down")


def _log_end(work: object) -> None:
    """Says why the thread ended, if it did so by itself; the error's words may hold what users wrote."""
    error = work.exception()  # type: ignore[attr-defined]
    if error is not None:
        logger.error("the engine stopped: %s", type(error).__name__)
