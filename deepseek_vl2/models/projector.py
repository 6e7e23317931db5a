"""The projector from patches of the vision tower to image tokens of the language model."""

import itertools

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .configuration_deepseek_vl_v2 import MlpProjectorConfig


class MlpProjector(nn.Module):
    """Maps patches [V, P*P, C] of views to image tokens [V, G*G, D] (arXiv:2412.10302, 2)."""

    def __init__(self, config: MlpProjectorConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = _build_layers(config)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches [V, P*P, C] -> image tokens [V, G*G, D].

        Raises:
            ValueError: If the patches are not those of square views.
        """
        if self.config.projector_type == "downsample_mlp_gelu":
            patches = merge_blocks(patches, self.config.downsample_ratio)
        return self.layers(patches)


def merge_blocks(patches: torch.Tensor, side: int) -> torch.Tensor:
    """Joins blocks of side x side patches into one vector each, channels first.

    A side that does not divide P is filled up with zeros at the bottom and right (27 patches become 28).

    Args:
        patches: [V, P*P, C].
        side: Patches a side of a block.

    Returns:
        [V, G*G, C*side*side].
    """
    patches_per_side = round(patches.shape[1] ** 0.5)
    if patches_per_side**2 != patches.shape[1]:
        raise ValueError(f"{patches.shape[1]} patches a view are no square number; views have to be square.")
    patches = rearrange(patches, "v (h w) c -> v c h w", h=patches_per_side)
    missing = -patches_per_side % side
    patches = F.pad(patches, (0, missing, 0, missing))
    return rearrange(patches, "v c (h bh) (w bw) -> v (h w) (c bh bw)", bh=side, bw=side)


def _build_layers(config: MlpProjectorConfig) -> nn.Module:
    if config.projector_type == "identity":
        return nn.Identity()
    if config.projector_type == "linear":
        return nn.Linear(config.input_dim, config.n_embed)
    if config.projector_type == "mlp_gelu":
        widths = [config.input_dim] + [config.n_embed] * config.depth
    else:
        block_width = config.input_dim * config.downsample_ratio**2
        widths = [block_width] + [config.n_embed * config.mlp_ratio] * (config.depth - 1) + [config.n_embed]
    layers: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise(widths):
        layers += [nn.Linear(width_in, width_out), nn.GELU()]
    return nn.Sequential(*layers[:-1])
