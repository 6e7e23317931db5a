"""Weight-only int8 and int4 for the CPU, through transformers' `quantization_config`.

Letters beside those of `deepseek_vl2.models`: N outputs and K inputs of a layer, g inputs a group, E experts.

Linear layers and fused experts are quantised. Exact stay routers, norms, embeddings, positions, convolutions, the
attention pool that is never run, an output layer tied to the embeddings, and `kv_b_proj`: absorbed attention reads it
as a matrix at each token, and it is below 1 % of the weights.
"""

from .choice import (
    check_quantization,
    choose_quantization,
    needed_quantization,
    own_quantization,
    read_quantization,
)
from .config import QUANTIZATIONS, WeightOnlyConfig
from .quantizer import register_quantization

__all__ = [
    "QUANTIZATIONS",
    "WeightOnlyConfig",
    "check_quantization",
    "choose_quantization",
    "needed_quantization",
    "own_quantization",
    "read_quantization",
    "register_quantization",
]
