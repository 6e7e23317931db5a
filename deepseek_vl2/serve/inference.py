"""Streaming answers: the one way in which the script, the page and the batch runner let the model speak."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.conversation import Conversation
from deepseek_vl2.utils.io import load_pil_images, load_pretrained_model

# The page and the script warn above this; the published models get vague there.
MAX_ADVISED_TEMPERATURE = 0.7


def load_model(
    model_path: str, dtype: str | torch.dtype = torch.bfloat16, **options: Any
) -> tuple[PreTrainedTokenizerBase, DeepseekVLV2ForCausalLM, DeepseekVLV2Processor]:
    """Loads a model as `deepseek_vl2.utils.io.load_pretrained_model` does, in the order of the reference.

    Args:
        model_path: `"nano"`, a checkpoint folder or a name on the hub.
        dtype: Type of the weights.
        **options: Passed on.

    Returns:
        Tokenizer, model, processor.
    """
    loaded = load_pretrained_model(model_path, dtype=dtype, **options)
    return loaded.tokenizer, loaded.model, loaded.processor


def convert_conversation_to_prompts(
    conversation: Conversation,
) -> tuple[list[dict[str, Any]], Image.Image | None]:
    """Turns the turns of a page's conversation into messages for the processor.

    Args:
        conversation: Its messages are pairs (role, text) or (role, (text, pictures)), question and answer in turn.

    Returns:
        The messages, and the last picture of the conversation.

    Raises:
        ValueError: If a question has no place for an answer after it.
    """
    messages = conversation.messages
    if len(messages) % 2:
        raise ValueError(f"The conversation has {len(messages)} messages; every question needs an answer, '' if open.")
    prompts: list[dict[str, Any]] = []
    last_image = None
    for (user, question), (assistant, answer) in zip(messages[::2], messages[1::2], strict=True):
        text, images = question if isinstance(question, tuple) else (question, [])
        last_image = images[-1] if images else last_image
        prompts.append({"role": user, "content": text, "images": images})
        prompts.append({"role": assistant, "content": answer or ""})
    return prompts, last_image


def deepseek_generate(
    conversations: Sequence[Mapping[str, Any]],
    vl_gpt: DeepseekVLV2ForCausalLM,
    vl_chat_processor: DeepseekVLV2Processor,
    tokenizer: PreTrainedTokenizerBase,
    stop_words: Sequence[str] = (),
    max_length: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.1,
    chunk_size: int = -1,
) -> Iterator[str]:
    """Answers a conversation, piece by piece.

    Args:
        conversations: Messages with role, content and pictures (PIL, path, address, ...), the last one an empty answer.
        vl_gpt: The model.
        vl_chat_processor: Its processor.
        tokenizer: Its tokenizer.
        stop_words: Texts that end the answer and are not part of it.
        max_length: Most new tokens.
        temperature: 0 for the likeliest token each time.
        top_p: Share of the likeliest tokens that sampling draws from.
        repetition_penalty: Above 1 for fewer repetitions.
        chunk_size: Tokens to prefill at once, -1 for all.

    Yields:
        Text as it comes, special tokens of grounding kept, the end-of-sentence token not.

    Raises:
        ValueError: If the conversation or a number does not make sense; whatever the model raises.
    """
    inputs = vl_chat_processor(  # type: ignore[union-attr]  # a batch, since force_batchify is set
        conversations=conversations,
        images=load_pil_images(conversations),
        inference_mode=True,
        force_batchify=True,
        system_prompt="",
    ).to(vl_gpt.device, dtype=vl_gpt.dtype)
    return generate(
        vl_gpt,
        tokenizer,
        inputs,
        max_gen_len=max_length,
        temperature=temperature,
        repetition_penalty=repetition_penalty,
        top_p=top_p,
        stop_words=stop_words,
        chunk_size=chunk_size,
    )


def generate(
    vl_gpt: DeepseekVLV2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prepare_inputs: Any,
    max_gen_len: int = 256,
    temperature: float = 0.0,
    repetition_penalty: float = 1.1,
    top_p: float = 0.95,
    stop_words: Sequence[str] = (),
    chunk_size: int = -1,
) -> Iterator[str]:
    """Answers a prepared prompt, piece by piece; see `deepseek_generate`.

    The model runs in a thread of its own. Closing the iterator stops it at the next token, and what it raises is raised
    here.

    Args:
        prepare_inputs: The processor's outputs for one prompt, on the model's device.
    """
    options = sampling_options(max_gen_len, temperature, top_p, repetition_penalty)
    _check_chunk_size(chunk_size)
    return _stream(vl_gpt, tokenizer, prepare_inputs, options, tuple(stop_words), chunk_size)


def sampling_options(
    max_new_tokens: int, temperature: float, top_p: float, repetition_penalty: float
) -> dict[str, Any]:
    """Keywords for transformers' `generate`.

    Raises:
        ValueError: If a number is out of its range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"{max_new_tokens} new tokens: at least 1 is needed.")
    if temperature < 0:
        raise ValueError(f"Temperature {temperature} must be 0 (greedy) or above, at best up to 0.7.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} must be above 0 and at most 1.")
    if repetition_penalty <= 0:
        raise ValueError(f"repetition_penalty {repetition_penalty} must be above 0; 1 is none.")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "repetition_penalty": repetition_penalty}
    if temperature == 0:
        return options | {"do_sample": False}
    return options | {"do_sample": True, "temperature": temperature, "top_p": top_p}


def _check_chunk_size(chunk_size: int) -> None:
    if chunk_size < -1 or chunk_size == 0:
        raise ValueError(f"chunk_size {chunk_size} must be at least 1, or -1 for the whole prompt at once.")


class _StopRequest(StoppingCriteria):
    """Ends generation after the present token once it is asked to."""

    def __init__(self) -> None:
        self.is_requested = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.is_requested.is_set(), device=input_ids.device)


def _stream(
    model: DeepseekVLV2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Any,
    options: dict[str, Any],
    stop_words: tuple[str, ...],
    chunk_size: int,
) -> Iterator[str]:
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=False)
    stop = _StopRequest()

    def run() -> None:
        try:
            with torch.inference_mode():
                _answer(model, tokenizer, inputs, chunk_size, options, streamer=streamer, stopping=stop)
        finally:
            streamer.end()

    with ThreadPoolExecutor(1, thread_name_prefix="deepseek_vl2-generate") as executor:
        answering = executor.submit(run)
        try:
            yield from until_stop_word(streamer, (tokenizer.eos_token, *stop_words))
        finally:
            stop.is_requested.set()
        answering.result()


def _answer(
    model: DeepseekVLV2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Any,
    chunk_size: int,
    options: dict[str, Any],
    streamer: TextIteratorStreamer,
    stopping: StoppingCriteria,
) -> None:
    prompt = {
        name: inputs[name]
        for name in ("input_ids", "images", "images_seq_mask", "images_spatial_crop", "attention_mask")
    }
    cache = None
    if chunk_size == -1:
        inputs_embeds = model.prepare_inputs_embeds(**prompt)
    else:
        inputs_embeds, cache = model.incremental_prefilling(**prompt, chunk_size=chunk_size)
    model.generate(
        inputs_embeds=inputs_embeds,
        past_key_values=cache,
        input_ids=prompt["input_ids"],
        attention_mask=prompt["attention_mask"],
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=True,
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([stopping]),
        **options,
    )


def until_stop_word(pieces: Iterable[str], stop_words: Sequence[str]) -> Iterator[str]:
    """Passes text on up to the first stop word, which is left out even if it comes in several pieces.

    Text that may be the beginning of a stop word waits for the next piece.
    """
    pending = ""
    for piece in pieces:
        pending += piece
        found = [position for word in stop_words if word and (position := pending.find(word)) >= 0]
        if found:
            if min(found):
                yield pending[: min(found)]
            return
        num_safe = len(pending) - _length_of_possible_start(pending, stop_words)
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
