"""Adapters of peft: put into a model's weights, so that nothing else has to know of them."""

import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from deepseek_vl2.models import DeepseekVLV2ForCausalLM

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What peft adds to the name of a table of tokens some rows of which are trained.
_TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"


def require_peft() -> ModuleType:
    """Import peft.

    Raises:
        ImportError: it is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError("adapters need the package peft: pip install 'deepseek_vl2[train]', or pip install peft")
    return importlib.import_module("peft")


@contextmanager
def without_peft_warnings() -> Iterator[None]:
    """Keep back that peft asks a model for an attribute by the name it had before transformers 5.23."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def check_adapter(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that holds no adapter, before a model is loaded for it.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing in it.
        ValueError: its files are broken.
        ImportError: peft is not installed.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no adapter folder {str(folder)!r}")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} has no {name}: it is no adapter that fine-tuning or peft has saved")
    try:
        json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        with safe_open(path / ADAPTER_WEIGHTS, "pt"):
            pass
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"the adapter in {path} is broken or cut off: {error}") from error
    require_peft()


def merge_adapter(model: "DeepseekVLV2ForCausalLM", folder: str | os.PathLike[str]) -> "DeepseekVLV2ForCausalLM":
    """Put an adapter into the weights of the model that it was trained on.

    Beside the weights it would slow generation down, and attention that reads `kv_b_proj` directly would miss it.

    Args:
        model: changed in place.
        folder: holds the adapter.

    Returns:
        The model.

    Raises:
        FileNotFoundError: see `check_adapter`.
        ValueError: the adapter is broken, or it belongs to another model.
        ImportError: peft is not installed.
    """
    check_adapter(folder)
    _check_layers(model, folder)
    try:
        with without_peft_warnings():
            adapted: Any = require_peft().PeftModel.from_pretrained(model, os.fspath(folder))
    except (ValueError, RuntimeError, IndexError) as error:  # an IndexError: of tokens that the model lacks
        reason = " ".join(str(error).split())
        raise ValueError(f"the adapter in {folder} does not fit the model: {reason:.300}") from error
    return adapted.merge_and_unload()


def _check_layers(model: torch.nn.Module, folder: str | os.PathLike[str]) -> None:
    """Refuse an adapter for layers that the model lacks: peft would leave them out.

    Raises:
        ValueError: a layer is missing.
    """
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    with safe_open(Path(folder) / ADAPTER_WEIGHTS, "pt") as weights:
        missing = sorted({_adapted_name(key) for key in weights.keys()} - names)  # noqa: SIM118 - it is no dictionary
    if missing:
        raise ValueError(f"the adapter in {folder} belongs to another model: there is no {missing[0]!r} here")


def _adapted_name(key: str) -> str:
    """Name of the layer with LoRA or rows of tokens (`language.lm_head`), or of a parameter trained in full."""
    name = key.removeprefix("base_model.model.").partition(".lora_")[0].removesuffix(_TOKEN_ROWS)
    while name.endswith(".base_layer"):  # the first of two parameters of one layer
        name = name.removesuffix(".base_layer")
    return name
