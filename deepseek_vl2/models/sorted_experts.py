"""The way of tokens through experts whose weights are held in a form of their own."""

from collections.abc import Callable

import torch
from torch import nn

from .modeling_deepseek import DeepseekV2Experts


class SortedExperts(nn.Module):
    """Stands in for `DeepseekV2Experts`; every expert that is hit is read once, whatever the number of tokens.

    Args:
        experts: What it stands in for; its weights are the subclass's concern.
    """

    def __init__(self, experts: DeepseekV2Experts) -> None:
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
        if hidden_states.shape[0] == 1:
            experts = top_k_index[0].tolist()
            outputs = self._run(hidden_states.expand(len(experts), -1), experts, [1] * len(experts))
        else:
            outputs = self._run_sorted(hidden_states, top_k_index)
        # Weights are float32, and so is the sum over the experts of a token.
        return (outputs.unflatten(0, top_k_index.shape) * top_k_weights[..., None]).sum(dim=1).to(hidden_states.dtype)

    def _run_sorted(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor) -> torch.Tensor:
        """Rows [N * k, D], those of a token beside each other."""
        order = top_k_index.flatten().argsort(stable=True)
        counts = top_k_index.flatten().bincount(minlength=self.num_experts).tolist()
        hit = [expert for expert, count in enumerate(counts) if count]
        rows = hidden_states[order // top_k_index.shape[1]]
        outputs = self._run(rows, hit, [counts[expert] for expert in hit])
        return torch.empty_like(outputs).index_copy_(0, order, outputs)

    def _run(self, rows: torch.Tensor, experts: list[int], counts: list[int]) -> torch.Tensor:
        """Runs experts on rows [n, D], those of one expert beside each other: so many of each."""
        gate, up = self.project_all(rows, "gate_up_proj", experts, counts).chunk(2, dim=-1)
        return self.project_all(self.act_fn(gate) * up, "down_proj", experts, counts)
