"""Weights to integers and back, in plain torch.

int8: weight int8 [N, K], scales bfloat16 [N]; value = weight * scale.

int4: weight uint8 [N', K / 2], scales bfloat16 [K / g, N', 2], N' being N filled up to a multiple of 64;
value = (nibble - 8) * scale + offset. The bytes are [N' / 64, K, 32]: for each 64 outputs and each input 32 bytes,
byte t holding output t in its low half and output 32 + t in its high half. torch's kernel for AVX-512 reads them as
they are, so a checkpoint of this layout is used straight from its file. The kernel for AVX2 takes 32 outputs at once,
see `with_block_rows`.
"""

import torch
import torch.nn.functional as F

from .config import WeightFormat

BLOCK_ROWS = 64
# Weights quantised at once: the many steps on a block find it in the processor's cache.
QUANTIZED_AT_ONCE = 2**19
INT8_MAX = 127
INT4_MAX = 15
INT4_CENTER = 8
# How often scale and offset are fitted anew to the levels that they gave: the first two take off most of the error.
INT4_REFITS = 2


def padded_rows(num_rows: int, weight_format: WeightFormat) -> int:
    """N' of a weight [N, K]."""
    return num_rows if weight_format.bits == 8 else -(-num_rows // BLOCK_ROWS) * BLOCK_ROWS


def empty_weight(
    num_rows: int, num_inputs: int, weight_format: WeightFormat, leading: tuple[int, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for a quantised weight and its scales, with leading dimensions such as E in front."""
    rows = padded_rows(num_rows, weight_format)
    if weight_format.group_size is None:
        return (
            torch.empty(*leading, rows, num_inputs, dtype=torch.int8),
            torch.empty(*leading, rows, dtype=torch.bfloat16),
        )
    return (
        torch.empty(*leading, rows, num_inputs // 2, dtype=torch.uint8),
        torch.empty(*leading, num_inputs // weight_format.group_size, rows, 2, dtype=torch.bfloat16),
    )


def row_blocks(num_rows: int, num_inputs: int, num_weights: int) -> range:
    """First rows of blocks of so many weights at most; the step is a multiple of `BLOCK_ROWS`."""
    return range(0, num_rows, max(num_weights // num_inputs // BLOCK_ROWS, 1) * BLOCK_ROWS)


@torch.no_grad()
def quantize_into(
    values: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, weight_format: WeightFormat
) -> None:
    """Quantises values [N, K], block by block, into memory that `empty_weight` gave.

    Raises:
        ValueError: If a value is not finite.
    """
    blocks = row_blocks(values.shape[0], values.shape[1], QUANTIZED_AT_ONCE)
    for start in blocks:
        block = values[start : start + blocks.step].float()
        if not block.isfinite().all():
            raise ValueError("A weight is not finite (NaN or infinite); the checkpoint is broken.")
        if weight_format.group_size is None:
            stop = start + block.shape[0]
            weight[start:stop], scales[start:stop] = _to_int8(block)
        else:
            block = F.pad(block, (0, 0, 0, -block.shape[0] % BLOCK_ROWS))
            stop = start + block.shape[0]
            weight[start:stop], scales[:, start:stop] = _to_int4(block, weight_format.group_size)


def _to_int8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    smallest = torch.finfo(torch.bfloat16).tiny
    scales = (values.abs().amax(dim=1) / INT8_MAX).clamp_(min=smallest).bfloat16()
    # Divided by the rounded scale, so that its rounding costs nothing.
    levels = (values / scales.float()[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX)
    return levels.to(torch.int8), scales


def _to_int4(values: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    groups = values.unflatten(1, (-1, group_size))  # [N', K / g, g]
    lowest, highest = groups.aminmax(dim=2)
    scales = _positive_scales((highest - lowest) / INT4_MAX)
    offsets = _rounded(lowest + INT4_CENTER * scales)
    levels = _nearest_levels(groups, scales, offsets)
    for _ in range(INT4_REFITS):
        scales, offsets = _least_squares(groups, levels)
        levels = _nearest_levels(groups, scales, offsets)
    weight = pack_nibbles((levels + INT4_CENTER).to(torch.uint8).flatten(1))
    return weight, torch.stack((scales, offsets), dim=2).bfloat16().transpose(0, 1)


def _nearest_levels(groups: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The level -8..7 nearest to each value, as floats [N', K / g, g]."""
    levels = (groups - offsets[..., None]).div_(scales[..., None]).round_()
    return levels.clamp_(-INT4_CENTER, INT4_MAX - INT4_CENTER)


def _least_squares(groups: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and offsets [N', K / g] with the least squared error for given levels: a line through each group."""
    size = groups.shape[2]
    level_means, means = levels.mean(dim=2), groups.mean(dim=2)
    covariance = torch.linalg.vecdot(levels, groups) - size * level_means * means
    variance = torch.linalg.vecdot(levels, levels) - size * level_means.square()
    # Values that are all the same have one level, and a line through one point any slope.
    scales = _positive_scales(covariance / variance.clamp_(min=0.5))
    return scales, _rounded(means - scales * level_means)


def _positive_scales(scales: torch.Tensor) -> torch.Tensor:
    return _rounded(scales.clamp_(min=torch.finfo(torch.bfloat16).tiny))


def _rounded(numbers: torch.Tensor) -> torch.Tensor:
    """To what bfloat16 holds: so the levels are chosen for the numbers that are stored."""
    return numbers.bfloat16().float()


def pack_nibbles(levels: torch.Tensor, block_rows: int = BLOCK_ROWS) -> torch.Tensor:
    """Levels 0..15 [N', K] -> bytes [N', K / 2]."""
    low, high = levels.unflatten(0, (-1, block_rows)).transpose(1, 2).chunk(2, dim=2)  # each [blocks, K, rows / 2]
    return (low | (high << 4)).reshape(levels.shape[0], -1)


def unpack_nibbles(weight: torch.Tensor, block_rows: int = BLOCK_ROWS) -> torch.Tensor:
    """Bytes [N', K / 2] -> levels 0..15 [N', K]."""
    num_rows, half_width = weight.shape
    packed = weight.view(-1, 2 * half_width, block_rows // 2)  # [blocks, K, rows / 2]
    return torch.cat((packed & INT4_MAX, packed >> 4), dim=2).transpose(1, 2).reshape(num_rows, -1)


def with_block_rows(weight: torch.Tensor, old: int, new: int) -> torch.Tensor:
    """Packs int4 weights [..., N', K / 2] anew, with another number of outputs side by side."""
    matrices = weight.flatten(0, -3) if weight.dim() > 2 else weight[None]
    repacked = torch.empty_like(matrices)
    for source, target in zip(matrices, repacked, strict=True):
        target.copy_(pack_nibbles(unpack_nibbles(source, old), new))
    return repacked.view_as(weight)


def dequantize_int4_transposed(
    weight: torch.Tensor, scales: torch.Tensor, group_size: int, dtype: torch.dtype, block_rows: int = BLOCK_ROWS
) -> torch.Tensor:
    """int4 weights [N', K / 2] of whole blocks -> values [K, N']; transposed, because so they lie in the bytes."""
    num_rows, half_width = weight.shape
    packed = weight.view(-1, 2 * half_width, block_rows // 2).transpose(0, 1)  # [K, blocks, rows / 2]
    values = torch.empty(2 * half_width, num_rows, dtype=dtype, device=weight.device)
    low, high = values.view(2 * half_width, -1, block_rows).chunk(2, dim=2)
    # The centre is taken off before the conversion: in bytes that costs less.
    low.copy_((packed & INT4_MAX).view(torch.int8).sub_(INT4_CENTER))
    high.copy_((packed >> 4).view(torch.int8).sub_(INT4_CENTER))
    groups = values.view(-1, group_size, num_rows)
    # Each [K / g, 1, N'], and dense: beside each other in memory they take the next line seven times as long.
    step, offset = (numbers.contiguous() for numbers in scales.to(dtype)[:, None].unbind(-1))
    torch.addcmul(offset, groups, step, out=groups)
    return values


def dequantize(
    weight: torch.Tensor,
    scales: torch.Tensor,
    weight_format: WeightFormat,
    num_rows: int,
    dtype: torch.dtype = torch.float32,
    block_rows: int = BLOCK_ROWS,
) -> torch.Tensor:
    """A whole quantised weight -> values [N, K]."""
    if weight_format.group_size is None:
        return weight.to(dtype) * scales.to(dtype)[:, None]
    return dequantize_int4_transposed(weight, scales, weight_format.group_size, dtype, block_rows).t()[:num_rows]
