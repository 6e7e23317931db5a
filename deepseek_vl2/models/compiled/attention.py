"""The half of a decoder layer that attends, for one new token a row, as a chain of kernels in one call.

What Python takes to call a dozen kernels a layer one by one is as long as reading the layer's weights in int4. Letters
as in `products`; B rows of a batch, H heads, of which G have keys and values, `room` tokens that a cache has space for.
"""

from functools import cache, partial
from typing import Any

import numpy as np
from numba import njit, prange

from .int4 import project
from .numbers import FASTMATH, IN_PARALLEL, STAMP, compiled, dot, from_float32, load, to_float32
from .rows import add, find_largest, normalize_rows, spans_of_all
from .tiles import OUTPUTS_AT_ONCE, ROWS_AT_ONCE, multiply_tile

_LOWEST = np.finfo(np.float32).min  # score of a hidden token; where all are hidden, all count alike


def _one_token_kernel() -> Any:
    stamp = STAMP

    @compiled
    def attend_one_token(
        num_threads: Any,
        queries: Any,
        keys: Any,
        values: Any,
        length: int,
        visible: Any,
        scaling: Any,
        outputs: Any,
    ) -> int:
        """Attention of one new token a row of the batch to those in a cache.

        Args:
            num_threads: See `products.multiply_rows`.
            queries: [B, G, h, D] numbers: h heads that share keys and values.
            keys: [B, G, room, D] numbers.
            values: [B, G, room, V] numbers.
            length: How many tokens the cache holds.
            visible: [B, length] bool; [0, 0] where all are to be seen.
            scaling: Factor on the scores.
            outputs: [B, G, h, V] numbers, written to.
        """
        batch_size, num_groups, num_heads, width = queries.shape
        value_width = values.shape[3]
        for unit in prange(batch_size * num_groups):
            row = unit // num_groups
            group = unit % num_groups
            query = np.empty(width, np.float32)
            scores = np.empty(length, np.float32)
            mixed = np.empty(value_width, np.float32)
            for head in range(num_heads):
                for i in range(width):
                    query[i] = to_float32(queries[row, group, head, i]) * scaling
                largest = _LOWEST
                for token in range(length):
                    if len(visible) == 0 or visible[row, token]:
                        key = keys[row, group, token]
                        score = np.float32(0)
                        for i in range(width):
                            score += query[i] * to_float32(key[i])
                        scores[token] = score
                        largest = max(largest, score)
                    else:
                        scores[token] = _LOWEST
                total = np.float32(0)
                mixed[:] = 0
                for token in range(length):
                    weight = np.exp(scores[token] - largest)
                    total += weight
                    value = values[row, group, token]
                    for i in range(value_width):
                        mixed[i] += weight * to_float32(value[i])
                for i in range(value_width):
                    outputs[row, group, head, i] = from_float32(mixed[i] / total, outputs)
        return stamp

    return attend_one_token


attend_one_token = _one_token_kernel()


@njit(fastmath=FASTMATH)
def _rotate_halves(heads: Any, cosines: Any, sines: Any, outputs: Any) -> None:
    """Rotates number i of the first half of each head with number i of the second.

    Args:
        heads: [H, D] numbers.
        cosines: [D / 2] float32.
        sines: [D / 2] float32.
        outputs: [H, D] numbers, written to.
    """
    half = len(cosines)
    for head in range(len(heads)):
        for i in range(half):
            first, second = to_float32(heads[head, i]), to_float32(heads[head, half + i])
            outputs[head, i] = from_float32(first * cosines[i] - second * sines[i], outputs)
            outputs[head, half + i] = from_float32(second * cosines[i] + first * sines[i], outputs)


@njit
def _write_heads(heads: Any, position: Any, cache: Any) -> None:
    """Writes numbers of one token a row [B, G, D] into a cache [B, G, room, D]."""
    for row in range(heads.shape[0]):
        for head in range(heads.shape[1]):
            for i in range(heads.shape[2]):
                cache[row, head, position, i] = heads[row, head, i]


@cache
def attention_kernel(input_block_rows: int, value_block_rows: int, output_block_rows: int) -> Any:
    """Multi-head attention with its norm and residual path.

    Args:
        input_block_rows: Of int4 weights of query and key the outputs that lie side by side; 0 of others.
        value_block_rows: The same of values, which in a model of int4 are of another kind.
        output_block_rows: The same of the output projection.
    """
    stamp = STAMP

    @partial(compiled, is_parallel=False)
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
        visible: Any,
        scaling: Any,
        outputs: Any,
    ) -> int:
        """Reads one token a row and adds it to the cache.

        Args:
            num_threads: See `products.multiply_rows`, as for all places, types and scales.
            hidden: [B, D] numbers.
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
            cosines: [B, head / 2] float32, or [1, head / 2] for all rows.
            sines: The same.
            keys: [B, G, room, head] numbers; the keys are written behind the others.
            values: [B, G, room, head] numbers, also.
            length: How many tokens the cache holds before.
            visible: See `attend_one_token`, the new tokens among them.
            scaling: Factor on the scores.
            outputs: [B, D] numbers, written to.
        """
        num_rows, num_groups, _, width = keys.shape
        spans = spans_of_all(2, num_rows)
        one = spans[:1]
        normed = np.empty(hidden.shape, hidden.dtype)
        normalize_rows(hidden, norm_address, hidden, epsilon, normed)
        num_heads = input_places[0, 2] // width
        query_end = num_rows * num_heads * width
        projected = np.empty(query_end + num_rows * num_groups * width, hidden.dtype)
        project(input_block_rows, num_threads, normed, input_places, spans, input_type, input_scales, projected)
        unrotated_query = projected[:query_end].reshape(num_rows, num_heads, width)
        unrotated_key = projected[query_end:].reshape(num_rows, num_groups, width)
        value = np.empty(unrotated_key.shape, hidden.dtype)
        project(value_block_rows, num_threads, normed, value_places, one, value_type, value_scales, value.reshape(-1))
        query = np.empty(unrotated_query.shape, hidden.dtype)
        key = np.empty(unrotated_key.shape, hidden.dtype)
        for row in range(num_rows):
            cosine, sine = cosines[row % len(cosines)], sines[row % len(sines)]
            _rotate_halves(unrotated_query[row], cosine, sine, query[row])
            _rotate_halves(unrotated_key[row], cosine, sine, key[row])
        _write_heads(key, length, keys)
        _write_heads(value, length, values)
        queries = query.reshape(num_rows, num_groups, num_heads // num_groups, width)
        mixed = np.empty(queries.shape, hidden.dtype)
        attend_one_token(num_threads, queries, keys, values, length + 1, visible, scaling, mixed)
        projected = np.empty(hidden.shape, hidden.dtype)
        rows, flat = mixed.reshape(num_rows, num_heads * width), projected.reshape(-1)
        project(output_block_rows, num_threads, rows, output_places, one, output_type, output_scales, flat)
        add(hidden, projected, outputs)
        return stamp

    return attend


@njit
def _rotate_interleaved(heads: Any, cosines: Any, sines: Any, outputs: Any) -> None:
    """Rotates neighbouring pairs of each head [H, P] into first and second halves."""
    half = len(cosines)
    for head in range(len(heads)):
        for i in range(half):
            first, second = to_float32(heads[head, 2 * i]), to_float32(heads[head, 2 * i + 1])
            outputs[head, i] = from_float32(first * cosines[i] - second * sines[i], outputs)
            outputs[head, half + i] = from_float32(second * cosines[i] + first * sines[i], outputs)


@njit(**IN_PARALLEL)
def _attend_latent(
    num_threads: Any,
    queries: Any,
    rotated: Any,
    up_address: Any,
    up_like: Any,
    rope_keys: Any,
    latents: Any,
    length: Any,
    visible: Any,
    scaling: Any,
    outputs: Any,
) -> None:
    """Attention of one token a row, of H heads, to cached latents, which stay as they are.

    All arrays lie in one piece: of a part of a larger one numba does not know that neighbours are beside each other,
    and reads number by number.

    Args:
        num_threads: See `products.multiply_rows`.
        queries: [B, H, nope + P] numbers, of which the first are read.
        rotated: [B, H, P] numbers.
        up_address: Of the up-projection [H, nope + V, R].
        up_like: Something of its type.
        rope_keys: [B, 1, room, P] numbers.
        latents: [B, 1, room, R] numbers.
        length: How many of these there are.
        visible: See `attend_one_token`.
        scaling: Factor on the scores.
        outputs: [B, H, V] numbers, written to.
    """
    num_rows, num_heads, num_rotated = rotated.shape
    num_plain, rank = queries.shape[2] - num_rotated, latents.shape[3]
    value_width = outputs.shape[2]
    row_bytes = rank * up_like.itemsize
    latent_bytes, rope_bytes = rank * latents.itemsize, num_rotated * rope_keys.itemsize
    num_units = (num_heads + ROWS_AT_ONCE - 1) // ROWS_AT_ONCE
    for part in prange(num_threads):
        query = np.empty((ROWS_AT_ONCE, rank), np.float32)
        query_rope = np.empty((ROWS_AT_ONCE, num_rotated), np.float32)
        scores = np.empty((ROWS_AT_ONCE, length), np.float32)
        mixed = np.empty((ROWS_AT_ONCE, rank), np.float32)
        plain = np.empty((ROWS_AT_ONCE, OUTPUTS_AT_ONCE), np.float32)
        rope = np.empty((ROWS_AT_ONCE, OUTPUTS_AT_ONCE), np.float32)
        # All rows of a batch read the same part of the up-projection one after the other, while it is in a cache.
        for unit in range(part * num_units * num_rows // num_threads, (part + 1) * num_units * num_rows // num_threads):
            row, first = unit % num_rows, unit // num_rows * ROWS_AT_ONCE
            count = min(ROWS_AT_ONCE, num_heads - first)
            # Heads that there are not have queries of zeros, and their outputs are left.
            for head in range(ROWS_AT_ONCE):
                for i in range(rank):
                    query[head, i] = 0
                    mixed[head, i] = 0
                for i in range(num_rotated):
                    query_rope[head, i] = 0
            for head in range(count):
                start = up_address + (first + head) * (num_plain + value_width) * row_bytes
                for number in range(num_plain):
                    factor = to_float32(queries[row, first + head, number])
                    for i in range(rank):
                        query[head, i] += factor * load(start + number * row_bytes, i, up_like)
                for i in range(num_rotated):
                    query_rope[head, i] = to_float32(rotated[row, first + head, i])
            # Each latent is read once for four heads.
            token = 0
            while token < length:
                num_tokens = min(OUTPUTS_AT_ONCE, length - token)
                place = row * latents.shape[2] + token
                address = latents.ctypes.data + place * latent_bytes
                multiply_tile(query, 0, ROWS_AT_ONCE, address, latent_bytes, num_tokens, latents, plain)
                address = rope_keys.ctypes.data + place * rope_bytes
                multiply_tile(query_rope, 0, ROWS_AT_ONCE, address, rope_bytes, num_tokens, rope_keys, rope)
                for i in range(num_tokens):
                    is_visible = len(visible) == 0 or visible[row, token + i]
                    for head in range(ROWS_AT_ONCE):
                        score = (plain[head, i] + rope[head, i]) * scaling
                        scores[head, token + i] = score if is_visible else _LOWEST
                token += num_tokens
            for head in range(ROWS_AT_ONCE):
                largest = scores[head, find_largest(scores[head])]
                total = np.float32(0)
                for token in range(length):
                    scores[head, token] = np.exp(scores[head, token] - largest)
                    total += scores[head, token]
                for token in range(length):
                    scores[head, token] /= total
            for token in range(length):
                for i in range(rank):
                    latent = to_float32(latents[row, 0, token, i])
                    mixed[0, i] += scores[0, token] * latent
                    mixed[1, i] += scores[1, token] * latent
                    mixed[2, i] += scores[2, token] * latent
                    mixed[3, i] += scores[3, token] * latent
            for head in range(count):
                start = up_address + ((first + head) * (num_plain + value_width) + num_plain) * row_bytes
                for i in range(value_width):
                    output = dot(mixed[head], start + i * row_bytes, up_like)
                    outputs[row, first + head, i] = from_float32(output, outputs)


@cache
def latent_attention_kernel(input_block_rows: int, query_block_rows: int, output_block_rows: int) -> Any:
    """Multi-head latent attention with its norm and residual path.

    Args:
        input_block_rows: Of int4 weights of the first projections the outputs that lie side by side; 0 of others.
        query_block_rows: The same of the second projection of a compressed query.
        output_block_rows: The same of the output projection.
    """
    stamp = STAMP

    @partial(compiled, is_parallel=False)
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
        visible: Any,
        scaling: Any,
        outputs: Any,
    ) -> int:
        """Reads one token a row and adds it to the cache; see `attention_kernel` for what is not named here.

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
            cosines: [B, P / 2] float32, or [1, P / 2] for all rows.
            sines: The same.
            rope_keys: [B, 1, room, P] numbers; the new ones are written behind the others.
            latents: [B, 1, room, R] numbers, also.
            length: See there.
            visible: See there.
            scaling: See there.
            outputs: See there.
        """
        num_heads, num_plain, value_width = widths
        num_rows = len(hidden)
        num_rotated, rank = rope_keys.shape[3], latents.shape[3]
        spans = spans_of_all(2, num_rows)
        one = spans[:1]
        normed = np.empty(hidden.shape, hidden.dtype)
        normalize_rows(hidden, norm_address, hidden, epsilon, normed)
        query_end = num_rows * input_places[0, 2]
        projected = np.empty(query_end + num_rows * (rank + num_rotated), hidden.dtype)
        project(input_block_rows, num_threads, normed, input_places, spans, input_type, input_scales, projected)
        query = projected[:query_end]
        if query_places is not None:
            rows = query.reshape(num_rows, input_places[0, 2])
            compressed = np.empty(rows.shape, hidden.dtype)
            normalize_rows(rows, norm_addresses[1], hidden, norm_epsilons[1], compressed)
            query = np.empty(num_rows * query_places[0, 2], hidden.dtype)
            project(query_block_rows, num_threads, compressed, query_places, one, query_type, query_scales, query)
        new = projected[query_end:].reshape(num_rows, 1, rank + num_rotated)
        normalize_rows(new[:, 0, :rank], norm_addresses[0], hidden, norm_epsilons[0], latents[:, 0, length])
        queries = query.reshape(num_rows, num_heads, num_plain + num_rotated)
        rotated = np.empty((num_rows, num_heads, num_rotated), hidden.dtype)
        for row in range(num_rows):
            cosine, sine = cosines[row % len(cosines)], sines[row % len(sines)]
            _rotate_interleaved(new[row, :, rank:], cosine, sine, rope_keys[row, :, length])
            _rotate_interleaved(queries[row, :, num_plain:], cosine, sine, rotated[row])
        mixed = np.empty((num_rows, num_heads, value_width), hidden.dtype)
        _attend_latent(
            num_threads,
            queries,
            rotated,
            up_address,
            up_like,
            rope_keys,
            latents,
            length + 1,
            visible,
            scaling,
            mixed,
        )
        projected = np.empty(hidden.shape, hidden.dtype)
        rows, flat = mixed.reshape(num_rows, num_heads * value_width), projected.reshape(-1)
        project(output_block_rows, num_threads, rows, output_places, one, output_type, output_scales, flat)
        add(hidden, projected, outputs)
        return stamp

    return attend
