"""The loss that keeps experts evenly busy in training, and the way it acts on gradients alone."""

from typing import Any

import torch


class AddLossGradient(torch.autograd.Function):
    """Returns `x` unchanged and lets a side loss take part in the backward pass, without changing the reported loss."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.loss_dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad_output, torch.ones((), dtype=ctx.loss_dtype, device=grad_output.device)


def load_balancing_loss(scores: torch.Tensor, topk_indices: torch.Tensor, is_per_sequence: bool) -> torch.Tensor:
    """Loss that is 1 when experts share the tokens evenly and more the less they do (arXiv:2405.04434, 2.2.3).

    Args:
        scores: Router probabilities [B, T, E].
        topk_indices: Chosen experts [B, T, k].
        is_per_sequence: Whether each of the B sequences is balanced by itself.
    """
    num_experts = scores.shape[-1]
    if not is_per_sequence:
        scores, topk_indices = scores.flatten(0, 1)[None], topk_indices.flatten(0, 1)[None]
    choices = topk_indices.flatten(1)
    counts = torch.zeros(scores.shape[0], num_experts, device=scores.device)
    counts.scatter_add_(1, choices, torch.ones_like(choices, dtype=counts.dtype))
    load = counts / (choices.shape[1] / num_experts)
    return (load * scores.mean(dim=1)).sum(dim=1).mean()
