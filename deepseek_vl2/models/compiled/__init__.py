"""Kernels for the CPU that numba compiles; imported when the first of them is used, since numba takes its time.

From below: `products` and `int4` multiply rows by weights, `rows` treats rows between products, `attention` and
`feed_forward` are the two halves of a decoder layer, `many_tokens` is attention of pictures and prompts.
"""

from .attention import attend_one_token, attention_kernel, latent_attention_kernel
from .feed_forward import feed_forward_kernel
from .int4 import int4_rows_kernel
from .many_tokens import attend_many_tokens
from .numbers import HAS_PAIR_PRODUCTS
from .products import multiply_rows

__all__ = [
    "HAS_PAIR_PRODUCTS",
    "attend_many_tokens",
    "attend_one_token",
    "attention_kernel",
    "feed_forward_kernel",
    "int4_rows_kernel",
    "latent_attention_kernel",
    "multiply_rows",
]
