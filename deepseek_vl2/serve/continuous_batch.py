"""Answers that decode together although each begins and ends on its own ("continuous batching").

A prompt is read alone, with the numbers that it has alone. Then its cache joins those of the answers under way, padded
on the left to one length. A row that is done leaves at once, and the padding that nobody needs any more with it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from deepseek_vl2.models import DeepseekVLV2ForCausalLM


class ReadPrompt(NamedTuple):
    """A prompt that was read: logits [1, vocabulary] of the token after it, and its cache."""

    logits: torch.Tensor
    cache: Cache


@torch.inference_mode()
def read_prompt(model: DeepseekVLV2ForCausalLM, inputs_embeds: torch.Tensor, chunk_size: int = -1) -> ReadPrompt:
    """Reads one prompt.

    Args:
        model: The model.
        inputs_embeds: [1, T, D], see `prepare_inputs_embeds`.
        chunk_size: Tokens to read at once, -1 for all.
    """
    mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
    cache, num_cached = None, 0
    if chunk_size != -1:
        _, cache = model.incremental_prefilling(inputs_embeds=inputs_embeds, attention_mask=mask, chunk_size=chunk_size)
        num_cached = cache.get_seq_length()
    outputs = model.language(
        inputs_embeds=inputs_embeds[:, num_cached:],
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return ReadPrompt(outputs.logits[:, -1], outputs.past_key_values)


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

    def join(self, cache: Any) -> None:
        """Adds the cache of one prompt as the last row; the cache is used up. An error leaves the rows as they were."""
        length = cache.get_seq_length()
        width = max(self.num_positions, length)
        if not self._lengths:
            self._cache = cache
        else:
            self._join_layers(cache, width)
        self._lengths.append(length)

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
                    _set(own, own.keys[:-1][..., start:, :], own.values[:-1][..., start:, :])

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
