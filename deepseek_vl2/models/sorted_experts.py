"""The way of tokens through experts that reads every expert that is hit once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from . import few_row_products
from .streamed_weights import remember

# Multiplies rows [n, K], those of one expert beside each other, by a weight of each: (rows, "gate_up_proj" or
# "down_proj", numbers of the experts, how many rows each has) -> [n, N].
ProjectAll = Callable[[torch.Tensor, str, list[int], list[int]], torch.Tensor]


def run_sorted(
    project_all: ProjectAll,
    act_fn: Callable[[torch.Tensor], torch.Tensor],
    num_experts: int,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Runs tokens through their experts, expert by expert.

    Args:
        project_all: What multiplies by the weights.
        act_fn: The activation of the gate.
        num_experts: E.
        hidden_states: [N, D].
        top_k_index: [N, k].
        top_k_weights: [N, k].

    Returns:
        [N, D].
    """

    def run(rows: torch.Tensor, experts: list[int], counts: list[int]) -> torch.Tensor:
        gate, up = project_all(rows, "gate_up_proj", experts, counts).chunk(2, dim=-1)
        return project_all(act_fn(gate) * up, "down_proj", experts, counts)

    if hidden_states.shape[0] == 1:  # there is nothing to sort
        experts = top_k_index[0].tolist()
        outputs = run(hidden_states.expand(len(experts), -1), experts, [1] * len(experts))
    else:
        order = top_k_index.flatten().argsort(stable=True)
        counts = top_k_index.flatten().bincount(minlength=num_experts).tolist()
        hit = [expert for expert, count in enumerate(counts) if count]
        rows = hidden_states[order // top_k_index.shape[1]]
        sorted_outputs = run(rows, hit, [counts[expert] for expert in hit])
        outputs = torch.empty_like(sorted_outputs).index_copy_(0, order, sorted_outputs)
    # Weights are float32, and so is the sum over the experts of a token.
    return (outputs.unflatten(0, top_k_index.shape) * top_k_weights[..., None]).sum(dim=1).to(hidden_states.dtype)


def grouped_mm_experts_forward(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """As transformers' function of that name, but at the speed of memory for a few tokens on the CPU.

    Args:
        experts: `DeepseekV2Experts` with its weights as they are loaded.
        hidden_states: See `run_sorted`.
        top_k_index: See `run_sorted`.
        top_k_weights: See `run_sorted`.
    """
    # With as many rows as experts most of these have few; a product of more is right, too.
    are_few = top_k_index.numel() <= experts.num_experts and not experts._is_expert_parallel
    is_elsewhere = torch.compiler.is_compiling() or hidden_states.device.type != "cpu"
    weight = remember(experts, "gate_up_proj", experts.gate_up_proj) if are_few and not is_elsewhere else None
    if weight is None or not few_row_products.can_multiply(hidden_states, 1, weight):
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, hidden_states, top_k_index, top_k_weights)

    def project_all(rows: torch.Tensor, name: str, numbers: list[int], counts: list[int]) -> torch.Tensor:
        return few_row_products.multiply(rows, remember(experts, name, getattr(experts, name)), numbers, counts)

    return run_sorted(project_all, experts.act_fn, experts.num_experts, hidden_states, top_k_index, top_k_weights)


class StreamedExpertsInterface(ExpertsInterface):
    """transformers' implementations of experts, with `grouped_mm_experts_forward` in the place of theirs."""

    def get_interface(self, experts_implementation: str, default: Callable) -> Callable:
        """See `ExpertsInterface.get_interface`."""
        if experts_implementation == "grouped_mm":
            return grouped_mm_experts_forward
        return ALL_EXPERTS_FUNCTIONS.get_interface(experts_implementation, default)


class SortedExperts(nn.Module):
    """Stands in for `DeepseekV2Experts` with weights that are held in a form of their own.

    Args:
        experts: What it stands in for; its weights are the subclass's concern.
    """

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.num_experts = experts.num_experts
        self.act_fn: Callable[[torch.Tensor], torch.Tensor] = experts.act_fn

    def project(self, rows: torch.Tensor, name: str, expert: int) -> torch.Tensor:
        """Multiplies rows [n, K] by the weight [N, K] of an expert: [n, N].

        Args:
            rows: Of the tokens that chose this expert.
            name: "gate_up_proj" or "down_proj".
            expert: Number of the expert.
        """
        raise NotImplementedError

    def project_all(self, rows: torch.Tensor, name: str, experts: list[int], counts: list[int]) -> torch.Tensor:
        """Multiplies rows [n, K] by the weights of their experts: [n, N].

        Args:
            rows: Those of one expert beside each other.
            name: See `project`.
            experts: Numbers of the experts.
            counts: How many rows each has.
        """
        parts = zip(experts, rows.split(counts), strict=True)
        return torch.cat([self.project(part, name, expert) for expert, part in parts])

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As `DeepseekV2Experts.forward`: [N, D], [N, k], [N, k] -> [N, D]."""
        return run_sorted(self.project_all, self.act_fn, self.num_experts, hidden_states, top_k_index, top_k_weights)
