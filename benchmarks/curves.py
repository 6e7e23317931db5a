"""Latency over the length of the prompt, memory over the length of the context, and their plots."""

from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.bench import CHUNK_SIZE, Bench
from benchmarks.measurements import WHOLE, prefill_peak
from benchmarks.timing import seconds_of
from deepseek_vl2.utils.model_size import cache_bytes_per_token

PROMPT_LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
DECODED_TOKENS = 8
GB = 1e9


def check_matplotlib() -> None:
    """Refuses plots before anything is measured.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'deepseek_vl2[benchmarks]'") from error
    matplotlib.use("Agg")


@torch.inference_mode()
def measure_curves(bench: Bench) -> list[dict[str, Any]]:
    """For each length of a prompt of random tokens: seconds to read it and to decode a token, and memory.

    Memory is that of cache and computation, whole and in chunks; the weights come on top of it.

    Raises:
        OSError: The system does not let this process measure its peak again.
    """
    points = []
    for num_tokens in (length for length in PROMPT_LENGTHS if length + DECODED_TOKENS <= bench.max_tokens):
        embeds = bench.random_embeds(num_tokens)
        prefill = [
            seconds_of(
                partial(bench.model.language, inputs_embeds=embeds, use_cache=True, logits_to_keep=1), bench.device
            )
            for _ in range(bench.repeats)
        ]
        cache = num_tokens * cache_bytes_per_token(bench.config, bench.model.dtype.itemsize)
        points.append(
            {
                "num_tokens": num_tokens,
                "prefill_s": median(prefill),
                "decode_s": bench.generate(DECODED_TOKENS, inputs_embeds=embeds).step,
                "cache_gb": cache / GB,
                "chunked_gb": (cache + prefill_peak(bench, num_tokens, bench.chunk_size)) / GB,
                "whole_gb": (cache + prefill_peak(bench, num_tokens, WHOLE)) / GB,
            }
        )
    return points


def draw_curves(points: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Draws `latency.png` and `memory.png`; returns where they are."""
    from matplotlib import pyplot

    lengths = [point["num_tokens"] for point in points]
    plots = {
        "latency.png": ("seconds", {"prefill_s": "reading the prompt", "decode_s": "one more token"}),
        "memory.png": (
            "GB beside the weights",
            {"whole_gb": "read whole", "chunked_gb": f"read in chunks of {CHUNK_SIZE}", "cache_gb": "cache alone"},
        ),
    }
    for file, (label, curves) in plots.items():
        figure, axis = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
        for name, description in curves.items():
            axis.plot(lengths, [point[name] for point in points], marker="o", label=description)
        axis.set(xlabel="tokens of the prompt", ylabel=label, xscale="log", yscale="log")
        axis.set_xticks(lengths, [str(length) for length in lengths], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.legend()
        figure.savefig(folder / file, dpi=110)
        pyplot.close(figure)
    return [folder / file for file in plots]
