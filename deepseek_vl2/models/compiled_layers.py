"""The two halves of a decoder layer for one token, each a chain of `compiled_kernels` in one call.

What Python takes to call a dozen kernels a layer one by one is as long as reading the layer's weights in int4.
"""

import zlib
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit, prange

from . import compiled_kernels
from .compiled_kernels import (
    _FASTMATH,
    _ROWS_AT_ONCE,
    _compiled,
    _dot,
    _dot_four,
    _from_float32,
    _load,
    _to_float32,
    attend_one_token,
    int4_gated_kernel,
    int4_rows_kernel,
    multiply_rows,
    run_gated_layers,
)

# numba keeps what it compiled by the date of this file and by what functions close over, which this is, too: it tells
# apart what was compiled with other kernels.
_STAMP = zlib.crc32(Path(compiled_kernels.__file__).read_bytes())

_TAKEN = np.float32(-np.inf)
_FORBIDDEN = np.finfo(np.float32).min  # before those that are taken, where more are asked for than may be
# By name, see `compiled_kernels`.
_multiply_int4_rows_32, _multiply_int4_rows_64 = int4_rows_kernel(32), int4_rows_kernel(64)
_run_gated_int4_32, _run_gated_int4_64 = int4_gated_kernel(32), int4_gated_kernel(64)


@njit(inline="always")
def _project(
    block_rows: Any,
    num_threads: Any,
    inputs: Any,
    places: Any,
    spans: Any,
    weight_type: Any,
    scale_like: Any,
    outputs: Any,
) -> None:
    """Multiplies rows by weights whose kind is known when this is compiled: 0, or outputs of int4 side by side."""
    if block_rows == 0:
        multiply_rows(num_threads, inputs, places, spans, weight_type, scale_like, outputs)
    elif block_rows == 64:
        _multiply_int4_rows_64(num_threads, inputs, places, spans, weight_type, scale_like, outputs)
    else:
        _multiply_int4_rows_32(num_threads, inputs, places, spans, weight_type, scale_like, outputs)


@njit(fastmath=_FASTMATH)
def _normalize_rows(rows: Any, address: Any, like: Any, epsilon: Any, outputs: Any) -> None:
    """Root-mean-square norm.

    Args:
        rows: [P, D] numbers (see `compiled_kernels.multiply_rows`).
        address: Of the weight, D numbers.
        like: See `compiled_kernels.multiply_rows`, of the same type as the rows.
        epsilon: Added to the mean square, float32.
        outputs: [P, D] numbers, written to.
    """
    width = rows.shape[1]
    for row in range(len(rows)):
        total = np.float32(0)
        for i in range(width):
            number = _to_float32(rows[row, i])
            total += number * number
        factor = np.float32(1) / np.sqrt(total / np.float32(width) + epsilon)
        for i in range(width):
            # Rounded before it is multiplied by the weight, too.
            normed = _to_float32(_from_float32(_to_float32(rows[row, i]) * factor, rows))
            outputs[row, i] = _from_float32(normed * _load(address, i, like), outputs)


@njit(fastmath=_FASTMATH)
def _rotate_halves(heads: Any, cosines: Any, sines: Any, outputs: Any) -> None:
    """Rotates number i of the first half of each head with number i of the second.

    Args:
        heads: [H, D] numbers (see `compiled_kernels.multiply_rows`).
        cosines: [D / 2] float32.
        sines: [D / 2] float32.
        outputs: [H, D] numbers, written to.
    """
    half = len(cosines)
    for head in range(len(heads)):
        for i in range(half):
            first, second = _to_float32(heads[head, i]), _to_float32(heads[head, half + i])
            outputs[head, i] = _from_float32(first * cosines[i] - second * sines[i], outputs)
            outputs[head, half + i] = _from_float32(second * cosines[i] + first * sines[i], outputs)


# Loops, here and elsewhere: what numba makes of an assignment to a slice takes seconds to compile.
@njit
def _spans_of_one(num_matrices: Any) -> Any:
    """Spans of matrices that all multiply the one row."""
    spans = np.zeros((num_matrices, 2), np.int64)
    for matrix in range(num_matrices):
        spans[matrix, 1] = 1
    return spans


@njit
def _write_heads(heads: Any, position: Any, cache: Any) -> None:
    """Writes one token's numbers [G, D] into a cache [1, G, room, D]."""
    for head in range(len(heads)):
        for i in range(heads.shape[1]):
            cache[0, head, position, i] = heads[head, i]


@njit
def _add(first: Any, second: Any, outputs: Any) -> None:
    for i in range(len(outputs)):
        outputs[i] = _from_float32(_to_float32(first[i]) + _to_float32(second[i]), outputs)


@cache
def attention_kernel(input_block_rows: int, value_block_rows: int, output_block_rows: int) -> Any:
    """Multi-head attention with its norm and residual path.

    Args:
        input_block_rows: Of int4 weights of query and key the outputs that lie side by side; 0 of others.
        value_block_rows: The same of values, which in a model of int4 are of another kind.
        output_block_rows: The same of the output projection.
    """
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
        value_places: Any,
        value_type: Any,
        value_scales: Any,
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
            input_places: [2, 4] of query and key.
            input_type: Of their weights.
            input_scales: Also.
            output_places: [1, 4] of the output projection.
            output_type: Of its weight.
            output_scales: Also.
            value_places: [1, 4] of the value.
            value_type: Of its weight.
            value_scales: Also.
            cosines: [head / 2] float32.
            sines: [head / 2] float32.
            keys: [1, G, room, head] numbers; the key is written behind the others.
            values: [1, G, room, head] numbers, also.
            length: How many tokens the cache holds before.
            scaling: Factor on the scores.
            outputs: [D] numbers, written to.
        """
        num_groups, _, width = keys.shape[1:]
        spans = _spans_of_one(2)
        normed = np.empty((1, len(hidden)), hidden.dtype)
        _normalize_rows(hidden.reshape(1, len(hidden)), norm_address, hidden, epsilon, normed)
        query_end = input_places[0, 2]
        key_end = query_end + num_groups * width
        projected = np.empty(key_end, hidden.dtype)
        _project(input_block_rows, num_threads, normed, input_places, spans, input_type, input_scales, projected)
        value = np.empty((num_groups, width), hidden.dtype)
        one, flat = spans[:1], value.reshape(num_groups * width)
        _project(value_block_rows, num_threads, normed, value_places, one, value_type, value_scales, flat)
        query = np.empty((query_end // width, width), hidden.dtype)
        _rotate_halves(projected[:query_end].reshape(query_end // width, width), cosines, sines, query)
        key = np.empty((num_groups, width), hidden.dtype)
        _rotate_halves(projected[query_end:].reshape(num_groups, width), cosines, sines, key)
        _write_heads(key, length, keys)
        _write_heads(value, length, values)
        queries = query.reshape(1, num_groups, query_end // width // num_groups, width)
        mixed = np.empty(queries.shape, hidden.dtype)
        attend_one_token(num_threads, queries, keys, values, length + 1, None, scaling, mixed)
        projected = np.empty(len(hidden), hidden.dtype)
        rows = mixed.reshape(1, query_end)
        _project(output_block_rows, num_threads, rows, output_places, one, output_type, output_scales, projected)
        _add(hidden, projected, outputs)
        return stamp

    return attend


@njit
def _largest(numbers: Any) -> int:
    """Where the first of the largest numbers is."""
    place = 0
    for i in range(len(numbers)):
        if numbers[i] > numbers[place]:
            place = i
    return place


@njit
def _rotate_interleaved(heads: Any, cosines: Any, sines: Any, outputs: Any) -> None:
    """Rotates neighbouring pairs of each head [H, P] into first and second halves."""
    half = len(cosines)
    for head in range(len(heads)):
        for i in range(half):
            first, second = _to_float32(heads[head, 2 * i]), _to_float32(heads[head, 2 * i + 1])
            outputs[head, i] = _from_float32(first * cosines[i] - second * sines[i], outputs)
            outputs[head, half + i] = _from_float32(second * cosines[i] + first * sines[i], outputs)


@njit(parallel=True, nogil=True, fastmath=_FASTMATH)
def _attend_latent(
    num_threads: Any,
    queries: Any,
    rotated: Any,
    up_address: Any,
    up_like: Any,
    rope_keys: Any,
    latents: Any,
    length: Any,
    scaling: Any,
    outputs: Any,
) -> None:
    """Attention of one token of H heads to cached latents, which stay as they are.

    Args:
        num_threads: See `compiled_kernels.multiply_rows`.
        queries: [H, nope] numbers.
        rotated: [H, P] numbers.
        up_address: Of the up-projection [H, nope + V, R].
        up_like: Something of its type.
        rope_keys: [room, P] numbers.
        latents: [room, R] numbers.
        length: How many of these there are.
        scaling: Factor on the scores.
        outputs: [H, V] numbers, written to.
    """
    num_heads, num_plain = queries.shape
    num_rotated, rank = rotated.shape[1], latents.shape[1]
    value_width = outputs.shape[1]
    row_bytes = rank * up_like.itemsize
    num_units = (num_heads + _ROWS_AT_ONCE - 1) // _ROWS_AT_ONCE
    for part in prange(num_threads):
        query = np.empty((_ROWS_AT_ONCE, rank), np.float32)
        query_rope = np.empty((_ROWS_AT_ONCE, num_rotated), np.float32)
        scores = np.empty((_ROWS_AT_ONCE, length), np.float32)
        mixed = np.empty((_ROWS_AT_ONCE, rank), np.float32)
        for unit in range(part * num_units // num_threads, (part + 1) * num_units // num_threads):
            first = unit * _ROWS_AT_ONCE
            count = min(_ROWS_AT_ONCE, num_heads - first)
            # Heads that there are not have queries of zeros, and their outputs are left.
            for head in range(_ROWS_AT_ONCE):
                for i in range(rank):
                    query[head, i] = 0
                    mixed[head, i] = 0
                for i in range(num_rotated):
                    query_rope[head, i] = 0
            for head in range(count):
                start = up_address + (first + head) * (num_plain + value_width) * row_bytes
                for number in range(num_plain):
                    factor = _to_float32(queries[first + head, number])
                    for i in range(rank):
                        query[head, i] += factor * _load(start + number * row_bytes, i, up_like)
                for i in range(num_rotated):
                    query_rope[head, i] = _to_float32(rotated[first + head, i])
            for token in range(length):
                # Each latent is read once for four heads.
                plain = _dot_four(query, 0, latents.ctypes.data + token * rank * latents.itemsize, latents)
                rope_address = rope_keys.ctypes.data + token * num_rotated * rope_keys.itemsize
                rope = _dot_four(query_rope, 0, rope_address, rope_keys)
                scores[0, token] = (plain[0] + rope[0]) * scaling
                scores[1, token] = (plain[1] + rope[1]) * scaling
                scores[2, token] = (plain[2] + rope[2]) * scaling
                scores[3, token] = (plain[3] + rope[3]) * scaling
            for head in range(_ROWS_AT_ONCE):
                largest = scores[head, _largest(scores[head])]
                total = np.float32(0)
                for token in range(length):
                    scores[head, token] = np.exp(scores[head, token] - largest)
                    total += scores[head, token]
                for token in range(length):
                    scores[head, token] /= total
            for token in range(length):
                for i in range(rank):
                    latent = _to_float32(latents[token, i])
                    mixed[0, i] += scores[0, token] * latent
                    mixed[1, i] += scores[1, token] * latent
                    mixed[2, i] += scores[2, token] * latent
                    mixed[3, i] += scores[3, token] * latent
            for head in range(count):
                start = up_address + ((first + head) * (num_plain + value_width) + num_plain) * row_bytes
                for i in range(value_width):
                    output = _dot(mixed[head], start + i * row_bytes, up_like)
                    outputs[first + head, i] = _from_float32(output, outputs)


@cache
def latent_attention_kernel(input_block_rows: int, query_block_rows: int, output_block_rows: int) -> Any:
    """Multi-head latent attention with its norm and residual path.

    Args:
        input_block_rows: Of int4 weights of the first projections the outputs that lie side by side; 0 of others.
        query_block_rows: The same of the second projection of a compressed query.
        output_block_rows: The same of the output projection.
    """
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
        query_places: Any,
        query_type: Any,
        query_scales: Any,
        norm_addresses: Any,
        norm_epsilons: Any,
        up_address: Any,
        up_like: Any,
        widths: Any,
        cosines: Any,
        sines: Any,
        rope_keys: Any,
        latents: Any,
        length: Any,
        scaling: Any,
        outputs: Any,
    ) -> int:
        """Reads one token and adds it to the cache; see `attention_kernel` for what is not named here.

        Args:
            num_threads: See there.
            hidden: See there.
            norm_address: See there.
            epsilon: See there.
            input_places: [2, 4] of the query (or what it is compressed to), and of latent and key for rotation.
            input_type: See there.
            input_scales: See there.
            output_places: See there.
            output_type: See there.
            output_scales: See there.
            query_places: [1, 4] of the second projection of a compressed query; None if it is not compressed.
            query_type: Of its weight.
            query_scales: Also.
            norm_addresses: Of the norms of latent and compressed query (or 0).
            norm_epsilons: Of these, [2] float32.
            up_address: Of the up-projection of latents.
            up_like: Something of its type.
            widths: How many heads there are, and numbers a head that are not rotated, and of values.
            cosines: [P / 2] float32.
            sines: [P / 2] float32.
            rope_keys: [1, 1, room, P] numbers; the new one is written behind the others.
            latents: [1, 1, room, R] numbers, also.
            length: See there.
            scaling: See there.
            outputs: See there.
        """
        num_heads, num_plain, value_width = widths
        num_rotated, rank = rope_keys.shape[3], latents.shape[3]
        spans = _spans_of_one(2)
        normed = np.empty((1, len(hidden)), hidden.dtype)
        _normalize_rows(hidden.reshape(1, len(hidden)), norm_address, hidden, epsilon, normed)
        query_end = input_places[0, 2]
        projected = np.empty(query_end + rank + num_rotated, hidden.dtype)
        _project(input_block_rows, num_threads, normed, input_places, spans, input_type, input_scales, projected)
        query = projected[:query_end]
        if query_places is not None:
            compressed = np.empty((1, query_end), hidden.dtype)
            rows = query.reshape(1, query_end)
            _normalize_rows(rows, norm_addresses[1], hidden, norm_epsilons[1], compressed)
            query = np.empty(query_places[0, 2], hidden.dtype)
            _project(
                query_block_rows, num_threads, compressed, query_places, spans[:1], query_type, query_scales, query
            )
        latent = projected[query_end : query_end + rank].reshape(1, rank)
        _normalize_rows(latent, norm_addresses[0], hidden, norm_epsilons[0], latents[0, :, length])
        key = projected[query_end + rank :].reshape(1, num_rotated)
        _rotate_interleaved(key, cosines, sines, rope_keys[0, :, length])
        queries = query.reshape(num_heads, num_plain + num_rotated)
        rotated = np.empty((num_heads, num_rotated), hidden.dtype)
        _rotate_interleaved(queries[:, num_plain:], cosines, sines, rotated)
        mixed = np.empty((num_heads, value_width), hidden.dtype)
        _attend_latent(
            num_threads,
            queries[:, :num_plain],
            rotated,
            up_address,
            up_like,
            rope_keys[0, 0],
            latents[0, 0],
            length + 1,
            scaling,
            mixed,
        )
        projected = np.empty(len(hidden), hidden.dtype)
        rows = mixed.reshape(1, num_heads * value_width)
        _project(output_block_rows, num_threads, rows, output_places, spans[:1], output_type, output_scales, projected)
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
    scores = np.empty(num_experts, np.float32)
    marks = np.empty(num_experts, np.float32)  # by which experts are chosen
    largest = logits[_largest(logits)]
    total = np.float32(0)
    for expert in range(num_experts):
        scores[expert] = np.exp(logits[expert] - largest) if is_softmax else 1 / (1 + np.exp(-logits[expert]))
        total += scores[expert]
    for expert in range(num_experts):
        if is_softmax:
            scores[expert] /= total
        marks[expert] = scores[expert]
        if bias is not None:
            marks[expert] += bias[expert]
    if choice > 0:
        size = num_experts // num_groups
        group_marks = np.empty(num_groups, np.float32)
        for group in range(num_groups):
            first, second = np.float32(-np.inf), np.float32(-np.inf)
            for expert in range(group * size, (group + 1) * size):
                first, second = max(first, marks[expert]), max(second, min(first, marks[expert]))
            group_marks[group] = first + second if choice == 2 and size > 1 else first
        for _ in range(num_best_groups):
            group_marks[_largest(group_marks)] = _TAKEN
        for expert in range(num_experts):
            if group_marks[expert // size] != _TAKEN:
                marks[expert] = np.float32(0) if choice == 1 else _FORBIDDEN
    chosen = np.empty(top_k, np.int64)
    weights = np.empty(top_k, np.float32)
    total = np.float32(1e-20)
    for i in range(top_k):
        chosen[i] = _largest(marks)
        weights[i] = scores[chosen[i]]
        marks[chosen[i]] = _TAKEN
        total += weights[i]
    for i in range(top_k):
        weights[i] *= scaling / total if is_normalized and top_k > 1 else scaling
    return chosen, weights


@njit
def _copy_places(places: Any, copy: Any) -> None:
    for matrix in range(places.shape[0]):
        for column in range(places.shape[1]):
            copy[matrix, column] = places[matrix, column]


@cache
def feed_forward_kernel(block_rows: int) -> Any:
    """The feed-forward half of a layer, of experts or not, with its norm and residual path.

    Args:
        block_rows: Of int4 weights the outputs that lie side by side; 0 of others.
    """
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
        _normalize_rows(hidden.reshape(1, len(hidden)), norm_address, hidden, epsilon, normed)
        top_k = settings[0]
        layers = np.empty((top_k + len(shared), 3, 4), np.int64)
        factors = np.ones(top_k + len(shared), np.float32)
        for layer in range(len(shared)):
            _copy_places(shared[layer], layers[top_k + layer])
        if top_k > 0:
            row = np.empty((1, len(hidden)), np.float32)
            for i in range(len(hidden)):
                row[0, i] = _to_float32(normed[0, i])
            logits = np.empty(router_places[0, 2], np.float32)
            spans = _spans_of_one(1)
            multiply_rows(num_threads, row, router_places, spans, router_type, None, logits)
            chosen, weights = _choose_experts(logits, bias, settings, scaling)
            for i in range(top_k):
                _copy_places(experts[chosen[i]], layers[i])
                factors[i] = weights[i]
        output = np.empty(len(hidden), hidden.dtype)
        if block_rows == 0:
            run_gated_layers(num_threads, normed[0], layers, factors, weight_type, scale_like, output)
        elif block_rows == 64:
            _run_gated_int4_64(num_threads, normed[0], layers, factors, weight_type, scale_like, output)
        else:
            _run_gated_int4_32(num_threads, normed[0], layers, factors, weight_type, scale_like, output)
        _add(hidden, output, outputs)
        return stamp

    return feed_forward
