"""Compiled attention of every token to every other beside torch's, and where it is left to torch."""

import logging

import numba
import pytest
import torch
import torch.nn.functional as F

from deepseek_vl2.models import few_row_products, full_attention, siglip_vit
from deepseek_vl2.models.cpu_features import cpu_flags
from deepseek_vl2.models.full_attention import attend_to_all
from deepseek_vl2.models.siglip_vit import VisionTransformer

needs_pair_products = pytest.mark.skipif(
    "avx512_bf16" not in cpu_flags() or "amx_bf16" in cpu_flags(),
    reason="needs a CPU with avx512_bf16 and without amx_bf16",
)


@pytest.fixture(autouse=True)
def fresh_self_test():
    full_attention.is_supported.cache_clear()
    yield
    full_attention.is_supported.cache_clear()


def random_qkv(num_sequences: int, num_tokens: int, num_heads: int, width: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return (scale * torch.randn(num_sequences, num_tokens, 3 * num_heads * width, generator=generator)).bfloat16()


def by_torch(qkv: torch.Tensor, num_heads: int, scaling: float) -> torch.Tensor:
    query, key, value = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2).flatten(2)


def mean_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact).abs().mean())


@needs_pair_products
@pytest.mark.parametrize("num_tokens", [8, 9, 31, 32, 33, 200, 729])
@pytest.mark.parametrize(("num_heads", "width"), [(1, 72), (3, 64), (2, 10), (2, 128)])
def test_as_exact_as_torchs(num_tokens, num_heads, width):
    qkv = random_qkv(2, num_tokens, num_heads, width, scale=2)
    scaling = 0.7 * width**-0.5
    found = attend_to_all(qkv, num_heads, scaling)
    assert found is not None and found.dtype == torch.bfloat16 and found.shape == (2, num_tokens, num_heads * width)
    exact = by_torch(qkv.float(), num_heads, scaling)
    assert mean_error(found, exact) < 1.05 * mean_error(by_torch(qkv, num_heads, scaling), exact)
    torch.testing.assert_close(found.float(), exact, rtol=2**-7, atol=2**-7 * float(exact.abs().max()))


@needs_pair_products
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_any_number_of_threads(monkeypatch, num_threads):
    if num_threads > numba.config.NUMBA_NUM_THREADS:
        num_threads = numba.config.NUMBA_NUM_THREADS
    qkv = random_qkv(3, 41, 3, 16)
    assert full_attention.is_supported()
    monkeypatch.setattr(full_attention, "threads_for", lambda num_bytes: num_threads)
    exact = by_torch(qkv.float(), 3, 0.25)
    torch.testing.assert_close(attend_to_all(qkv, 3, 0.25).float(), exact, rtol=2**-7, atol=2**-7)


@needs_pair_products
@pytest.mark.parametrize("part", range(3), ids=["query", "key", "value"])
def test_what_is_not_a_number_stays_visible(part):
    qkv = random_qkv(2, 40, 2, 16)
    qkv[0, 17, part * 32 : part * 32 + 16] = float("nan")  # of the first head
    found = attend_to_all(qkv, 2, 0.25)
    assert found.isnan().any()
    assert torch.equal(found.isnan(), by_torch(qkv, 2, 0.25).isnan())


@needs_pair_products
def test_one_token_that_all_look_at():
    qkv = torch.zeros(1, 40, 3, 1, 16)
    qkv[..., 0, :, 0] = 1
    qkv[0, 33, 1, 0, 0] = 1000.0
    qkv[:, :, 2] = torch.arange(40.0)[:, None, None]
    found = attend_to_all(qkv.flatten(2).bfloat16(), 1, 1.0)
    assert torch.equal(found, torch.full_like(found, 33.0))


@needs_pair_products
def test_when_attention_is_left_to_torch():
    qkv = random_qkv(2, 16, 2, 10)
    assert attend_to_all(qkv, 2, 0.3) is not None
    assert attend_to_all(qkv.float(), 2, 0.3) is None
    assert attend_to_all(qkv.half(), 2, 0.3) is None
    assert attend_to_all(qkv.to("meta"), 2, 0.3) is None
    assert attend_to_all(qkv[:, : full_attention.MIN_TOKENS - 1].contiguous(), 2, 0.3) is None
    assert attend_to_all(qkv[:, ::2], 2, 0.3) is None
    assert attend_to_all(qkv[:0], 2, 0.3) is None
    assert attend_to_all(qkv, 4, 0.3) is None  # heads of five numbers
    differentiated = qkv.clone().requires_grad_()
    assert attend_to_all(differentiated, 2, 0.3) is None
    with torch.no_grad():
        assert attend_to_all(differentiated, 2, 0.3) is not None


def make_tower(**changes) -> VisionTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = VisionTransformer(img_size=84, embed_dim=32, depth=2, num_heads=2, **changes)
        for parameter in tower.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    return tower.eval()


@needs_pair_products
@torch.no_grad()
def test_the_tower_uses_it_unless_told_otherwise(monkeypatch):
    outputs: list[torch.Tensor | None] = []

    def watched(*args):
        outputs.append(attend_to_all(*args))
        return outputs[-1]

    monkeypatch.setattr(siglip_vit, "attend_to_all", watched)
    pixels = torch.randn(2, 3, 84, 84, generator=torch.Generator().manual_seed(0))
    tower = make_tower()
    exact = tower(pixels)
    assert outputs == [None, None]  # float32
    tower.bfloat16()
    compiled = tower(pixels.bfloat16())
    assert len(outputs) == 4 and outputs[2] is not None and outputs[3] is not None
    monkeypatch.setattr(siglip_vit, "attend_to_all", lambda *args: None)
    assert mean_error(compiled, exact) < 1.1 * mean_error(tower(pixels.bfloat16()), exact)
    monkeypatch.setattr(siglip_vit, "attend_to_all", watched)
    tower.attn_implementation = "eager"
    tower(pixels.bfloat16())
    assert len(outputs) == 4


@needs_pair_products
def test_training_goes_through_torch():
    tower = make_tower().bfloat16().train()
    tower(torch.randn(1, 3, 84, 84).bfloat16()).float().square().mean().backward()
    assert tower.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("flags", [set(), {"avx512f"}, {"avx512_bf16", "amx_bf16"}], ids=str)
def test_other_processors_use_torchs(monkeypatch, caplog, flags):
    monkeypatch.setattr(full_attention, "cpu_flags", lambda: flags)
    with caplog.at_level(logging.WARNING):
        assert not full_attention.is_supported()
        assert attend_to_all(random_qkv(2, 16, 2, 10), 2, 0.3) is None
    assert not caplog.records


@pytest.mark.parametrize("reason", ["instructions", "result", "compiler"])
@needs_pair_products
def test_where_it_fails_the_log_says_so_once(monkeypatch, caplog, reason):
    if reason == "instructions":
        monkeypatch.setattr(numba.config, "CPU_NAME", "generic")
    elif reason == "result":
        monkeypatch.setattr(full_attention, "_attend", lambda qkv, num_heads, scaling: torch.zeros(2, 19, 20))
    else:

        def refuse(*arguments):
            raise numba.core.errors.NumbaError("no compiler")

        monkeypatch.setattr(few_row_products, "run_kernel", refuse)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert attend_to_all(random_qkv(2, 16, 2, 10), 2, 0.3) is None
    assert len(caplog.records) == 1 and "on this CPU" in caplog.text
