"""Several questions answered at once. An answer is that of its question alone, whatever else is in the batch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.processing_deepseek_vl_v2 import VLChatProcessorOutput


class BatchAnswer(NamedTuple):
    """An answer of a batch.

    Attributes:
        text: special tokens of grounding kept, end-of-sentence not.
        num_new_tokens: tokens of the text.
        is_cut_off: whether the limit came before the end of the sentence.
    """

    text: str
    num_new_tokens: int
    is_cut_off: bool


class Sampling(NamedTuple):
    """How tokens are drawn, where they are not the likeliest.

    Attributes:
        temperature: above 0.
        top_p: share of the likeliest tokens that are drawn from.
        seeds: one a question; the same seed draws the same answer in every batch.
    """

    temperature: float
    top_p: float
    seeds: tuple[int, ...]


class RowSeededNoise(LogitsProcessor):
    """Adds Gumbel noise to the scores, each row's from its own seed: the largest is then a draw from their softmax.

    Source: Maddison et al., A* Sampling (arXiv 1411.0030), section 2.

    Args:
        seeds: one a row.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Changes scores [B, number of tokens]; what is excluded (-inf) stays so."""
        rows = [torch.empty(scores.shape[1]).exponential_(generator=generator) for generator in self.generators]
        noise: Any = scores.float() - torch.stack(rows).log().to(scores.device)
        return noise


@torch.inference_mode()
def answer_batch(
    model: DeepseekVLV2ForCausalLM,
    processor: DeepseekVLV2Processor,
    prompts: Sequence[VLChatProcessorOutput],
    max_new_tokens: int,
    chunk_size: int = -1,
    repetition_penalty: float = 1.0,
    sampling: Sampling | None = None,
) -> list[BatchAnswer]:
    """Answers encoded questions as one batch.

    What stands beside a question decides about its answer only through rounding: where two tokens are equally likely to
    within the precision of the weights' type, another batch may take the other one.

    Args:
        model: the model.
        processor: of the model.
        prompts: the questions.
        max_new_tokens: most tokens of an answer; fewer where the model has no positions left after the question.
        chunk_size: tokens to prefill at once, -1 for all.
        repetition_penalty: above 1 for fewer repetitions.
        sampling: by default the likeliest token is taken each time.

    Raises:
        ValueError: a question is longer than the model's positions.
    """
    inputs = processor.batchify(prompts).to(model.device, dtype=model.dtype)
    num_tokens = inputs["input_ids"].shape[1]
    prompt: dict[str, Any] = dict(inputs.items())
    if chunk_size != -1:
        embeds, cache = model.incremental_prefilling(**prompt, chunk_size=chunk_size)
        prompt |= {"inputs_embeds": embeds, "past_key_values": cache}
    room = [model.config.language_config.max_position_embeddings - len(question) + 1 for question in prompts]
    limits = [min(max_new_tokens, tokens) for tokens in room]
    output = model.generate(
        **prompt,
        do_sample=False,  # noise on the scores draws, where sampling is wanted
        logits_processor=_samplers(sampling),
        repetition_penalty=repetition_penalty,
        max_new_tokens=max(limits),
        pad_token_id=processor.pad_id,
        eos_token_id=processor.eos_id,
    )
    rows = output[:, num_tokens:].tolist()
    return [_answer(processor, row[:limit]) for row, limit in zip(rows, limits, strict=True)]


def _samplers(sampling: Sampling | None) -> LogitsProcessorList:
    if sampling is None:
        return LogitsProcessorList()
    return LogitsProcessorList(
        [
            TemperatureLogitsWarper(sampling.temperature),
            TopPLogitsWarper(sampling.top_p),
            RowSeededNoise(sampling.seeds),
        ]
    )


def _answer(processor: DeepseekVLV2Processor, row: list[int]) -> BatchAnswer:
    is_cut_off = processor.eos_id not in row
    kept = row if is_cut_off else row[: row.index(processor.eos_id)]
    return BatchAnswer(processor.decode(kept), len(kept), is_cut_off)
