"""The way of a single token through a decoder layer on the CPU: two calls of compiled kernels, where that may be.

A layer is called as ever where one of its parts is wrapped, watched, on another device, of a kind that the kernels do
not read, or differentiated.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers.activations import SiLUActivation

from .few_row_products import are_few_rows, as_array, as_tensor, can_run, compiled_layers, run_kernel, threads_for
from .growing_cache import GrowingLayer
from .streamed_weights import StreamedWeight, is_plain, remember

# What a configuration calls `topk_method`, by the numbers that the kernels have for them.
CHOICES = ("greedy", "group_limited_greedy", "noaux_tc")


class Routing(NamedTuple):
    """How a router chooses.

    Attributes:
        settings: Top k (0 without experts), number in `CHOICES`, groups, groups to choose from, and 1 or 0 for a
            softmax and for weights that are made to add up to 1.
        scaling: Factor on the weights.
        bias: [E] for the choice, or None.
    """

    settings: tuple[int, int, int, int, int, int]
    scaling: float
    bias: torch.Tensor | None


class FeedForward(NamedTuple):
    """Weights of a feed-forward layer.

    Attributes:
        shared: Gate, up and down of what every token passes; empty if there is none.
        experts: Gate and up as one, and down, of experts; empty if there are none.
        router: Of the experts.
        routing: Also.
    """

    shared: tuple[StreamedWeight, ...]
    experts: tuple[StreamedWeight, ...] = ()
    router: StreamedWeight | None = None
    routing: Routing | None = None


def is_one_token(hidden_states: torch.Tensor) -> bool:
    """Whether hidden states [..., D] are those of a single token on the CPU."""
    return are_few_rows(hidden_states) and hidden_states.numel() == hidden_states.shape[-1]


class _AttentionPlan:
    """What is to be known of an attention layer and its norm, as long as their weights stay where they are."""

    def __init__(self, weights: tuple[StreamedWeight, ...]) -> None:
        self.weights = weights
        _, query, key, value, output = weights
        inputs = (query, key, value)
        are_alike = all(weight.kind == query.kind for weight in inputs)
        are_whole = all(weight.num_outputs == weight.num_rows for weight in (*inputs, output))
        self.is_readable = are_alike and are_whole and all(weight.is_readable for weight in weights)
        if self.is_readable:
            self.kernel = compiled_layers().attention_kernel(query.int4_block_rows, output.int4_block_rows)
            places = np.concatenate([weight.places for weight in inputs])
            self.arguments = (places, *query.types, output.places, *output.types)
            self.num_bytes = sum(weight.num_rows for weight in inputs) * query.row_bytes


def attend(
    norm: Any,
    attention: Any,
    hidden_states: torch.Tensor,
    cache_layer: Any,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor | None:
    """Multi-head attention of one token, with its norm and residual path; the cache takes the token in.

    Args:
        norm: `DeepseekV2RMSNorm`.
        attention: `DeepseekV2MultiHeadAttention`.
        hidden_states: [1, 1, D].
        cache_layer: What holds the keys and values of earlier tokens.
        position_embeddings: Cosines and sines, each [1, 1, head / 2].

    Returns:
        [1, 1, D]; None if the layers have to be called.
    """
    own_weights = _of_plain(attention, "streamed_weights") if is_plain(norm) else None
    if own_weights is None or type(cache_layer) is not GrowingLayer:
        return None
    weights = (remember(norm, "weight", norm.weight), *own_weights)
    plan: _AttentionPlan | None = vars(attention).get("_one_token")
    if plan is None or plan.weights != weights:
        plan = vars(attention)["_one_token"] = _AttentionPlan(weights)
    if not plan.is_readable or not _can_run(hidden_states, weights):
        return None
    buffers = cache_layer.take_room(hidden_states)
    if buffers is None:
        return None
    row = as_array(hidden_states).reshape(-1)
    outputs = np.empty(row.shape, row.dtype)
    run_kernel(
        plan.kernel,
        threads_for(plan.num_bytes),
        row,
        weights[0].addresses[0],
        np.float32(norm.variance_epsilon),
        *plan.arguments,
        *(table.numpy()[0, 0] for table in position_embeddings),
        *map(as_array, buffers),
        cache_layer.get_seq_length() - 1,
        np.float32(attention.scaling),
        outputs,
    )
    return as_tensor(outputs.reshape(hidden_states.shape), hidden_states.dtype)


class _FeedForwardPlan:
    """The same of a feed-forward layer and its norm."""

    def __init__(self, layers: FeedForward) -> None:
        self.layers = layers
        gates = [layer[0] for layer in (layers.shared, layers.experts) if layer]
        downs = [layer[-1] for layer in (layers.shared, layers.experts) if layer]
        widths = [layer[0].num_rows // (4 - len(layer)) for layer in (layers.shared, layers.experts) if layer]
        first, down = gates[0], downs[0]
        weights = (*layers.shared, *layers.experts)
        self.is_readable = (
            all(weight.is_readable for weight in weights)
            and (layers.router is None or (layers.router.is_readable and layers.router.scales is None))
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
        self.kernel = compiled_layers().feed_forward_kernel(first.int4_block_rows)
        routing = layers.routing or Routing((0, 0, 1, 1, 1, 0), 1.0, None)
        router = layers.router or first
        none = np.empty((0, 3, 4), np.int64)
        experts, shared = none, none
        if layers.experts:
            gate_up, down_experts = layers.experts
            experts = np.stack((*gate_up.halves(), down_experts.places), axis=1)
        if layers.shared:
            shared = np.stack([weight.places for weight in layers.shared], axis=1)
        weight_type = np.array([first.group_size, down.group_size]) if first.is_int4 else first.types[0]
        self.router = (router.places, router.types[0])
        self.routing = (routing.settings, np.float32(routing.scaling))
        self.layer_arguments = (experts, shared, weight_type, first.types[1])
        num_widths = routing.settings[0] * (widths[-1] if layers.experts else 0) + (widths[0] if layers.shared else 0)
        self.num_bytes = num_widths * first.row_bytes


def feed_forward(norm: Any, mlp: Any, hidden_states: torch.Tensor) -> torch.Tensor | None:
    """The feed-forward half of a layer for one token, with its norm and residual path.

    Args:
        norm: `DeepseekV2RMSNorm`.
        mlp: `DeepseekV2MLP` or `DeepseekV2MoE`.
        hidden_states: [1, 1, D].

    Returns:
        [1, 1, D]; None if the layers have to be called.
    """
    layers: FeedForward | None = _of_plain(mlp, "feed_forward") if is_plain(norm) else None
    if layers is None:
        return None
    plan: _FeedForwardPlan | None = vars(mlp).get("_one_token")
    if plan is None or plan.layers != layers:
        plan = vars(mlp)["_one_token"] = _FeedForwardPlan(layers)
    norm_weight = remember(norm, "weight", norm.weight)
    router = () if layers.router is None else (layers.router,)
    if not plan.is_readable or not _can_run(hidden_states, (norm_weight, *router, *layers.experts, *layers.shared)):
        return None
    bias = None if layers.routing is None or layers.routing.bias is None else layers.routing.bias.numpy()
    settings, scaling = plan.routing
    row = as_array(hidden_states).reshape(-1)
    outputs = np.empty(row.shape, row.dtype)
    run_kernel(
        plan.kernel,
        threads_for(plan.num_bytes),
        row,
        norm_weight.addresses[0],
        np.float32(norm.variance_epsilon),
        *plan.router,
        bias,
        settings,
        scaling,
        *plan.layer_arguments,
        outputs,
    )
    return as_tensor(outputs.reshape(hidden_states.shape), hidden_states.dtype)


def _of_plain(module: nn.Module, name: str) -> Any:
    """What a module's method of that name returns; None without such a method, and if calling the module does more."""
    # By the class: an adapter around a layer may pass on what it does not know.
    method = getattr(type(module), name, None)
    return method(module) if method and is_plain(module) else None


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
