"""The three parts of the model that are trained or frozen each by itself, and their learning rates."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from deepseek_vl2.train.config import FULL, TrainConfig

VISION, PROJECTOR, LANGUAGE = "vision", "projector", "language"
_PEFT_PREFIX = "base_model.model."
# Carried along by published checkpoints but never run, so it has nothing to learn.
_UNUSED = "vision.attn_pool."


def part_of(name: str) -> str:
    """The part that a parameter belongs to; line ends and separator of pictures belong to the projector."""
    first = name.removeprefix(_PEFT_PREFIX).partition(".")[0]
    return first if first in (VISION, LANGUAGE) else PROJECTOR


def unfreeze(model: nn.Module, config: TrainConfig) -> None:
    """Marks the parameters of parts that are trained in full as trained, and all others as frozen."""
    for name, parameter in model.named_parameters():
        is_trained = getattr(config, part_of(name)) == FULL and not name.startswith(_UNUSED)
        parameter.requires_grad_(is_trained)


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Trained parameters for an optimizer: by part, for the learning rate, and by weight decay (matrices only)."""
    rates = {
        VISION: config.vision_learning_rate or config.learning_rate,
        PROJECTOR: config.projector_learning_rate or config.learning_rate,
        LANGUAGE: config.learning_rate,
    }
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in _trained(model):
        groups.setdefault((part_of(name), parameter.dim() > 1), []).append(parameter)
    return [
        {"params": group, "lr": rates[part], "weight_decay": config.weight_decay if is_matrix else 0.0}
        for (part, is_matrix), group in groups.items()
    ]


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def count_trained(model: nn.Module) -> int:
    """Number of trained weights."""
    return sum(parameter.numel() for _, parameter in _trained(model))
