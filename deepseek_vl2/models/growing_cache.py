"""A cache of keys and values that writes new tokens into room kept free, instead of copying all earlier ones."""

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

# Tokens of room to begin with, and to add at least; beyond, a cache grows by a quarter.
MIN_ROOM = 256
GROWTH_DIVISOR = 4


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, views [B, H, K, head] of larger buffers.

    Everything that transformers does to a cache between two tokens (cropping, reordering, repeating rows) puts other
    tensors in the place of the views. That is noticed at the next token, which then gets buffers of its own.

    Args:
        num_expected: Tokens that will come; room for them is made at once.
    """

    keys: Any
    values: Any

    def __init__(self, num_expected: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_expected = num_expected
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds new tokens [B, H, T, head]; returns keys and values of all."""
        if key_states.requires_grad or value_states.requires_grad:
            # Gradients forbid writing in place.
            self._buffers = None
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_cached = self.get_seq_length()
        num_tokens = num_cached + key_states.shape[-2]
        buffers = self._buffers_for(key_states, value_states, num_cached, num_tokens)
        for buffer, states in zip(buffers, (key_states, value_states), strict=True):
            buffer[..., num_cached:num_tokens, :] = states
        self.keys, self.values = (buffer[..., :num_tokens, :] for buffer in buffers)
        return self.keys, self.values

    def take_room(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Counts one more token a row, which the caller writes.

        Args:
            like: Something [B, ...] of the type of the new tokens.

        Returns:
            Buffers [B, H, room, head] of keys and values; None where they must not be written, or there is nothing yet.
        """
        num_cached = self.get_seq_length()
        if not num_cached or self.keys.dtype != like.dtype or self.keys.requires_grad:
            return None
        if self.keys.shape[0] != like.shape[0]:
            return None
        buffers = self._buffers_for(self.keys, self.values, num_cached, num_cached + 1)
        self.keys, self.values = (buffer[..., : num_cached + 1, :] for buffer in buffers)
        return buffers

    def give_room_back(self) -> None:
        """Counts the last token no more, since it was not written."""
        self.keys, self.values = self.keys[..., :-1, :], self.values[..., :-1, :]

    def _buffers_for(
        self, key_states: torch.Tensor, value_states: torch.Tensor, num_cached: int, num_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The buffers, with room for all tokens."""
        if self._buffers is None or not self._has_room(self._buffers, num_tokens):
            self._buffers = (
                self._grown(self.keys, key_states, num_cached, num_tokens),
                self._grown(self.values, value_states, num_cached, num_tokens),
            )
        return self._buffers

    def _has_room(self, buffers: tuple[torch.Tensor, torch.Tensor], num_tokens: int) -> bool:
        """Whether keys and values still begin the buffers, and those are long enough and can be written."""
        return all(
            view.data_ptr() == buffer.data_ptr()
            and view.shape[:-2] == buffer.shape[:-2]
            and view.stride() == buffer.stride()
            and num_tokens <= buffer.shape[-2]
            # What was made in inference mode cannot be written outside it.
            and (torch.is_inference_mode_enabled() or not buffer.is_inference())
            for view, buffer in zip((self.keys, self.values), buffers, strict=True)
        )

    def _grown(self, cached: torch.Tensor, new: torch.Tensor, num_cached: int, num_tokens: int) -> torch.Tensor:
        room = max(self.num_expected - num_tokens, num_tokens // GROWTH_DIVISOR, MIN_ROOM)
        buffer = new.new_empty(*new.shape[:-2], num_tokens + room, new.shape[-1])
        if num_cached:
            buffer[..., :num_cached, :] = cached
        return buffer

    def reset(self) -> None:
        """Forgets all tokens."""
        self._buffers = None
        super().reset()


class GrowingCache(DynamicCache):
    """transformers' default cache on `GrowingLayer`.

    Args:
        num_layers: Layers of the model; all of them are there from the start, so that their lengths can be compared.
        num_expected: Tokens that will come, if that is known: room for them is made at once.
    """

    def __init__(self, num_layers: int, num_expected: int = 0) -> None:
        super().__init__()
        self.layer_class_to_replicate = None
        self.layers = [GrowingLayer(num_expected) for _ in range(num_layers)]
