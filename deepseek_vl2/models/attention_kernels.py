"""Attention written out, for what transformers' kernels do not do, or slowly: see `modeling_deepseek.attend`.

Letters as in `modeling_deepseek`.
"""

from typing import Any

import torch
import torch.nn.functional as F

from . import few_row_products
from .many_tokens import attend_many_tokens


def eager_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, the form that transformers' attention interface asks for.

    Args:
        module: The attention layer; its `num_key_value_groups` query heads share one key and value head.
        query: [B, H, T, head].
        key: [B, H / groups, K, head].
        value: [B, H / groups, K, head].
        attention_mask: Added to the scores, broadcast to [B, H, T, K].
        scaling: Factor on the scores.
        dropout: Probability of dropping a weight in training.

    Returns:
        Output [B, T, H, head] and weights [B, H, T, K].
    """
    if module.num_key_value_groups > 1:
        key = key.repeat_interleave(module.num_key_value_groups, dim=1)
        value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def attend_on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor | None:
    """Attention where torch's fused kernel for the CPU is slow; see `eager_attention_forward`.

    It takes several times as long as plain products where one token looks at many.

    Returns:
        Output [B, T, H, head]; None where torch's kernel is to be used.
    """
    if query.device.type != "cpu":
        return None
    if query.shape[2] == 1:
        return attend_one_token(query, key, value, attention_mask, scaling)
    return attend_many_tokens(query, key, value, scaling, is_causal=True) if attention_mask is None else None


def attend_one_token(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Attention of one token a row on the CPU; see `attend_by_products`, whose place a compiled kernel takes."""
    output = None
    if few_row_products.can_attend(query, key) and (attention_mask is None or attention_mask.dim() == 2):
        visible = None if attention_mask is None else attention_mask[:, -key.shape[2] :]
        output = few_row_products.attend(query, key, value, visible, scaling)
    return attend_by_products(query, key, value, attention_mask, scaling) if output is None else output


def attend_by_products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Attention of one token a row, as plain products that read keys and values once; see `eager_attention_forward`.

    Args:
        query: [B, H, 1, head].
        key: [B, H / groups, K, head].
        value: [B, H / groups, K, head].
        attention_mask: See `mask_scores`.
        scaling: Factor on the scores.

    Returns:
        Output [B, 1, H, head].
    """
    grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])  # heads of a group beside each other
    # With the keys to the left the CPU makes no transposed copy of them, which would take longer than the product.
    scores = (key @ grouped.transpose(-1, -2)).transpose(-1, -2).float() * scaling
    scores = mask_scores(scores.reshape(*query.shape[:3], -1), attention_mask)
    weights = scores.softmax(dim=-1).to(value.dtype).view(*grouped.shape[:3], -1)
    return (weights @ value).reshape(query.shape[0], 1, query.shape[1], -1)


def mask_scores(scores: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Hides masked and future tokens, for any form of mask that the attention implementations ask for.

    Args:
        scores: [B, H, T, K], the T queries being the last of the K tokens.
        attention_mask: None (causal only), padding [B, K] (1 real, 0 padding), or [B, 1, T, K], boolean (True: may be
            seen) or to be added.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        if attention_mask.dtype == torch.bool:
            return scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        return scores + attention_mask
    num_new, num_total = scores.shape[-2:]
    is_visible = torch.ones(num_new, num_total, dtype=torch.bool, device=scores.device).tril(num_total - num_new)
    if attention_mask is not None:
        is_visible = is_visible & attention_mask[:, None, None, -num_total:].bool()
    return scores.masked_fill(~is_visible, torch.finfo(scores.dtype).min)
