"""What both models add to transformers' `generate`: prompt limits and caches that were prefilled by hand."""

from numbers import Integral
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from .growing_cache import GrowingCache

# That of the reference's `incremental_prefilling`.
DEFAULT_CHUNK_SIZE = 1024


def check_prompt_length(num_tokens: int, config: PreTrainedConfig) -> None:
    """Refuses more tokens than the model has positions for.

    Raises:
        ValueError: If `num_tokens` exceeds `config.max_position_embeddings`.
    """
    limit = config.max_position_embeddings
    if num_tokens > limit:
        raise ValueError(
            f"The prompt has {num_tokens} tokens, the model has {limit} positions. Use fewer pictures, no tiling "
            "(three or more pictures at once are not tiled), a shorter text or fewer earlier turns."
        )


def room_for_answer(num_prompt_tokens: int, config: PreTrainedConfig) -> int:
    """How many tokens may follow a prompt: one more than positions are left, as the last one is not read any more."""
    num_positions: int = config.max_position_embeddings
    return num_positions - num_prompt_tokens + 1


def check_chunk_size(chunk_size: int, max_length: int | None = None) -> None:
    """Refuses sizes of chunks that there are not.

    Args:
        chunk_size: Tokens to prefill at once, or -1 for all.
        max_length: Tokens that the model has room for, where they are known.

    Raises:
        ValueError: If `chunk_size` is no whole number, 0, below -1, or larger than the context.
    """
    if not isinstance(chunk_size, Integral) or isinstance(chunk_size, bool) or chunk_size < -1 or chunk_size == 0:
        raise ValueError(f"chunk_size {chunk_size!r} must be at least 1, or -1 for the whole prompt at once.")
    # The default is for small contexts, too.
    if max_length is not None and chunk_size > max_length and chunk_size != DEFAULT_CHUNK_SIZE:
        raise ValueError(
            f"chunk_size {chunk_size} is larger than the context of {max_length} tokens; take -1 for the whole prompt "
            "at once."
        )


class PrefilledGenerationMixin:
    """`generate` for prompts whose beginning is in a cache already, see `incremental_prefilling`."""

    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Generates as `GenerationMixin.generate` does.

        Args:
            inputs: Prompt ids [B, T], the same as `input_ids`.
            generation_config: As in transformers, like everything after it.
            *args: As in transformers.
            **kwargs: As in transformers. With `past_key_values`, the ids or embeddings are those of the whole prompt.

        Returns:
            With ids: prompt and new ids. With embeddings only: new ids.

        Raises:
            ValueError: If the prompt is longer than the model's positions, or the cache does not belong to it.
        """
        prompt = inputs if inputs is not None else kwargs.get("inputs_embeds")
        prompt = prompt if prompt is not None else kwargs.get("input_ids")
        if prompt is not None:
            config: PreTrainedConfig = self.config  # type: ignore[attr-defined]
            check_prompt_length(prompt.shape[1], config.get_text_config())
        cache = kwargs.get("past_key_values")
        if cache is not None and prompt is not None:
            check_cache(cache, prompt)
            num_copies = self._num_rows_for_each_prompt(generation_config, kwargs)
            if num_copies > 1:
                cache.batch_repeat_interleave(num_copies)
        return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        """Takes a cache that does not copy itself for each token where transformers takes its default one."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]
        cache = model_kwargs.get("past_key_values")
        if type(cache) is DynamicCache and not cache.offloading and not cache.get_seq_length():
            config: PreTrainedConfig = self.config  # type: ignore[attr-defined]
            model_kwargs["past_key_values"] = GrowingCache(config.get_text_config().num_hidden_layers)

    def _num_rows_for_each_prompt(self, generation_config: Any, kwargs: dict[str, Any]) -> int:
        """Rows that transformers makes of each prompt row for beams and several answers, but not of a given cache."""
        config = generation_config or self.generation_config  # type: ignore[attr-defined]

        def value(name: str) -> int:
            return kwargs.get(name) or getattr(config, name, None) or 1

        return max(value("num_beams"), value("num_return_sequences"))


def check_cache(cache: Cache, prompt: torch.Tensor) -> None:
    """Refuses a cache that cannot hold the beginning of a prompt [B, T] or [B, T, D].

    Raises:
        ValueError: If it is no `Cache`, holds the whole prompt or more, or has another number of rows.
    """
    if not isinstance(cache, Cache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}, not a transformers.Cache: pass on the object that "
            "incremental_prefilling has returned."
        )
    num_cached, num_tokens = cache.get_seq_length(), prompt.shape[1]
    if num_cached >= num_tokens:
        raise ValueError(
            f"The cache holds {num_cached} tokens, the prompt has {num_tokens}: it was used before or belongs to "
            "another prompt. Prefill a new one, or copy it with copy.deepcopy before each use."
        )
    keys = getattr(cache.layers[0], "keys", None) if num_cached else None
    if keys is not None and keys.shape[0] != prompt.shape[0]:
        raise ValueError(
            f"The cache has {keys.shape[0]} row(s), the prompt has {prompt.shape[0]}. "
            "Prefill a cache for the same batch."
        )
