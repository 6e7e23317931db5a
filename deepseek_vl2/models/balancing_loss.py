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


def load_balancing_loss(
    scores: torch.Tensor, topk_indices: torch.Tensor, is_per_sequence: bool, is_token: torch.Tensor | None = None
) -> torch.Tensor:
    """Loss that is 1 when experts share the tokens evenly and more the less they do (arXiv:2405.04434, 2.2.3).

    Args:
        scores: Router probabilities [B, T, E].
        topk_indices: Chosen experts [B, T, k].
        is_per_sequence: Whether each of the B sequences is balanced by itself.
        is_token: False [B, T] at padding, which does not count; None if there is none.
    """
    num_experts, num_chosen = scores.shape[-1], topk_indices.shape[-1]
    counted = scores.new_ones(scores.shape[:2]) if is_token is None else is_token.to(scores.dtype)
    if not is_per_sequence:
        scores, topk_indices, counted = (values.flatten(0, 1)[None] for values in (scores, topk_indices, counted))
    num_tokens = counted.sum(dim=1, keepdim=True).clamp(min=1)
    counts = torch.zeros_like(scores[:, 0])
    counts.scatter_add_(1, topk_indices.flatten(1), counted.repeat_interleave(num_chosen, dim=1))
    load = counts / (num_tokens * num_chosen / num_experts)
    mean_scores = (scores * counted[..., None]).sum(dim=1) / num_tokens
    return (load * mean_scores).sum(dim=1).mean()
