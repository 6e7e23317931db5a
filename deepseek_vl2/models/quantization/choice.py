"""Which quantisation a device and a checkpoint allow."""

import importlib.util
import logging
from typing import Any

from transformers import BitsAndBytesConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from .config import METHOD, QUANTIZATIONS, WeightOnlyConfig
from .layers import EXACT_LINEARS

logger = logging.getLogger(__name__)


def check_quantization(quantize: str, device_type: str) -> None:
    """Refuses a quantisation that is unknown, or that a device cannot run.

    Args:
        quantize: `int8` or `int4`.
        device_type: `cpu`, `cuda` or another kind of device.

    Raises:
        ValueError: If the name is unknown, or there is no quantisation for the device.
        ImportError: If the device needs a package that is not installed.
    """
    if quantize not in QUANTIZATIONS:
        raise ValueError(f"unknown quantisation {quantize!r}: take {' or '.join(QUANTIZATIONS)}")
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"quantize {quantize!r} is not possible on {device_type!r}: take the device 'cpu'")
    if device_type == "cuda" and importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"quantize {quantize!r} on CUDA needs the package bitsandbytes: pip install bitsandbytes, or take the "
            "device 'cpu'"
        )


def choose_quantization(quantize: str, device_type: str, checkpoint_config: Any) -> QuantizationConfigMixin | None:
    """What to pass to `from_pretrained` as `quantization_config`.

    Args:
        quantize: `int8` or `int4`.
        device_type: `cpu` for `WeightOnlyConfig`, `cuda` for bitsandbytes.
        checkpoint_config: Configuration of the model as its folder holds it.

    Returns:
        The configuration; None if the checkpoint is quantised like that already.

    Raises:
        ValueError: If the checkpoint is quantised otherwise, and see `check_quantization`.
        ImportError: See `check_quantization`.
    """
    check_quantization(quantize, device_type)
    found = _present(checkpoint_config)
    if found is not None:
        if _name(found) != quantize:
            raise ValueError(
                f"the checkpoint is quantised already ({_name(found)}), so it cannot be loaded as {quantize!r}: leave "
                "quantize out, or take the original checkpoint"
            )
        return None
    if device_type == "cpu":
        return WeightOnlyConfig(bits=QUANTIZATIONS[quantize])
    logger.warning(
        "bitsandbytes quantises linear layers only: the routed experts, most of the weights of these models, stay as "
        "they are on CUDA"
    )
    is_int8 = quantize == "int8"
    return BitsAndBytesConfig(
        load_in_8bit=is_int8, load_in_4bit=not is_int8, llm_int8_skip_modules=[*EXACT_LINEARS, "lm_head"]
    )


def read_quantization(given: Any) -> Any:
    """What a caller gave as `quantization_config`, with the fields of a `WeightOnlyConfig` made into one.

    Raises:
        ValueError: If it is a name and no configuration, or has fields that `WeightOnlyConfig` refuses.
    """
    if isinstance(given, str):
        raise ValueError(
            f"quantization_config {given!r} is no configuration: give one, such as WeightOnlyConfig(bits=8), or give "
            f"quantize={given!r} to load_pretrained_model"
        )
    is_own = isinstance(given, dict) and given.get("quant_method") == METHOD
    return WeightOnlyConfig(**given) if is_own else given


def needed_quantization(given: WeightOnlyConfig, checkpoint_config: Any) -> WeightOnlyConfig | None:
    """What is left to do of a quantisation: nothing if the checkpoint is quantised like that already.

    Args:
        given: What is asked for.
        checkpoint_config: Configuration of the model as its folder holds it.

    Raises:
        ValueError: If the checkpoint is quantised otherwise.
    """
    found = _present(checkpoint_config)
    if found is None:
        return given
    if found != given.to_dict():
        raise ValueError(
            f"the checkpoint is quantised already ({found}), so it cannot be loaded with {given.to_dict()}: leave "
            "quantization_config out, or take the original checkpoint"
        )
    return None


def own_quantization(checkpoint_config: Any) -> str | None:
    """`int8` or `int4` if a checkpoint is quantised by `WeightOnlyConfig`, else None.

    Args:
        checkpoint_config: Configuration of the model as its folder holds it.

    Raises:
        ValueError: If its `quantization_config` is one that `WeightOnlyConfig` refuses.
    """
    found = _present(checkpoint_config)
    return _name(found) if found is not None and found.get("quant_method") == METHOD else None


def _present(checkpoint_config: Any) -> dict[str, Any] | None:
    present = getattr(checkpoint_config, "quantization_config", None)
    return present if present is None or isinstance(present, dict) else present.to_dict()


def _name(config: dict[str, Any]) -> str:
    method = config.get("quant_method")
    return WeightOnlyConfig(**config).name if method == METHOD else f"method {method}"
