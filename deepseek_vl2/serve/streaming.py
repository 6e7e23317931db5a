"""An answer as a stream of text: the model speaks in a thread of its own, the reader may stop it at any time."""

import logging
import queue
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.models.generation import check_chunk_size, check_prompt_length, room_for_answer
from deepseek_vl2.serve.prompt_memory import PromptMemory, Reuse
from deepseek_vl2.serve.text_pieces import LetterDecoder, until_stop_word

logger = logging.getLogger(__name__)

_PROMPT_PARTS = ("input_ids", "images", "images_seq_mask", "images_spatial_crop", "attention_mask")
_answering = threading.local()  # in the model's thread: `stop`, the request of the answer that it works on


class AnswerStream(Iterator[str]):
    """The text of an answer, piece by piece as the model speaks.

    The model starts when the first piece is asked for; what it raises is raised here. Closing the stream, or dropping
    it, ends the model's work at the next token, and at the next layer if `stop_between_layers` was called for the
    model. An answer also ends where the model's positions do.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        inputs: The processor's outputs for one prompt, on the model's device; padding on the left is left out.
        options: Keywords for `model.generate`, `max_new_tokens` among them.
        stop_words: Texts that end the answer and are not part of it.
        chunk_size: Tokens to prefill at once, -1 for all.
        memory: What is known of the conversation, and will know this answer too; None to begin with nothing and keep
            nothing.

    Attributes:
        num_prompt_tokens: Tokens of the prompt, those of pictures included.
        num_image_tokens: Tokens of its pictures.

    Raises:
        ValueError: If there are several prompts, or beams or answers for one, the prompt is padded elsewhere than on
            the left or longer than the model's positions, `memory` is another model's, or `stop_words` or `chunk_size`
            make no sense.
        RuntimeError: With the first piece, if `memory` is in use by another answer.
    """

    def __init__(
        self,
        model: DeepseekVLV2ForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        inputs: Any,
        options: Mapping[str, Any],
        stop_words: Sequence[str] | None = (),
        chunk_size: int = -1,
        memory: PromptMemory | None = None,
    ) -> None:
        check_chunk_size(chunk_size, model.config.language_config.max_position_embeddings)
        if isinstance(stop_words, str):
            raise ValueError(f"stop_words is a list of texts; give [{stop_words!r}].")
        if memory is not None and memory.model is not model:
            raise ValueError("memory is that of another model; every model needs one of its own.")
        _check_single(model, options)
        prompt = _without_padding({name: inputs[name] for name in _PROMPT_PARTS})
        self.num_prompt_tokens = prompt["input_ids"].shape[1]
        config = model.config.language_config
        check_prompt_length(self.num_prompt_tokens, config)
        self.num_image_tokens = int(prompt["images_seq_mask"].sum())
        room = room_for_answer(self.num_prompt_tokens, config)
        options = {**options, "max_new_tokens": min(options["max_new_tokens"], room)}
        self._speaker = _Speaker(model, tokenizer, prompt, options, chunk_size, memory)
        # Neither the speaker nor its thread knows this object, so that dropping it closes the pieces.
        self._pieces = self._speaker.pieces((tokenizer.eos_token, *(stop_words or ())))

    @property
    def num_new_tokens(self) -> int:
        """Tokens of the answer up to now, the end-of-sentence token included."""
        return len(self._speaker.text.ids)

    @property
    def reuse(self) -> Reuse | None:
        """What of the prompt was known; None until the model has looked at its pictures."""
        return self._speaker.reuse

    @property
    def is_cut_off(self) -> bool:
        """Whether the answer is over only because it reached its greatest length."""
        return self._speaker.is_cut_off

    def __next__(self) -> str:
        return next(self._pieces)

    def stop(self) -> None:
        """Asks the model, from any thread, to end at the next token; what it has said until then still comes."""
        self._speaker.stop.is_requested.set()

    def close(self) -> None:
        """Ends the answer and waits until the model has stopped."""
        self.stop()
        self._pieces.close()


def _check_single(model: DeepseekVLV2ForCausalLM, options: Mapping[str, Any]) -> None:
    """Refuses beams and several answers, which may also be what a checkpoint asks for."""
    for name in ("num_beams", "num_return_sequences"):
        number = options.get(name) or getattr(model.generation_config, name, None) or 1
        if number > 1:
            raise ValueError(f"{name}={number}: what is streamed is one answer, without beams; set {name} to 1.")


def _without_padding(prompt: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Takes off what a batch has put in front of one prompt."""
    num_rows = prompt["input_ids"].shape[0]
    if num_rows != 1:
        raise ValueError(f"An answer is streamed for one prompt at a time, here are {num_rows}.")
    num_padding = int((prompt["attention_mask"] == 0).sum())
    own = {name: prompt[name][:, num_padding:] for name in ("input_ids", "images_seq_mask", "attention_mask")}
    if not own["attention_mask"].all():
        raise ValueError("The prompt is padded elsewhere than on the left: batchify(..., padding='left') to generate.")
    return {**prompt, **own}


class _StopRequest(StoppingCriteria):
    """Ends generation after the present token once it is asked to."""

    def __init__(self) -> None:
        self.is_requested = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.is_requested.is_set(), device=input_ids.device)


class _TextQueue(BaseStreamer):
    """Takes tokens from the model's thread and gives text to the reader's."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.ids: list[int] = []
        self.has_eos = False
        self.is_read = False
        self._eos_token_id = tokenizer.eos_token_id
        self._decoder = LetterDecoder(tokenizer)
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, which is passed over, then the new tokens."""
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.flatten().tolist():
            self.ids.append(token)
            if token == self._eos_token_id:
                self.has_eos = True
                return
            self._queue.put(self._decoder.feed(token))

    def end(self) -> None:
        """Lets the rest go, even if it is no whole letter."""
        self._queue.put(self._decoder.flush())

    def hang_up(self) -> None:
        """Tells the reader that nothing more comes."""
        self._queue.put(None)

    def read(self) -> Iterator[str]:
        """Waits for text until nothing more comes."""
        while (text := self._queue.get()) is not None:
            yield text
        self.is_read = True


class _Speaker:
    """What model and reader share of one answer."""

    def __init__(
        self,
        model: DeepseekVLV2ForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        prompt: dict[str, torch.Tensor],
        options: dict[str, Any],
        chunk_size: int,
        memory: PromptMemory | None,
    ) -> None:
        self.text = _TextQueue(tokenizer)
        self.stop = _StopRequest()
        self.is_cut_off = False
        self._model = model
        self._prompt = prompt
        self._chunk_size = chunk_size
        self._memory = memory
        self.reuse: Reuse | None = None
        self._options = {
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "use_cache": True,
            **options,
        }

    def pieces(self, stop_words: Sequence[str]) -> Generator[str, None, None]:
        """Starts the model's thread and passes its text on; ends both together."""
        with ThreadPoolExecutor(1, thread_name_prefix="deepseek_vl2-answer") as executor:
            answering = executor.submit(self._speak)
            was_stopped = True
            try:
                yield from until_stop_word(self.text.read(), stop_words)
                was_stopped = self.stop.is_requested.is_set()
            finally:
                self.stop.is_requested.set()
            answering.result()
        self.is_cut_off = self.text.is_read and not (self.text.has_eos or was_stopped)

    @torch.inference_mode()
    def _speak(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.set_device(self._model.device)  # a new thread begins on the first device
        # One that is made here goes with this thread, though the stream be kept.
        memory = PromptMemory(self._model) if self._memory is None else self._memory
        try:
            with memory.in_use(self.text.ids), left_when(self.stop.is_requested):
                self._answer(memory)
        finally:
            self.text.hang_up()

    def _answer(self, memory: PromptMemory) -> None:
        inputs_embeds, cache = memory.prefill(self._prompt, self._chunk_size)
        self.reuse = memory.last_reuse
        if self.stop.is_requested.is_set():
            return
        self._model.generate(
            input_ids=self._prompt["input_ids"],
            attention_mask=self._prompt["attention_mask"],
            inputs_embeds=inputs_embeds,
            past_key_values=cache,
            streamer=self.text,
            stopping_criteria=StoppingCriteriaList([self.stop]),
            **self._options,
        )


class _StoppedError(Exception):
    """Leaves the model's forward pass of an answer that nobody waits for any more."""


def stop_between_layers(model: DeepseekVLV2ForCausalLM) -> None:
    """Lets answers of this model end within its forward pass, so that a long prompt does not hold the model up.

    Without it an answer ends at the next token at the earliest, which is after the whole prompt has been read.
    """
    for layer in (*model.vision.blocks, *model.language.model.layers):
        layer.register_forward_pre_hook(_leave_if_stopped)


@contextmanager
def left_when(stop: threading.Event) -> Iterator[None]:
    """Lets go of the model's work of this thread before its next layer once `stop` is set; see `stop_between_layers`.

    The block is then left without an error.
    """
    _answering.stop = stop
    try:
        yield
    except _StoppedError:
        logger.debug("stopped before the next layer")
    finally:
        _answering.stop = None


def _leave_if_stopped(layer: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
    stop: threading.Event | None = getattr(_answering, "stop", None)
    if stop is not None and stop.is_set():
        raise _StoppedError
