"""Answers one question of the page with the model. Imports the heavy libraries, so it is imported when they are due."""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from PIL import Image

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.special_tokens import IMAGE
from deepseek_vl2.serve.app_modules.conversation import Answer, FoundBox, Question, Statistics, Turn
from deepseek_vl2.serve.app_modules.engine import ANSWERING, LOADING, WEIGHTS, Job, LoadState, Request
from deepseek_vl2.serve.app_modules.limits import UploadLimits
from deepseek_vl2.serve.app_modules.logs import LOGGER_NAME
from deepseek_vl2.serve.app_modules.settings import BY_CHANCE, Settings
from deepseek_vl2.serve.app_modules.texts import UserError
from deepseek_vl2.serve.box_owners import OwnedBox, assign_boxes
from deepseek_vl2.serve.chat_session import DEFAULT_MAX_CACHE_BYTES, ChatSession, ChatSessionPool
from deepseek_vl2.serve.grounding import draw_boxes, read_grounding, save_drawing, strip_grounding
from deepseek_vl2.serve.inference import sampling_options
from deepseek_vl2.serve.questions import place_image_marks
from deepseek_vl2.serve.streaming import AnswerStream, stop_between_layers
from deepseek_vl2.utils.hardware import use_chosen_num_threads
from deepseek_vl2.utils.io import LoadedModel, load_image, load_pretrained_model

logger = logging.getLogger(LOGGER_NAME)

# Room that is kept for an answer when earlier turns are left out.
MIN_ROOM_FOR_ANSWER = 512
# What the model has said itself is no mark.
PLAIN_IMAGE = IMAGE.replace("<", "< ")


class ModelOptions(NamedTuple):
    """What to load, and how.

    Attributes:
        path: `"nano"`, a checkpoint folder or a name on the hub.
        dtype: type of the weights; None for what suits the device.
        device: where to run.
        max_cache_bytes: memory for the caches of conversations between their turns.
        quantize: `"int8"`, `"int4"`, or None for the weights as they are.
        compile: whether to use torch.compile.
    """

    path: str
    dtype: str | None
    device: str
    max_cache_bytes: int
    quantize: str | None = None
    compile: bool = False


class _Said(NamedTuple):
    """Messages of one turn, and their pictures."""

    messages: list[dict[str, str]]
    pictures: list[Image.Image]


class _Prompt(NamedTuple):
    """A prompt that fits, and how many turns of the conversation had to be left out for that."""

    inputs: Any
    num_left_out: int


def load_answerer(
    options: ModelOptions, limits: UploadLimits, folder: Path, set_state: Callable[[LoadState], None]
) -> "ModelAnswerer":
    """Load the model, and tell how far it is; see `ModelAnswerer`.

    Raises:
        ValueError: as in `load_pretrained_model`, like its other errors.
    """
    set_state(LoadState(LOADING))
    use_chosen_num_threads()
    with _reported(lambda fraction: set_state(LoadState(WEIGHTS, fraction))):
        loaded = load_pretrained_model(
            options.path,
            dtype=options.dtype,
            device=options.device,
            quantize=options.quantize,
            pack=not options.compile,
            compile=options.compile,
        )
    return ModelAnswerer(loaded, limits, folder, options.max_cache_bytes)


@contextmanager
def _reported(report: Callable[[float], None]) -> Iterator[None]:
    """Passes the progress on that transformers would show in the terminal."""

    def hook(factory: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return _ReportedBar(factory(*arguments, **options), report)

    previous = transformers.logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        transformers.logging.set_tqdm_hook(previous)


class _ReportedBar:
    """A progress bar that also reports its share of done work while it is iterated over."""

    def __init__(self, bar: Any, report: Callable[[float], None]) -> None:
        self._bar = bar
        self._report = report

    def __iter__(self) -> Iterator[Any]:
        total = getattr(self._bar, "total", None) or 0
        for count, item in enumerate(self._bar):
            if total:
                self._report(count / total)
            yield item

    def __enter__(self) -> Any:
        return self._bar.__enter__()

    def __exit__(self, *error: Any) -> Any:
        return self._bar.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)


class ModelAnswerer:
    """Answers questions with a loaded model; several threads may ask at once.

    Args:
        loaded: the model.
        limits: of uploaded pictures.
        folder: where pictures with boxes are saved, each under a name that cannot be guessed.
        max_cache_bytes: memory for the caches of conversations between their turns.

    Attributes:
        sessions: what is known of the users' conversations.
        device: where the model runs.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        limits: UploadLimits,
        folder: Path,
        max_cache_bytes: int = DEFAULT_MAX_CACHE_BYTES,
    ) -> None:
        self._processor: DeepseekVLV2Processor = loaded.processor
        self._model: DeepseekVLV2ForCausalLM = loaded.model
        self._limits = limits
        self._folder = folder
        self.sessions = ChatSessionPool(self._model, self._processor, max_cache_bytes)
        self.device = str(self._model.device)
        stop_between_layers(self._model)

    @property
    def context(self) -> int:
        """Tokens that prompt and answer have room in."""
        return self._model.config.language_config.max_position_embeddings

    def answer(self, request: Request, job: Job) -> Answer:
        """Answer a question; see `Answerer`.

        Raises:
            UserError: the pictures, the marks in the text or the length are not right.
        """
        start = time.perf_counter()
        pictures = self._load_pictures(request.question)
        prompt = self._fit_prompt(request, pictures)
        with self.sessions.lend(job.user) as session:
            stream = self._start(prompt, request.settings, session)
            job.call_on_stop(stream.stop)
            pieces: list[str] = []
            first = None
            for piece in stream:
                first = first or time.perf_counter()
                pieces.append(piece)
                job.words = strip_grounding("".join(pieces))
                job.phase = ANSWERING
        end = time.perf_counter()
        statistics = Statistics(
            num_prompt_tokens=stream.num_prompt_tokens,
            num_image_tokens=stream.num_image_tokens,
            num_new_tokens=stream.num_new_tokens,
            seconds_to_first_token=(first or end) - start,
            seconds=end - start,
            num_reused_tokens=stream.reuse.num_reused_tokens if stream.reuse else 0,
        )
        text = "".join(pieces)
        boxes, problems = self._find_boxes(text, request, pictures)
        return Answer(
            text=text,
            words=strip_grounding(text),
            boxes=tuple(_found(owned, pictures) for owned in boxes),
            marked_pictures=tuple(self._mark(pictures, boxes)),
            problems=tuple(problems),
            statistics=statistics,
            num_left_out=prompt.num_left_out,
            was_stopped=job.is_stopped,
            is_cut_off=stream.is_cut_off,
        )

    def forget(self, user: str) -> None:
        """Forget what is known of a user's conversation."""
        self.sessions.forget(user)

    def _start(self, prompt: _Prompt, settings: Settings, session: ChatSession) -> AnswerStream:
        prompt.inputs.to(self._model.device, dtype=self._model.dtype)
        if settings.seed != BY_CHANCE:
            torch.manual_seed(settings.seed)
        return AnswerStream(
            self._model,
            self._processor.tokenizer,
            prompt.inputs,
            sampling_options(
                settings.max_new_tokens, settings.temperature, settings.top_p, settings.repetition_penalty
            ),
            chunk_size=settings.chunk_size,
            memory=session.memory,
        )

    def _load_pictures(self, question: Question) -> list[Image.Image]:
        return [load_upload(path, self._limits) for path in question.pictures]

    def _fit_prompt(self, request: Request, pictures: list[Image.Image]) -> _Prompt:
        """Encode the conversation; leave out its oldest turns until it fits."""
        settings = request.settings
        room = self.context - min(settings.max_new_tokens, MIN_ROOM_FOR_ANSWER)
        limit = min(room, settings.history_tokens)
        num_left_out = request.num_left_out
        earlier = [self._said(turn) for turn in request.turns[num_left_out:]]
        asked = _Said(_pair(place_image_marks(request.question.text, len(pictures)), ""), pictures)
        while True:
            said = [*earlier, asked]
            messages = [message for own in said for message in own.messages]
            images = [picture for own in said for picture in own.pictures]
            # Counted first: cutting up all pictures for every attempt would take long.
            sizes = [image.size for image in images]
            num_tokens = self._processor.count_tokens(messages, sizes, cropping=settings.use_tiling)
            if num_tokens <= limit or (not earlier and num_tokens <= self.context):
                inputs = self._processor(conversations=messages, images=images, cropping=settings.use_tiling)
                return _Prompt(inputs, num_left_out)
            if not earlier:
                raise UserError("prompt_too_long", tokens=num_tokens, limit=self.context)
            num_left_out += 1
            earlier = earlier[1:]

    def _said(self, turn: Turn) -> "_Said":
        """A turn as the model reads it; one without a word in its answer is not read."""
        if turn.answer is None or not turn.answer.text:
            return _Said([], [])
        marked = place_image_marks(turn.question.text, len(turn.question.pictures))
        # Read off a picture, say, the mark of pictures would ask for one more of them.
        answer = turn.answer.text.replace(IMAGE, PLAIN_IMAGE)
        return _Said(_pair(marked, answer), self._load_pictures(turn.question))

    def _find_boxes(self, text: str, request: Request, pictures: list[Image.Image]) -> tuple[list[OwnedBox], list[str]]:
        """Find the boxes, in the pictures of this question, or of the last question that had some."""
        grounding = read_grounding(text)
        if not grounding.boxes:
            return [], grounding.problems
        if not pictures:
            earlier = [turn.question for turn in request.turns if turn.question.pictures]
            if not earlier:
                return [], []
            pictures.extend(self._load_pictures(earlier[-1]))
        return assign_boxes(text, request.question.text, len(pictures))

    def _mark(self, pictures: Sequence[Image.Image], boxes: Sequence[OwnedBox]) -> Iterator[tuple[int, str]]:
        """Draw the boxes on copies of the pictures that they belong to."""
        for number, picture in enumerate(pictures, start=1):
            own = [owned.box for owned in boxes if owned.picture == number - 1]
            if own:
                self._folder.mkdir(parents=True, exist_ok=True)
                path = Path(tempfile.mkdtemp(dir=self._folder)) / f"boxes_{number}.jpg"
                yield number, str(save_drawing(draw_boxes(picture, own), path, quality=92))


def load_upload(path: str, limits: UploadLimits) -> Image.Image:
    """Load an uploaded picture.

    Raises:
        UserError: it is too large, no picture, broken or gone.
    """
    limits.check_bytes(path)
    name = Path(path).name
    try:
        # As bytes, because a message about a path would tell users where the server keeps its files.
        content = Path(path).read_bytes()
        return load_image(content, max_pixels=limits.max_pixels)
    except OSError as error:
        raise UserError("picture_gone", name=name) from error
    except ValueError as error:
        reason = str(error).replace(f"the picture of {len(content)} bytes", "it")
        raise UserError("bad_picture", name=name, reason=reason) from error


def _pair(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "<|User|>", "content": question}, {"role": "<|Assistant|>", "content": answer}]


def _found(owned: OwnedBox, pictures: Sequence[Image.Image]) -> FoundBox:
    pixels = owned.box.to_pixels(*pictures[owned.picture].size)
    return FoundBox(owned.picture + 1, owned.box.label, owned.box.box, pixels)
