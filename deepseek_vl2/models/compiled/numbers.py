"""Numbers as the kernels read and write them, and what is common to their compilation.

Numbers are float32, or the bits of bfloat16 as uint16.
"""

import logging
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import extending, njit, types
from numba.core import cgutils

logger = logging.getLogger(__name__)

CACHE_LINE = 64


def _has_feature(name: str) -> bool:
    """Whether the processor has instructions that LLVM calls so."""
    try:
        return bool(binding.get_host_cpu_features().get(name))
    except RuntimeError:  # LLVM cannot tell on this system
        return False


_SETTINGS: Any = numba.config
LANES = 16 if _has_feature("avx512f") else 8  # of 32 bits in a vector
# Whether there is an instruction for products of pairs of bfloat16; without it compiling `add_bfloat16_pairs` ends the
# process. Whoever sets the processor for numba wants code for another one.
HAS_PAIR_PRODUCTS = _has_feature("avx512bf16") and not (_SETTINGS.CPU_NAME or _SETTINGS.CPU_FEATURES)
FLOAT = ir.FloatType()
BYTE, WORD, INT, LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
ELEMENTS = {types.float32: FLOAT, types.uint16: WORD, types.int8: BYTE}

# numba keeps what it compiled by the date of one file and by what functions close over. Kernels that use other files'
# functions close over this, so that what was compiled with other sources is told apart.
STAMP = zlib.crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))

# Sums in any order, so that they run in vectors; infinities and not-a-numbers stay what they are.
FASTMATH = {"reassoc", "contract"}

# Only what is written as such is run by several threads, and not each filling of an array.
_IMPLICIT = ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion")
IN_PARALLEL: dict[str, Any] = {
    "parallel": {"prange": True, **dict.fromkeys(_IMPLICIT, False)},
    "nogil": True,
    "fastmath": FASTMATH,
}

intrinsic: Any = extending.intrinsic  # its own annotations count the first argument, which callers do not pass


def compiled(function: Callable[..., Any], is_parallel: bool = True) -> Any:
    """Compiles at the first call; the result is kept beside the source or in the user's cache folder."""
    options = IN_PARALLEL if is_parallel else {"nogil": True, "fastmath": FASTMATH}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError as error:  # no folder to write to
        logger.info("%s is compiled in every process: %s", function.__name__, error)
        return njit(**options)(function)


@intrinsic
def to_float32(typing_context: Any, number: Any) -> Any:
    """A float32 as it is, an int8, or a bfloat16 that comes as uint16: it is the upper half of a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return as_float(builder, number, arguments[0])

    return types.float32(number), generate


def as_float(builder: Any, number: Any, value: Any) -> Any:
    """A number of a type of numba, or a vector of such, as float32."""
    if number == types.float32:
        return value
    kinds = [ir.VectorType(kind, value.type.count) if hasattr(value.type, "count") else kind for kind in (INT, FLOAT)]
    if number == types.uint16:
        wide = builder.zext(value, kinds[0])
        return builder.bitcast(builder.shl(wide, splat(kinds[0], 16)), kinds[1])
    return builder.sitofp(value, kinds[1])


@intrinsic
def from_float32(typing_context: Any, number: Any, like: Any) -> Any:
    """A float32 as it is, or rounded to the nearest bfloat16 if that is what the array `like` holds as uint16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if like.dtype == types.float32:
            return arguments[0]
        bits = builder.bitcast(arguments[0], INT)
        is_odd = builder.and_(builder.lshr(bits, INT(16)), INT(1))
        rounded = builder.add(bits, builder.add(is_odd, INT(0x7FFF)))  # halves go to the even neighbour
        quiet = builder.or_(bits, INT(0x00400000))  # rounding up would make an infinity of a not-a-number
        is_number = builder.fcmp_ordered("ord", arguments[0], arguments[0])
        return builder.trunc(builder.lshr(builder.select(is_number, rounded, quiet), INT(16)), WORD)

    return like.dtype(types.float32, like), generate


@intrinsic
def load(typing_context: Any, address: Any, index: Any, like: Any) -> Any:
    """Number of that index of those that lie at an address, of the type of an array, as a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start = builder.inttoptr(arguments[0], ELEMENTS[like.dtype].as_pointer())
        value = builder.load(builder.gep(start, [arguments[1]]), align=like.dtype.bitwidth // 8)
        return as_float(builder, like.dtype, value)

    return types.float32(types.intp, types.intp, like), generate


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Asks for the cache line at an address; there may be nothing."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        prefetch_line(builder, builder.inttoptr(arguments[0], BYTE.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.intp), generate


def prefetch_line(builder: Any, pointer: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), INT, INT, INT])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    # Into the second cache: in the first it would crowd out the inputs.
    is_write, locality, is_data = INT(0), INT(2), INT(1)
    builder.call(function, [pointer, is_write, locality, is_data])


def splat(kind: Any, number: int) -> Any:
    """A constant, of a type of numbers or vectors of numbers."""
    return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)


def load_vector(builder: Any, pointer: Any, element: Any, count: int) -> Any:
    """So many neighbouring elements from a pointer on."""
    return builder.load(
        builder.bitcast(pointer, ir.VectorType(element, count).as_pointer()),
        align=4 if element is FLOAT else element.width // 8,
    )


def array_start(context: Any, builder: Any, array_type: Any, array: Any, element: Any) -> Any:
    """Pointer to an array's first element."""
    return builder.bitcast(context.make_array(array_type)(context, builder, array).data, element.as_pointer())


def shuffle(builder: Any, vector: Any, places: list[int]) -> Any:
    """The elements of a vector that are at so many places."""
    return builder.shuffle_vector(
        vector, ir.Constant(vector.type, ir.Undefined), ir.Constant(ir.VectorType(INT, len(places)), places)
    )


def add_pairs(builder: Any, left: Any, right: Any) -> Any:
    """Products of integers of 16 bits, those of two neighbours added."""
    wide = ir.VectorType(INT, left.type.count)
    products = builder.mul(builder.sext(left, wide), builder.sext(right, wide))
    even, odd = (shuffle(builder, products, list(range(start, left.type.count, 2))) for start in (0, 1))
    return builder.add(even, odd)


class _BFloat16(ir.Type):
    """LLVM's type of that name, which llvmlite does not know."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


def add_bfloat16_pairs(builder: Any, total: Any, left: Any, right: Any) -> Any:
    """Adds products of bfloat16 to float32, those of two neighbours at once; only where `HAS_PAIR_PRODUCTS`.

    Args:
        builder: Of LLVM's code.
        total: 16 float32.
        left: 32 bfloat16, as integers of 16 bits or pairs of 32.
        right: Also.
    """
    numbers = ir.VectorType(_BFloat16(), 2 * total.type.count)
    kind = ir.FunctionType(total.type, [total.type, numbers, numbers])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    return builder.call(function, [total, builder.bitcast(left, numbers), builder.bitcast(right, numbers)])


@njit(fastmath=FASTMATH)
def dot(row: Any, address: Any, like: Any) -> Any:
    """Sum of the products of a row [K] and the K numbers at an address."""
    total = np.float32(0)
    for i in range(len(row)):
        total += row[i] * load(address, i, like)
    return total
