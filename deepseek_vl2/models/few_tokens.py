"""The way of a few tokens through a decoder layer on the CPU: two calls of compiled kernels, where that may be.

A layer is called as ever where one of its parts is wrapped, watched, on another device, of a kind that the kernels do
not read, or differentiated.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers.activations import SiLUActivation

from .configuration_deepseek import DeepseekV2Config
from .few_row_products import (
    are_few_rows,
    as_array,
    as_tensor,
    as_visible,
    can_run,
    kernels,
    threads_for,
    try_kernel,
)
from .growing_cache import GrowingLayer
from .streamed_weights import NotCopied, StreamedWeight, Unchanged, is_plain, remember

# Up to so many tokens at once. With more, experts have so many rows that torch's products, which use instructions for
# matrices, catch up.
MAX_TOKENS = 32
# What a configuration calls `topk_method`, by the numbers that the kernels have for them.
CHOICES = ("greedy", "group_limited_greedy", "noaux_tc")


class Routing(NamedTuple):
    """How a router chooses.

    Attributes:
        settings: Top k (0 without experts), number in `CHOICES`, groups, groups to choose from, and 1 or 0 for a
            softmax and for weights that are made to add up to 1.
        scaling: Factor on the weights.
    """

    settings: tuple[int, int, int, int, int, int]
    scaling: float

    @classmethod
    def of(cls, config: DeepseekV2Config) -> "Routing":
        """How a configuration says."""
        settings = (
            config.num_experts_per_tok or 0,
            CHOICES.index(config.topk_method),
            config.n_group or 1,
            config.topk_group or 1,
            int(config.scoring_func == "softmax"),
            int(config.norm_topk_prob),
        )
        return cls(settings, config.routed_scaling_factor)


class FeedForward(NamedTuple):
    """Weights of a feed-forward layer.

    Attributes:
        shared: Gate, up and down of what every token passes; empty if there is none.
        experts: Gate and up as one, and down, of experts; empty if there are none.
        router: Of the experts.
        routing: Also.
        bias: [E], added to the scores by which experts are chosen; None if there is none.
    """

    shared: tuple[StreamedWeight, ...]
    experts: tuple[StreamedWeight, ...] = ()
    router: StreamedWeight | None = None
    routing: Routing | None = None
    bias: torch.Tensor | None = None


class HeadAttention(NamedTuple):
    """Weights of multi-head attention."""

    query: StreamedWeight
    key: StreamedWeight
    value: StreamedWeight
    output: StreamedWeight


class LatentAttention(NamedTuple):
    """Weights of multi-head latent attention.

    Attributes:
        query: What makes the query, or what it is compressed to.
        compressed: What makes the latent and the key for rotation.
        latent_norm: Of the latent.
        up: What would make keys and values of the latent.
        output: The output projection.
        query_norm: Of a compressed query.
        query_up: What makes the query of that.
    """

    query: StreamedWeight
    compressed: StreamedWeight
    latent_norm: StreamedWeight
    up: StreamedWeight
    output: StreamedWeight
    query_norm: StreamedWeight | None = None
    query_up: StreamedWeight | None = None


def are_few_tokens(hidden_states: torch.Tensor) -> bool:
    """Whether hidden states [B, T, D] are those of a few tokens on the CPU."""
    return are_few_rows(hidden_states, MAX_TOKENS)


class _AttentionPlan(NotCopied):
    """What is to be known of an attention layer, as long as its weights stay where they are."""

    def __init__(self, attention: Any, weights: HeadAttention | LatentAttention) -> None:
        self.known = tuple(weight for weight in weights if weight is not None)
        self.unchanged = Unchanged(attention, self.known)
        if isinstance(weights, LatentAttention):
            inputs: tuple[StreamedWeight, ...] = (weights.query, weights.compressed)
        else:
            inputs = (weights.query, weights.key)
        first, output = inputs[0], weights.output
        self.is_readable = (
            all(weight.is_readable for weight in self.known)
            and all(weight.kind == first.kind for weight in inputs)
            and all(weight.num_outputs == weight.num_rows for weight in self.known)
        )
        if not self.is_readable:
            return
        self.norm_types: tuple[torch.dtype, ...] = ()
        self.num_bytes = sum(weight.num_rows for weight in inputs) * first.row_bytes
        places = np.concatenate([weight.places for weight in inputs])
        self.arguments: tuple[Any, ...] = (places, *first.types, output.places, *output.types)
        if not isinstance(weights, LatentAttention):
            value = weights.value
            block_rows = [weight.int4_block_rows for weight in (first, value, output)]
            self.kernel = kernels().attention_kernel(*block_rows)
            self.arguments += (value.places, *value.types)
            return
        latent_norm, up, query_norm, query_up = weights.latent_norm, weights.up, weights.query_norm, weights.query_up
        norms = (latent_norm,) if query_norm is None else (latent_norm, query_norm)
        self.norm_types = tuple(norm.values.dtype for norm in norms)
        self.is_readable = up.scales is None
        query_rows = 0 if query_up is None else query_up.int4_block_rows
        query_arguments = (None, None, None) if query_up is None else (query_up.places, *query_up.types)
        epsilons = [attention.kv_a_layernorm.variance_epsilon, 0.0]
        if query_norm is not None:
            epsilons[1] = attention.q_a_layernorm.variance_epsilon
        self.kernel = kernels().latent_attention_kernel(first.int4_block_rows, query_rows, output.int4_block_rows)
        num_heads = up.num_rows // (attention.qk_nope_head_dim + attention.v_head_dim)
        self.arguments += (
            *query_arguments,
            (latent_norm.addresses[0], 0 if query_norm is None else query_norm.addresses[0]),
            np.array(epsilons, np.float32),
            up.addresses[0],
            up.types[0],
            (num_heads, attention.qk_nope_head_dim, attention.v_head_dim),
        )


def attend(
    norm: Any,
    attention: Any,
    hidden_states: torch.Tensor,
    cache_layer: Any,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None,
) -> torch.Tensor | None:
    """Attention of one token a row, with its norm and residual path; the cache takes the tokens in.

    Args:
        norm: `DeepseekV2RMSNorm`.
        attention: `DeepseekV2MultiHeadAttention` or `DeepseekV2Attention`.
        hidden_states: [B, 1, D].
        cache_layer: What holds the keys and values of earlier tokens.
        position_embeddings: Cosines and sines, each [B, 1, head / 2] or [1, 1, head / 2].
        attention_mask: None, or booleans [B, 1, 1, K], the new tokens among them.

    Returns:
        [B, 1, D]; None if the layers have to be called.
    """
    if hidden_states.shape[1] != 1 or type(cache_layer) is not GrowingLayer or not is_plain(norm):
        return None
    plan: _AttentionPlan | None = _plan_of(attention, "streamed_weights", _AttentionPlan)
    if plan is None or not _is_padding_mask(attention_mask, hidden_states.shape[0], cache_layer.get_seq_length() + 1):
        return None
    norm_weight = remember(norm, "weight", norm.weight)
    if not plan.is_readable or not _can_run(hidden_states, (norm_weight, *plan.known)):
        return None
    if any(dtype != hidden_states.dtype for dtype in plan.norm_types):
        return None
    buffers = cache_layer.take_room(hidden_states)
    if buffers is None:
        return None
    output = _run(
        plan,
        norm,
        norm_weight,
        hidden_states,
        *plan.arguments,
        *(table.numpy()[:, 0] for table in position_embeddings),
        *map(as_array, buffers),
        cache_layer.get_seq_length() - 1,
        as_visible(None if attention_mask is None else attention_mask[:, 0, 0]),
        np.float32(attention.scaling),
    )
    if output is None:
        cache_layer.give_room_back()
    return output


def _is_padding_mask(attention_mask: torch.Tensor | None, batch_size: int, length: int) -> bool:
    """Whether a mask says no more than which tokens [B, K] are to be seen, or nothing at all."""
    if attention_mask is None:
        return True
    return attention_mask.dtype == torch.bool and attention_mask.shape == (batch_size, 1, 1, length)


class _FeedForwardPlan(NotCopied):
    """What is to be known of a feed-forward layer, as long as its weights stay where they are."""

    def __init__(self, mlp: Any, layers: FeedForward) -> None:
        router = () if layers.router is None else (layers.router,)
        self.known = (*router, *layers.experts, *layers.shared)
        self.unchanged = Unchanged(mlp, self.known)
        self.bias = layers.bias
        gates = [layer[0] for layer in (layers.shared, layers.experts) if layer]
        downs = [layer[-1] for layer in (layers.shared, layers.experts) if layer]
        widths = [layer[0].num_rows // (4 - len(layer)) for layer in (layers.shared, layers.experts) if layer]
        first, down = gates[0], downs[0]
        weights = (*layers.shared, *layers.experts)
        self.is_readable = (
            all(weight.is_readable for weight in self.known)
            and (layers.router is None or layers.router.scales is None)
            and all(weight.kind == first.kind for weight in (*gates, *layers.shared[:2]))
            and all(weight.kind == down.kind for weight in downs)
            and first.kind[:3] == down.kind[:3]
            # No blocks of int4 weights that are filled up.
            and all(weight.num_outputs == weight.num_rows for weight in weights)
            and all(width == weight.num_inputs for width, weight in zip(widths, downs, strict=True))
            and not (first.is_int4 and any(width % first.block_rows for width in widths))
        )
        if not self.is_readable:
            return
        self.kernel = kernels().feed_forward_kernel(first.int4_block_rows)
        routing = layers.routing or Routing((0, 0, 1, 1, 1, 0), 1.0)
        first_router = layers.router or first
        none = np.empty((0, 3, 4), np.int64)
        experts, shared = none, none
        if layers.experts:
            gate_up, down_experts = layers.experts
            experts = np.stack((*gate_up.halves(), down_experts.places), axis=1)
        if layers.shared:
            shared = np.stack([weight.places for weight in layers.shared], axis=1)
        weight_type = np.array([first.group_size, down.group_size]) if first.is_int4 else first.types[0]
        self.router = (first_router.places, first_router.types[0])
        self.routing = (routing.settings, np.float32(routing.scaling))
        self.layer_arguments = (experts, shared, weight_type, first.types[1])
        num_widths = routing.settings[0] * (widths[-1] if layers.experts else 0) + (widths[0] if layers.shared else 0)
        self.num_bytes = num_widths * first.row_bytes


def feed_forward(norm: Any, mlp: Any, hidden_states: torch.Tensor) -> torch.Tensor | None:
    """The feed-forward half of a layer for a few tokens, with its norm and residual path.

    Args:
        norm: `DeepseekV2RMSNorm`.
        mlp: `DeepseekV2MLP` or `DeepseekV2MoE`.
        hidden_states: [B, T, D].

    Returns:
        [B, T, D]; None if the layers have to be called.
    """
    plan: _FeedForwardPlan | None = _plan_of(mlp, "feed_forward", _FeedForwardPlan) if is_plain(norm) else None
    if plan is None or not plan.is_readable:
        return None
    norm_weight = remember(norm, "weight", norm.weight)
    if not _can_run(hidden_states, (norm_weight, *plan.known)):
        return None
    bias = None if plan.bias is None else plan.bias.float().numpy()
    settings, scaling = plan.routing
    arguments = (*plan.router, bias, settings, scaling, *plan.layer_arguments)
    return _run(plan, norm, norm_weight, hidden_states, *arguments)


def _run(
    plan: _AttentionPlan | _FeedForwardPlan,
    norm: Any,
    norm_weight: StreamedWeight,
    hidden_states: torch.Tensor,
    *arguments: Any,
) -> torch.Tensor | None:
    """Calls the kernel of a plan; None if it cannot be compiled, after which the plan is not tried again."""
    rows = as_array(hidden_states).reshape(-1, hidden_states.shape[-1])
    outputs = np.empty(rows.shape, rows.dtype)
    inputs = (rows, norm_weight.addresses[0], np.float32(norm.variance_epsilon))
    plan.is_readable = try_kernel(plan.kernel, threads_for(plan.num_bytes), *inputs, *arguments, outputs)
    return as_tensor(outputs.reshape(hidden_states.shape), hidden_states.dtype) if plan.is_readable else None


def _plan_of(module: nn.Module, method_name: str, plan_class: Any) -> Any:
    """The plan of a module; None if calling it does more than its weights say, which that method of it returns."""
    plan = vars(module).get("_few_tokens")
    if plan is None or not plan.unchanged.holds():
        # By the class: an adapter around a layer may pass on what it does not know.
        method = getattr(type(module), method_name, None)
        weights = method(module) if method and is_plain(module) else None
        plan = vars(module)["_few_tokens"] = None if weights is None else plan_class(module, weights)
    return plan


def _can_run(hidden_states: torch.Tensor, weights: tuple[StreamedWeight, ...]) -> bool:
    norm, *others = weights
    if not norm.is_readable or norm.values.dtype != hidden_states.dtype or not hidden_states.is_contiguous():
        return False
    for weight in others:
        # The kernels round inputs of int4 weights to 16 bits.
        if weight.is_int4 and hidden_states.dtype == torch.float32:
            return False
    return can_run(hidden_states, *(weight.values for weight in weights))


def is_silu(activation: nn.Module) -> bool:
    """Whether an activation is what the kernels compute."""
    return isinstance(activation, SiLUActivation | nn.SiLU)
