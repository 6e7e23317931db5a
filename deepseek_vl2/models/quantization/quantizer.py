"""The part that transformers calls: replaces layers, quantises each weight as it is read, loads and saves."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from ..conversion_mapping import FuseExperts, experts_of_layer
from ..mapped_files import MappedFiles
from ..weight_headers import read_header
from . import kernels, packing
from .config import METHOD, WeightOnlyConfig
from .layers import EXPERT_WEIGHTS, SCALES, QuantizedExperts, QuantizedModule, int4_weights, replace_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# The names by which transformers shares a model out over the devices that it finds.
AUTOMATIC_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


class QuantizeWeights(ConversionOps):
    """Quantises what was read for one parameter, and gives the memory of the file back."""

    @torch.no_grad()
    def convert(  # type: ignore[override]  # transformers' own steps take and return these, too
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Quantises one weight [N, K], or the experts of one layer, one after the other.

        Args:
            input_dict: The weight by its name; or by kind of weight the tensors of all experts.
            source_patterns: The kinds of weights.
            target_patterns: Name of the fused experts without the layer's, as transformers expects it.
            full_layer_name: Name of the parameter in the model.
            model: Holds the layer, still without content.

        Raises:
            ValueError: If a shape is not the layer's, experts are missing, or a value is not finite.
        """
        if any(name.endswith(SCALES) for name in input_dict):
            return input_dict  # transformers asks again after experts, which are quantised at once
        module, name = get_module_from_name(model, full_layer_name)
        values = next(iter(input_dict.values()))
        if len(source_patterns) > 1 or "*" in source_patterns[0]:
            matrices = experts_of_layer(input_dict, source_patterns)
            target_name = target_patterns[0]
        else:
            tensor = values[0] if isinstance(values, list) else values
            matrices = [(matrix,) for matrix in (tensor if tensor.dim() == 3 else tensor[None])]
            target_name = full_layer_name
        weight, scales = _quantize(matrices, module, name)
        return {target_name: weight, target_name + SCALES: scales}

    @property
    def reverse_op(self) -> ConversionOps:
        """Never used: quantised weights are saved as they are."""
        raise NotImplementedError("Quantised weights cannot be turned back into the original ones.")


def _quantize(
    matrices: list[tuple[torch.Tensor, ...]], module: QuantizedModule, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises the parts of each expert, or of the one weight of a linear layer."""
    *experts, num_rows, num_inputs = shape = module.shape_of(name)
    found = (*([len(matrices)] if experts else []), sum(part.shape[0] for part in matrices[0]), matrices[0][0].shape[1])
    if found != tuple(shape):
        raise ValueError(f"the shape is {list(found)}, the model's configuration says {list(shape)}")
    weight_format = module.format_of(name)
    weight, scales = packing.empty_weight(num_rows, num_inputs, weight_format, tuple(experts))
    targets = zip(weight, scales, strict=True) if experts else [(weight, scales)]
    files = MappedFiles()
    for parts, (target, target_scales) in zip(matrices, targets, strict=True):
        values = parts[0] if len(parts) == 1 else torch.cat(parts)
        packing.quantize_into(values, target, target_scales, weight_format)
        files.release_pages(parts)
    return weight, scales


class WeightOnlyQuantizer(HfQuantizer):
    """Loads models with the weights that `WeightOnlyConfig` describes."""

    quantization_config: WeightOnlyConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses other devices than the CPU.

        Raises:
            ValueError: If a part of the model would be elsewhere.
        """
        if _means_cpu(device_map):
            return
        places = device_map.values() if isinstance(device_map, dict) else [device_map or "cpu"]
        others = {str(place) for place in places if str(place) != "cpu"}
        if others:
            raise ValueError(
                f"{self.quantization_config.name} weights of WeightOnlyConfig work on the CPU only, not on "
                f"{', '.join(sorted(others))}. Load with device_map='cpu'; for CUDA there is BitsAndBytesConfig."
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Puts everything on the CPU where that is the only device."""
        return {"": "cpu"} if _means_cpu(device_map) else device_map

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Refuses float16, in which products of integers overflow.

        Raises:
            ValueError: For float16.
        """
        kernels.check_activations(dtype)
        return dtype

    def param_needs_quantization(self, model: "PreTrainedModel", param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter of the checkpoint is one that this class quantises."""
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, QuantizedExperts):
            return name in EXPERT_WEIGHTS
        return isinstance(module, QuantizedModule) and name == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        """The step after a parameter is read."""
        return QuantizeWeights()

    def update_weight_conversions(self, weight_conversions: list[Any], model: "PreTrainedModel") -> list[Any]:
        """Quantises experts one by one in place of fusing them; in quantised checkpoints they are fused already."""
        updated = []
        for conversion in weight_conversions:
            operations = getattr(conversion, "operations", [])
            if not any(isinstance(operation, FuseExperts) for operation in operations):
                updated.append(conversion)
            elif not self.pre_quantized:
                conversion.operations = [QuantizeWeights()]
                updated.append(conversion)
        return updated

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        # Not above: that module needs this package.
        from ..memory import check_memory_of_files

        replace_layers(model, self.quantization_config)
        if not checkpoint_files:
            return
        if self.pre_quantized:
            check_is_complete(model, checkpoint_files)
        check_memory_of_files(checkpoint_files, self.quantization_config, model.dtype)

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        # Else saving would take the experts apart.
        model._weight_conversions = []  # type: ignore[assignment]
        _refuse_parts_alone(model)
        _align_int8_weights(model)
        block_rows = kernels.machine_block_rows()
        if block_rows != packing.BLOCK_ROWS:
            for weight in int4_weights(model).values():
                weight.copy_(packing.with_block_rows(weight, packing.BLOCK_ROWS, block_rows))

    def get_state_dict_and_metadata(self, model: "PreTrainedModel") -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What is saved: int4 weights in the layout of checkpoints, on every machine."""
        state_dict = model.state_dict()
        block_rows = kernels.machine_block_rows()
        if block_rows != packing.BLOCK_ROWS:
            for name, weight in int4_weights(model).items():
                state_dict[name] = packing.with_block_rows(weight, block_rows, packing.BLOCK_ROWS)
        # A model that was put into float32 has widened its scales, too; they lose nothing.
        return {name: value.bfloat16() if name.endswith(SCALES) else value for name, value in state_dict.items()}, {}

    def is_serializable(self) -> bool:
        """Quantised models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Quantised models cannot be trained."""
        return False


def _means_cpu(device_map: Any) -> bool:
    """Whether transformers is asked to choose devices on a machine that has no other than the CPU."""
    return isinstance(device_map, str) and device_map in AUTOMATIC_MAPS and not torch.accelerator.is_available()


def _refuse_parts_alone(model: "PreTrainedModel") -> None:
    """Keeps models inside the model from being saved alone: only the whole one's configuration tells of its weights."""
    for name, part in model.named_modules():
        if name and hasattr(part, "save_pretrained"):
            part.save_pretrained = functools.partial(_refuse_to_save, name)


def _refuse_to_save(name: str, *args: Any, **kwargs: Any) -> None:
    raise ValueError(
        f"{name!r} is a part of a quantised model and would not load again by itself. Save the whole model, or save "
        "the part of the original model and quantise it with WeightOnlyConfig when it is loaded."
    )


def _align_int8_weights(model: nn.Module) -> None:
    """Copies int8 weights that are views of a file to addresses that torch's kernel takes."""
    files = MappedFiles()
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.dtype == torch.int8 and buffer.data_ptr() % kernels.INT8_WEIGHT_ALIGNMENT:
                    setattr(module, name, buffer.clone())
                    files.release_pages([buffer])


def check_is_complete(model: "PreTrainedModel", checkpoint_files: Sequence[str | Path]) -> None:
    """Refuses a quantised checkpoint of which a part is missing, by the headers of its files.

    Raises:
        ValueError: If a file is broken or cut off, or a weight is missing or of another shape or type.
    """
    found: dict[str, tuple[list[int], str]] = {}
    way_out = "quantise and save the original again, into an empty folder"
    for file in checkpoint_files:
        try:
            header = read_header(Path(file))
        except (ValueError, OSError) as error:
            raise ValueError(
                f"The quantised checkpoint is broken or half written: {file}: {error}; {way_out}"
            ) from error
        found |= {name: (tensor["shape"], tensor["dtype"]) for name, tensor in header.items()}
    types = {torch.int8: "I8", torch.uint8: "U8", torch.bfloat16: "BF16"}
    quantized = {
        name: types[buffer.dtype]
        for module_name, module in model.named_modules()
        if isinstance(module, QuantizedModule)
        for name, buffer in module.named_buffers(prefix=module_name, recurse=False)
    }
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    wrong = []
    for name, tensor in expected.items():
        shape, kind = found.get(name, ([], ""))
        if shape != list(tensor.shape) or quantized.get(name, kind) != kind:
            wrong.append(name)
    if wrong:
        files = sorted({Path(checkpoint_files[0]).name, Path(checkpoint_files[-1]).name})
        raise ValueError(
            f"The quantised checkpoint is half written, or not of this configuration: {len(wrong)} weights are missing "
            f"or of another shape in {' to '.join(files)}, such as {wrong[0]}; {way_out}"
        )


def register_quantization() -> None:
    """Tells transformers of the method, so that `from_pretrained` takes its configuration and loads its checkpoints."""
    register_quantization_config(METHOD)(WeightOnlyConfig)
    register_quantizer(METHOD)(WeightOnlyQuantizer)
