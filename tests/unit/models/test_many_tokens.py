"""Compiled attention of many tokens beside torch's, and where it is left to torch."""

import logging

import numba
import pytest
import torch
import torch.nn.functional as F
from small_models import MHA, language_config, seeded

from deepseek_vl2.models import attention_kernels, few_row_products, many_tokens, siglip_vit
from deepseek_vl2.models.cpu_features import cpu_flags
from deepseek_vl2.models.many_tokens import attend_many_tokens
from deepseek_vl2.models.modeling_deepseek import DeepseekV2ForCausalLM
from deepseek_vl2.models.siglip_vit import VisionTransformer

needs_pair_products = pytest.mark.skipif(
    "avx512_bf16" not in cpu_flags() or "amx_bf16" in cpu_flags(),
    reason="needs a CPU with avx512_bf16 and without amx_bf16",
)


@pytest.fixture(autouse=True)
def fresh_self_test():
    many_tokens.is_supported.cache_clear()
    yield
    many_tokens.is_supported.cache_clear()


# Heads, groups of them, and widths: vision towers, tiny, small, grouped, and odd numbers of vectors.
SHAPES = [(3, 3, 72, 72), (1, 1, 128, 128), (2, 2, 192, 128), (4, 2, 64, 64), (2, 1, 10, 22)]


def random_states(
    num_sequences: int,
    num_heads: int,
    num_groups: int,
    num_tokens: int,
    width: int,
    value_width: int | None = None,
    scale: float = 1.0,
) -> list[torch.Tensor]:
    """Queries, keys and values."""
    generator = torch.Generator().manual_seed(num_tokens)
    heads = ((num_heads, width), (num_groups, width), (num_groups, value_width or width))
    shapes = [(num_sequences, count, num_tokens, size) for count, size in heads]
    return [(scale * torch.randn(shape, generator=generator)).bfloat16() for shape in shapes]


def by_torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, is_causal: bool
) -> torch.Tensor:
    settings = {"scale": scaling, "is_causal": is_causal, "enable_gqa": True}
    # Filled up with zeros: of different widths torch's fused kernel takes none.
    width = max(query.shape[-1], value.shape[-1])
    states = (F.pad(part, (0, width - part.shape[-1])) for part in (query, key, value))
    return F.scaled_dot_product_attention(*states, **settings)[..., : value.shape[-1]].transpose(1, 2)


def mean_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact).abs().mean())


@needs_pair_products
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("num_tokens", [8, 9, 31, 32, 33, 200, 729])
@pytest.mark.parametrize(("num_heads", "num_groups", "width", "value_width"), SHAPES)
def test_as_exact_as_torchs(num_heads, num_groups, width, value_width, num_tokens, is_causal):
    states = random_states(2, num_heads, num_groups, num_tokens, width, value_width, scale=2)
    scaling = 0.7 * width**-0.5
    found = attend_many_tokens(*states, scaling, is_causal)
    assert found is not None and found.dtype == torch.bfloat16
    assert found.shape == (2, num_tokens, num_heads, value_width)
    exact = by_torch(*(part.float() for part in states), scaling, is_causal)
    assert mean_error(found, exact) < 1.05 * mean_error(by_torch(*states, scaling, is_causal), exact)
    torch.testing.assert_close(found.float(), exact, rtol=2**-7, atol=2**-7 * float(exact.abs().max()))


@needs_pair_products
def test_parts_of_larger_tensors():
    """As the towers pass them: heads beside each other, and a cache with room."""
    qkv = random_states(2, 3, 3, 20, 48)[0].transpose(1, 2).unflatten(-1, (3, 16)).permute(3, 0, 2, 1, 4)
    cache = random_states(1, 2, 2, 64, 16)[1].expand(2, -1, -1, -1)[:, :, :20]
    for states in (qkv, (qkv[0][:, :2], cache, cache)):
        found = attend_many_tokens(*states, 0.25, is_causal=True)
        plain = attend_many_tokens(*(part.contiguous() for part in states), 0.25, is_causal=True)
        assert found is not None and torch.equal(found, plain)


@needs_pair_products
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_any_number_of_threads(monkeypatch, num_threads, is_causal):
    num_threads = min(num_threads, numba.config.NUMBA_NUM_THREADS)
    states = random_states(3, 4, 2, 41, 16)
    assert many_tokens.is_supported()
    monkeypatch.setattr(many_tokens, "threads_for", lambda num_bytes: num_threads)
    exact = by_torch(*(part.float() for part in states), 0.25, is_causal)
    found = attend_many_tokens(*states, 0.25, is_causal)
    torch.testing.assert_close(found.float(), exact, rtol=2**-7, atol=2**-7)


@needs_pair_products
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("part", range(3), ids=["query", "key", "value"])
def test_what_is_not_a_number_stays_visible(part, is_causal):
    states = random_states(2, 2, 2, 40, 16)
    states[part][0, 1, 17] = float("nan")
    found = attend_many_tokens(*states, 0.25, is_causal)
    expected = found.new_zeros(found.shape, dtype=torch.bool)
    first, end = (17, 18) if part == 0 else (17 if is_causal else 0, 40)
    expected[0, first:end, 1] = True
    # torch's kernel spreads it in causal attention, since it multiplies hidden values by zero.
    if part == 2 and is_causal:
        assert found.isnan()[expected].all() and not found[1].isnan().any() and not found[0, :, 0].isnan().any()
    else:
        assert torch.equal(found.isnan(), expected)


@needs_pair_products
def test_one_token_that_all_look_at():
    query, key = torch.zeros(2, 1, 1, 40, 16)
    query[..., 0] = 1
    key[0, 0, 33, 0] = 1000.0
    value = torch.arange(40.0)[None, None, :, None].expand(1, 1, 40, 16)
    found = attend_many_tokens(query.bfloat16(), key.bfloat16(), value.bfloat16(), 1.0, is_causal=False)
    assert torch.equal(found, torch.full_like(found, 33.0))


@needs_pair_products
def test_when_attention_is_left_to_torch():
    query, key, value = states = random_states(2, 2, 2, 16, 10)

    def is_left(*states: torch.Tensor) -> bool:
        return attend_many_tokens(*states, 0.3, is_causal=True) is None

    assert not is_left(*states)
    assert is_left(*(part.float() for part in states))
    assert is_left(*(part.half() for part in states))
    assert is_left(*(part.to("meta") for part in states))
    assert is_left(*(part[:, :, : many_tokens.MIN_TOKENS - 1] for part in states))
    assert is_left(*(part[:0] for part in states))
    assert is_left(query[:, :, 1:], key, value)  # tokens that were there before
    assert is_left(query[..., :9], key[..., :9], value)  # no pairs
    assert is_left(query, key, value.transpose(2, 3).contiguous().transpose(2, 3))
    query.requires_grad_()
    assert is_left(*states)
    with torch.no_grad():
        assert not is_left(*states)


@needs_pair_products
@pytest.mark.parametrize("changes", [MHA, {}], ids=["mha", "mla"])
@torch.no_grad()
def test_prompts_are_read_with_it(monkeypatch, changes):
    model = seeded(DeepseekV2ForCausalLM, language_config(**changes)).eval()
    ids = torch.arange(3, 40)[None]
    exact = model(ids).logits
    model.bfloat16()
    calls: list[bool] = []

    def watched(*args, **kwargs):
        output = attend_many_tokens(*args, **kwargs)
        calls.append(output is not None)
        return output

    monkeypatch.setattr(attention_kernels, "attend_many_tokens", watched)
    compiled = model(ids).logits
    assert calls and all(calls)
    monkeypatch.setattr(attention_kernels, "attend_many_tokens", lambda *args, **kwargs: None)
    assert mean_error(compiled, exact) < 1.1 * mean_error(model(ids).logits, exact)


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

    def watched(*args, **kwargs):
        outputs.append(attend_many_tokens(*args, **kwargs))
        return outputs[-1]

    monkeypatch.setattr(siglip_vit, "attend_many_tokens", watched)
    pixels = torch.randn(2, 3, 84, 84, generator=torch.Generator().manual_seed(0))
    tower = make_tower()
    exact = tower(pixels)
    assert outputs == [None, None]  # float32
    tower.bfloat16()
    compiled = tower(pixels.bfloat16())
    assert len(outputs) == 4 and outputs[2] is not None and outputs[3] is not None
    monkeypatch.setattr(siglip_vit, "attend_many_tokens", lambda *args, **kwargs: None)
    assert mean_error(compiled, exact) < 1.1 * mean_error(tower(pixels.bfloat16()), exact)
    monkeypatch.setattr(siglip_vit, "attend_many_tokens", watched)
    tower.attn_implementation = "eager"
    tower(pixels.bfloat16())
    assert len(outputs) == 4


@needs_pair_products
def test_training_goes_through_torch():
    tower = make_tower().bfloat16().train()
    tower(torch.randn(1, 3, 84, 84).bfloat16()).float().square().mean().backward()
    assert tower.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("flags", ["", "avx512f", "avx512_bf16 amx_bf16"])
def test_other_processors_use_torchs(monkeypatch, caplog, flags):
    monkeypatch.setattr(many_tokens, "cpu_flags", lambda: set(flags.split()))
    with caplog.at_level(logging.WARNING):
        assert not many_tokens.is_supported()
        assert attend_many_tokens(*random_states(2, 2, 2, 16, 10), 0.3, is_causal=False) is None
    assert not caplog.records


@pytest.mark.parametrize("reason", ["instructions", "result", "compiler"])
@needs_pair_products
def test_where_it_fails_the_log_says_so_once(monkeypatch, caplog, reason):
    if reason == "instructions":
        monkeypatch.setattr(few_row_products.kernels(), "HAS_PAIR_PRODUCTS", False)
    elif reason == "result":
        monkeypatch.setattr(many_tokens, "_attend", lambda *args: torch.zeros(2, 19, 2, 10))
    else:

        def refuse(*arguments):
            raise numba.core.errors.NumbaError("no compiler")

        monkeypatch.setattr(few_row_products, "run_kernel", refuse)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert attend_many_tokens(*random_states(2, 2, 2, 16, 10), 0.3, is_causal=False) is None
    assert len(caplog.records) == 1 and "on this CPU" in caplog.text
