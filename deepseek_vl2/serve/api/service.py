"""What happens between a request and its answers: a place, pictures, prompt, queue, and the events of the engine."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from http import HTTPStatus
from typing import NamedTuple

from deepseek_vl2.serve.api.engine import (
    Answering,
    BatchEngine,
    EngineStoppedError,
    Event,
    Failed,
    Finished,
    Question,
)
from deepseek_vl2.serve.api.errors import ApiError, bad_request
from deepseek_vl2.serve.api.metrics import Metrics
from deepseek_vl2.serve.api.pictures import PictureLoader
from deepseek_vl2.serve.api.places import Places
from deepseek_vl2.serve.api.prompts import Prompt, PromptBuilder
from deepseek_vl2.serve.api.public_fetch import PublicFetcher
from deepseek_vl2.serve.api.schemas import ChatRequest
from deepseek_vl2.serve.api.settings import ServerSettings
from deepseek_vl2.serve.row_sampling import Sampling
from deepseek_vl2.utils.errors import is_out_of_memory
from deepseek_vl2.utils.io import LoadedModel

# Threads that load pictures and encode prompts.
NUM_PREPARING = 4
TOP_K = Sampling().top_k


class AnswerEvent(NamedTuple):
    """What happens to one of the answers of a request."""

    number: int
    event: Event


class OpenRequest:
    """A request whose answers are on their way. Whoever has it closes it.

    Attributes:
        prompt: what is asked.
        num_answers: how many answers come.
        num_new_tokens: of the answers that are finished.
        deadline: in the time of the event loop.
        closing: what is done when it is closed.
    """

    def __init__(self, prompt: Prompt, num_answers: int, deadline: float) -> None:
        self.prompt = prompt
        self.num_answers = num_answers
        self.num_new_tokens = 0
        self.closing = ExitStack()
        self.deadline = deadline
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[AnswerEvent] = asyncio.Queue()
        self._first: AnswerEvent | None = None
        self._num_open = num_answers

    def receiver(self, index: int) -> Callable[[Event], None]:
        """What takes the events of one answer, in any thread."""

        def receive(event: Event) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._queue.put_nowait, AnswerEvent(index, event))

        return receive

    async def wait_for_first(self) -> None:
        """Waits until the first answer begins.

        Raises:
            ApiError: see `events`.
        """
        self._first = await self._next()

    async def events(self) -> AsyncIterator[AnswerEvent]:
        """The events of all answers, until the last is finished.

        Raises:
            ApiError: the time is over, or the model could not answer.
        """
        while self._num_open or self._first is not None:
            event = self._first or await self._next()
            self._first = None
            yield event

    async def _next(self) -> AnswerEvent:
        try:
            async with asyncio.timeout_at(self.deadline):
                index, event = await self._queue.get()
        except TimeoutError:
            raise timed_out() from None
        if isinstance(event, Failed):
            raise _engine_error(event.error)
        if isinstance(event, Finished):
            self._num_open -= 1
            self.num_new_tokens += event.num_new_tokens
        return AnswerEvent(index, event)

    def close(self) -> None:
        """Ends what is still open, and gives the places back."""
        self.closing.close()


class ChatService:
    """Answers requests with one model. Used in the thread of the server's event loop.

    Args:
        loaded: the model.
        settings: of the server.
        fetcher: downloads pictures, in place of the default that only reaches the public internet.
    """

    def __init__(self, loaded: LoadedModel, settings: ServerSettings, fetcher: PublicFetcher | None = None) -> None:
        if settings.allow_url_fetch and fetcher is None:
            fetcher = PublicFetcher(settings.limits.max_bytes)
        self.settings = settings
        self.metrics = Metrics()
        self.created = int(time.time())
        self.engine = BatchEngine(loaded, settings.max_batch, settings.chunk_size, self.metrics.note_step)
        self.places = Places(settings.max_batch + settings.max_waiting, settings.max_open_per_client)
        loader = PictureLoader(settings.limits, fetcher if settings.allow_url_fetch else None)
        self._prompts = PromptBuilder(loaded, loader)
        self._preparing = ThreadPoolExecutor(NUM_PREPARING, thread_name_prefix="deepseek_vl2-prepare")
        self.metrics.add_gauge("running_answers", "Answers that the model works on", lambda: self.engine.num_running)
        self.metrics.add_gauge("waiting_answers", "Answers that wait for their turn", lambda: self.engine.num_waiting)
        self.metrics.add_gauge("open_answers", "Places that are taken", lambda: self.places.num_open)

    async def begin(self, request: ChatRequest, client: Hashable) -> OpenRequest:
        """Prepares a request and waits until its first answer begins.

        Args:
            request: what is asked.
            client: whose it is, for fairness.

        Raises:
            ApiError: the request is not right, there is no place for it, or its time is over.
        """
        start = time.monotonic()
        deadline = asyncio.get_running_loop().time() + self.settings.timeout
        self._prompts.check(request.messages)
        num_answers = request.n or 1
        if num_answers > self.places.most_of_a_client:
            message = (
                f"n is {num_answers}, and this server gives a client {self.places.most_of_a_client} answers at a time"
            )
            raise bad_request(message, "n")
        with ExitStack() as closing:
            closing.enter_context(self.places.taken(client, num_answers))
            prompt = await self._prepare(request, deadline)
            opened = OpenRequest(prompt, num_answers, deadline)
            for index in range(num_answers):
                answering = self._submit(client, _question(request, prompt, index), opened.receiver(index))
                closing.callback(self.engine.cancel, answering)
            await opened.wait_for_first()
            self._count(prompt, time.monotonic() - start)
            opened.closing = closing.pop_all()
        return opened

    async def _prepare(self, request: ChatRequest, deadline: float) -> Prompt:
        loop = asyncio.get_running_loop()
        is_cancelled = threading.Event()
        build = partial(self._prompts.build, request.messages, is_cancelled)
        try:
            async with asyncio.timeout_at(deadline):
                return await loop.run_in_executor(self._preparing, build)
        except TimeoutError:
            raise timed_out() from None
        finally:
            is_cancelled.set()  # the thread does not end with the waiting for it

    def _submit(self, client: Hashable, question: Question, emit: Callable[[Event], None]) -> Answering:
        try:
            return self.engine.submit(client, question, emit)
        except EngineStoppedError as error:
            raise _engine_error(error) from error

    def _count(self, prompt: Prompt, seconds: float) -> None:
        self.metrics.seconds_to_first_token.observe(seconds)
        self.metrics.prompt_tokens.inc(len(prompt.inputs))
        self.metrics.image_tokens.inc(prompt.num_image_tokens)
        self.metrics.pictures.inc(len(prompt.inputs.num_image_tokens))

    def end(self, opened: OpenRequest) -> None:
        """Closes a request, and counts what was answered."""
        opened.close()
        self.metrics.new_tokens.inc(opened.num_new_tokens)

    def close(self) -> None:
        """Ends all answers."""
        self._preparing.shutdown(wait=False, cancel_futures=True)
        self.engine.close()


def _question(request: ChatRequest, prompt: Prompt, index: int) -> Question:
    """One of the answers that are asked for; each has a seed of its own."""
    seed = None if request.seed is None else (request.seed + index) % 2**63
    sampling = Sampling(
        temperature=request.temperature or 0.0,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=TOP_K if request.top_k is None else request.top_k,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        seed=seed,
    )
    return Question(prompt.inputs, sampling, request.max_new_tokens, request.stop_words)


def timed_out() -> ApiError:
    """Status 504."""
    return ApiError(HTTPStatus.GATEWAY_TIMEOUT, "the answer took too long for this server", code="timeout")


def _engine_error(error: Exception) -> ApiError:
    if isinstance(error, EngineStoppedError):
        return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, str(error), code="shutting_down")
    if is_out_of_memory(error):
        message = "there is not enough memory for this request now: send fewer pictures or less text, or try later"
        return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, message, code="out_of_memory")
    if isinstance(error, ValueError):
        return bad_request(str(error), "messages")
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "the model failed on this request", code="model_failed")
