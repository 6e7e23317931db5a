"""Multiplications and bytes that a model needs, from its configuration: what measured times are compared with.

FLOP count multiplications and additions, so twice the weights for each token, and leave out norms and activations.
"""

from typing import Any

from deepseek_vl2.models import DeepseekVLV2Config
from deepseek_vl2.utils.model_size import active_of, active_weights_by_part, bytes_by_part, cache_bytes_per_token


def vision_flop(config: DeepseekVLV2Config, num_views: int) -> int:
    """FLOP of the vision tower."""
    vision = config.vision_config
    width, num_patches = vision.width, vision.patches_per_side**2
    hidden = int(width * vision.mlp_ratio)
    embedding = num_patches * width * 3 * vision.patch_size**2
    projections = num_patches * 4 * width**2
    attention = 2 * num_patches**2 * width
    feed_forward = num_patches * 2 * width * hidden
    return 2 * num_views * (embedding + vision.layers * (projections + attention + feed_forward))


def projector_flop(config: DeepseekVLV2Config, num_views: int) -> int:
    """FLOP of the published kind of projector."""
    projector = config.projector_config
    num_tokens = projector.tokens_per_side(config.vision_config.patches_per_side) ** 2
    block = projector.input_dim * projector.downsample_ratio**2
    hidden = projector.n_embed * projector.mlp_ratio
    weights = block * hidden + (projector.depth - 2) * hidden**2 + hidden * projector.n_embed
    return 2 * num_views * num_tokens * weights


def prefill_flop(config: DeepseekVLV2Config, num_tokens: int) -> int:
    """FLOP of reading a prompt, with the logits of its last token only.

    Args:
        config: The model's.
        num_tokens: Tokens of the prompt; each sees itself and those before it.
    """
    language: Any = config.language_config
    active = active_weights_by_part(config)
    linear = num_tokens * (sum(active.values()) - active["lm_head"]) + active["lm_head"]
    numbers_a_head = language.qk_head_dim + language.v_head_dim if language.use_mla else 2 * language.head_dim
    num_pairs = num_tokens * (num_tokens + 1) // 2
    attention = language.num_hidden_layers * language.num_attention_heads * numbers_a_head * num_pairs
    return 2 * (linear + attention)


def decode_bytes(config: DeepseekVLV2Config, num_cached: int, weights: str = "bfloat16", num_rows: int = 1) -> int:
    """Bytes that one decoding step reads: the weights of every expert that a row hits, all others once, and the cache.

    Args:
        config: The model's.
        num_cached: Tokens in the cache of each row.
        weights: One of `model_size.WEIGHT_KINDS`.
        num_rows: Rows decoded together, each of which chooses its experts by chance.
    """
    read = active_of(bytes_by_part(config, weights), config, num_rows)
    return sum(read.values()) + num_rows * num_cached * cache_bytes_per_token(config)
