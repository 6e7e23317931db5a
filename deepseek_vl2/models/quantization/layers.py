"""Layers that hold quantised weights in place of the model's own."""

import logging
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from .. import few_row_products
from ..few_row_products import are_few_rows
from ..modeling_deepseek import DeepseekV2Experts
from ..sorted_experts import SortedExperts
from ..streamed_weights import StreamedWeight, remember
from . import kernels, packing
from .config import WeightFormat, WeightOnlyConfig

logger = logging.getLogger(__name__)

# Linear layers that stay exact, by the end or a part of their name; see the package's docstring.
EXACT_LINEARS = ("kv_b_proj", "attn_pool")
SCALES = "_scales"
EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")


def refuse_training(module: nn.Module, inputs: torch.Tensor) -> None:
    """Stops before a training that would leave the quantised weights as they are.

    Raises:
        RuntimeError: If a gradient is asked for.
    """
    if module.training and inputs.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("Quantised weights cannot be trained. Train the original model, and quantise the result.")


class QuantizedLinear(nn.Module):
    """A linear layer with a quantised weight; the bias is exact."""

    weight: torch.Tensor
    weight_scales: torch.Tensor

    def __init__(self, linear: nn.Linear, weight_format: WeightFormat) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight_format = weight_format
        weight, scales = packing.empty_weight(self.out_features, self.in_features, weight_format)
        self.register_buffer("weight", weight)
        self.register_buffer(f"weight{SCALES}", scales)
        self.bias = linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs [..., K] -> [..., N]."""
        refuse_training(self, inputs)
        output = few_row_products.project(inputs, self.streamed_weight()) if are_few_rows(inputs) else None
        if output is None:
            output = kernels.linear(inputs, self.weight, self.weight_scales, self.weight_format, self.out_features)
        return output if self.bias is None else output + self.bias

    def streamed_weight(self) -> StreamedWeight:
        """The weight in the form that the kernels for few rows read."""
        return remember(
            self, "weight", self.weight, self.weight_scales, kernels.machine_block_rows(), self.out_features
        )

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape [N, K] of the weight before it is quantised."""
        return (self.out_features, self.in_features)

    def format_of(self, name: str) -> WeightFormat:
        """Format of the weight."""
        return self.weight_format

    def extra_repr(self) -> str:
        """What `print(model)` shows of the layer."""
        return f"{self.in_features}, {self.out_features}, {self.weight_format}"


class QuantizedExperts(SortedExperts):
    """The routed experts with quantised weights.

    How a product is computed depends on the number of tokens that chose the expert, see `kernels.linear`.
    """

    gate_up_proj: torch.Tensor
    gate_up_proj_scales: torch.Tensor
    down_proj: torch.Tensor
    down_proj_scales: torch.Tensor

    def __init__(self, experts: DeepseekV2Experts, config: WeightOnlyConfig) -> None:
        super().__init__(experts)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.formats: dict[str, WeightFormat] = {}
        for name in EXPERT_WEIGHTS:
            _, num_outputs, num_inputs = shape = tuple(getattr(experts, name).shape)
            weight_format = config.choose_format(name, num_inputs)
            weight, scales = packing.empty_weight(num_outputs, num_inputs, weight_format, (self.num_experts,))
            self.register_buffer(name, weight)
            self.register_buffer(name + SCALES, scales)
            self.shapes[name], self.formats[name] = shape, weight_format

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As `DeepseekV2Experts.forward`: [N, D], [N, k], [N, k] -> [N, D]."""
        refuse_training(self, hidden_states)
        return super().forward(hidden_states, top_k_index, top_k_weights)

    def project(self, rows: torch.Tensor, name: str, expert: int) -> torch.Tensor:
        """See `SortedExperts.project`."""
        weight, scales = getattr(self, name)[expert], getattr(self, name + SCALES)[expert]
        return kernels.linear(rows, weight, scales, self.formats[name], self.shapes[name][1])

    def project_all(self, rows: torch.Tensor, name: str, experts: list[int], counts: list[int]) -> torch.Tensor:
        """See `SortedExperts.project_all`."""
        weight = self.streamed_weight(name) if are_few_rows(rows[: max(counts)]) else None
        if weight is not None and few_row_products.can_multiply(rows, max(counts), weight):
            return few_row_products.multiply(rows, weight, experts, counts)
        return super().project_all(rows, name, experts, counts)

    def streamed_weight(self, name: str) -> StreamedWeight:
        """A weight of all experts in the form that the kernels for few rows read."""
        values, scales = getattr(self, name), getattr(self, name + SCALES)
        return remember(self, name, values, scales, kernels.machine_block_rows(), self.shapes[name][1])

    def streamed_weights(self) -> tuple[StreamedWeight, StreamedWeight]:
        """The weights as the kernels for few rows read them."""
        gate_up, down = map(self.streamed_weight, EXPERT_WEIGHTS)
        return gate_up, down

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape [E, N, K] of a weight before it is quantised."""
        return self.shapes[name]

    def format_of(self, name: str) -> WeightFormat:
        """Format of a weight."""
        return self.formats[name]

    def extra_repr(self) -> str:
        """What `print(model)` shows of the experts."""
        return ", ".join(f"{name} {self.shapes[name]} {self.formats[name]}" for name in EXPERT_WEIGHTS)


QuantizedModule = QuantizedLinear | QuantizedExperts


def replace_layers(model: Any, config: WeightOnlyConfig) -> None:
    """Puts quantised layers without content into a model on the meta device; says which formats were chosen."""
    tied = {name.rpartition(".")[0] for names in model.all_tied_weights_keys.items() for name in names}
    by_format: dict[WeightFormat, list[str]] = defaultdict(list)
    for name, module in list(model.named_modules()):
        if isinstance(module, DeepseekV2Experts):
            experts = QuantizedExperts(module, config)
            model.set_submodule(name, experts)
            for weight in EXPERT_WEIGHTS:
                by_format[experts.format_of(weight)].append(f"{name}.{weight}")
        elif isinstance(module, nn.Linear) and name not in tied and not is_exact(name):
            weight_format = config.choose_format(name, module.in_features)
            model.set_submodule(name, QuantizedLinear(module, weight_format))
            by_format[weight_format].append(name)
    for weight_format, names in by_format.items():
        logger.info("%s: %d weights, such as %s", weight_format, len(names), names[-1])
    for name in sorted(tied):
        logger.info("%s stays exact: it shares its weights with the embeddings", name)


def is_exact(name: str) -> bool:
    """Whether a linear layer of that name keeps its weights."""
    return any(part in name.split(".") for part in EXACT_LINEARS)


def int4_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The packed int4 weights of a model by name."""
    weights: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            for weight in EXPERT_WEIGHTS if isinstance(module, QuantizedExperts) else ("weight",):
                if module.format_of(weight).bits == 4:
                    weights[f"{name}.{weight}"] = getattr(module, weight)
    return weights
