"""Attention of pictures and prompts by a compiled kernel, where that is faster than torch's.

torch's kernel multiplies blocks of a few rows, for which its products in bfloat16 are not made on CPUs with AVX-512;
the compiled one takes half as long and is as exact: scores, sums of weights and outputs are added up in float32.
"""

import functools
import logging
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .cpu_features import cpu_flags
from .few_row_products import as_tensor, has_numba, kernels, threads_for, try_kernel

logger = logging.getLogger(__name__)

# Processors with instructions for matrices are faster with torch's kernel, which uses them.
_NEEDED_FLAG, _BETTER_FLAG = "avx512_bf16", "amx_bf16"
# Fewer tokens fill no block of queries.
MIN_TOKENS = 8
_SELF_TEST_SHAPE = (2, 2, 19, 10)  # sequences, heads, tokens, head
_TOLERANCE = 2**-7  # of the largest output: rounded to eight bits, and its weights also


def attend_many_tokens(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, is_causal: bool
) -> torch.Tensor | None:
    """Attention of each token to all of its sequence, or to those up to itself.

    Args:
        query: [B, H, N, D].
        key: [B, G, N, D], G dividing H.
        value: [B, G, N, V].
        scaling: Factor on the scores.
        is_causal: Whether a token looks at none behind it.

    Returns:
        [B, N, H, V]; None where torch's kernel is to be used.
    """
    states = (query, key, value)
    is_readable = (
        not torch.compiler.is_compiling()
        and all(map(_is_readable, states))
        and query.shape[2] >= MIN_TOKENS
        and key.shape[2] == value.shape[2] == query.shape[2]
        and query.numel() > 0
        and scaling > 0
    )
    if not is_readable or (torch.is_grad_enabled() and any(part.requires_grad for part in states)):
        return None
    return _attend(query, key, value, scaling, is_causal) if is_supported() else None


def _is_readable(states: torch.Tensor) -> bool:
    """Whether numbers of a head are pairs of bfloat16 beside each other."""
    return (
        type(states) is torch.Tensor
        and states.device.type == "cpu"
        and states.dtype == torch.bfloat16
        and states.stride(3) == 1
        and all(size % 2 == 0 for size in (states.shape[3], states.storage_offset(), *states.stride()[:3]))
    )


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, is_causal: bool
) -> torch.Tensor | None:
    num_sequences, num_heads, num_tokens, width = query.shape
    places = [[part.data_ptr(), *(part.itemsize * step for step in part.stride()[:3])] for part in (query, key, value)]
    outputs = np.empty((num_sequences, num_tokens, num_heads, value.shape[3]), np.uint16)
    is_compiled = try_kernel(
        kernels().attend_many_tokens,
        # A thread is worth its while for so many scores as for so many bytes.
        threads_for(num_sequences * num_heads * num_tokens**2),
        np.array(places),
        width // 2,
        num_heads // key.shape[1],
        is_causal,
        np.float32(scaling),
        outputs,
    )
    return as_tensor(outputs, query.dtype) if is_compiled else None


@functools.cache
def is_supported() -> bool:
    """Whether the kernel suits this CPU and works; the log says where it should and does not."""
    flags = cpu_flags()
    if _NEEDED_FLAG not in flags or _BETTER_FLAG in flags or not has_numba():
        return False
    if not kernels().HAS_PAIR_PRODUCTS:
        logger.warning("Pictures take longer on this CPU: numba does not use its instructions for bfloat16")
        return False
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"), torch.inference_mode():
        query, key, value = torch.randn(3, *_SELF_TEST_SHAPE, generator=generator).bfloat16()
        for is_causal in (False, True):
            found = _attend(query, key, value, 1.0, is_causal)
            if found is None:
                return False
            settings: dict[str, Any] = {"scale": 1.0, "is_causal": is_causal}
            expected = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), **settings)
            expected = expected.transpose(1, 2)
            if (found.float() - expected).abs().max() > _TOLERANCE * expected.abs().max():
                logger.warning("Pictures take longer on this CPU: compiled attention is wrong")
                return False
    return True
