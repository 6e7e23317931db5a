"""Says what the library chooses on this machine and why, and which models fit: `python -m deepseek_vl2.doctor`.

With `--model_path` it also checks that the checkpoint is complete and fits. Exit codes: 0; 1 if the checkpoint is
incomplete or too large; 2 after an error that the user can mend.
"""

import argparse
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from packaging.requirements import Requirement

from deepseek_vl2 import __version__
from deepseek_vl2.models import (
    DeepseekVLV2Config,
    DeepseekVLV2ForCausalLM,
    WeightOnlyConfig,
    checkpoint_bytes,
    few_row_products,
    many_tokens,
    own_quantization,
)
from deepseek_vl2.models.machine_limits import free_bytes
from deepseek_vl2.models.quantization.layers import replace_layers
from deepseek_vl2.models.quantization.quantizer import check_is_complete
from deepseek_vl2.utils.checkpoint_files import check_weight_files, compare_shapes
from deepseek_vl2.utils.command_line import OneLineParser
from deepseek_vl2.utils.errors import run_command
from deepseek_vl2.utils.hardware import choose_device, choose_dtype, choose_num_threads
from deepseek_vl2.utils.io import check_model_type, resolve_model_path
from deepseek_vl2.utils.model_size import (
    PUBLISHED_SIZES,
    cache_bytes_per_token,
    checkpoint_shapes,
    published_config,
    weight_bytes,
)

PROGRAM = "python -m deepseek_vl2.doctor"
VERSIONS_OF = ("torch", "transformers", "timm")
WEIGHTS = ("bfloat16", "int8", "int4")
CONTEXT = 4096
# Above this share of the free memory a model leaves little for what it computes.
TIGHT = 0.9
GB = 1e9
# Names of tensors that a checkpoint may lack.
NOT_NEEDED = tuple(DeepseekVLV2ForCausalLM._keys_to_ignore_on_load_missing)


def diagnose(model_path: str | None = None) -> dict[str, Any]:
    """Collects everything that the command prints, in the types of JSON.

    Args:
        model_path: See `utils.io.resolve_model_path`; None for the machine alone.

    Raises:
        ValueError: The name is none, or the configuration is not one of this library's.
        OSError: There is no such folder.
    """
    device = choose_device()
    free = free_bytes(device.value)
    report = {
        "version": __version__,
        "machine": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "memory_gb": round(psutil.virtual_memory().total / GB, 2),
            "free_gb": round(free / GB, 2),
        },
        "versions": {name: installed_version(name) for name in VERSIONS_OF},
        "extras": missing_packages(),
        "choices": {"device": {"value": str(device.value), "reason": device.reason}} | choices(device.value),
        "fits": [
            fit_of(published_config(size), size, kind, free)
            for size in PUBLISHED_SIZES
            for kind in weights_on(device.value)
        ],
    }
    if model_path is not None:
        report["model"] = check_model(model_path, device.value, free)
    return report


def weights_on(device: torch.device) -> tuple[str, ...]:
    """Kinds of weights that a device takes. In int8 and int4 the experts, most of a model, are on the CPU only."""
    return WEIGHTS if device.type == "cpu" else WEIGHTS[:1]


def choices(device: torch.device) -> dict[str, dict[str, Any]]:
    """Type of weights, threads and kernels, each with `value` and `reason`."""
    dtype, num_threads = choose_dtype(device), choose_num_threads()
    kernels = chosen_kernels()
    from_transformers = "what transformers settles on for this model and the installed packages"
    return {
        "dtype": {"value": _name(dtype.value), "reason": dtype.reason},
        "threads": {"value": num_threads.value, "reason": num_threads.reason},
        "attention": {"value": kernels["attention"], "reason": from_transformers},
        "vision_attention": {"value": kernels["vision_attention"], "reason": "the exact kernel that runs everywhere"},
        "experts": {"value": kernels["experts"], "reason": from_transformers},
        "many_tokens": many_token_kernels(device),
        "decoding": decoding_kernels(device),
    }


def many_token_kernels(device: torch.device) -> dict[str, str]:
    """Who runs the attention of pictures and prompts in bfloat16: `value` and `reason`."""
    if device.type == "cpu" and many_tokens.is_supported():
        return {"value": "compiled", "reason": "attention in bfloat16: this CPU multiplies pairs of numbers"}
    return {"value": "torch", "reason": "attention: the compiled kernel is for avx512_bf16 without amx_bf16, and numba"}


def decoding_kernels(device: torch.device) -> dict[str, str]:
    """Who multiplies a few rows by many weights: `value` and `reason`."""
    if device.type != "cpu":
        return {"value": "torch", "reason": f"on {device.type} its products are fast for few rows, too"}
    if few_row_products.is_supported(torch.bfloat16, torch.bfloat16):
        return {"value": "compiled", "reason": "numba runs here: a token waits for reading the weights only"}
    return {"value": "torch", "reason": "numba does not run here, see the log; with it answers are faster"}


def chosen_kernels() -> dict[str, str]:
    """Names of the kernels that a model gets whose loader is told nothing about them."""
    config = published_config("tiny")
    config.language_config.num_hidden_layers = 2
    config.vision_config.layers = 1
    with torch.device("meta"):
        model = DeepseekVLV2ForCausalLM(config)
    language: Any = model.language.config
    return {
        "attention": language._attn_implementation,
        "vision_attention": model.vision.attn_implementation,
        "experts": language._experts_implementation,
    }


def fit_of(
    config: DeepseekVLV2Config, name: str, weights: str, free: int, num_bytes: int | None = None
) -> dict[str, Any]:
    """What a model takes, and whether that fits.

    Args:
        config: The model's.
        name: How to call it.
        weights: One of `model_size.WEIGHT_KINDS`.
        free: Bytes of memory that it may take.
        num_bytes: What the weights take, if that is known better than by their kind.

    Returns:
        `model`, `weights`, `needs_gb` (weights, and the cache of `CONTEXT` tokens) and `verdict`: yes, tight or no.
    """
    needed = (num_bytes or weight_bytes(config, weights)) + CONTEXT * cache_bytes_per_token(config)
    verdict = "no" if needed > free else "tight" if needed > TIGHT * free else "yes"
    return {"model": name, "weights": weights, "needs_gb": round(needed / GB, 2), "verdict": verdict}


def installed_version(package: str) -> str | None:
    """Version of an installed package, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing_packages() -> dict[str, list[str]]:
    """For each optional extra of this library the packages that are not installed; empty lists are ready to use."""
    try:
        described = importlib.metadata.metadata("deepseek_vl2")
    except importlib.metadata.PackageNotFoundError:  # run from its source without being installed
        return {}
    requirements = [Requirement(text) for text in importlib.metadata.requires("deepseek_vl2") or ()]
    missing: dict[str, list[str]] = {}
    for extra in described.get_all("Provides-Extra") or ():
        needed = [item for item in requirements if _is_of(item, extra)]
        missing[extra] = sorted({item.name for item in needed if installed_version(item.name) is None})
    return missing


def _is_of(requirement: Requirement, extra: str) -> bool:
    """Whether an extra asks for something that the package without it does not."""
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def check_model(model_path: str, device: torch.device, free: int) -> dict[str, Any]:
    """Whether a checkpoint is complete and fits.

    Raises:
        ValueError: See `diagnose`.
        OSError: See `diagnose`.
    """
    folder = _local_folder(model_path)
    if folder is None:
        problem = f"{model_path} is not in the cache yet; it is downloaded when it is loaded first"
        return {"path": model_path, "problems": [problem]}
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is not a model folder")
    check_model_type(folder)
    config: Any = DeepseekVLV2Config.from_pretrained(folder)
    found = check_weight_files(folder)
    missing = [name for name in ("processor_config.json", "tokenizer.json") if not (folder / name).is_file()]
    problems = found.problems + [f"{name} is missing: the processor cannot be loaded" for name in missing]
    quantized = own_quantization(config)
    if not found.problems and quantized:
        problems += _problems_of_quantized(config, found.files)
    elif not found.problems:
        problems += compare_shapes(found.shapes, checkpoint_shapes(config), NOT_NEEDED)
    # The files' headers say what the weights take as 16 bits; a folder that lacks a file cannot be loaded anyway.
    num_bytes = found.num_bytes if found.problems else checkpoint_bytes(folder)
    dtype = choose_dtype(device, num_bytes, quantized)
    weights = quantized or ("float32" if dtype.value == torch.float32 else "bfloat16")
    kinds = (quantized,) if quantized else dict.fromkeys((weights, *weights_on(device)))
    fits = [fit_of(config, Path(model_path).name, kind, free, num_bytes if quantized else None) for kind in kinds]
    if fits[0]["verdict"] == "no":
        others = [fit["weights"] for fit in fits if fit["verdict"] != "no"]
        way_out = f"{' or '.join(others)} would fit" if others else "a smaller model may fit"
        problems.append(f"it needs {fits[0]['needs_gb']} GB in {weights}, {free / GB:.2f} GB are free; {way_out}")
    return {
        "path": str(folder),
        "num_files": len(found.files),
        "size_gb": round(found.num_bytes / GB, 3),
        "dtype": _name(dtype.value),
        "fits": fits,
        "problems": problems,
    }


def _problems_of_quantized(config: DeepseekVLV2Config, files: list[Path]) -> list[str]:
    with torch.device("meta"):
        model = DeepseekVLV2ForCausalLM(config)
    quantization: Any = config.quantization_config
    replace_layers(model, WeightOnlyConfig(**quantization))
    try:
        check_is_complete(model, files)
    except ValueError as error:
        return [str(error)]
    return []


def _local_folder(model_path: str) -> Path | None:
    """Folder of a model here or in the hub's cache; None for a hub name that is not in it."""
    resolved = resolve_model_path(model_path)
    if Path(resolved).is_dir():
        return Path(resolved)
    try:
        return Path(snapshot_download(resolved, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise ValueError(f"{model_path!r} is neither a folder here nor a possible name on the hub: {error}") from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def format_report(report: dict[str, Any]) -> str:
    """The report as text."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in report["versions"].items())
    lines = [
        f"deepseek_vl2 {report['version']}, Python {machine['python']}, {versions}",
        f"{machine['platform']}, {machine['memory_gb']} GB of memory, {machine['free_gb']} GB free for the model",
        "",
        "Chosen here, if nothing else is asked for:",
    ]
    lines += [f"  {name:16} {choice['value']!s:12} {choice['reason']}" for name, choice in report["choices"].items()]
    lines += ["", f"Would it fit? Weights and the cache of {CONTEXT:,} tokens, estimated:"]
    lines += [_fit_line(fit) for fit in report["fits"]]
    if report["extras"]:
        lines += ["", "Optional extras:"]
        for name, missing in report["extras"].items():
            state = f"lacks {', '.join(missing)}: pip install 'deepseek_vl2[{name}]'" if missing else "ready"
            lines.append(f"  {name:16} {state}")
    if "model" in report:
        lines += ["", *_model_lines(report["model"])]
    return "\n".join(lines)


def _fit_line(fit: dict[str, Any]) -> str:
    return f"  {fit['model']:16} {fit['weights']:12} {fit['needs_gb']:7.2f} GB  {fit['verdict']}"


def _model_lines(model: dict[str, Any]) -> list[str]:
    lines = [f"The model {model['path']}:"]
    if "num_files" in model:
        lines.append(f"  {model['num_files']} weight files of {model['size_gb']} GB, loaded as {model['dtype']}")
        lines += [_fit_line(fit) for fit in model["fits"]]
    return lines + ([f"  PROBLEM: {problem}" for problem in model["problems"]] or ["  complete, and it fits"])


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = OneLineParser(prog=PROGRAM, description="Say what is chosen on this machine, and what fits.")
    parser.add_argument("--model_path", help="also check this model: 'nano', a checkpoint folder or a name on the hub")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    options = parser.parse_args(arguments)
    return run_command(PROGRAM, lambda: _diagnose_and_tell(options))


def _diagnose_and_tell(options: argparse.Namespace) -> int:
    report = diagnose(options.model_path)
    print(json.dumps(report, ensure_ascii=False) if options.json else format_report(report))
    return 1 if report.get("model", {}).get("problems") else 0


if __name__ == "__main__":
    sys.exit(main())
