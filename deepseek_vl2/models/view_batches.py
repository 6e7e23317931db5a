"""How many views the vision tower takes at once, so that what it holds on the way fits into memory."""

import torch

from .configuration_deepseek_vl_v2 import VisionEncoderConfig
from .machine_limits import free_bytes

# Of the free memory; the rest is for what comes after, and for whoever else is at work.
MEMORY_SHARE = 0.5
# What a block holds at once for each patch: its input, normalised input, queries, keys, values and their attention, ...
_WIDTHS_HELD = 6
# ... or the hidden values of its feed-forward layer before and after the activation.
_HIDDEN_WIDTHS_HELD = 2


def bytes_per_view(config: VisionEncoderConfig, dtype: torch.dtype) -> int:
    """Most that a view takes within a block, without what training keeps for gradients."""
    num_patches = config.patches_per_side**2
    values = _WIDTHS_HELD * config.width + _HIDDEN_WIDTHS_HELD * int(config.width * config.mlp_ratio)
    return num_patches * values * dtype.itemsize


def views_at_once(config: VisionEncoderConfig, num_views: int, dtype: torch.dtype, device: torch.device) -> int:
    """Size of the batches that views are cut into: all of them, or what fits into half of the free memory, at least 1.

    Where gradients are kept all views stay in memory anyway, so they are not cut.

    Args:
        config: Of the tower.
        num_views: V, at least 1.
        dtype: Of the activations.
        device: Where the tower is.
    """
    if num_views == 1 or torch.is_grad_enabled():
        return num_views
    fitting = int(MEMORY_SHARE * free_bytes(device)) // bytes_per_view(config, dtype)
    return max(1, min(num_views, fitting))
