"""Attention of every token to every other by a compiled kernel, where that is faster than torch's.

torch's kernel multiplies blocks of a few rows, for which its products in bfloat16 are not made on CPUs with AVX-512;
the compiled one takes half as long and is as exact: scores, weights' sums and outputs are added up in float32.
"""

import functools
import logging

import numpy as np
import torch
import torch.nn.functional as F

from .cpu_features import cpu_flags
from .few_row_products import as_array, as_tensor, has_numba, kernels, threads_for, try_kernel

logger = logging.getLogger(__name__)

# Processors with instructions for matrices are faster with torch's kernel, which uses them.
_NEEDED_FLAG, _BETTER_FLAG = "avx512_bf16", "amx_bf16"
# Fewer tokens fill no block of queries.
MIN_TOKENS = 8
_SELF_TEST_SHAPE = (2, 19, 2, 10)  # sequences, tokens, heads, head
_TOLERANCE = 2**-7  # of the largest output: rounded to eight bits, and its weights also


def attend_to_all(qkv: torch.Tensor, num_heads: int, scaling: float) -> torch.Tensor | None:
    """Attention of each token to all of its sequence.

    Args:
        qkv: [B, N, 3 * H * D], queries, keys and values of each token.
        num_heads: H.
        scaling: Factor on the scores.

    Returns:
        [B, N, H * D]; None where torch's kernel is to be used.
    """
    is_readable = (
        type(qkv) is torch.Tensor
        and qkv.device.type == "cpu"
        and qkv.dtype == torch.bfloat16
        and qkv.is_contiguous()
        and qkv.shape[1] >= MIN_TOKENS
        and qkv.shape[2] % (6 * num_heads) == 0  # heads of pairs
        and qkv.numel() > 0
        and scaling > 0
    )
    if not is_readable or (torch.is_grad_enabled() and qkv.requires_grad) or torch.compiler.is_compiling():
        return None
    return _attend(qkv, num_heads, scaling) if is_supported() else None


def _attend(qkv: torch.Tensor, num_heads: int, scaling: float) -> torch.Tensor | None:
    num_sequences, num_tokens, width = qkv.shape
    head_width = width // (3 * num_heads)
    pairs = as_array(qkv).view(np.uint32).reshape(num_sequences, num_tokens, 3, num_heads, head_width // 2)
    outputs = np.empty((num_sequences, num_tokens, num_heads, head_width), np.uint16)
    # A thread is worth its while for so many scores as for so many bytes.
    num_threads = threads_for(num_sequences * num_heads * num_tokens**2)
    if not try_kernel(kernels().attend_to_all, num_threads, pairs, np.float32(scaling), outputs):
        return None
    return as_tensor(outputs.reshape(num_sequences, num_tokens, width // 3), qkv.dtype)


@functools.cache
def is_supported() -> bool:
    """Whether the kernel suits this CPU and works; the log says where it should and does not."""
    flags = cpu_flags()
    if _NEEDED_FLAG not in flags or _BETTER_FLAG in flags or not has_numba():
        return False
    if not kernels().has_pair_products():
        logger.warning("Pictures take longer on this CPU: numba does not use its instructions for bfloat16")
        return False
    num_sequences, num_tokens, num_heads, width = _SELF_TEST_SHAPE
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"), torch.inference_mode():
        qkv = torch.randn(num_sequences, num_tokens, 3 * num_heads * width, generator=generator).bfloat16()
        query, key, value = qkv.float().unflatten(-1, (3, num_heads, width)).permute(2, 0, 3, 1, 4)
        expected = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        found = _attend(qkv, num_heads, width**-0.5)
    if found is None:
        return False
    is_right = bool((found.float() - expected).abs().max() <= _TOLERANCE * expected.abs().max())
    if not is_right:
        logger.warning("Pictures take longer on this CPU: compiled attention is wrong")
    return is_right
