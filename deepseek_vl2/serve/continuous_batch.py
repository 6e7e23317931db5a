"""Answers that decode together although each begins and ends on its own ("continuous batching").

Prompts are read alone or several at a time. Then their cache joins those of the answers under way, padded on the left
to one length. A row that is done can leave at once, and the padding that nobody needs any more with it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from deepseek_vl2.models import DeepseekVLV2ForCausalLM


class ReadPrompts(NamedTuple):
    """Prompts that were read.

    Attributes:
        logits: Of the token after each, [B, vocabulary].
        cache: Their cache; on the left what is padding in `lengths`.
        lengths: Tokens of each, without padding.
    """

    logits: torch.Tensor
    cache: Cache
    lengths: list[int]


@torch.inference_mode()
def read_prompts(
    model: DeepseekVLV2ForCausalLM,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    chunk_size: int = -1,
) -> ReadPrompts:
    """Reads prompts.

    Args:
        model: The model.
        inputs_embeds: [B, T, D], see `prepare_inputs_embeds`.
        attention_mask: [B, T], 0 at the padding on the left.
        chunk_size: Tokens to read at once, -1 for all.
    """
    cache, num_cached = None, 0
    if chunk_size != -1:
        _, cache = model.incremental_prefilling(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, chunk_size=chunk_size
        )
        num_cached = cache.get_seq_length()
    outputs = model.language(
        inputs_embeds=inputs_embeds[:, num_cached:],
        attention_mask=attention_mask,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return ReadPrompts(outputs.logits[:, -1], outputs.past_key_values, attention_mask.sum(dim=1).tolist())


class ContinuousBatch:
    """The caches of the answers under way, as rows of one cache.

    Args:
        model: The model. Its cache must be one that grows layer by layer, as that of all published models.
    """

    def __init__(self, model: DeepseekVLV2ForCausalLM) -> None:
        self._model = model
        self._cache: Any = DynamicCache()
        self._lengths: list[int] = []  # cached tokens of each row, without padding

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def num_positions(self) -> int:
        """Cached positions of a row, padding included."""
        return max(self._lengths, default=0)

    def join(self, read: ReadPrompts) -> None:
        """Adds prompts as the last rows; their cache is used up. An error leaves the rows as they were."""
        if not self._lengths:
            self._cache = read.cache
        else:
            self._join_layers(read.cache, max(self.num_positions, *read.lengths))
        self._lengths += read.lengths

    def _join_layers(self, cache: Any, width: int) -> None:
        start, num_joined = width - self.num_positions, 0
        try:
            for own, new in zip(self._cache.layers, cache.layers, strict=True):
                _set(
                    own,
                    torch.cat([_padded(own.keys, width), _padded(new.keys, width)]),
                    torch.cat([_padded(own.values, width), _padded(new.values, width)]),
                )
                num_joined += 1
        finally:
            if num_joined < len(self._cache.layers):  # views need no memory, of which there is not enough
                for own in self._cache.layers[:num_joined]:
                    _set(own, own.keys[: len(self)][..., start:, :], own.values[: len(self)][..., start:, :])

    def leave(self, rows: Sequence[int]) -> None:
        """Takes rows out; the others move up. After an error only all of them can leave."""
        kept = [row for row in range(len(self)) if row not in set(rows)]
        lengths = [self._lengths[row] for row in kept]
        start = self.num_positions - max(lengths, default=0)
        self._lengths = lengths
        if not kept:
            self._cache = DynamicCache()
            return
        for layer in self._cache.layers:
            _set(layer, layer.keys[kept][..., start:, :], layer.values[kept][..., start:, :])

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Reads the next token of each row.

        Returns:
            Logits [B, vocabulary] of the tokens after them.
        """
        device = self._model.device
        lengths = torch.tensor(self._lengths, device=device)
        width = self.num_positions
        # Row r has its real tokens at the end; all rows see the token that they read now.
        mask = torch.arange(width + 1, device=device)[None] >= width - lengths[:, None]  # [B, K+1]
        outputs = self._model.language(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            attention_mask=mask.long(),
            position_ids=lengths[:, None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._lengths = [length + 1 for length in self._lengths]
        return outputs.logits[:, -1]


def _padded(states: torch.Tensor, width: int) -> torch.Tensor:
    """States [B, H, K, d] with zeros in front, to K = width."""
    return F.pad(states, (0, 0, width - states.shape[-2], 0))


def _set(layer: DynamicLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
    layer.keys, layer.values = keys, values
