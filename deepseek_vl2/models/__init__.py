"""The DeepSeek-VL2 models and their processor, and their registration with transformers.

Letters of shapes, here and in every docstring of the package: B batch, T tokens, V views, I images, S view side in
pixels, P patches a side, G image tokens a side, C vision width, D text width.

A view is one SxS picture fed to the vision tower: the whole picture (global view) or a tile of it. A patch is 14x14
pixels. An image token is a placeholder in the text that a merged block of patches is put into.
"""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from .configuration_deepseek import DeepseekV2Config
from .configuration_deepseek_vl_v2 import DeepseekVLV2Config
from .conversion_mapping import register_conversion_mapping
from .memory import check_memory, checkpoint_bytes
from .modeling_deepseek_vl_v2 import DeepseekVLV2ForCausalLM
from .processing_deepseek_vl_v2 import DeepseekVLV2Processor
from .quantization import (
    WeightOnlyConfig,
    check_quantization,
    choose_quantization,
    needed_quantization,
    own_quantization,
    read_quantization,
    register_quantization,
)
from .widening import narrower_stored_dtype, widen

__all__ = [
    "DeepseekV2Config",
    "DeepseekVLV2Config",
    "DeepseekVLV2ForCausalLM",
    "DeepseekVLV2Processor",
    "WeightOnlyConfig",
    "check_memory",
    "check_quantization",
    "checkpoint_bytes",
    "choose_quantization",
    "narrower_stored_dtype",
    "needed_quantization",
    "own_quantization",
    "read_quantization",
    "widen",
]

AutoConfig.register(DeepseekVLV2Config.model_type, DeepseekVLV2Config, exist_ok=True)
AutoModelForCausalLM.register(DeepseekVLV2Config, DeepseekVLV2ForCausalLM, exist_ok=True)
AutoModelForImageTextToText.register(DeepseekVLV2Config, DeepseekVLV2ForCausalLM, exist_ok=True)
AutoProcessor.register(DeepseekVLV2Config, DeepseekVLV2Processor, exist_ok=True)
register_conversion_mapping()
register_quantization()
