"""Several questions answered at once. An answer is that of its question alone, whatever else is in the batch."""

from collections.abc import Sequence
from itertools import repeat
from typing import NamedTuple

import torch

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.generation import room_for_answer
from deepseek_vl2.models.processing_deepseek_vl_v2 import VLChatProcessorOutput
from deepseek_vl2.serve.continuous_batch import ContinuousBatch, read_prompts
from deepseek_vl2.serve.row_sampling import RowSampler, Sampling, choose_tokens

# Rows that are done leave when they are so many of all: each time the cache of the others is copied.
LEAVING_SHARE = 0.25


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


class _Row:
    """An answer under way."""

    def __init__(self, sampler: RowSampler, limit: int, eos_id: int) -> None:
        self.sampler = sampler
        self.tokens: list[int] = []
        self._limit = limit
        self._eos_id = eos_id

    @property
    def has_ended(self) -> bool:
        """Whether the end of the sentence has come."""
        return bool(self.tokens) and self.tokens[-1] == self._eos_id

    @property
    def is_done(self) -> bool:
        """Whether there is nothing to add."""
        return self.has_ended or len(self.tokens) >= self._limit


@torch.inference_mode()
def answer_batch(
    model: DeepseekVLV2ForCausalLM,
    processor: DeepseekVLV2Processor,
    prompts: Sequence[VLChatProcessorOutput],
    max_new_tokens: int,
    chunk_size: int = -1,
    samplings: Sequence[Sampling] | None = None,
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
        samplings: how the tokens of each answer are chosen; by default the likeliest one is taken each time.

    Raises:
        ValueError: a question is longer than the model's positions.
    """
    inputs = processor.batchify(prompts).to(model.device, dtype=model.dtype)
    embeds = model.prepare_inputs_embeds(**dict(inputs.items()))
    read = read_prompts(model, embeds, inputs["attention_mask"], chunk_size)
    config = model.config.language_config
    rows = [
        _Row(
            RowSampler(sampling, prompt.input_ids, model.device),
            min(max_new_tokens, room_for_answer(len(prompt), config)),
            processor.eos_id,
        )
        for prompt, sampling in zip(prompts, samplings or repeat(Sampling(), len(prompts)), strict=True)
    ]
    batch = ContinuousBatch(model)
    batch.join(read)
    _decode(batch, read.logits, rows)
    return [_answer(processor, row) for row in rows]


def _decode(batch: ContinuousBatch, logits: torch.Tensor, rows: Sequence[_Row]) -> None:
    """Gives all rows of a batch their tokens, the first ones by logits [B, vocabulary]."""
    running = list(rows)
    while True:
        chosen = choose_tokens(logits, [row.sampler for row in running])
        for row, token in zip(running, chosen, strict=True):
            if not row.is_done:
                row.tokens.append(token)
        done = [place for place, row in enumerate(running) if row.is_done]
        if len(done) == len(running):
            return
        if len(done) >= LEAVING_SHARE * len(running):
            batch.leave(done)
            running = [row for row in running if not row.is_done]
        logits = batch.step([row.tokens[-1] for row in running])


def _answer(processor: DeepseekVLV2Processor, row: _Row) -> BatchAnswer:
    kept = row.tokens[:-1] if row.has_ended else row.tokens
    return BatchAnswer(processor.decode(kept), len(kept), not row.has_ended)
