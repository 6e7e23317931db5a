"""Compiled norms and rotations beside those that torch computes."""

import pytest
import torch

from deepseek_vl2.models import few_row_layers
from deepseek_vl2.models.modeling_deepseek import DeepseekV2RMSNorm
from deepseek_vl2.models.rotary_positions import rotate_halves

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def random_numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_norm(width: int, dtype: torch.dtype) -> DeepseekV2RMSNorm:
    norm = DeepseekV2RMSNorm(width, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(random_numbers(width, seed=1))
    return norm.to(dtype)


def without_kernels(monkeypatch, name: str, function, *arguments) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(few_row_layers, name, lambda *args: None)
        return function(*arguments)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 1280), (2, 2, 53), (1280,)], ids=str)
@torch.no_grad()
def test_norm_of_few_rows(monkeypatch, dtype, shape):
    norm = random_norm(shape[-1], dtype)
    hidden = 3 * random_numbers(*shape).to(dtype)
    expected = without_kernels(monkeypatch, "normalize", norm, hidden)
    found = norm(hidden)
    assert found.dtype == dtype and found.shape == hidden.shape
    # Sums of squares in another order may round a bfloat16 the other way.
    torch.testing.assert_close(found, expected, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-7)
    if dtype == torch.bfloat16:
        assert (found == expected).float().mean() > 0.99
    if hidden.dim() > 1:
        across = hidden.transpose(0, 1)
        torch.testing.assert_close(norm(across), found.transpose(0, 1), rtol=0, atol=0)


@torch.no_grad()
def test_norm_after_its_weight_was_moved_or_replaced(monkeypatch):
    norm, hidden = random_norm(64, torch.float32), random_numbers(1, 64)
    norm(hidden)
    for change in (
        lambda: norm.double().float(),
        lambda: setattr(norm, "weight", torch.nn.Parameter(random_numbers(64, seed=2))),
        lambda: norm.weight.mul_(2),
        lambda: setattr(norm.weight, "data", random_numbers(64, seed=3)),
    ):
        change()
        torch.testing.assert_close(norm(hidden), without_kernels(monkeypatch, "normalize", norm, hidden))


def test_which_norms_torch_computes():
    norm, hidden = random_norm(64, torch.float32), random_numbers(1, 64)
    weight = few_row_layers.StreamedWeight(norm.weight)
    assert few_row_layers.normalize(hidden, weight, 1e-6) is None  # a gradient is asked for
    with torch.no_grad():
        assert few_row_layers.normalize(hidden, weight, 1e-6) is not None
        assert few_row_layers.normalize(hidden.bfloat16(), weight, 1e-6) is None
        assert few_row_layers.normalize(hidden, few_row_layers.StreamedWeight(norm.weight.to("meta")), 1e-6) is None
        norm(hidden).sum()
    norm(hidden).sum().backward()
    assert norm.weight.grad is not None


@DTYPES
@pytest.mark.parametrize("num_heads", [1, 10])
@torch.no_grad()
def test_rotation_of_one_token(monkeypatch, dtype, num_heads):
    heads = random_numbers(1, 1, num_heads * 48).to(dtype).unflatten(-1, (-1, 48)).transpose(1, 2)
    angles = random_numbers(1, 1, 24, seed=1)
    expected = without_kernels(monkeypatch, "rotate_halves", rotate_halves, heads, angles.cos(), angles.sin())
    found = rotate_halves(heads, angles.cos(), angles.sin())
    assert found.dtype == dtype and found.shape == heads.shape
    torch.testing.assert_close(found, expected, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-6)


def test_which_rotations_torch_computes():
    heads, cos = random_numbers(1, 3, 1, 8), torch.ones(1, 1, 4)
    with torch.no_grad():
        assert few_row_layers.rotate_halves(heads, cos, cos) is not None
        assert few_row_layers.rotate_halves(heads.expand(2, -1, -1, -1), cos, cos) is None
        assert few_row_layers.rotate_halves(heads.expand(-1, -1, 2, -1), cos, cos) is None
        assert few_row_layers.rotate_halves(heads.half(), cos, cos) is None
        assert few_row_layers.rotate_halves(heads.to("meta"), cos, cos) is None
    assert few_row_layers.rotate_halves(heads.requires_grad_(), cos, cos) is None
