"""How checkpoints, which hold experts one by one, become the model's fused experts, and back when saving."""

from typing import Any

import torch
from transformers import WeightConverter
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps

from .configuration_deepseek import DeepseekV2Config
from .mapped_files import MappedFiles


class FuseExperts(ConversionOps):
    """Weights of experts one by one -> one tensor [E, N, K].

    transformers' own steps stack each kind of weight and then join the kinds, and the file's pages stay in memory:
    twice the weights. Here each expert is copied to its place once, and its pages are given back.
    """

    @torch.no_grad()
    def convert(  # type: ignore[override]  # transformers' own steps return tensors, too
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Fuses the experts of one layer.

        Args:
            input_dict: By kind of weight the tensors [n, K] of all experts; N is the sum of the kinds' n.
            source_patterns: The kinds in the order in which they stand in the fused tensor.
            target_patterns: Name of the fused tensor.

        Raises:
            ValueError: If experts are missing or of different shapes.
        """
        experts = experts_of_layer(input_dict, source_patterns)
        first = torch.cat(experts[0])
        fused = first.new_empty(len(experts), *first.shape)
        files = MappedFiles()
        for target, parts in zip(fused, experts, strict=True):
            torch.cat(parts, out=target)
            files.release_pages(parts)
        return {target_patterns[0]: fused}

    @property
    def reverse_op(self) -> ConversionOps:
        """What saving does."""
        return SplitExperts()


class SplitExperts(ConversionOps):
    """One tensor [E, N, K] -> weights of experts one by one."""

    @torch.no_grad()
    def convert(  # type: ignore[override]  # transformers' own steps return tensors, too
        self,
        input_dict: dict[str, torch.Tensor | list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Takes the experts of one layer apart, see `FuseExperts`; the results are views."""
        (fused,) = input_dict.values()
        if isinstance(fused, list):
            (fused,) = fused
        kinds = fused.chunk(len(target_patterns), dim=1)
        return {
            pattern.replace("*", str(expert)): weight
            for pattern, kind in zip(target_patterns, kinds, strict=True)
            for expert, weight in enumerate(kind)
        }

    @property
    def reverse_op(self) -> ConversionOps:
        """What loading does."""
        return FuseExperts()


def experts_of_layer(tensors: dict[str, list[torch.Tensor]], patterns: list[str]) -> list[tuple[torch.Tensor, ...]]:
    """Sorts weights of one layer by expert.

    Args:
        tensors: By kind of weight the tensors of all experts.
        patterns: The kinds in order.

    Raises:
        ValueError: If experts are missing or of different shapes.
    """
    kinds = [tensors[pattern] for pattern in patterns if pattern in tensors]
    if len(kinds) < len(patterns) or len({len(kind) for kind in kinds}) > 1:
        counts = ", ".join(f"{len(tensors.get(pattern, []))} of {pattern}" for pattern in patterns)
        raise ValueError(f"experts are missing: there are {counts}")
    for pattern, kind in zip(patterns, kinds, strict=True):
        shapes = {tuple(tensor.shape) for tensor in kind}
        if len(shapes) > 1:
            raise ValueError(f"experts have different shapes in {pattern}: {sorted(shapes)}")
    return list(zip(*kinds, strict=True))


def register_conversion_mapping() -> None:
    """Tells transformers to fuse and unfuse experts of this package's models.

    It goes by the model type of the language model, wherever that stands in a larger model. transformers' own model of
    that type has the same layout, so it goes on as before.
    """
    register_checkpoint_conversion_mapping(
        DeepseekV2Config.model_type,
        [
            WeightConverter(
                source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
                target_patterns="mlp.experts.gate_up_proj",
                operations=[FuseExperts()],
            ),
            WeightConverter(
                source_patterns="mlp.experts.*.down_proj.weight",
                target_patterns="mlp.experts.down_proj",
                operations=[FuseExperts()],
            ),
        ],
        overwrite=True,
    )
