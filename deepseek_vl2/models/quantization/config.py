"""What can be chosen about weight-only quantisation, and what follows from it for each layer."""

import re
from dataclasses import dataclass
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "deepseek_vl2_weight_only"
# What the command line calls them, and their bits.
QUANTIZATIONS = {"int8": 8, "int4": 4}
GROUP_SIZES = (32, 64, 128)
# How weights lie in checkpoints, see `packing`. A change of the layout, or of which layers have 8 bits, raises it.
LAYOUT_VERSION = 3
# Layers that keep 8 bits in an int4 model: queries, keys and output of the language model's attention, the feed-forward
# layers without experts, and the projector. All tokens pass them one after the other; with a fiftieth of the weights
# they would bring in most of the error.
_EIGHT_BIT_LAYERS = re.compile(
    r"(^|\.)((q|q_a|q_b|k|o)_proj|kv_a_proj_with_mqa|mlp\.(gate|up|down)_proj|projector\..+)(\.|$)"
)


@dataclass(frozen=True)
class WeightFormat:
    """How one weight [N, K] is held.

    Attributes:
        bits: 8, with a scale for each output; or 4, with a scale and an offset for each group.
        group_size: Inputs g a group, None for 8 bits.
    """

    bits: int
    group_size: int | None = None

    def __str__(self) -> str:
        return f"int{self.bits}" + (f" in groups of {self.group_size}" if self.group_size else "")


class WeightOnlyConfig(QuantizationConfigMixin):
    """Quantises weights to integers on loading; products take them apart again, activations stay as they are.

    Args:
        bits: 8 or 4.
        group_size: For 4 bits, how many inputs share a scale: 32, 64 or 128. Fewer are more exact and take more memory
            (5, 4.5 or 4.25 bits a weight). A layer whose width it does not divide takes the largest smaller one that
            does, and else 8 bits, which a few layers that rounding harms most take anyway.
        layout_version: How a saved checkpoint lies in its file.

    Raises:
        ValueError: If a number is not one of those.
    """

    def __init__(
        self,
        bits: int = 8,
        group_size: int = 64,
        layout_version: int = LAYOUT_VERSION,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            name, value = next(iter(unknown.items()))
            raise ValueError(f"quantization_config has no {name!r} (value {value!r}); it has bits and group_size.")
        if type(bits) is not int or bits not in QUANTIZATIONS.values():
            raise ValueError(f"bits {bits!r} must be 8 or 4.")
        if type(group_size) is not int or group_size not in GROUP_SIZES:
            raise ValueError(f"group_size {group_size!r} must be one of {', '.join(map(str, GROUP_SIZES))}.")
        if layout_version != LAYOUT_VERSION:
            raise ValueError(
                f"The quantised weights have layout {layout_version!r}, this version of the library reads "
                f"{LAYOUT_VERSION}. Quantise the original checkpoint again."
            )
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers' own methods are an enumeration
        self.bits = bits
        self.group_size = group_size
        self.layout_version = layout_version

    def __eq__(self, other: object) -> bool:
        """Whether all arguments are the same; what it inherits compares `quant_method` alone."""
        return isinstance(other, WeightOnlyConfig) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.bits, self.group_size, self.layout_version))

    @property
    def name(self) -> str:
        """`int8` or `int4`."""
        return f"int{self.bits}"

    def choose_format(self, name: str, num_inputs: int) -> WeightFormat:
        """The format of a weight.

        Args:
            name: Of the weight or its layer, in the model or in a checkpoint.
            num_inputs: K.
        """
        if self.bits == 4 and not _EIGHT_BIT_LAYERS.search(name):
            for group_size in reversed(GROUP_SIZES):
                if group_size <= self.group_size and num_inputs % group_size == 0:
                    return WeightFormat(4, group_size)
        return WeightFormat(8)

    def to_dict(self) -> dict[str, Any]:
        """The arguments, as `config.json` keeps them."""
        return dict(vars(self))
