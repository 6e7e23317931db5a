"""Compiled products and attention beside the same in plain torch, and what happens where they are not to be had."""

import builtins
import logging
import threading

import pytest
import torch

from deepseek_vl2.models import few_row_products
from deepseek_vl2.models.attention_kernels import attend_by_products, attend_one_token
from deepseek_vl2.models.quantization import packing
from deepseek_vl2.models.quantization.config import WeightFormat
from deepseek_vl2.models.streamed_weights import StreamedWeight

NUM_MATRICES, NUM_OUTPUTS, NUM_INPUTS = 5, 192, 384
KINDS = [torch.float32, torch.bfloat16, WeightFormat(8), WeightFormat(4, 32), WeightFormat(4, 64), WeightFormat(4, 128)]
EXACT = 2e-6  # of the largest output: sums of float32 in another order


@pytest.fixture(autouse=True)
def fresh_self_tests():
    yield
    few_row_products.is_supported.cache_clear()
    few_row_products._modules.cache_clear()


def random_values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrices_of(kind, num_outputs: int = NUM_OUTPUTS, num_inputs: int = NUM_INPUTS):
    """Weights and scales as the kernels take them, and their values in float32."""
    values = random_values(NUM_MATRICES, num_outputs, num_inputs)
    if isinstance(kind, torch.dtype):
        return values.to(kind), None, values.to(kind).float()
    weight, scales = packing.empty_weight(num_outputs, num_inputs, kind, (NUM_MATRICES,))
    for matrix in range(NUM_MATRICES):
        packing.quantize_into(values[matrix], weight[matrix], scales[matrix], kind)
        values[matrix] = packing.dequantize(weight[matrix], scales[matrix], kind, num_outputs)
    return weight, scales, values


def product(rows, *weight) -> torch.Tensor:
    """The product with one matrix, however small it is."""
    weight = StreamedWeight(*(None if part is None else part[None] for part in weight))
    return few_row_products.multiply(rows, weight, [0], [rows.shape[0]])


def expected_products(rows, values, matrices, counts) -> torch.Tensor:
    parts = zip(matrices, rows.float().split(counts), strict=True)
    return torch.cat([part @ values[matrix].t() for matrix, part in parts])


def largest_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.float() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("counts", [[1], [4], [1, 1, 1], [3, 4, 2], [8, 1, 15]], ids=str)
def test_products_equal_those_of_the_values(kind, counts):
    weight, scales, values = matrices_of(kind)
    matrices = [3, 0, 4][: len(counts)]
    rows = random_values(sum(counts), NUM_INPUTS, seed=1)
    found = few_row_products.multiply(rows, StreamedWeight(weight, scales), matrices, counts)
    assert found.dtype == torch.float32
    assert largest_error(found, expected_products(rows, values, matrices, counts)) < EXACT
    rounded = few_row_products.multiply(rows.bfloat16(), StreamedWeight(weight, scales), matrices, counts)
    assert rounded.dtype == torch.bfloat16
    expected = expected_products(rows.bfloat16(), values, matrices, counts)
    # Half a unit of the output's eight bits; int4 rounds its inputs, too, to 16 bits of the largest.
    torch.testing.assert_close(rounded.float(), expected, rtol=2**-8, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
@pytest.mark.parametrize("num_inputs", [5, 53, 64 + 17])
def test_widths_need_be_no_multiples_of_anything(kind, num_inputs):
    weight, scales, values = matrices_of(kind, num_outputs=37, num_inputs=num_inputs)
    for dtype, error in ((torch.float32, EXACT), (torch.bfloat16, 2**-8)):
        rows = random_values(7, num_inputs).to(dtype)
        found = few_row_products.multiply(rows, StreamedWeight(weight, scales), [1], [7])
        assert largest_error(found, expected_products(rows, values, [1], [7])) < error


@pytest.mark.parametrize("num_inputs", [4096, 2**15, 100_003])
def test_long_rows_of_int8_do_not_overflow(num_inputs):
    """Products of integers are added up in 32 bits."""
    weight = torch.full((3, num_inputs), -127, dtype=torch.int8)
    scales = torch.full((3,), 1 / 127)
    rows = torch.ones(1, num_inputs, dtype=torch.bfloat16)
    found = product(rows, weight, scales)
    torch.testing.assert_close(found.float(), torch.full((1, 3), -float(num_inputs)), rtol=2**-8, atol=0)


@pytest.mark.parametrize("kind", KINDS[2:4], ids=str)
def test_scales_of_a_model_that_was_put_into_float32(kind):
    weight, scales, values = matrices_of(kind)
    rows = random_values(2, NUM_INPUTS)
    found = product(rows, weight[1], scales[1].float())
    assert largest_error(found, rows @ values[1].t()) < EXACT


@pytest.mark.parametrize("group_size", [32, 64])
def test_int4_blocks_of_32_outputs(group_size):
    kind = WeightFormat(4, group_size)
    weight, scales, values = matrices_of(kind)
    repacked = packing.with_block_rows(weight, packing.BLOCK_ROWS, 32)
    rows = random_values(5, NUM_INPUTS)
    found = few_row_products.multiply(rows, StreamedWeight(repacked, scales, block_rows=32), [2, 1], [1, 4])
    assert largest_error(found, expected_products(rows, values, [2, 1], [1, 4])) < EXACT


@pytest.mark.parametrize("kind", KINDS[1:5], ids=str)
def test_rows_that_are_not_finite_stay_so_and_harm_no_others(kind):
    weight, scales, values = matrices_of(kind)
    for dtype in (torch.bfloat16, torch.float32):
        rows = random_values(6, NUM_INPUTS).to(dtype)
        rows[1, 7], rows[4, 0], rows[5] = float("nan"), float("inf"), 0
        found = few_row_products.multiply(rows, StreamedWeight(weight, scales), [0, 2], [5, 1])
        assert not found[1].isfinite().any() and not found[4].isfinite().any()
        kept = [0, 2, 3]
        expected = expected_products(rows[kept], values, [0], [3])
        assert largest_error(found[kept], expected) < (EXACT if dtype == torch.float32 else 2**-7)
        assert (found[5] == 0).all()


def test_rounding_to_bfloat16_is_torchs():
    """Halves go to the even neighbour, what is too large to infinity, and what is no number stays so."""
    special = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, -3.4e38, 1e-40, float("inf"), float("nan")]
    numbers = torch.cat((torch.tensor(special), random_values(1000)))
    found = product(torch.ones(1, 1).bfloat16(), numbers[:, None])
    torch.testing.assert_close(found[0], numbers.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_views_of_any_address_and_order():
    weight, _, values = matrices_of(torch.bfloat16)
    memory = torch.empty(weight.nbytes + 64, dtype=torch.uint8)
    shifted = memory[6 : 6 + weight.nbytes].view(torch.bfloat16).view_as(weight).copy_(weight)
    rows = random_values(NUM_INPUTS, 3).t()
    found = few_row_products.multiply(rows, StreamedWeight(shifted), [1], [3])
    assert largest_error(found, expected_products(rows, values, [1], [3])) < EXACT


def test_callers_in_several_threads_at_once():
    weight, scales, values = matrices_of(WeightFormat(8))
    inputs = [random_values(1, NUM_INPUTS, seed=seed) for seed in range(4)]
    errors: list[float] = []

    def work(rows: torch.Tensor) -> None:
        expected = expected_products(rows, values, [0], [1])
        for _ in range(50):
            errors.append(largest_error(product(rows, weight[0], scales[0]), expected))

    threads = [threading.Thread(target=work, args=(rows,)) for rows in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 200 and max(errors) < EXACT


def test_the_number_of_threads_is_torchs_unless_there_is_little_to_read():
    import numba

    large = torch.ones(2 * few_row_products.BYTES_A_THREAD // 4, 4)
    before = torch.get_num_threads()
    try:
        for num_threads in (1, min(2, numba.config.NUMBA_NUM_THREADS)):
            torch.set_num_threads(num_threads)
            product(torch.ones(1, 4), large)
            assert numba.get_num_threads() == num_threads
            product(torch.ones(1, 4), large[:100])
            assert numba.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_when_products_are_left_to_torch():
    weight = torch.ones(1, 8, 8, dtype=torch.bfloat16)
    rows = torch.ones(2, 8, dtype=torch.bfloat16)
    assert few_row_products.can_multiply(rows, 2, StreamedWeight(weight))
    assert not few_row_products.can_multiply(rows, few_row_products.MAX_ROWS + 1, StreamedWeight(weight))
    assert not few_row_products.can_multiply(rows, 0, StreamedWeight(weight))
    assert not few_row_products.can_multiply(rows.half(), 2, StreamedWeight(weight))
    assert not few_row_products.can_multiply(rows, 2, StreamedWeight(weight.to("meta")))
    assert not few_row_products.can_multiply(rows[:, :4], 2, StreamedWeight(weight))
    assert not few_row_products.can_multiply(rows.float(), 2, StreamedWeight(weight.half()))
    differentiated = rows.float().requires_grad_()
    assert not few_row_products.can_multiply(differentiated, 2, StreamedWeight(weight))
    with torch.no_grad():
        assert few_row_products.can_multiply(differentiated, 2, StreamedWeight(weight))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.int8, torch.uint8], ids=str)
def test_without_numba_the_log_says_so_once(monkeypatch, caplog, kind):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "numba":
            raise ImportError("numba is not there")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    few_row_products.is_supported.cache_clear()
    few_row_products._modules.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not few_row_products.is_supported(torch.float32, kind)
        assert not few_row_products.is_supported(torch.float32, kind)
    (record,) = caplog.records
    assert "numba" in record.message and "not there" in record.message


@pytest.mark.parametrize("failure", ["wrong", "crash"])
@pytest.mark.parametrize("dtype", few_row_products.INPUT_TYPES, ids=str)
def test_kernels_that_fail_their_test_are_not_used(monkeypatch, caplog, failure, dtype):
    def fake(*args, **kwargs):
        if failure == "crash":
            raise RuntimeError("LLVM knows no such processor")
        return torch.zeros(few_row_products.MAX_ROWS + 2, 128)

    few_row_products.is_supported.cache_clear()
    monkeypatch.setattr(few_row_products, "multiply", fake)
    with caplog.at_level(logging.WARNING):
        assert not few_row_products.is_supported(dtype, torch.int8)
    assert "torch.int8" in caplog.text and ("wrong" in caplog.text or "no such processor" in caplog.text)


def test_all_kinds_work_here():
    """Else other tests would compare the stand-ins with themselves."""
    for dtype in few_row_products.INPUT_TYPES:
        for kind in (torch.float32, torch.bfloat16, torch.int8, torch.uint8):
            assert few_row_products.is_supported(dtype, kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_heads", "num_groups"), [(6, 6), (6, 2)])
@pytest.mark.parametrize("has_mask", [False, True])
def test_attention_of_one_token_equals_products(monkeypatch, dtype, num_heads, num_groups, has_mask):
    query = random_values(2, num_heads, 1, 48).to(dtype)
    key, value = (random_values(2, num_groups, 100, 48, seed=seed).to(dtype)[:, :, :77] for seed in (1, 2))
    mask = None
    if has_mask:
        mask = torch.ones(2, 77, dtype=torch.long)
        mask[0, :9] = 0
        mask[1, :] = 0  # nothing to be seen: all count alike
    expected = attend_by_products(query.float(), key.float(), value.float(), mask, 0.3)
    monkeypatch.setattr("deepseek_vl2.models.attention_kernels.attend_by_products", lambda *args: None)
    found = attend_one_token(query, key, value, mask, 0.3)
    assert found.shape == (2, 1, num_heads, 48) and found.dtype == dtype
    assert largest_error(found, expected) < (EXACT if dtype == torch.float32 else 2**-7)


def test_attention_that_products_have_to_do():
    """A mask to be added or for all rows, a cache in pieces, and one that does not begin where its memory does."""
    query, key, value = random_values(1, 2, 1, 16), random_values(1, 2, 9, 16), random_values(1, 2, 9, 16)
    added = torch.zeros(1, 1, 1, 9)
    added[..., :4] = torch.finfo(torch.float32).min
    in_pieces = key.transpose(2, 3).contiguous().transpose(2, 3)
    shifted = torch.cat((key[:, :, :5], key), dim=2)[:, :, 5:]
    for keys, mask in ((key, added), (in_pieces, None), (shifted, None)):
        expected = attend_by_products(query, keys, value, mask, 0.25)
        assert torch.equal(attend_one_token(query, keys, value, mask, 0.25), expected)
    for_all = torch.tensor([[0] * 4 + [1] * 5])
    both = [tensor.repeat(2, 1, 1, 1) for tensor in (query, key, value)]
    assert torch.equal(attend_one_token(*both, for_all, 0.25), attend_by_products(*both, for_all, 0.25))


def test_weights_that_do_not_lie_as_the_kernels_read_them():
    rows, weight = random_values(1, NUM_INPUTS), random_values(512, NUM_INPUTS)
    assert few_row_products.project(rows, StreamedWeight(weight)) is not None
    assert few_row_products.project(rows, StreamedWeight(weight[:, ::2].contiguous())) is None  # another width
    assert few_row_products.project(rows, StreamedWeight(random_values(NUM_INPUTS, 512).t())) is None
    assert few_row_products.project(rows, StreamedWeight(weight[::2])) is None
