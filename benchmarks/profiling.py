"""Where the time goes: seconds of each part of the model, while it sees, reads and speaks.

Parts that are watched are called one by one, also on a CPU, which runs half a layer of a few tokens in one call
otherwise (see `few_tokens`).
"""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from benchmarks.bench import Bench
from benchmarks.timing import synchronize

# The modules whose calls are timed, by their names; none lies within another.
_TIMED_MODULES = (
    ("vision_attention", r"^vision\.blocks\.\d+\.attn$"),
    ("vision_mlp", r"^vision\.blocks\.\d+\.mlp$"),
    ("projector", r"^projector$"),
    ("attention", r"^language\.model\.layers\.\d+\.self_attn$"),
    ("router", r"\.mlp\.gate$"),
    ("experts", r"\.mlp\.experts$"),
    ("shared_experts", r"\.mlp\.shared_experts$"),
    ("lm_head", r"^language\.lm_head$"),
)
_DENSE_MLP = re.compile(r"^language\.model\.layers\.\d+\.mlp$")
SAMPLING = "sampling"
OTHER = "other"


def timed_part(name: str, module: nn.Module) -> str | None:
    """The part that a module's calls are counted for; None for modules that lie within or around others."""
    if _DENSE_MLP.match(name) and not hasattr(module, "experts"):
        return "dense_mlp"
    return next((part for part, pattern in _TIMED_MODULES if re.search(pattern, name)), None)


@contextmanager
def timed_parts(model: nn.Module, device: torch.device) -> Iterator[dict[str, float]]:
    """Adds up the seconds of each part in a dictionary, while the context lasts."""
    seconds: dict[str, float] = defaultdict(float)
    parts = {module: part for name, module in model.named_modules() if (part := timed_part(name, module))}
    starts: dict[nn.Module, float] = {}

    def before(module: nn.Module, args: Any) -> None:
        synchronize(device)
        starts[module] = time.perf_counter()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        synchronize(device)
        seconds[parts[module]] += time.perf_counter() - starts[module]

    handles = [
        handle
        for module in parts
        for handle in (module.register_forward_pre_hook(before), module.register_forward_hook(after))
    ]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def profile(bench: Bench) -> dict[str, dict[str, float]]:
    """Seconds of each part for one picture (`vision`), one prompt (`prefill`) and one token (`decode`).

    `other` is what lies between the parts (norms, residual paths, cache); in `decode` also `sampling`, what `generate`
    does between two calls of the model.
    """
    inputs = bench.prepare()
    embeds, cache = bench.model.incremental_prefilling(**inputs, chunk_size=bench.chunk_size)
    prompt = {"inputs_embeds": embeds, "input_ids": inputs.input_ids, "past_key_values": cache}
    result = {
        "vision": _profile_once(
            bench, lambda: bench.model.get_image_features(inputs.images, inputs.images_spatial_crop)
        ),
        "prefill": _profile_once(
            bench, lambda: bench.model.language(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
        ),
    }
    decode = _profile_decode(bench, prompt)
    return result | {"decode": decode}


def _profile_once(bench: Bench, work: Callable[[], object]) -> dict[str, float]:
    work()  # warms up
    with timed_parts(bench.model, bench.device) as seconds:
        start = time.perf_counter()
        work()
        synchronize(bench.device)
        total = time.perf_counter() - start
    return dict(seconds) | {OTHER: max(0.0, total - sum(seconds.values()))}


def _profile_decode(bench: Bench, prompt: dict[str, Any]) -> dict[str, float]:
    """Mean seconds a token; the model's own time tells what `generate` adds to it."""
    calls: list[tuple[float, float]] = []
    bench.generate(2, **prompt)  # warms up
    handles = [
        bench.model.register_forward_pre_hook(lambda module, args: calls.append((time.perf_counter(), 0.0))),
        bench.model.register_forward_hook(
            lambda module, args, output: calls.append((calls.pop()[0], time.perf_counter()))
        ),
    ]
    try:
        with timed_parts(bench.model, bench.device) as seconds:
            times = bench.generate(bench.num_new_tokens, **prompt)
    finally:
        for handle in handles:
            handle.remove()
    in_model = sum(end - start for start, end in calls)
    total = times.times[-1] - times.start
    parts = dict(seconds) | {OTHER: max(0.0, in_model - sum(seconds.values())), SAMPLING: max(0.0, total - in_model)}
    return {part: taken / len(times.times) for part, taken in parts.items()}


def format_profile(profiles: dict[str, dict[str, float]]) -> str:
    """Tables of seconds and shares, the largest first."""
    lines = []
    for stage, seconds in profiles.items():
        total = sum(seconds.values())
        lines.append(f"{stage}: {1000 * total:.2f} ms")
        for part, taken in sorted(seconds.items(), key=lambda item: -item[1]):
            lines.append(f"  {part:18} {1000 * taken:10.2f} ms  {100 * taken / total:5.1f} %")
    return "\n".join(lines)
