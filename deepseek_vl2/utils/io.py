"""What comes from outside: pictures, JSON files, and the one loader of model and processor."""

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from attrdict import AttrDict
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError

from deepseek_vl2.utils.adapter import check_adapter, merge_adapter
from deepseek_vl2.utils.hardware import choose_device, choose_dtype
from deepseek_vl2.utils.pictures import load_image, load_pil_images

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM, DeepseekVLV2Processor

__all__ = [
    "LoadedModel",
    "checkpoint_folder",
    "dtype_name",
    "load_image",
    "load_json",
    "load_pil_images",
    "load_pretrained_model",
    "load_processor",
    "resolve_device",
    "resolve_dtype",
    "resolve_model_path",
]

logger = logging.getLogger(__name__)

MODEL_TYPE = "deepseek_vl_v2"
NANO = "nano"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HUB_TIMEOUT = 5.0
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
# What transformers says in a plain RuntimeError where a tensor could not be converted.
_IN_CONVERSION = "automatic conversion"
_PROCESSOR_FILES = ("processor_config.json", "tokenizer.json")


class LoadedModel(NamedTuple):
    """What `load_pretrained_model` gives, in the order of the reference."""

    tokenizer: "PreTrainedTokenizerBase"
    processor: "DeepseekVLV2Processor"
    model: "DeepseekVLV2ForCausalLM"


def load_json(path: str | os.PathLike[str]) -> AttrDict:
    """Read a JSON object; its keys, nested ones too, can be read as attributes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, not JSON, or no object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds {type(content).__name__}")
    return AttrDict(content)


def resolve_model_path(name_or_path: str | os.PathLike[str]) -> str:
    """Find the folder that a model's name means.

    Args:
        name_or_path: `"nano"` for the bundled model (`"./nano"` is a folder), an existing folder, or a name on the
            Hugging Face hub.

    Returns:
        A folder's path, or the hub name as it is.

    Raises:
        FileNotFoundError: what can only be a path does not exist.
        NotADirectoryError: it is a file.
    """
    text = os.fspath(name_or_path)
    if text == NANO:
        from deepseek_vl2 import nano

        return nano.path()
    folder = Path(text).expanduser()
    if text and folder.is_dir():
        return str(folder)
    if text and folder.exists():
        raise NotADirectoryError(f"{text!r} is a file; give the folder that holds config.json")
    if not isinstance(name_or_path, str) or not text or text.startswith((".", "~", os.sep)) or text.count("/") > 1:
        raise FileNotFoundError(f"there is no model folder {text!r}")
    return text


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Choose where a model runs.

    Args:
        device: `"auto"` (CUDA, else MPS, else CPU), `"cpu"`, `"cuda"`, `"cuda:1"` or `"mps"`.

    Raises:
        ValueError: an unknown name, or a device that this machine does not have.
    """
    if device == "auto":
        return choose_device().value
    cuda_count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_mps = torch.backends.mps.is_available()
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"unknown device {str(device)!r}: take auto, cpu, cuda, cuda:N or mps")
    missing = {"cpu": False, "cuda": (chosen.index or 0) >= cuda_count, "mps": not has_mps}[chosen.type]
    if missing:
        present = ["cpu", *(f"cuda:{index}" for index in range(cuda_count)), *(["mps"] if has_mps else [])]
        raise ValueError(
            f"device {str(device)!r} is not available here (there is: {', '.join(present)}); use --device cpu"
        )
    return chosen


def resolve_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """Read a dtype's name.

    Args:
        dtype: a torch dtype, `"bfloat16"`, `"float16"`, `"float32"`, or `"auto"` for the checkpoint's own.

    Raises:
        ValueError: another name or dtype.
    """
    if dtype == "auto" or dtype in DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise ValueError(f"unknown dtype {str(dtype)!r}: take one of auto, {', '.join(DTYPES)}")


def load_processor(path: str | os.PathLike[str]) -> tuple["DeepseekVLV2Processor", "DeepseekVLV2Config"]:
    """Load what prepares questions: a model's processor and its configuration, without its weights.

    Args:
        path: see `resolve_model_path`.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        ConnectionError: the hub cannot be reached and the model is not in the cache.
        ValueError: another kind of model, or one whose tokens are not the tokenizer's.
    """
    from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2Processor

    folder = checkpoint_folder(resolve_model_path(path))
    processor = DeepseekVLV2Processor.from_pretrained(folder)
    check_model_type(folder)
    config = DeepseekVLV2Config.from_pretrained(folder)
    processor.check_vocab(config.language_config.vocab_size)
    return processor, config


def load_pretrained_model(
    path: str | os.PathLike[str],
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "auto",
    adapter: str | os.PathLike[str] | None = None,
    quantize: str | None = None,
    pack: bool = False,
    compile: bool = False,
    **model_options: Any,
) -> LoadedModel:
    """Load a model for inference, with its processor and tokenizer.

    Args:
        path: see `resolve_model_path`. A hub name is downloaded once, then read from the cache.
        dtype: see `resolve_dtype`; if None, what suits the device, see `hardware.choose_dtype`.
        device: see `resolve_device`. Leave it at `"auto"` when a `device_map` is among the options.
        adapter: folder of an adapter that was trained on this model; it is merged into the weights.
        quantize: `"int8"` or `"int4"` to hold the weights in fewer bits, None to hold them as the checkpoint does. On
            the CPU that is `deepseek_vl2.models.WeightOnlyConfig`, on CUDA bitsandbytes, which leaves the experts.
        pack: whether to reorder the weights on the CPU, see `deepseek_vl2.models.cpu_packing`: that takes a moment, and
            answers come faster from then on. Such a model cannot be trained.
        compile: whether to use torch.compile, see `deepseek_vl2.models.compiling`; not together with `pack`.
        model_options: passed on to `DeepseekVLV2ForCausalLM.from_pretrained`, such as `attn_implementation`, or a
            `distributed_config` for processes that share the model.

    Returns:
        Tokenizer, processor and model (in eval mode).

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        ConnectionError: the hub cannot be reached and the model is not in the cache.
        ValueError: a device, dtype or quantisation that does not fit, a checkpoint or adapter that does not fit the
            model or tokenizer, or weights that do not fit into memory.
        ImportError: an adapter is given and peft is not installed, or a quantisation needs another package.
    """
    from deepseek_vl2.models import (
        DeepseekVLV2ForCausalLM,
        WeightOnlyConfig,
        check_memory,
        check_quantization,
        choose_quantization,
        narrower_stored_dtype,
        needed_quantization,
        read_quantization,
        widen,
    )

    torch_dtype = None if dtype is None else resolve_dtype(dtype)
    if compile and pack:
        raise ValueError("packed weights cannot be compiled: give pack=True or compile=True, not both")
    if adapter is not None:
        if model_options.get("distributed_config") is not None:
            raise ValueError(
                f"adapter {os.fspath(adapter)!r} cannot be merged into a model that processes share; merge it first: "
                "python -m deepseek_vl2.train.merge --help"
            )
        check_adapter(adapter)
    given = model_options.get("quantization_config")
    if quantize is not None and given is not None:
        raise ValueError(f"give quantize={quantize!r} or a quantization_config, not both")
    given = read_quantization(given)
    if given is not None:
        model_options["quantization_config"] = given
    # How the weights are held in the end.
    held_as = given if isinstance(given, WeightOnlyConfig) else quantize
    model_options["device_map"] = _device_map(device, model_options)
    # Before anything is downloaded or read.
    if quantize is not None:
        check_quantization(quantize, _kind_of_device(model_options["device_map"]))
    if compile:
        from deepseek_vl2.models.compiling import check_compiler

        check_compiler(_kind_of_device(model_options["device_map"]))
    folder = checkpoint_folder(resolve_model_path(path))
    processor, config = load_processor(folder)
    if torch_dtype is None:
        place = "cpu" if _is_on_cpu(model_options["device_map"]) else device
        kind_of_weights = held_as.name if isinstance(held_as, WeightOnlyConfig) else held_as
        torch_dtype = _choose_dtype(folder, config, place, kind_of_weights)
    if adapter is not None and (quantize or given or getattr(config, "quantization_config", None)):
        raise ValueError(
            "an adapter cannot be put into quantised weights: merge it first (python -m deepseek_vl2.train.merge), "
            "then quantise the result"
        )
    if isinstance(given, WeightOnlyConfig):
        model_options["quantization_config"] = needed_quantization(given, config)
    if quantize is not None:
        kind = _kind_of_device(model_options["device_map"])
        model_options["quantization_config"] = choose_quantization(quantize, kind, config)
    wide_dtype = None
    if _is_on_cpu(model_options["device_map"]):
        check_memory(folder, held_as, torch_dtype)
        if isinstance(torch_dtype, torch.dtype) and held_as is None and given is None:
            stored_dtype = narrower_stored_dtype(Path(folder), torch_dtype)
            if stored_dtype is not None:
                torch_dtype, wide_dtype = stored_dtype, torch_dtype
    try:
        loaded: Any = DeepseekVLV2ForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch_dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the loading info, and refused below
            **model_options,
        )
    except SafetensorError as error:
        raise ValueError(f"the weights in {folder} are broken or cut off: {error}") from error
    except RuntimeError as error:
        if _IN_CONVERSION not in str(error):
            raise
        raise ValueError(
            f"the weights in {folder} do not fit its config.json or are broken: a part of them is missing, has another "
            "shape or is no number; copy or download them again"
        ) from error
    model, info = loaded
    _check_loading(info, folder)
    if wide_dtype is not None:
        widen(model, wide_dtype)
    if adapter is not None:
        model = merge_adapter(model, adapter)
    model.eval()
    if pack and quantize is None and given is None and _is_on_cpu(model_options["device_map"]):
        from deepseek_vl2.models.cpu_packing import pack_weights

        pack_weights(model)
    if compile:
        from deepseek_vl2.models.compiling import compile_towers

        compile_towers(model)
    return LoadedModel(processor.tokenizer, processor, model)


def _device_map(device: str | torch.device, model_options: dict[str, Any]) -> Any:
    device_map = model_options.get("device_map")
    if model_options.get("distributed_config") is not None:
        if device != "auto" or device_map is not None:
            raise ValueError("processes that share a model take their devices by themselves; leave device at auto")
        return None
    if device_map is None:
        return {"": resolve_device(device)}
    if device != "auto":
        raise ValueError(f"give device={str(device)!r} or device_map={device_map!r}, not both")
    return device_map


def dtype_name(path: str | os.PathLike[str], device: str | torch.device = "auto", quantize: str | None = None) -> str:
    """The name in `DTYPES` of the type that `load_pretrained_model` chooses by itself for a model and a device.

    A hub name is downloaded, since the choice depends on the size of the weights.

    Raises:
        ValueError: no such device.
        OSError: the model is not there.
    """
    from deepseek_vl2.models import DeepseekVLV2Config

    folder = checkpoint_folder(resolve_model_path(path))
    chosen = _choose_dtype(folder, DeepseekVLV2Config.from_pretrained(folder), device, quantize)
    return next(name for name, dtype in DTYPES.items() if dtype == chosen)


def _choose_dtype(
    folder: str, config: "DeepseekVLV2Config", device: str | torch.device, quantize: str | None
) -> torch.dtype:
    from deepseek_vl2.models import checkpoint_bytes, own_quantization

    place = resolve_device(device)
    num_bytes = checkpoint_bytes(folder) if place.type == "cpu" else None
    choice = choose_dtype(place, num_bytes, quantize or own_quantization(config))
    logger.info("weights are loaded as %s: %s", choice.value, choice.reason)
    return choice.value


def _is_on_cpu(device_map: Any) -> bool:
    """Whether the whole model goes into the CPU's memory, and nothing to other devices or to disk."""
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    return {str(place) for place in places} == {"cpu"}


def _kind_of_device(device_map: Any) -> str:
    """Kind of the device that quantised weights go to; several devices are GPUs if there are any."""
    if _is_on_cpu(device_map):
        return "cpu"
    if isinstance(device_map, dict) and len(device_map) == 1:
        return torch.device(next(iter(device_map.values()))).type
    return "cuda" if torch.cuda.is_available() else "cpu"


def checkpoint_folder(name_or_folder: str) -> str:
    """Return a folder that holds config and processor; a hub name is downloaded.

    Args:
        name_or_folder: what `resolve_model_path` gives.

    Raises:
        FileNotFoundError: there is no such model, or a file is missing.
        ConnectionError: the hub cannot be reached and the model is not in the cache.
        PermissionError: the hub wants an agreement first.
        ValueError: an impossible name.
    """
    folder = Path(name_or_folder)
    if not folder.is_dir() and not folder.is_absolute():
        folder = Path(_download(name_or_folder))
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise FileNotFoundError(
                f"{folder} holds an adapter and no model: give the model it was trained on and --adapter, or merge it "
                "first: python -m deepseek_vl2.train.merge --help"
            )
        raise FileNotFoundError(f"{folder} has no config.json: it is not a model folder")
    missing = [name for name in _PROCESSOR_FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {' and no '.join(missing)}: the model's processor is missing. "
            "Copy these files from the model it was made of, or save it there: processor.save_pretrained(folder)."
        )
    return str(folder)


def _download(name: str) -> str:
    """Bring a hub model into the cache and return its folder; without a network, the folder that is there already."""
    try:
        return snapshot_download(name, allow_patterns=_HUB_FILES, etag_timeout=HUB_TIMEOUT)
    except LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{name!r} is no folder here, the Hugging Face hub cannot be reached (no network, or offline mode), and "
            f"no complete copy of {name!r} is in its cache. Without a network the bundled model works: 'nano'."
        ) from error
    except GatedRepoError as error:
        raise PermissionError(f"{name!r} asks for an agreement on the hub first, then for `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} is neither a folder here nor a model on the Hugging Face hub (private: `hf auth login` first)"
        ) from error
    except HFValidationError as error:
        raise ValueError(f"{name!r} is neither a folder here nor a possible name on the hub: {error}") from error


def check_model_type(folder: str | os.PathLike[str]) -> None:
    """Refuses another kind of model.

    Raises:
        ValueError: the config is broken, or names another model type.
        OSError: there is no config.
    """
    model_type = load_json(Path(folder) / "config.json").get("model_type")
    if model_type != MODEL_TYPE:
        raise ValueError(f"{folder} holds a model of type {model_type!r}; this library loads {MODEL_TYPE!r}")


def _check_loading(info: dict[str, Any], folder: str) -> None:
    """Refuse a checkpoint that leaves weights at random, or holds others.

    Raises:
        ValueError: keys are missing, unexpected or of another shape.
    """
    complaints = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = sorted(map(str, info.get(kind) or ()))
        if found:
            shown = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
            complaints.append(f"{len(found)} {kind.replace('_', ' ')} ({shown})")
    if complaints:
        raise ValueError(f"the weights in {folder} do not fit its config.json: {'; '.join(complaints)}")
