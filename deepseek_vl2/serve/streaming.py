"""An answer as a stream of text: the model speaks in a thread of its own, the reader may stop it at any time."""

import logging
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.models.generation import check_chunk_size, check_prompt_length

logger = logging.getLogger(__name__)

_PROMPT_PARTS = ("input_ids", "images", "images_seq_mask", "images_spatial_crop", "attention_mask")
_answering = threading.local()  # in the model's thread: `stop`, the request of the answer that it works on
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what incomplete UTF-8 is decoded to


class AnswerStream(Iterator[str]):
    """The text of an answer, piece by piece as the model speaks.

    The model starts when the first piece is asked for; what it raises is raised here. Closing the stream, or dropping
    it, ends the model's work at the next token, and at the next layer if `stop_between_layers` was called for the
    model. An answer also ends where the model's positions do.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        inputs: The processor's outputs for one prompt, on the model's device.
        options: Keywords for `model.generate`, `max_new_tokens` among them.
        stop_words: Texts that end the answer and are not part of it.
        chunk_size: Tokens to prefill at once, -1 for all.
        embed: What embeds the prompt, with the keywords of `model.prepare_inputs_embeds`, which is the default.

    Attributes:
        num_prompt_tokens: Tokens of the prompt, those of pictures included.
        num_image_tokens: Tokens of its pictures.

    Raises:
        ValueError: If there are several prompts, the prompt is longer than the model's positions, or `stop_words` or
            `chunk_size` make no sense.
    """

    def __init__(
        self,
        model: DeepseekVLV2ForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        inputs: Any,
        options: Mapping[str, Any],
        stop_words: Sequence[str] | None = (),
        chunk_size: int = -1,
        embed: Callable[..., torch.Tensor] | None = None,
    ) -> None:
        check_chunk_size(chunk_size)
        if isinstance(stop_words, str):
            raise ValueError(f"stop_words is a list of texts; give [{stop_words!r}].")
        prompt = {name: inputs[name] for name in _PROMPT_PARTS}
        num_rows, self.num_prompt_tokens = prompt["input_ids"].shape
        if num_rows != 1:
            raise ValueError(f"An answer is streamed for one prompt at a time, here are {num_rows}.")
        config = model.config.language_config
        check_prompt_length(self.num_prompt_tokens, config)
        self.num_image_tokens = int(prompt["images_seq_mask"].sum())
        room = config.max_position_embeddings - self.num_prompt_tokens + 1  # the last new token is not read any more
        options = {**options, "max_new_tokens": min(options["max_new_tokens"], room)}
        self._speaker = _Speaker(model, tokenizer, prompt, options, chunk_size, embed or model.prepare_inputs_embeds)
        # Neither the speaker nor its thread knows this object, so that dropping it closes the pieces.
        self._pieces = self._speaker.pieces((tokenizer.eos_token, *(stop_words or ())))

    @property
    def num_new_tokens(self) -> int:
        """Tokens of the answer up to now, the end-of-sentence token included."""
        return self._speaker.text.num_tokens

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


class _StopRequest(StoppingCriteria):
    """Ends generation after the present token once it is asked to."""

    def __init__(self) -> None:
        self.is_requested = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.is_requested.is_set(), device=input_ids.device)


class _TextQueue(BaseStreamer):
    """Takes tokens from the model's thread and gives text to the reader's, an incomplete letter with its last byte.

    This relies on the tokenizer being one of bytes, where text of whole letters does not change with what follows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.num_tokens = 0
        self.has_eos = False
        self.is_read = False
        self._tokenizer = tokenizer
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._waiting: list[int] = []
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, which is passed over, then the new tokens."""
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.flatten().tolist():
            self.num_tokens += 1
            if token == self._tokenizer.eos_token_id:
                self.has_eos = True
                return
            self._waiting.append(token)
            text = self._text()
            if not text.endswith(_REPLACEMENT):
                self._waiting.clear()
                self._queue.put(text)

    def _text(self) -> str:
        text: Any = self._tokenizer.decode(self._waiting, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def end(self) -> None:
        """Lets the rest go, even if it is no whole letter."""
        self._queue.put(self._text())
        self._waiting.clear()

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
        embed: Callable[..., torch.Tensor],
    ) -> None:
        self.text = _TextQueue(tokenizer)
        self.stop = _StopRequest()
        self.is_cut_off = False
        self._model = model
        self._prompt = prompt
        self._chunk_size = chunk_size
        self._embed = embed
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
        _answering.stop = self.stop.is_requested
        if self._model.device.type == "cuda":
            torch.cuda.set_device(self._model.device)  # a new thread begins on the first device
        try:
            self._answer()
        except _StoppedError:
            logger.debug("stopped before the next layer")
        finally:
            self.text.hang_up()

    def _answer(self) -> None:
        inputs_embeds, cache = self._embed(**self._prompt), None
        if self._chunk_size != -1:
            inputs_embeds, cache = self._model.incremental_prefilling(
                inputs_embeds=inputs_embeds,
                attention_mask=self._prompt["attention_mask"],
                chunk_size=self._chunk_size,
            )
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


def _leave_if_stopped(layer: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
    stop: threading.Event | None = getattr(_answering, "stop", None)
    if stop is not None and stop.is_set():
        raise _StoppedError


def until_stop_word(pieces: Iterable[str], stop_words: Sequence[str]) -> Iterator[str]:
    """Passes text on up to the first stop word, which is left out even if it comes in several pieces.

    The first is the one that is complete first; so what comes does not depend on how the text was cut into pieces. Text
    that may be the beginning of a stop word waits for the next piece.
    """
    words = [word for word in stop_words if word]
    pending = ""
    for piece in pieces:
        pending += piece
        found = [(start + len(word), start) for word in words if (start := pending.find(word)) >= 0]
        if found:
            _, start = min(found)
            if start:
                yield pending[:start]
            return
        num_safe = len(pending) - _length_of_possible_start(pending, words)
        if num_safe:
            yield pending[:num_safe]
            pending = pending[num_safe:]
    if pending:
        yield pending


def _length_of_possible_start(text: str, stop_words: Sequence[str]) -> int:
    """Length of the longest end of a text that a stop word begins with."""
    longest = max((len(word) - 1 for word in stop_words), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(word.startswith(text[-length:]) for word in stop_words):
            return length
    return 0
