"""Streaming answers: the one way in which the script, the page and the batch runner let the model speak."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.conversation import Conversation
from deepseek_vl2.models.generation import check_chunk_size
from deepseek_vl2.serve.prompt_memory import PromptMemory
from deepseek_vl2.serve.row_sampling import LEAST_TEMPERATURE
from deepseek_vl2.serve.streaming import AnswerStream
from deepseek_vl2.utils.io import load_pil_images, load_pretrained_model

# The page and the script warn above this; the published models get vague there.
MAX_ADVISED_TEMPERATURE = 0.7


def load_model(
    model_path: str, dtype: str | torch.dtype | None = None, **options: Any
) -> tuple[PreTrainedTokenizerBase, DeepseekVLV2ForCausalLM, DeepseekVLV2Processor]:
    """Loads a model as `deepseek_vl2.utils.io.load_pretrained_model` does, in the order of the reference.

    Args:
        model_path: `"nano"`, a checkpoint folder or a name on the hub.
        dtype: Type of the weights; what suits the device if None.
        **options: Passed on.

    Returns:
        Tokenizer, model, processor.
    """
    loaded = load_pretrained_model(model_path, dtype=dtype, **options)
    return loaded.tokenizer, loaded.model, loaded.processor


def convert_conversation_to_prompts(conversation: Conversation) -> tuple[list[dict[str, Any]], Any]:
    """Turns the turns of a page's conversation into messages for the processor.

    Args:
        conversation: Its messages are pairs (role, text) or (role, (text, pictures)), question and answer in turn.

    Returns:
        The messages, and the last picture of the conversation as it stands there, or None.

    Raises:
        ValueError: If a question has no place for an answer after it, or is neither text nor (text, pictures).
    """
    messages = conversation.messages
    if len(messages) % 2:
        raise ValueError(f"The conversation has {len(messages)} messages; every question needs an answer, '' if open.")
    prompts: list[dict[str, Any]] = []
    last_image = None
    for (user, question), (assistant, answer) in zip(messages[::2], messages[1::2], strict=True):
        text, images = _text_and_pictures(question)
        last_image = images[-1] if images else last_image
        prompts.append({"role": user, "content": text, "images": images})
        prompts.append({"role": assistant, "content": answer or ""})
    return prompts, last_image


def _text_and_pictures(question: Any) -> tuple[str, list[Any]]:
    if isinstance(question, str):
        return question, []
    if isinstance(question, (tuple, list)) and len(question) == 2 and isinstance(question[1], (tuple, list)):
        return question[0], list(question[1])
    raise ValueError(f"A question is text or a pair (text, list of pictures), not {question!r:.80}.")


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
    memory: PromptMemory | None = None,
) -> AnswerStream:
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
        memory: What is known of the conversation's earlier turns; see `ChatSession`, which keeps one.

    Returns:
        Text as it comes, special tokens of grounding kept, the end-of-sentence token not.

    Raises:
        ValueError: If the conversation or a number does not make sense, the prompt is too long, or `memory` is another
            model's.
    """
    options = sampling_options(max_length, temperature, top_p, repetition_penalty)
    check_chunk_size(chunk_size, vl_gpt.config.language_config.max_position_embeddings)
    inputs: Any = vl_chat_processor(
        conversations=conversations,
        images=load_pil_images(conversations),
        inference_mode=True,
        force_batchify=True,
        system_prompt="",
    )
    inputs.to(vl_gpt.device, dtype=vl_gpt.dtype)
    return AnswerStream(vl_gpt, tokenizer, inputs, options, stop_words, chunk_size, memory)


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
    memory: PromptMemory | None = None,
) -> AnswerStream:
    """Answers a prepared prompt, piece by piece; see `deepseek_generate`.

    Args:
        prepare_inputs: The processor's outputs for one prompt, on the model's device.
    """
    options = sampling_options(max_gen_len, temperature, top_p, repetition_penalty)
    return AnswerStream(vl_gpt, tokenizer, prepare_inputs, options, stop_words, chunk_size, memory)


def sampling_options(
    max_new_tokens: int, temperature: float, top_p: float, repetition_penalty: float
) -> dict[str, Any]:
    """Keywords for transformers' `generate`.

    Raises:
        ValueError: If a number is out of its range.
    """
    if max_new_tokens < 1 or max_new_tokens != int(max_new_tokens):
        raise ValueError(f"max_new_tokens {max_new_tokens} must be a whole number of at least 1.")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature {temperature} must be 0 (greedy) or above, at best up to 0.7.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} must be above 0 and at most 1.")
    if not 0 < repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty {repetition_penalty} must be above 0; 1 is none.")
    options: dict[str, Any] = {"max_new_tokens": int(max_new_tokens), "repetition_penalty": float(repetition_penalty)}
    if temperature < LEAST_TEMPERATURE:
        return options | {"do_sample": False}
    return options | {"do_sample": True, "temperature": float(temperature), "top_p": float(top_p)}
