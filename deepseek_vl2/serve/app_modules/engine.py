"""The one model behind all pages: loaded once, asked in turn, stopped at once. Imports no heavy library itself."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple, Protocol

from deepseek_vl2.serve.app_modules.conversation import Answer, Question, Turn
from deepseek_vl2.serve.app_modules.logs import LOGGER_NAME
from deepseek_vl2.serve.app_modules.settings import Settings
from deepseek_vl2.serve.fair_queue import FairQueue

logger = logging.getLogger(LOGGER_NAME)

# What loading and answering raise: bad input, files and network, memory, devices.
EXPECTED_ERRORS = (ValueError, TypeError, OSError, ImportError, MemoryError, RuntimeError)

IDLE, LIBRARIES, LOADING, WEIGHTS, READY, FAILED = "idle", "libraries", "loading", "weights", "ready", "failed"
WAITING, PREPARING, ANSWERING = "waiting", "preparing", "answering"


class LoadState(NamedTuple):
    """How far the model is.

    Attributes:
        phase: `idle`, `libraries`, `loading`, `weights`, `ready` or `failed`.
        fraction: of the weights that are loaded.
        reason: why it failed.
        seconds: since loading began.
        device: where it runs, once it is ready.
    """

    phase: str = IDLE
    fraction: float = 0.0
    reason: str = ""
    seconds: float = 0.0
    device: str = ""


class Request(NamedTuple):
    """A question with what was said before it."""

    turns: tuple[Turn, ...]
    question: Question
    settings: Settings
    num_left_out: int = 0


class Answerer(Protocol):
    """What answers, once the model is loaded."""

    device: str

    def answer(self, request: Request, job: "Job") -> Answer:
        """Answer a question; what is raised is shown to the one who asked."""

    def forget(self, user: str) -> None:
        """Forget what is known of a user's conversation."""


class Job:
    """One answer on its way.

    Attributes:
        request: what is asked.
        user: who asks; what is known of a conversation belongs to one user.
        phase: `waiting`, `preparing` or `answering`.
        words: what was said until now, for people.
    """

    def __init__(self, request: Request, user: str = "") -> None:
        self.request = request
        self.user = user
        self.phase = WAITING
        self.words = ""
        self.future: Future[Answer] = Future()
        self._stop = threading.Event()
        self._on_stop: Callable[[], None] | None = None
        self._lock = threading.Lock()

    @property
    def is_stopped(self) -> bool:
        """Whether nobody wants more of it."""
        return self._stop.is_set()

    def stop(self) -> None:
        """End it as soon as possible; what was said until then is its answer."""
        with self._lock:
            self._stop.set()
            on_stop = self._on_stop
        if on_stop is not None:
            on_stop()

    def call_on_stop(self, on_stop: Callable[[], None]) -> None:
        """Say what ends the work; it is called at once if the job is stopped already."""
        with self._lock:
            self._on_stop = on_stop
            is_stopped = self.is_stopped
        if is_stopped:
            on_stop()


class Engine:
    """Loads a model once, and lets it answer the questions of all users in fair order.

    Args:
        load: gives the answerer; it is called in a thread of its own, with a function that takes the state of loading.
        concurrency: answers at the same time.
    """

    def __init__(self, load: Callable[[Callable[[LoadState], None]], Answerer], concurrency: int = 1) -> None:
        self._load = load
        self._queue: FairQueue[Job] = FairQueue()
        self._concurrency = concurrency
        self._running: set[Job] = set()
        self._lock = threading.RLock()  # an answer that is over at once notes that within `_dispatch`
        self._executor = ThreadPoolExecutor(concurrency, thread_name_prefix="deepseek_vl2-engine")
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="deepseek_vl2-loader")
        self._state = LoadState()
        self._started = 0.0
        self._loading: Future[Answerer] | None = None

    @property
    def num_running(self) -> int:
        """Answers that the model works on."""
        with self._lock:
            return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Questions in the queue."""
        with self._lock:
            return len(self._queue)

    @property
    def load_state(self) -> LoadState:
        """How far the model is."""
        with self._lock:
            state = self._state
            is_under_way = state.phase in (LIBRARIES, LOADING, WEIGHTS)
            return state._replace(seconds=time.monotonic() - self._started) if is_under_way else state

    def start_loading(self) -> "Future[Answerer]":
        """Begin to load, unless it was begun; after a failure try again."""
        with self._lock:
            if self._loading is None or self._state.phase == FAILED:
                self._started = time.monotonic()
                self._state = LoadState(LIBRARIES)
                self._loading = self._loader.submit(self._load_model)
            return self._loading

    def _load_model(self) -> Answerer:
        with ExitStack() as stack:
            # Noted before the future fails: whoever waits for it may ask for the state, or for another try, at once.
            stack.push(self._note_failure)
            answerer = self._load(self._set_state)
        self._set_state(LoadState(READY, device=answerer.device))
        logger.info("the model is loaded, on %s", answerer.device)
        return answerer

    def _note_failure(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning("the model could not be loaded: %s", reason)
            self._set_state(LoadState(FAILED, reason=reason))

    def _set_state(self, state: LoadState) -> None:
        with self._lock:
            self._state = state

    def submit(self, user: str, request: Request) -> Job:
        """Put a question into the queue.

        Args:
            user: whose it is, for fairness and for what is known of the conversation.
            request: the question.
        """
        self.start_loading()
        job = Job(request, user)
        with self._lock:
            self._queue.push(user, job)
        self._dispatch()
        return job

    def place(self, job: Job) -> int | None:
        """Tell how many questions will be taken before one that waits; `None` if it does not wait."""
        with self._lock:
            return self._queue.place(job)

    def cancel(self, job: Job) -> None:
        """Stop a job, and take it out of the queue if it waits there."""
        job.stop()
        with self._lock:
            was_waiting = self._queue.remove(job)
        if was_waiting:
            job.future.cancel()

    def forget(self, user: str) -> None:
        """Forget what is known of a user's conversation."""
        with self._lock:
            loading = self._loading
        if loading is not None and loading.done() and loading.exception() is None:
            loading.result().forget(user)

    def close(self) -> None:
        """End all answers. A load under way cannot be interrupted; it is not waited for."""
        with self._lock:
            jobs = [*self._queue.in_turn(), *self._running]
        for job in jobs:
            self.cancel(job)
        self._executor.shutdown()
        self._loader.shutdown(wait=False, cancel_futures=True)

    def _dispatch(self) -> None:
        with self._lock:
            while len(self._queue) and len(self._running) < self._concurrency:
                job = self._queue.pop()
                self._running.add(job)
                job.phase = PREPARING
                self._executor.submit(self._run, job).add_done_callback(partial(self._finish, job))

    def _run(self, job: Job) -> Answer:
        loading = self.start_loading() if self._loading is None else self._loading
        while not job.is_stopped and not loading.done():
            time.sleep(0.05)
        if not loading.done():
            raise InterruptedError("stopped while the model was loading")
        return loading.result().answer(job.request, job)

    def _finish(self, job: Job, work: "Future[Answer]") -> None:
        with self._lock:
            self._running.discard(job)
        self._dispatch()
        error = work.exception()
        if error is not None:
            job.future.set_exception(error)
        else:
            job.future.set_result(work.result())
