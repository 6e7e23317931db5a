"""Weights to integers and back."""

import pytest
import torch

from deepseek_vl2.models.quantization import WeightOnlyConfig, packing
from deepseek_vl2.models.quantization.config import LAYOUT_VERSION, WeightFormat

INT8 = WeightFormat(8)
# Rows and inputs: whole blocks of 64 rows, a whole and a part, and a part only.
SIZES = [(128, 64), (112, 192), (40, 320)]


def random_values(num_rows: int, num_inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, num_inputs, generator=torch.Generator().manual_seed(seed))


def quantized(values: torch.Tensor, weight_format: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    weight, scales = packing.empty_weight(*values.shape, weight_format)
    packing.quantize_into(values, weight, scales, weight_format)
    return weight, scales


def cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    return torch.cosine_similarity(first.flatten().double(), second.flatten().double(), dim=0).item()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("weight_format", "least"),
    [(INT8, 0.9999), (WeightFormat(4, 32), 0.995), (WeightFormat(4, 64), 0.994)],
    ids=str,
)
def test_values_come_back_nearly(size, weight_format, least):
    values = random_values(*size)
    weight, scales = quantized(values, weight_format)
    back = packing.dequantize(weight, scales, weight_format, size[0])
    assert back.shape == values.shape
    assert cosine(back, values) > least
    # Each value became the nearest that its scale and offset allow.
    if weight_format == INT8:
        scale, offset, levels = scales.float()[:, None, None], 0, torch.arange(-127, 128)
    else:
        scale, offset = (
            scales.float().transpose(0, 1)[: size[0]].repeat_interleave(weight_format.group_size, 1).split(1, 2)
        )
        levels = torch.arange(-8, 8)
    allowed = levels * scale + offset  # [N, K or 1, 255 or 16]
    nearest = (allowed - values[..., None]).abs().amin(dim=2)
    torch.testing.assert_close((back - values).abs(), nearest, atol=1e-5, rtol=0)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("center", [0.0, 3.0])
def test_int4_beats_levels_from_lowest_to_highest(group_size, center):
    """Rounding costs a twentieth less, with outliers more, than where the end levels are the end values."""
    values = random_values(128, 512) + center
    values[::3] = values[::3] ** 3  # rows with outliers
    weight_format = WeightFormat(4, group_size)
    weight, scales = quantized(values, weight_format)
    groups = values.unflatten(1, (-1, group_size))
    lowest, highest = groups.aminmax(dim=2, keepdim=True)
    step = (highest - lowest) / 15
    simple_error = (((groups - lowest) / step).round() * step + lowest - groups).square().sum(dim=(1, 2))
    error = (packing.dequantize(weight, scales, weight_format, 128) - values).square().sum(dim=1)
    assert (error.sqrt() < 1.02 * simple_error.sqrt()).all()
    assert error.sum() < 0.95 * simple_error.sum()


def test_int8_known_answer():
    weight, scales = quantized(torch.tensor([[127.0, -127.0, 1.0, 0.0], [0.5, 0.25, -0.125, 0.0]]), INT8)
    assert weight[0].tolist() == [127, -127, 1, 0] and scales[0] == 1
    assert weight[1].tolist() == [127, 64, -32, 0] or weight[1].tolist() == [127, 63, -32, 0]


def test_int4_layout_known_answer():
    levels = torch.arange(64)[:, None] % 16 + torch.zeros(64, 32)
    levels[:, 1] = 15 - levels[:, 0]
    packed = packing.pack_nibbles(levels.to(torch.uint8)).view(32, 32)  # 32 inputs, 32 bytes each
    assert packed[0].tolist() == [row % 16 + 16 * ((row + 32) % 16) for row in range(32)]
    assert packed[1].tolist() == [15 - row % 16 + 16 * (15 - (row + 32) % 16) for row in range(32)]


def test_values_on_the_grid_are_exact():
    """Sixteen levels, evenly spaced by a power of two, are what int4 can hold."""
    values = (torch.arange(64 * 64).view(64, 64) % 16 - 8) * 0.25
    weight_format = WeightFormat(4, 64)
    weight, scales = quantized(values, weight_format)
    assert torch.equal(packing.dequantize(weight, scales, weight_format, 64), values)


@pytest.mark.parametrize("weight_format", [INT8, WeightFormat(4, 32)], ids=str)
def test_constant_and_zero_rows(weight_format):
    values = torch.zeros(64, 64)
    values[1] = 0.75
    weight, scales = quantized(values, weight_format)
    back = packing.dequantize(weight, scales, weight_format, 64)
    torch.testing.assert_close(back, values, atol=0, rtol=0.005)
    assert not back[0].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weights_are_refused(bad):
    values = random_values(64, 64)
    values[3, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantized(values, INT8)


def test_blocks_of_work_change_nothing(monkeypatch):
    values = random_values(300, 64)
    whole = [quantized(values, weight_format) for weight_format in (INT8, WeightFormat(4, 32))]
    monkeypatch.setattr(packing, "QUANTIZED_AT_ONCE", 64 * 64)
    assert len(packing.row_blocks(300, 64, packing.QUANTIZED_AT_ONCE)) == 5
    for (weight, scales), weight_format in zip(whole, (INT8, WeightFormat(4, 32)), strict=True):
        again_weight, again_scales = quantized(values, weight_format)
        assert torch.equal(weight, again_weight) and torch.equal(scales, again_scales)


@pytest.mark.parametrize("leading", [(), (3,)])
def test_other_blocks_of_rows_and_back(leading):
    weight = torch.randint(0, 256, (*leading, 128, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    other = packing.with_block_rows(weight, 64, 32)
    assert other.shape == weight.shape and not torch.equal(other, weight)
    assert torch.equal(packing.with_block_rows(other, 32, 64), weight)
    first = weight[0] if leading else weight
    first_other = other[0] if leading else other
    assert torch.equal(packing.unpack_nibbles(first), packing.unpack_nibbles(first_other, 32))


@pytest.mark.parametrize(
    ("bits", "group_size", "num_inputs", "expected"),
    [
        (8, 64, 1280, INT8),
        (4, 128, 1280, WeightFormat(4, 128)),
        (4, 128, 896, WeightFormat(4, 128)),
        (4, 128, 192, WeightFormat(4, 64)),
        (4, 64, 96, WeightFormat(4, 32)),
        (4, 64, 4304, INT8),  # the vision tower's feed-forward layers
        (4, 32, 48, INT8),
    ],
)
def test_format_of_a_width(bits, group_size, num_inputs, expected):
    assert WeightOnlyConfig(bits, group_size).choose_format("lm_head", num_inputs) == expected


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("language.model.layers.3.self_attn.o_proj", 8),
        ("language.model.layers.3.self_attn.o_proj.weight", 8),
        ("language.model.layers.3.self_attn.q_proj", 8),
        ("language.model.layers.3.self_attn.k_proj.weight", 8),
        ("language.model.layers.3.self_attn.kv_a_proj_with_mqa", 8),
        ("language.model.layers.3.self_attn.v_proj", 4),
        ("language.model.layers.0.mlp.down_proj.weight", 8),
        ("model.layers.0.mlp.gate_proj", 8),
        ("language.model.layers.1.mlp.shared_experts.gate_proj", 4),
        ("language.model.layers.1.mlp.experts.gate_up_proj", 4),
        ("language.model.layers.1.mlp.experts.7.down_proj.weight", 4),
        ("projector.layers.0", 8),
        ("vision.blocks.0.mlp.fc1", 4),
        ("vision.blocks.0.attn.proj", 4),
        ("language.lm_head.weight", 4),
    ],
)
def test_bits_of_a_layer(name, bits):
    assert WeightOnlyConfig(4).choose_format(name, 1280).bits == bits
    assert WeightOnlyConfig(8).choose_format(name, 1280).bits == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 3}, "bits 3 must be 8 or 4"),
        ({"bits": "8"}, "bits '8' must be"),
        ({"bits": 8.0}, "bits 8.0 must be"),
        ({"bits": 4, "group_size": 64.0}, "group_size 64.0 must be"),
        ({"bits": 4, "group_size": 48}, "group_size 48 must be one of 32, 64, 128"),
        ({"layout_version": LAYOUT_VERSION + 1}, "Quantise the original checkpoint again"),
    ],
)
def test_impossible_configurations(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightOnlyConfig(**arguments)


def test_configurations_are_equal_if_all_of_them_is():
    assert WeightOnlyConfig(4, 32) == WeightOnlyConfig(4, 32)
    assert WeightOnlyConfig(4, 32) != WeightOnlyConfig(4, 64)
    assert WeightOnlyConfig(8) != WeightOnlyConfig(4)
    assert len({WeightOnlyConfig(8), WeightOnlyConfig(8), WeightOnlyConfig(4)}) == 2
