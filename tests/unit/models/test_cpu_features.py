"""What the CPU computes fast, on machines that files and patches pretend."""

import pytest
import torch

from deepseek_vl2.models import cpu_features
from deepseek_vl2.models.cpu_features import cpu_bfloat16_support, has_fast_bfloat16, product_dtype


@pytest.mark.parametrize(
    ("cpuinfo", "support"),
    [
        ("processor : 0\nflags : fpu avx512f avx512_bf16\n", "native"),
        ("processor : 0\nflags : fpu amx_bf16 amx_tile\n", "native"),
        ("processor : 0\nFeatures : fp asimd bf16 sve\n", "native"),
        ("processor : 0\nflags : fpu avx512f avx512bw\n", "none"),
        ("processor : 0\nflags : fpu avx2\n", "none"),
        ("", "unknown"),
    ],
)
def test_bfloat16_of_a_cpu(monkeypatch, tmp_path, cpuinfo, support):
    monkeypatch.setattr(cpu_features.platform, "system", lambda: "Linux")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
    assert cpu_bfloat16_support(tmp_path) == support


@pytest.mark.parametrize(("answer", "support"), [("1", "native"), ("", "none")])
def test_bfloat16_of_an_apple_cpu(monkeypatch, answer, support):
    monkeypatch.setattr(cpu_features.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(cpu_features, "_sysctl", lambda name: answer)
    assert cpu_bfloat16_support() == support


@pytest.mark.parametrize(("support", "is_fast"), [("native", True), ("unknown", True), ("none", False)])
def test_only_a_cpu_that_is_known_to_lack_bfloat16_computes_in_float32(monkeypatch, support, is_fast):
    monkeypatch.setattr(cpu_features, "cpu_bfloat16_support", lambda: support)
    has_fast_bfloat16.cache_clear()
    try:
        assert has_fast_bfloat16() is is_fast
    finally:
        has_fast_bfloat16.cache_clear()


@pytest.mark.parametrize(
    ("is_fast", "device", "dtype", "expected"),
    [
        (False, "cpu", torch.bfloat16, torch.float32),
        (True, "cpu", torch.bfloat16, torch.bfloat16),
        (False, "cpu", torch.float16, torch.float16),
        (False, "cpu", torch.float32, torch.float32),
        (False, "meta", torch.bfloat16, torch.bfloat16),
    ],
)
def test_products_of_slow_types_are_computed_in_float32(monkeypatch, is_fast, device, dtype, expected):
    monkeypatch.setattr(cpu_features, "has_fast_bfloat16", lambda: is_fast)
    assert product_dtype(torch.zeros(2, 3, dtype=dtype, device=device)) == expected
