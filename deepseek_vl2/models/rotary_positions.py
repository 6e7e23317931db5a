"""Rotary positions (arXiv:2104.09864) of both kinds of attention, scaled as the configuration says.

Letters as in `modeling_deepseek`.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_deepseek import DeepseekV2Config

# Those of transformers whose frequencies do not depend on the length of the prompt.
ROPE_TYPES = ("default", "linear", "yarn", "llama3")


def default_inverse_frequencies(config: DeepseekV2Config) -> tuple[torch.Tensor, float]:
    """Inverse frequencies of plain rotary positions, in the form of transformers' other kinds of scaling.

    Returns:
        The frequencies [head_dim / 2] in float32, and the factor 1.0 on cosine and sine.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    rope_theta: float = config.rope_parameters["rope_theta"]  # type: ignore[index]  # transformers fills it in
    return 1.0 / rope_theta**exponents, 1.0


class DeepseekV2RotaryEmbedding(nn.Module):
    """Cosines and sines of token positions.

    The frequencies are no buffer: `model.to(torch.bfloat16)` would round them and the positions (257 becomes 256),
    which makes wrong boxes. They stay float32 on the CPU and follow the positions' device for each use.
    """

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__()
        self.rope_type = config.rope_parameters["rope_type"]  # type: ignore[index]
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_scaling type {self.rope_type!r} is unknown. Choose one of {', '.join(ROPE_TYPES)}.")
        rope_init = default_inverse_frequencies if self.rope_type == "default" else ROPE_INIT_FUNCTIONS[self.rope_type]
        # Models are built on the meta device before loading, and these numbers come from no checkpoint.
        with torch.device("cpu"):
            inv_freq, self.attention_scaling = rope_init(config)
        self.inv_freq = inv_freq.float()

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions [B, T] -> cosines and sines, each [B, T, head_dim / 2] in float32."""
        if self.inv_freq.device != position_ids.device:
            self.inv_freq = self.inv_freq.to(position_ids.device)
        angles = position_ids[..., None].float() * self.inv_freq
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def rotate_interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates neighbouring pairs (0, 1), (2, 3), ... as MLA does.

    The rotated pairs are returned as all first halves, then all second halves. Queries and keys share that order, so
    scores are those of the interleaved order.

    Args:
        x: [B, H, T, P].
        cos: [B, T, P / 2] in float32.
        sin: [B, T, P / 2] in float32.
    """
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return _rotate(first, second, cos, sin).to(x.dtype)


def rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates number i of the first half with number i of the second, as multi-head attention does."""
    first, second = x.float().chunk(2, dim=-1)
    return _rotate(first, second, cos, sin).to(x.dtype)


def _rotate(first: torch.Tensor, second: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def yarn_score_scaling(rope_parameters: Any) -> float:
    """Factor on attention scores that goes with yarn scaling of positions (arXiv:2309.00071, 3.4)."""
    mscale = rope_parameters.get("mscale_all_dim", 0)
    factor = rope_parameters.get("factor", 1.0)
    if rope_parameters["rope_type"] == "default" or not mscale or factor <= 1:
        return 1.0
    return (0.1 * mscale * math.log(factor) + 1.0) ** 2
