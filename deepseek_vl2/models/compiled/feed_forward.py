"""The feed-forward half of a decoder layer for a few tokens, experts or not, as a chain of kernels in one call.

Each expert that is hit is read once, for all of the tokens that chose it. Letters as in `products`; M runs of a layer
for a token, those of one layer beside each other, S layers.
"""

from functools import cache, partial
from typing import Any

import numpy as np
from numba import njit, prange

from .int4 import multiply_block, round_row, round_rows
from .numbers import IN_PARALLEL, STAMP, compiled, from_float32, load
from .products import multiply_rows, output_places
from .rows import add, find_largest, normalize_rows, spans_of_all
from .tiles import OUTPUTS_AT_ONCE, ROWS_AT_ONCE, empty_rows, fill_row, multiply_tile, rows_at_once

_TAKEN = np.float32(-np.inf)
_FORBIDDEN = np.finfo(np.float32).min  # before those that are taken, where more are asked for than may be


@njit
def _silu(number: Any) -> Any:
    return number / (np.float32(1) + np.exp(-number))


@njit
def _gathered(rows: Any, places: Any) -> Any:
    """Rows [P, ...] at the given places, [M, ...]."""
    gathered = np.empty((len(places), *rows.shape[1:]), rows.dtype)
    for number in range(len(places)):
        source, copy = rows[places[number]].reshape(-1), gathered[number].reshape(-1)
        for i in range(len(source)):
            copy[i] = source[i]
    return gathered


@njit
def _places_of_activations(layers: Any, spans: Any) -> Any:
    """Where widths and activations of each layer begin, see `products.output_places`, and room for the activations."""
    starts, places = output_places(layers[:, 0], spans)
    num_activations = places[-1] + (starts[-1] - starts[-2]) * (spans[-1, 1] - spans[-1, 0])
    return starts, places, np.empty(num_activations, np.float32)


@njit(**IN_PARALLEL)
def _run_gated_layers(
    num_threads: Any,
    inputs: Any,
    layers: Any,
    spans: Any,
    tokens: Any,
    factors: Any,
    weight_like: Any,
    scale_like: Any,
    outputs: Any,
) -> None:
    """Runs tokens through gated feed-forward layers with SiLU of float32, bfloat16 or int8, and adds up each one's.

    Args:
        num_threads: See `products.multiply_rows`.
        inputs: [P, K] numbers, one row a token.
        layers: [S, 3, 4] int64, the matrices of each layer: gate, up and down, see `products.multiply_rows`.
        spans: [S, 2] int64; layer s is run for those from `spans[s, 0]` up to `spans[s, 1]` among the M below.
        tokens: [M] int64, rows of inputs and outputs.
        factors: [M] float32, what the outputs of a layer for a token are multiplied by.
        weight_like: See `products.multiply_rows`.
        scale_like: See `products.multiply_rows`.
        outputs: [P, N] numbers, written to.
    """
    rows = empty_rows(inputs.shape, inputs, weight_like)
    input_steps = np.empty(len(inputs), np.float32)
    for row in range(len(inputs)):
        input_steps[row] = fill_row(inputs[row], rows[row])
    rows = _gathered(rows, tokens)
    starts, places, activations = _places_of_activations(layers, spans)
    row_bytes = inputs.shape[1] * weight_like.itemsize
    for part in prange(num_threads):
        gates = np.empty((ROWS_AT_ONCE, OUTPUTS_AT_ONCE), np.float32)
        ups = np.empty((ROWS_AT_ONCE, OUTPUTS_AT_ONCE), np.float32)
        layer = 0
        unit, end_unit = part * starts[-1] // num_threads, (part + 1) * starts[-1] // num_threads
        while unit < end_unit:
            while unit >= starts[layer + 1]:
                layer += 1
            count = min(OUTPUTS_AT_ONCE, min(end_unit, starts[layer + 1]) - unit)
            number = unit - starts[layer]
            gate_address = layers[layer, 0, 0] + number * row_bytes
            up_address = layers[layer, 1, 0] + number * row_bytes
            row, end = spans[layer]
            place = places[layer] + number
            while row < end:
                num_rows = rows_at_once(end - row)
                multiply_tile(rows, row, num_rows, gate_address, row_bytes, count, weight_like, gates)
                multiply_tile(rows, row, num_rows, up_address, row_bytes, count, weight_like, ups)
                for index in range(num_rows):
                    step = input_steps[tokens[row + index]]
                    for i in range(count):
                        gate, up = gates[index, i] * step, ups[index, i] * step
                        if scale_like is not None:
                            gate *= load(layers[layer, 0, 1], number + i, scale_like)
                            up *= load(layers[layer, 1, 1], number + i, scale_like)
                        activations[place + i] = _silu(gate) * up
                    place += starts[layer + 1] - starts[layer]
                row += num_rows
            unit += count
    hidden = empty_rows(len(activations), inputs, weight_like)
    steps = np.empty(len(tokens), np.float32)
    for layer in range(len(layers)):
        width = starts[layer + 1] - starts[layer]
        place = places[layer]
        for run in range(spans[layer, 0], spans[layer, 1]):
            steps[run] = fill_row(activations[place : place + width], hidden[place : place + width]) * factors[run]
            place += width
    totals = np.zeros(outputs.shape, np.float32)
    num_outputs = outputs.shape[1]
    for part in prange(num_threads):
        sums = np.empty((ROWS_AT_ONCE, OUTPUTS_AT_ONCE), np.float32)
        first_output, end_output = part * num_outputs // num_threads, (part + 1) * num_outputs // num_threads
        for layer in range(len(layers)):
            first, end = spans[layer]
            width = starts[layer + 1] - starts[layer]
            own = hidden[places[layer] : places[layer] + (end - first) * width].reshape(end - first, width)
            down_bytes = width * weight_like.itemsize
            output = first_output
            while output < end_output:
                count = min(OUTPUTS_AT_ONCE, end_output - output)
                down_address = layers[layer, 2, 0] + output * down_bytes
                row = 0
                while row < end - first:
                    num_rows = rows_at_once(end - first - row)
                    multiply_tile(own, row, num_rows, down_address, down_bytes, count, weight_like, sums)
                    for i in range(count):
                        scale = np.float32(1)
                        if scale_like is not None:
                            scale = load(layers[layer, 2, 1], output + i, scale_like)
                        for number in range(num_rows):
                            run = first + row + number
                            totals[tokens[run], output + i] += steps[run] * scale * sums[number, i]
                    row += num_rows
                output += count
        for token in range(len(outputs)):
            for output in range(first_output, end_output):
                outputs[token, output] = from_float32(totals[token, output], outputs)


def _int4_gated_layers(block_rows: int) -> Any:
    """As `_run_gated_layers`, for int4 weights in blocks of so many outputs."""

    @njit(**IN_PARALLEL)
    def run_gated_int4_layers(
        num_threads: Any,
        inputs: Any,
        layers: Any,
        spans: Any,
        tokens: Any,
        factors: Any,
        group_sizes: Any,
        scale_like: Any,
        outputs: Any,
    ) -> None:
        """Runs tokens through gated feed-forward layers with SiLU of int4 weights, and adds up each one's.

        Args:
            num_threads: See `products.multiply_rows`.
            inputs: See `_run_gated_layers`.
            layers: See `_run_gated_layers`; widths and N are multiples of b.
            spans: See `_run_gated_layers`.
            tokens: See `_run_gated_layers`.
            factors: See `_run_gated_layers`.
            group_sizes: [2] int64, g of gate and up, and of down.
            scale_like: See `products.multiply_rows`.
            outputs: See `_run_gated_layers`.
        """
        levels, group_sums, steps = round_rows(inputs, group_sizes[0])
        levels, group_sums = _gathered(levels, tokens), _gathered(group_sums, tokens)
        starts, places, activations = _places_of_activations(layers, spans)
        num_blocks = starts[-1] // block_rows
        for part in prange(num_threads):
            gates = np.empty((ROWS_AT_ONCE, block_rows), np.float32)
            ups = np.empty((ROWS_AT_ONCE, block_rows), np.float32)
            layer = 0
            for unit in range(part * num_blocks // num_threads, (part + 1) * num_blocks // num_threads):
                while unit * block_rows >= starts[layer + 1]:
                    layer += 1
                first = unit * block_rows - starts[layer]
                block = first // block_rows
                row, end = spans[layer]
                place = places[layer] + first
                gate, up = layers[layer, 0], layers[layer, 1]
                while row < end:
                    count = rows_at_once(end - row)
                    multiply_block(block_rows, levels, group_sums, row, count, gate, block, scale_like, gates)
                    multiply_block(block_rows, levels, group_sums, row, count, up, block, scale_like, ups)
                    for number in range(count):
                        step = steps[tokens[row + number]]
                        for i in range(block_rows):
                            activations[place + i] = _silu(gates[number, i] * step) * ups[number, i] * step
                        place += starts[layer + 1] - starts[layer]
                    row += count
        group_size = group_sizes[1]
        levels = np.empty((1, len(activations) // group_size, group_size), np.int16)
        group_sums = np.empty((1, len(activations) // group_size), np.float32)
        steps = np.empty(len(tokens), np.float32)
        for layer in range(len(layers)):
            width = starts[layer + 1] - starts[layer]
            place = places[layer]
            for run in range(spans[layer, 0], spans[layer, 1]):
                first, end = place // group_size, (place + width) // group_size
                own_activations = activations[place : place + width]
                step = round_row(own_activations, levels[0, first:end], group_sums[0, first:end])
                steps[run] = step * factors[run]
                place += width
        num_blocks = outputs.shape[1] // block_rows
        sums = np.zeros(outputs.shape, np.float32)
        for part in prange(num_threads):
            totals = np.empty((ROWS_AT_ONCE, block_rows), np.float32)
            first_block, end_block = part * num_blocks // num_threads, (part + 1) * num_blocks // num_threads
            for layer in range(len(layers)):
                first, end = spans[layer]
                num_groups = (starts[layer + 1] - starts[layer]) // group_size
                group = places[layer] // group_size
                end_group = group + (end - first) * num_groups
                own_levels = levels[0, group:end_group].reshape(end - first, num_groups, group_size)
                own_sums = group_sums[0, group:end_group].reshape(end - first, num_groups)
                for block in range(first_block, end_block):
                    row, down = 0, layers[layer, 2]
                    while row < end - first:
                        count = rows_at_once(end - first - row)
                        multiply_block(block_rows, own_levels, own_sums, row, count, down, block, scale_like, totals)
                        for number in range(count):
                            token, step = tokens[first + row + number], steps[first + row + number]
                            for i in range(block_rows):
                                sums[token, block * block_rows + i] += totals[number, i] * step
                        row += count
            for token in range(len(outputs)):
                for output in range(first_block * block_rows, end_block * block_rows):
                    outputs[token, output] = from_float32(sums[token, output], outputs)

    return run_gated_int4_layers


# By name, see `int4`.
_run_gated_int4_32, _run_gated_int4_64 = _int4_gated_layers(32), _int4_gated_layers(64)


@njit
def _choose_experts(logits: Any, bias: Any, settings: Any, scaling: Any, chosen: Any, weights: Any) -> None:
    """Chooses experts for one token as `DeepseekV2TopkRouter` does.

    Args:
        logits: [E] float32.
        bias: [E] float32 for the choice, or None.
        settings: See `few_tokens.Routing`.
        scaling: Factor on the weights.
        chosen: [k] int64, written to: numbers of experts.
        weights: [k] float32, written to.
    """
    top_k, choice, num_groups, num_best_groups, is_softmax, is_normalized = settings
    num_experts = len(logits)
    scores = np.empty(num_experts, np.float32)
    marks = np.empty(num_experts, np.float32)  # by which experts are chosen
    largest = logits[find_largest(logits)]
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
            group_marks[find_largest(group_marks)] = _TAKEN
        for expert in range(num_experts):
            if group_marks[expert // size] != _TAKEN:
                marks[expert] = np.float32(0) if choice == 1 else _FORBIDDEN
    total = np.float32(1e-20)
    for i in range(top_k):
        chosen[i] = find_largest(marks)
        weights[i] = scores[chosen[i]]
        marks[chosen[i]] = _TAKEN
        total += weights[i]
    for i in range(top_k):
        weights[i] *= scaling / total if is_normalized and top_k > 1 else scaling


@njit
def _copy_places(places: Any, copy: Any) -> None:
    for matrix in range(places.shape[0]):
        for column in range(places.shape[1]):
            copy[matrix, column] = places[matrix, column]


@njit
def _sorted_by_expert(chosen: Any, weights: Any, num_experts: Any, num_shared: Any) -> Any:
    """Runs of layers for tokens, those of one layer beside each other: experts that are hit, then shared layers.

    Args:
        chosen: [P, k] int64.
        weights: [P, k] float32.
        num_experts: E.
        num_shared: Layers that are run for all tokens.

    Returns:
        Numbers of the experts that are hit; spans [S, 2], tokens [M] and factors [M], see `_run_gated_layers`.
    """
    num_rows, top_k = chosen.shape
    counts = np.zeros(num_experts, np.int64)
    num_hit = 0
    for row in range(num_rows):
        for i in range(top_k):
            num_hit += counts[chosen[row, i]] == 0
            counts[chosen[row, i]] += 1
    hit = np.empty(num_hit, np.int64)
    spans = np.empty((num_hit + num_shared, 2), np.int64)
    places = np.empty(num_experts, np.int64)  # where the next run of each expert goes
    layer, end = 0, 0
    for expert in range(num_experts):
        places[expert] = end
        if counts[expert]:
            hit[layer], spans[layer, 0] = expert, end
            end += counts[expert]
            spans[layer, 1] = end
            layer += 1
    tokens = np.empty(end + num_shared * num_rows, np.int64)
    factors = np.ones(len(tokens), np.float32)
    for row in range(num_rows):
        for i in range(top_k):
            place = places[chosen[row, i]]
            tokens[place], factors[place] = row, weights[row, i]
            places[chosen[row, i]] += 1
    for layer in range(num_hit, num_hit + num_shared):
        spans[layer, 0], spans[layer, 1] = end, end + num_rows
        for row in range(num_rows):
            tokens[end + row] = row
        end += num_rows
    return hit, spans, tokens, factors


@cache
def feed_forward_kernel(block_rows: int) -> Any:
    """The feed-forward half of a layer, of experts or not, with its norm and residual path.

    Args:
        block_rows: Of int4 weights the outputs that lie side by side; 0 of others.
    """
    stamp = STAMP

    @partial(compiled, is_parallel=False)
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
        """Runs a few tokens.

        Args:
            num_threads: See `products.multiply_rows`, as for all places and types.
            hidden: [P, D] numbers.
            norm_address: Of the norm's weight, of the same type.
            epsilon: Of the norm.
            router_places: [1, 4] of the router's weight.
            router_type: Of it.
            bias: [E] float32, see `_choose_experts`.
            settings: See `few_tokens.Routing`.
            scaling: Factor on the experts' weights.
            experts: [E, 3, 4], see `_run_gated_layers`.
            shared: [S, 3, 4] of layers that are always run.
            weight_type: See `_run_gated_layers`.
            scale_like: Also.
            outputs: [P, D] numbers, written to.
        """
        num_rows, top_k, num_experts = len(hidden), settings[0], len(experts)
        normed = np.empty(hidden.shape, hidden.dtype)
        normalize_rows(hidden, norm_address, hidden, epsilon, normed)
        chosen = np.empty((num_rows, top_k), np.int64)
        weights = np.empty((num_rows, top_k), np.float32)
        if top_k > 0:
            rows = np.empty(hidden.shape, np.float32)
            for row in range(num_rows):
                fill_row(normed[row], rows[row])
            logits = np.empty((num_rows, num_experts), np.float32)
            spans = spans_of_all(1, num_rows)
            multiply_rows(num_threads, rows, router_places, spans, router_type, None, logits.reshape(-1))
            for row in range(num_rows):
                _choose_experts(logits[row], bias, settings, scaling, chosen[row], weights[row])
        hit, spans, tokens, factors = _sorted_by_expert(chosen, weights, num_experts, len(shared))
        layers = np.empty((len(spans), 3, 4), np.int64)
        for layer in range(len(hit)):
            _copy_places(experts[hit[layer]], layers[layer])
        for layer in range(len(shared)):
            _copy_places(shared[layer], layers[len(hit) + layer])
        output = np.empty(hidden.shape, hidden.dtype)
        if block_rows == 0:
            _run_gated_layers(num_threads, normed, layers, spans, tokens, factors, weight_type, scale_like, output)
        elif block_rows == 64:
            _run_gated_int4_64(num_threads, normed, layers, spans, tokens, factors, weight_type, scale_like, output)
        else:
            _run_gated_int4_32(num_threads, normed, layers, spans, tokens, factors, weight_type, scale_like, output)
        add(hidden, output, outputs)
        return stamp

    return feed_forward
