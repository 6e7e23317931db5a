"""The measurements of a loaded model, each of which gives its figures."""

import time
from statistics import median

import torch

from benchmarks.bench import Bench
from benchmarks.counts import decode_bytes, prefill_flop, projector_flop, vision_flop
from benchmarks.memory import cache_bytes, peak_resident_bytes, reset_peak, weight_bytes_by_part
from benchmarks.results import Figure
from benchmarks.timing import Timing, measure, seconds_of, synchronize
from deepseek_vl2.utils.model_size import WEIGHT_KINDS, cache_bytes_per_token

BATCH_SIZES = (1, 2, 4, 8, 16)
BATCH_PROMPT_TOKENS = 128
LONG_PROMPT_TOKENS = 4096
WHOLE = -1
GB = 1e9
GFLOP = 1e9


def _rates(name: str, timing: Timing, amount: float, unit: str, flop: float) -> list[Figure]:
    """Figures of work that multiplies: amount a second and GFLOP a second, beside the limit of products."""
    limit_seconds = flop / timing.limit_rate
    return [
        Figure(f"{name}_{unit}", amount / timing.seconds, f"{unit}/s", amount / limit_seconds, timing.share),
        Figure(f"{name}_gflop", flop / timing.seconds / GFLOP, "GFLOP/s", timing.limit_rate / GFLOP, timing.share),
    ]


def measure_limits(bench: Bench) -> list[Figure]:
    """The machine's limits, and what they allow for decoding with weights of each kind."""
    read = median(bench.limits.read_rate() for _ in range(bench.repeats))
    product = median(bench.limits.product_rate() for _ in range(bench.repeats))
    figures = [
        Figure("limit_read", read / GB, "GB/s"),
        Figure("limit_product", product / GFLOP, "GFLOP/s"),
    ]
    num_cached = bench.prepare().input_ids.shape[1]
    for weights in WEIGHT_KINDS:
        rate = read / decode_bytes(bench.config, num_cached, weights)
        figures.append(Figure(f"limit_decode_{weights}", rate, "tokens/s"))
    return figures


@torch.inference_mode()
def measure_vision(bench: Bench) -> list[Figure]:
    """Vision tower and projector on the views of one picture."""
    inputs = bench.prepare()
    columns, rows = inputs.images_spatial_crop[0, 0].tolist()
    num_views = 1 + columns * rows
    flop = vision_flop(bench.config, num_views) + projector_flop(bench.config, num_views)

    def work() -> float:
        return seconds_of(
            lambda: bench.model.get_image_features(inputs.images, inputs.images_spatial_crop), bench.device
        )

    timing = measure(work, bench.limits.product_rate, flop, bench.repeats)
    return [
        Figure("vision_picture", timing.seconds, "s", flop / timing.limit_rate, timing.share),
        *_rates("vision", timing, num_views, "views", flop),
    ]


@torch.inference_mode()
def measure_prefill(bench: Bench) -> list[Figure]:
    """The language model on a whole prompt with a picture, whose embeddings are there; logits of its last token."""
    embeds = bench.random_embeds(bench.prepare().input_ids.shape[1])
    num_tokens = embeds.shape[1]
    flop = prefill_flop(bench.config, num_tokens)

    def work() -> float:
        return seconds_of(
            lambda: bench.model.language(inputs_embeds=embeds, use_cache=True, logits_to_keep=1), bench.device
        )

    timing = measure(work, bench.limits.product_rate, flop, bench.repeats)
    return [Figure("prompt", num_tokens, "tokens"), *_rates("prefill", timing, num_tokens, "tokens", flop)]


def measure_first_token(bench: Bench) -> list[Figure]:
    """From a picture and a question to the first token: processor, vision, prefill."""
    inputs = bench.prepare()
    num_views = 1 + int(inputs.images_spatial_crop[0, 0].prod())
    flop = vision_flop(bench.config, num_views) + projector_flop(bench.config, num_views)
    flop += prefill_flop(bench.config, inputs.input_ids.shape[1])

    def work() -> float:
        start = time.perf_counter()
        bench.generate(1, **bench.prepare())
        synchronize(bench.device)
        return time.perf_counter() - start

    timing = measure(work, bench.limits.product_rate, flop, bench.repeats)
    return [Figure("first_token", timing.seconds, "s", flop / timing.limit_rate, timing.share)]


@torch.inference_mode()
def measure_decode(bench: Bench) -> list[Figure]:
    """Decoding one row after a prompt with a picture."""
    inputs = bench.prepare()
    num_cached = inputs.input_ids.shape[1] + bench.num_new_tokens // 2
    embeds, cache = bench.model.incremental_prefilling(**inputs, chunk_size=bench.chunk_size)
    prompt = {"inputs_embeds": embeds, "input_ids": inputs.input_ids, "past_key_values": cache}
    num_bytes = decode_bytes(bench.config, num_cached, bench.weights)

    def work() -> float:
        return bench.generate(bench.num_new_tokens, **prompt).step

    timing = measure(work, bench.limits.read_rate, num_bytes, bench.repeats)
    limit = timing.limit_rate / num_bytes
    return [
        Figure("decode_tokens", 1 / timing.seconds, "tokens/s", limit, timing.share),
        Figure("decode_read", num_bytes / timing.seconds / GB, "GB/s", timing.limit_rate / GB, timing.share),
        Figure("decode_bytes", num_bytes / GB, "GB/token"),
    ]


def measure_batch(bench: Bench) -> list[Figure]:
    """Decoding several rows of text at once; sizes take turns, and the gain is that within one round.

    Its limit is that of memory: rows of different texts hit different experts, so more rows read more weights.
    """
    prompts = {size: bench.random_ids(size, BATCH_PROMPT_TOKENS) for size in BATCH_SIZES}
    rates: dict[int, list[float]] = {size: [] for size in BATCH_SIZES}
    for round_number in range(bench.repeats + 1):
        for size, ids in prompts.items():
            step = bench.generate(bench.num_new_tokens, input_ids=ids, attention_mask=torch.ones_like(ids)).step
            if round_number:  # the first round warms up
                rates[size].append(size / step)
    figures = [Figure(f"batch_{size}_tokens", median(rates[size]), "tokens/s") for size in BATCH_SIZES]
    num_cached = BATCH_PROMPT_TOKENS + bench.num_new_tokens // 2
    alone_bytes = decode_bytes(bench.config, num_cached, bench.weights)
    for size in BATCH_SIZES[1:]:
        gain = median(rate / alone for rate, alone in zip(rates[size], rates[1], strict=True))
        limit = size * alone_bytes / decode_bytes(bench.config, num_cached, bench.weights, size)
        figures.append(Figure(f"batch_{size}_gain", gain, "x", limit, gain / limit))
    return figures


@torch.inference_mode()
def measure_memory(bench: Bench) -> list[Figure]:
    """What the weights of each part and the cache take, and the peak while a question is answered."""
    inputs = bench.prepare()
    figures = [
        Figure(f"memory_{part}", num_bytes / GB, "GB") for part, num_bytes in weight_bytes_by_part(bench.model).items()
    ]
    total = sum(figure.value for figure in figures)
    cache = bench.model.language(input_ids=inputs.input_ids, use_cache=True, logits_to_keep=1).past_key_values
    num_tokens = inputs.input_ids.shape[1]
    by_token = cache_bytes(cache) / num_tokens
    del cache
    figures += [
        Figure("memory_weights", total, "GB"),
        Figure("memory_cache", by_token * num_tokens / GB, "GB"),
        Figure("memory_cache_token_layer", by_token / bench.config.language_config.num_hidden_layers, "bytes"),
    ]
    if reset_peak():
        bench.generate(2, **inputs)
        figures.append(Figure("memory_peak", peak_resident_bytes() / GB, "GB"))
    return figures


@torch.inference_mode()
def prefill_peak(bench: Bench, num_tokens: int, chunk_size: int) -> int:
    """Most bytes that reading a prompt of random tokens takes beside weights, embeddings and cache.

    Raises:
        OSError: The system does not let this process measure its peak again.
    """
    embeds = bench.random_embeds(num_tokens)
    if not reset_peak():
        raise OSError("the peak of memory can be measured again and again only on Linux; leave prefill_memory out")
    before = peak_resident_bytes()
    bench.model.incremental_prefilling(inputs_embeds=embeds, chunk_size=chunk_size)
    cache = (num_tokens - 1) * cache_bytes_per_token(bench.config, bench.model.dtype.itemsize)
    return max(0, peak_resident_bytes() - before - cache)


def measure_prefill_memory(bench: Bench) -> list[Figure]:
    """Memory for computing a long prompt, in chunks and whole."""
    num_tokens = min(LONG_PROMPT_TOKENS, bench.max_tokens)
    prefill_peak(bench, min(64, num_tokens), WHOLE)  # what libraries set aside at their first call
    chunked = prefill_peak(bench, num_tokens, bench.chunk_size)
    whole = prefill_peak(bench, num_tokens, WHOLE)
    return [
        Figure("prefill_memory_prompt", num_tokens, "tokens"),
        Figure(f"prefill_memory_chunk_{bench.chunk_size}", chunked / GB, "GB"),
        Figure("prefill_memory_whole", whole / GB, "GB"),
        Figure("prefill_memory_chunk_over_whole", chunked / max(1, whole), "x"),
    ]
