"""Packed kernels, their stand-ins, and what decides between them."""

import logging

import pytest
import torch
from test_packing import quantized, random_values

from deepseek_vl2.models import cpu_features
from deepseek_vl2.models.quantization import kernels, packing
from deepseek_vl2.models.quantization.config import WeightFormat

FORMATS = [WeightFormat(8), WeightFormat(4, 32), WeightFormat(4, 64), WeightFormat(4, 128)]
# Of the largest output: inputs, weights and outputs are rounded to bfloat16.
TOLERANCE = 0.02


@pytest.fixture(autouse=True)
def fresh_self_tests():
    yield
    kernels.has_int8_kernel.cache_clear()
    kernels._int4_block_rows.cache_clear()


def expected_product(rows: torch.Tensor, weight, scales, weight_format: WeightFormat, num_rows: int) -> torch.Tensor:
    return rows.float() @ packing.dequantize(weight, scales, weight_format, num_rows).t()


def assert_close(output: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert output.shape == expected.shape
    assert (output.float() - expected).abs().max() <= tolerance * expected.abs().max()


def in_memory(weight: torch.Tensor, weight_format: WeightFormat) -> torch.Tensor:
    if weight_format.bits == 8:
        return weight
    return packing.with_block_rows(weight, packing.BLOCK_ROWS, kernels.machine_block_rows())


def _refuse(*args):
    raise RuntimeError("not built for this processor")


def _wrong(rows, weight, *args):
    return torch.zeros(rows.shape[0], weight.shape[0], dtype=rows.dtype)


@pytest.mark.parametrize("num_rows", [64, 112, 200])
@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
def test_few_rows_equal_many_rows_equal_float32(weight_format, num_rows):
    weight, scales = quantized(random_values(num_rows, 384), weight_format)
    held = in_memory(weight, weight_format)
    limit = kernels.packed_max_rows(weight_format.bits)
    for count in (1, 5, limit, limit + 1):
        rows = random_values(count, 384, seed=count).bfloat16()
        expected = expected_product(rows, weight, scales, weight_format, num_rows)
        assert_close(kernels.linear(rows, held, scales, weight_format, num_rows), expected)
        exact = kernels.linear(rows.float(), held, scales, weight_format, num_rows)
        assert exact.dtype == torch.float32
        assert_close(exact, expected, 1e-4 if weight_format.bits == 4 else 1e-5)


@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
def test_many_rows_are_computed_in_float32_where_bfloat16_is_slow(monkeypatch, weight_format):
    weight, scales = quantized(random_values(64, 384), weight_format)
    held = in_memory(weight, weight_format)
    monkeypatch.setattr(cpu_features, "has_fast_bfloat16", lambda: False)
    rows = random_values(kernels.packed_max_rows(weight_format.bits) + 1, 384).bfloat16()
    expected = expected_product(rows, weight, scales, weight_format, 64)
    output = kernels.linear(rows, held, scales, weight_format, 64)
    assert output.dtype == torch.bfloat16
    # Only the output is rounded then: to half a unit of eight bits.
    assert torch.allclose(output.float(), expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize(
    ("weight_format", "operator"),
    [(WeightFormat(8), "_weight_int8pack_mm"), (WeightFormat(4, 32), "_weight_int4pack_mm_for_cpu")],
    ids=str,
)
def test_rows_up_to_the_limit_take_the_packed_kernel(monkeypatch, weight_format, operator, is_fast):
    weight, scales = quantized(random_values(64, 384), weight_format)
    held = in_memory(weight, weight_format)
    assert kernels.has_int8_kernel() and kernels.has_int4_kernel()  # tried before the operators are taken away
    monkeypatch.setattr(cpu_features, "has_fast_bfloat16", lambda: is_fast)
    monkeypatch.setattr(torch.ops.aten, operator, _refuse)
    limit = kernels.packed_max_rows(weight_format.bits)
    with pytest.raises(RuntimeError, match="not built"):
        kernels.linear(random_values(limit, 384).bfloat16(), held, scales, weight_format, 64)
    kernels.linear(random_values(limit + 1, 384).bfloat16(), held, scales, weight_format, 64)


def test_packed_kernels_take_more_rows_where_bfloat16_is_slow(monkeypatch):
    monkeypatch.setattr(cpu_features, "has_fast_bfloat16", lambda: True)
    limits = kernels.packed_max_rows(8), kernels.packed_max_rows(4)
    monkeypatch.setattr(cpu_features, "has_fast_bfloat16", lambda: False)
    assert limits[0] < kernels.packed_max_rows(8)
    assert limits[1] < kernels.packed_max_rows(4)


@pytest.mark.parametrize("weight_format", FORMATS[:2], ids=str)
def test_leading_dimensions_and_no_rows(weight_format):
    weight, scales = quantized(random_values(40, 96), weight_format)
    held = in_memory(weight, weight_format)
    inputs = random_values(6, 96).bfloat16().view(2, 3, 96)
    output = kernels.linear(inputs, held, scales, weight_format, 40)
    assert_close(output, expected_product(inputs, weight, scales, weight_format, 40))
    assert kernels.linear(inputs[:, :0], held, scales, weight_format, 40).shape == (2, 0, 40)
    across = inputs.transpose(0, 1)  # not contiguous
    assert_close(kernels.linear(across, held, scales, weight_format, 40), output.transpose(0, 1).float())


def test_work_in_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "DEQUANTIZED_AT_ONCE", 64 * 128)
    for weight_format in FORMATS[:2]:
        weight, scales = quantized(random_values(200, 128), weight_format)
        rows = random_values(70, 128)
        output = kernels.linear(rows, in_memory(weight, weight_format), scales, weight_format, 200)
        assert_close(output, expected_product(rows, weight, scales, weight_format, 200), 1e-4)


def test_widths_that_the_int8_kernel_cannot_take_do_not_reach_it(monkeypatch):
    kernels.has_int8_kernel()
    monkeypatch.setattr(torch.ops.aten, "_weight_int8pack_mm", _refuse)
    weight, scales = quantized(random_values(8, 24), WeightFormat(8))
    rows = random_values(2, 24).bfloat16()
    expected = expected_product(rows, weight, scales, WeightFormat(8), 8)
    assert_close(kernels.linear(rows, weight, scales, WeightFormat(8), 8), expected)


@pytest.mark.parametrize("misaligned", ["rows", "weight"])
def test_addresses_that_the_int8_kernel_cannot_take_do_not_reach_it(misaligned):
    """Views of a file begin anywhere; torch's kernel crashes on them."""
    weight, scales = quantized(random_values(64, 128), WeightFormat(8))
    rows = random_values(3, 128).bfloat16()
    expected = expected_product(rows, weight, scales, WeightFormat(8), 64)
    tensors = {"rows": rows, "weight": weight}
    memory = torch.empty(tensors[misaligned].nbytes + 128, dtype=torch.uint8)
    view = memory[-memory.data_ptr() % 64 + 8 :][: tensors[misaligned].nbytes].view(tensors[misaligned].dtype)
    tensors[misaligned] = view.view_as(tensors[misaligned]).copy_(tensors[misaligned])
    assert_close(kernels.linear(tensors["rows"], tensors["weight"], scales, WeightFormat(8), 64), expected)


@pytest.mark.parametrize("operator", [_refuse, _wrong])
@pytest.mark.parametrize(
    ("name", "test", "weight_format"),
    [
        ("_weight_int8pack_mm", kernels.has_int8_kernel, FORMATS[0]),
        ("_weight_int4pack_mm_for_cpu", kernels.has_int4_kernel, FORMATS[1]),
    ],
)
def test_a_kernel_that_is_wrong_or_missing_is_announced_and_replaced(
    monkeypatch, caplog, operator, name, test, weight_format
):
    kernels.has_int8_kernel.cache_clear()
    kernels._int4_block_rows.cache_clear()
    monkeypatch.setattr(torch.ops.aten, name, operator)
    with caplog.at_level(logging.WARNING):
        assert not test() and not test()
    (record,) = caplog.records
    assert f"int{weight_format.bits} kernel is not usable here; a slower way" in record.message
    weight, scales = quantized(random_values(64, 96), weight_format)
    rows = random_values(2, 96).bfloat16()
    output = kernels.linear(rows, weight, scales, weight_format, 64)
    assert_close(output, expected_product(rows, weight, scales, weight_format, 64))


def test_the_kernels_of_this_torch_pass_on_x86():
    """Else every other test would compare the stand-in with itself."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("the processor has neither AVX2 nor AVX-512")
    assert kernels.has_int8_kernel() and kernels.has_int4_kernel()
    assert kernels.machine_block_rows() == {"AVX512": 64, "AVX2": 32}[torch.backends.cpu.get_cpu_capability()]


@pytest.mark.parametrize("weight_format", [WeightFormat(8), WeightFormat(4, 64)], ids=str)
def test_float16_is_refused_also_where_a_model_was_put_into_it_later(weight_format):
    weight, scales = packing.empty_weight(64, 64, weight_format)
    with pytest.raises(ValueError, match="do not work in float16"):
        kernels.linear(torch.ones(2, 64, dtype=torch.float16), weight, scales, weight_format, 64)
