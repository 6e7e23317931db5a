"""The two halves of a decoder layer for one token, each a chain of `compiled_kernels` in one call.

What Python takes to call a dozen kernels a layer one by one is as long as reading the layer's weights in int4.
"""

import zlib
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from . import compiled_kernels
from .compiled_kernels import (
    _compiled,
    _from_float32,
    _to_float32,
    attend_one_token,
    int4_gated_kernel,
    int4_rows_kernel,
    multiply_rows,
    normalize_rows,
    rotate_halves,
    run_gated_layers,
)

# numba keeps what it compiled by the date of this file and by what functions close over, which this is, too: it tells
# apart what was compiled with other kernels.
_STAMP = zlib.crc32(Path(compiled_kernels.__file__).read_bytes())


def _rows_kernel(block_rows: int | None) -> Any:
    return multiply_rows if block_rows is None else int4_rows_kernel(block_rows)


@njit
def _add(first: Any, second: Any, outputs: Any) -> None:
    for i in range(len(outputs)):
        outputs[i] = _from_float32(_to_float32(first[i]) + _to_float32(second[i]), outputs)


@cache
def attention_kernel(input_block_rows: int | None, output_block_rows: int | None) -> Any:
    """Multi-head attention with its norm and residual path.

    Args:
        input_block_rows: Of int4 weights of query, key and value the outputs that lie side by side; None of others.
        output_block_rows: The same of the output projection.
    """
    project_inputs, project_output = _rows_kernel(input_block_rows), _rows_kernel(output_block_rows)
    stamp = _STAMP

    @partial(_compiled, is_parallel=False)
    def attend(
        num_threads: Any,
        hidden: Any,
        norm_address: Any,
        epsilon: Any,
        input_places: Any,
        input_type: Any,
        input_scales: Any,
        output_places: Any,
        output_type: Any,
        output_scales: Any,
        cosines: Any,
        sines: Any,
        keys: Any,
        values: Any,
        length: Any,
        scaling: Any,
        outputs: Any,
    ) -> int:
        """Reads one token and adds it to the cache.

        Args:
            num_threads: See `compiled_kernels.multiply_rows`, as for all places, types and scales.
            hidden: [D] numbers.
            norm_address: Of the norm's weight, of the same type.
            epsilon: Of the norm.
            input_places: [3, 4] of query, key and value.
            input_type: Of their weights.
            input_scales: Also.
            output_places: [1, 4] of the output projection.
            output_type: Of its weight.
            output_scales: Also.
            cosines: [head / 2] float32.
            sines: [head / 2] float32.
            keys: [1, G, room, head] numbers; the key is written behind the others.
            values: [1, G, room, head] numbers, also.
            length: How many tokens the cache holds before.
            scaling: Factor on the scores.
            outputs: [D] numbers, written to.
        """
        num_groups, _, width = keys.shape[1:]
        spans = np.zeros((3, 2), np.int64)
        spans[:, 1] = 1
        normed = np.empty((1, len(hidden)), hidden.dtype)
        normalize_rows(hidden.reshape(1, len(hidden)), norm_address, hidden, epsilon, normed)
        query_end = input_places[0, 2]
        key_end = query_end + num_groups * width
        projected = np.empty(key_end + num_groups * width, hidden.dtype)
        project_inputs(num_threads, normed, input_places, spans, input_type, input_scales, projected)
        query = np.empty((query_end // width, width), hidden.dtype)
        rotate_halves(projected[:query_end].reshape(query_end // width, width), cosines, sines, query)
        key = np.empty((num_groups, width), hidden.dtype)
        rotate_halves(projected[query_end:key_end].reshape(num_groups, width), cosines, sines, key)
        keys[0, :, length] = key
        values[0, :, length] = projected[key_end:].reshape(num_groups, width)
        queries = query.reshape(1, num_groups, query_end // width // num_groups, width)
        mixed = np.empty(queries.shape, hidden.dtype)
        attend_one_token(num_threads, queries, keys, values, length + 1, None, scaling, mixed)
        projected = np.empty(len(hidden), hidden.dtype)
        rows = mixed.reshape(1, query_end)
        project_output(num_threads, rows, output_places, spans[:1], output_type, output_scales, projected)
        _add(hidden, projected, outputs)
        return stamp

    return attend


@njit
def _choose_experts(logits: Any, bias: Any, settings: Any, scaling: Any) -> Any:
    """Chooses experts as `DeepseekV2TopkRouter` does; returns their numbers and weights.

    Args:
        logits: [E] float32.
        bias: [E] float32 for the choice, or None.
        settings: See `one_token.Routing`.
        scaling: Factor on the weights.
    """
    top_k, choice, num_groups, num_best_groups, is_softmax, is_normalized = settings
    num_experts = len(logits)
    if is_softmax:
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
    else:
        scores = np.float32(1) / (np.float32(1) + np.exp(-logits))
    marks = scores.copy()  # by which experts are chosen
    if bias is not None:
        marks += bias
    if choice > 0:
        forbidden = np.float32(0) if choice == 1 else np.float32(-np.inf)
        grouped = marks.reshape(num_groups, num_experts // num_groups)
        group_marks = np.empty(num_groups, np.float32)
        for group in range(num_groups):
            ordered = np.sort(grouped[group])
            group_marks[group] = ordered[-1]
            if choice == 2 and len(ordered) > 1:
                group_marks[group] += ordered[-2]
        for group in np.argsort(-group_marks)[num_best_groups:]:
            grouped[group] = forbidden
    chosen = np.empty(top_k, np.int64)
    weights = np.empty(top_k, np.float32)
    for i in range(top_k):
        chosen[i] = marks.argmax()
        weights[i] = scores[chosen[i]]
        marks[chosen[i]] = -np.inf
    if is_normalized and top_k > 1:
        weights /= weights.sum() + np.float32(1e-20)
    return chosen, weights * scaling


@cache
def feed_forward_kernel(block_rows: int | None) -> Any:
    """The feed-forward half of a layer, of experts or not, with its norm and residual path.

    Args:
        block_rows: Of int4 weights the outputs that lie side by side; None of others.
    """
    run_gated = run_gated_layers if block_rows is None else int4_gated_kernel(block_rows)
    stamp = _STAMP

    @partial(_compiled, is_parallel=False)
    def feed_forward(
        num_threads: Any,
        hidden: Any,
        norm_address: Any,
        epsilon: Any,
        router_places: Any,
        router_type: Any,
        bias: Any,
        settings: Any,
        scaling: Any,
        experts: Any,
        shared: Any,
        weight_type: Any,
        scale_like: Any,
        outputs: Any,
    ) -> int:
        """Runs one token.

        Args:
            num_threads: See `compiled_kernels.multiply_rows`, as for all places and types.
            hidden: [D] numbers.
            norm_address: Of the norm's weight, of the same type.
            epsilon: Of the norm.
            router_places: [1, 4] of the router's weight.
            router_type: Of it.
            bias: [E] float32, see `_choose_experts`.
            settings: See `one_token.Routing`.
            scaling: Factor on the experts' weights.
            experts: [E, 3, 4], see `compiled_kernels.run_gated_layers`.
            shared: [S, 3, 4] of layers that are always run.
            weight_type: See `compiled_kernels.run_gated_layers`.
            scale_like: Also.
            outputs: [D] numbers, written to.
        """
        normed = np.empty((1, len(hidden)), hidden.dtype)
        normalize_rows(hidden.reshape(1, len(hidden)), norm_address, hidden, epsilon, normed)
        top_k = settings[0]
        layers = np.empty((top_k + len(shared), 3, 4), np.int64)
        layers[top_k:] = shared
        factors = np.ones(top_k + len(shared), np.float32)
        if top_k > 0:
            row = np.empty((1, len(hidden)), np.float32)
            for i in range(len(hidden)):
                row[0, i] = _to_float32(normed[0, i])
            logits = np.empty(router_places[0, 2], np.float32)
            spans = np.zeros((1, 2), np.int64)
            spans[0, 1] = 1
            multiply_rows(num_threads, row, router_places, spans, router_type, None, logits)
            chosen, weights = _choose_experts(logits, bias, settings, scaling)
            for i in range(top_k):
                layers[i] = experts[chosen[i]]
            factors[:top_k] = weights
        output = np.empty(len(hidden), hidden.dtype)
        run_gated(num_threads, normed[0], layers, factors, weight_type, scale_like, output)
        _add(hidden, output, outputs)
        return stamp

    return feed_forward
