"""A small model whose sizes are all different, and prompts for it.

A view has 70 pixels a side, so 5 patches, filled up to 6, so 3 image tokens a side (G). The other sizes are multiples
of 8, which grouped matrix products ask for, but for those that have to be odd to be told apart.
"""

from collections.abc import Callable
from typing import Any

import torch

from deepseek_vl2.models import DeepseekV2Config, DeepseekVLV2Config

SIDE = 70
TOKENS_PER_SIDE = 3
IMAGE_ID, PAD_ID, BOS_ID, EOS_ID = 150, 1, 2, 3

LANGUAGE = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 88,
    "moe_intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "n_shared_experts": 2,
    "n_routed_experts": 12,  # more than ten: their keys do not sort by number
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 40,
    "q_lora_rank": None,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}
VISION = {
    "image_size": SIDE,
    "patch_size": 14,
    "width": 64,
    "layers": 2,
    "heads": 4,
    "mlp_ratio": 3.7362,
}
ROUTERS: dict[str, dict[str, Any]] = {
    "greedy": {"topk_method": "greedy"},
    "group_limited_greedy": {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2},
    "noaux_tc": {
        "topk_method": "noaux_tc",
        "n_group": 3,
        "topk_group": 2,
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.0,
    },
}
MHA = {"use_mla": False, "kv_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 0}
# As in the published models: tiny, small, base, and the router of groups that none of them uses.
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": MHA,
    "small": {},
    "base": ROUTERS["noaux_tc"],
    "groups": ROUTERS["group_limited_greedy"],
}


def language_config(**changes: Any) -> DeepseekV2Config:
    """The small language model, MLA and a greedy router unless told otherwise."""
    return DeepseekV2Config(**{**LANGUAGE, **changes})


def vl_config(language: dict[str, Any] | None = None, **changes: Any) -> DeepseekVLV2Config:
    """The small vision-language model."""
    parts = {
        "vision_config": VISION,
        "projector_config": {"input_dim": 64, "n_embed": 48},
        "language_config": {**LANGUAGE, **(language or {})},
        "candidate_resolutions": [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]],
    }
    return DeepseekVLV2Config(**{**parts, **changes})


def seeded(build: Callable[..., Any], *args: Any, seed: int = 0) -> Any:
    """Builds a model with random weights that are the same each time, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build(*args)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.3, 0.3)
    return model.eval()


def num_tokens(columns: int, rows: int) -> int:
    """Image tokens of a picture, counted by hand."""
    side = TOKENS_PER_SIDE
    return side * (side + 1) + 1 + rows * side * (columns * side + 1)


def make_inputs(grids: list[tuple[int, int]], num_text: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    """One prompt: text, then each picture with one token of text behind it, then text."""
    generator = torch.Generator().manual_seed(seed)

    def text(count: int) -> list[int]:
        return torch.randint(4, IMAGE_ID, (count,), generator=generator).tolist()

    ids = [BOS_ID, *text(num_text)]
    for grid in grids:
        ids += [IMAGE_ID] * num_tokens(*grid) + text(1)
    input_ids = torch.tensor([ids + text(num_text)])
    num_views = sum(1 + columns * rows for columns, rows in grids)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "images": torch.randn(1, max(num_views, 1), 3, SIDE, SIDE, generator=generator),
        "images_seq_mask": input_ids == IMAGE_ID,
        "images_spatial_crop": torch.tensor([grids or [(0, 0)]]),
    }


def join(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Puts prompts into one batch, padded on the left."""

    def padded(name: str, dim: int, is_left: bool, value: int = 0) -> torch.Tensor:
        size = max(row[name].shape[dim] for row in rows)
        tensors = []
        for row in rows:
            shape = list(row[name].shape)
            shape[dim] = size - shape[dim]
            filling = row[name].new_full(shape, value)
            tensors.append(torch.cat((filling, row[name]) if is_left else (row[name], filling), dim=dim))
        return torch.cat(tensors)

    return {
        "input_ids": padded("input_ids", 1, True, PAD_ID),
        "attention_mask": padded("attention_mask", 1, True),
        "images": padded("images", 1, False),
        "images_seq_mask": padded("images_seq_mask", 1, True),
        "images_spatial_crop": padded("images_spatial_crop", 1, False),
    }
