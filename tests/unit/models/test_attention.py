import sys
import types

import pytest
import torch
from small_models import MHA, language_config, make_inputs, seeded, vl_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, cpu_features
from deepseek_vl2.models.growing_cache import GrowingCache
from deepseek_vl2.models.modeling_deepseek import (
    DeepseekV2Attention,
    DeepseekV2ForCausalLM,
    DeepseekV2MultiHeadAttention,
    mask_scores,
)
from deepseek_vl2.models.rotary_positions import DeepseekV2RotaryEmbedding
from deepseek_vl2.models.siglip_vit import VisionAttention

KINDS = {
    "mla": {},
    "mla_query_lora": {"q_lora_rank": 80},
    "mla_wide_values": {"v_head_dim": 64},
    "mla_bias": {"attention_bias": True, "q_lora_rank": 80},
    "mha": MHA,
    "mha_shared_keys": {**MHA, "num_key_value_heads": 2},
    "mha_bias": {**MHA, "attention_bias": True},
}
LENGTH = 9


@pytest.fixture(params=KINDS)
def model(request) -> DeepseekV2ForCausalLM:
    return seeded(DeepseekV2ForCausalLM, language_config(**KINDS[request.param]))


def prompt() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows, the first with four tokens of padding on the left."""
    ids = torch.randint(4, 150, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return ids, mask


@pytest.mark.parametrize("is_padded", [False, True])
@torch.no_grad()
def test_sdpa_equals_eager(model, is_padded):
    ids, mask = prompt()
    outputs = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        outputs.append(model(ids, attention_mask=mask if is_padded else None).logits[mask.bool()])
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_padded_row_equals_the_row_alone(model, implementation):
    model.set_attn_implementation(implementation)
    ids, mask = prompt()
    alone = model(ids[:1, 4:]).logits
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[:1, 4:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("step", [1, 2, 4])
@torch.no_grad()
def test_cached_equals_uncached(model, implementation, step):
    model.set_attn_implementation(implementation)
    ids, mask = prompt()
    whole = model(ids, attention_mask=mask).logits
    cache, parts = DynamicCache(config=model.config), []
    for start in range(0, LENGTH, step):
        end = min(start + step, LENGTH)
        output = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask.bool()], whole[mask.bool()], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_later_tokens_change_nothing(model):
    ids, _ = prompt()
    changed = ids.clone()
    changed[:, 6:] = 77
    torch.testing.assert_close(model(ids).logits[:, :6], model(changed).logits[:, :6], atol=2e-5, rtol=1e-5)


def test_cache_of_mla_holds_the_latent():
    model = seeded(DeepseekV2ForCausalLM, language_config())
    ids, _ = prompt()
    cache = model(ids, use_cache=True).past_key_values
    assert len(cache.layers) == 3
    for layer in cache.layers:
        assert layer.keys.shape == (2, 1, LENGTH, 8)
        assert layer.values.shape == (2, 1, LENGTH, 40)


def test_cache_of_mha_holds_the_shared_keys():
    model = seeded(DeepseekV2ForCausalLM, language_config(**KINDS["mha_shared_keys"]))
    cache = model(prompt()[0], use_cache=True).past_key_values
    assert cache.layers[0].keys.shape == cache.layers[0].values.shape == (2, 2, LENGTH, 8)


@pytest.mark.parametrize("kind", ["mla", "mla_wide_values", "mla_query_lora"])
@pytest.mark.parametrize("num_new", [1, 3])
@torch.no_grad()
def test_absorbed_equals_expanded(kind, num_new):
    config = language_config(**KINDS[kind])
    config._attn_implementation = "eager"
    attention = seeded(DeepseekV2Attention, config, 0)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, LENGTH, 48, generator=generator)
    tables = DeepseekV2RotaryEmbedding(config)(torch.arange(LENGTH)[None])
    mask = torch.zeros(2, 1, num_new, LENGTH).masked_fill(
        ~torch.ones(num_new, LENGTH, dtype=torch.bool).tril(LENGTH - num_new), torch.finfo().min
    )
    outputs, weights = [], []
    for is_absorbed in (True, False):
        attention._is_absorbing_cheaper = lambda *_, is_absorbed=is_absorbed: is_absorbed
        cache = DynamicCache(config=config)
        attention(hidden[:, :-num_new], tuple(t[:, :-num_new] for t in tables), None, cache)
        last = tuple(t[:, -num_new:] for t in tables)
        output, weight = attention(hidden[:, -num_new:], last, mask, cache)
        outputs.append(output)
        weights.append(weight)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_decoding_never_expands_the_cache(monkeypatch, implementation):
    model = seeded(DeepseekV2ForCausalLM, language_config())
    model.set_attn_implementation(implementation)
    ids, mask = prompt()
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    lengths = []
    attend_heads = DeepseekV2Attention._attend_heads

    def noted(self, query, expanded, *args, **kwargs):
        lengths.append(expanded.shape[1])
        return attend_heads(self, query, expanded, *args, **kwargs)

    monkeypatch.setattr(DeepseekV2Attention, "_attend_heads", noted)
    for _ in range(3):
        mask = torch.cat((mask, mask.new_ones(2, 1)), dim=1)
        model(ids[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True)
    assert lengths == []
    model(ids)
    assert lengths == [LENGTH] * 3, "the spy sees the expansion of a prompt"
    model(ids, use_cache=True)
    assert lengths == [LENGTH] * 6, "a prompt is expanded beside an empty cache, too"


class LargestTensor(TorchDispatchMode):
    """Notes the most numbers that a tensor made in this context has."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and not func.is_view:
            self.numel = max(self.numel, output.numel())
        return output


@torch.no_grad()
def test_memory_of_a_later_chunk_is_that_of_the_first():
    config = language_config(num_attention_heads=8, num_key_value_heads=8)
    config._attn_implementation = "sdpa"
    attention = seeded(DeepseekV2Attention, config, 0)
    hidden = torch.randn(1, 320, 48, generator=torch.Generator().manual_seed(0))
    tables = DeepseekV2RotaryEmbedding(config)(torch.arange(320)[None])
    whole, _ = attention(hidden, tables)
    cache, largest, parts = GrowingCache(1, 320), [], []
    for start in range(0, 320, 40):
        chunk = slice(start, start + 40)
        mask = torch.ones(40, start + 40, dtype=torch.bool).tril(start)[None, None]
        with LargestTensor() as made:
            parts.append(attention(hidden[:, chunk], tuple(t[:, chunk] for t in tables), mask, cache)[0])
        largest.append(made.numel)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)
    assert max(largest[1:]) <= largest[0]


def test_published_sizes_expand_for_long_chunks_only():
    config = language_config(
        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, num_hidden_layers=1
    )
    with torch.device("meta"):
        attention = DeepseekV2Attention(config, 0).eval()
    # Absorbed: T * (512 + 512) multiplications a head and cached token; expanded: 512 * 256 and T * (128 + 128).
    assert attention._is_absorbing_cheaper(1)
    assert attention._is_absorbing_cheaper(170)
    assert not attention._is_absorbing_cheaper(171)


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_decoding(monkeypatch, dtype, is_fast):
    monkeypatch.setattr(cpu_features, "has_fast_bfloat16", lambda: is_fast)
    model = seeded(DeepseekV2ForCausalLM, language_config(**{**MHA, "n_routed_experts": None}))
    mla = seeded(DeepseekV2ForCausalLM, language_config(n_routed_experts=None))
    ids, mask = prompt()
    for each in (model, mla):
        expected = each(ids, attention_mask=mask).logits[:, -1]
        each.to(dtype)
        cache = each(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True).past_key_values
        outputs = each(ids[:, -1:], attention_mask=mask, past_key_values=cache)
        assert outputs.logits.dtype == dtype
        actual = outputs.logits[:, -1].float()
        assert (actual - expected).abs().max() < 0.05 * expected.abs().max()


def masks_of_every_kind() -> dict[str, torch.Tensor | None]:
    visible = torch.ones(2, 7, dtype=torch.bool).tril(5)[None, None].repeat(2, 1, 1, 1)
    visible[0, ..., :3] = False
    padding = torch.ones(2, 7, dtype=torch.long)
    padding[0, :3] = 0
    added = torch.zeros(2, 1, 2, 7).masked_fill(~visible, torch.finfo().min)
    return {"boolean": visible, "added": added, "padding": padding}


@pytest.mark.parametrize("kind", ["boolean", "added", "padding"])
def test_masks_of_every_kind(kind):
    scores = torch.randn(2, 5, 2, 7, generator=torch.Generator().manual_seed(0))
    weights = mask_scores(scores, masks_of_every_kind()[kind]).softmax(-1)
    expected = scores.masked_fill(~masks_of_every_kind()["boolean"], -torch.inf).softmax(-1)
    torch.testing.assert_close(weights, expected)
    assert weights[1, :, 0, 6].abs().max() == 0, "the last token but one must not see the last"


def test_no_mask_is_causal():
    weights = mask_scores(torch.zeros(1, 1, 2, 4), None).softmax(-1)[0, 0]
    torch.testing.assert_close(weights, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0], [0.25, 0.25, 0.25, 0.25]]))


def test_weights_can_be_asked_for(model):
    model.set_attn_implementation("eager")
    ids, mask = prompt()
    attentions = model(ids, attention_mask=mask, output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(2, 6, LENGTH, LENGTH)] * 3
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(2, 6, LENGTH))


CHOICES = {
    "eager": ("eager", "eager"),
    "sdpa": ("sdpa", "sdpa"),
    "vision eager": ("eager", "sdpa"),
    "language eager": ("sdpa", "eager"),
}
PARTS = {
    "eager": "eager",
    "sdpa": "sdpa",
    "vision eager": {"vision_config": "eager", "language_config": "sdpa"},
    "language eager": {"language_config": "eager"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    seeded(DeepseekVLV2ForCausalLM, vl_config()).save_pretrained(path)
    return path


def implementations_run(model: DeepseekVLV2ForCausalLM, monkeypatch) -> tuple[set[str], set[str]]:
    """Kernels that run in the vision tower and in the language model, by watching sdpa and the layers."""
    is_sdpa: dict[str, set[str]] = {"vision": set(), "language": set()}
    running: list[str] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        calls.append(running[-1])
        return original(*args, **kwargs)

    calls: list[str] = []
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    for module in model.modules():
        if isinstance(module, (VisionAttention, DeepseekV2Attention, DeepseekV2MultiHeadAttention)):
            part = "vision" if isinstance(module, VisionAttention) else "language"

            def before(_module, _args, part=part):
                running.append(part)
                calls.clear()

            def after(_module, _args, _output, part=part):
                is_sdpa[part].add("sdpa" if part in calls else "eager")

            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)
    with torch.no_grad():
        model(**make_inputs([(1, 1)]))
    return is_sdpa["vision"], is_sdpa["language"]


@pytest.mark.parametrize("when", ["loading", "later"])
@pytest.mark.parametrize("choice", CHOICES)
def test_choice_reaches_both_parts(folder, monkeypatch, choice, when):
    if when == "loading":
        model = DeepseekVLV2ForCausalLM.from_pretrained(folder, attn_implementation=PARTS[choice])
    else:
        model = DeepseekVLV2ForCausalLM.from_pretrained(folder)
        model.set_attn_implementation(PARTS[choice])
    vision, language = CHOICES[choice]
    assert implementations_run(model, monkeypatch) == ({vision}, {language})
    assert model.config.vision_config._attn_implementation == model.vision.attn_implementation == vision
    assert model.language.config._attn_implementation == language


@torch.no_grad()
def test_choices_agree(folder):
    inputs = make_inputs([(2, 1)])
    model = DeepseekVLV2ForCausalLM.from_pretrained(folder)
    expected = model(**inputs).logits
    for choice in CHOICES:
        model.set_attn_implementation(PARTS[choice])
        torch.testing.assert_close(model(**inputs).logits, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("when", ["loading", "later"])
@pytest.mark.parametrize(
    ("choice", "error", "words"),
    [
        ("nonsense", ValueError, ["nonsense", "sdpa"]),
        ({"vision_config": "nonsense"}, ValueError, ["nonsense", "sdpa"]),
        ({"language_config": "nonsense"}, ValueError, ["nonsense", "sdpa"]),
        ({"language_config": "xformers"}, ValueError, ["xformers", "sdpa"]),
        ("xformers", ImportError, ["xformers", "sdpa"]),
        ({"vision_config": "xformers"}, ImportError, ["xformers", "sdpa"]),
        ("flash_attention_2", ImportError, ["flash_attention_2", "flash_attn", "sdpa"]),
        ({"vision_config": "flash_attention_2"}, ImportError, ["flash_attention_2", "flash_attn", "sdpa"]),
        ({"language_config": "flash_attention_2"}, ImportError, ["flash_attention_2", "sdpa"]),
    ],
)
def test_choices_that_cannot_run_here(folder, monkeypatch, choice, error, words, when):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model = DeepseekVLV2ForCausalLM.from_pretrained(folder) if when == "later" else None
    with pytest.raises(error) as caught:
        if model is None:
            DeepseekVLV2ForCausalLM.from_pretrained(folder, attn_implementation=choice)
        else:
            model.set_attn_implementation(choice)
    for word in words:
        assert word in str(caught.value)
    if model is not None:
        assert model.vision.attn_implementation == model.language.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("implementation", ["xformers", "flash_attention_2"])
def test_installed_packages_without_cuda(folder, monkeypatch, implementation):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: types.SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = DeepseekVLV2ForCausalLM.from_pretrained(folder)
    with pytest.raises(ImportError, match=f"'{implementation}' needs CUDA.*'sdpa'"):
        model.set_attn_implementation({"vision_config": implementation})


def test_unknown_part(folder):
    model = DeepseekVLV2ForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"'vision' has no attention.*vision_config and language_config"):
        model.set_attn_implementation({"vision": "eager"})


def packages_of_cuda() -> dict[str, types.ModuleType]:
    """Stands in for the two packages, with the shapes of their interface: [batch, tokens, heads, head]."""

    def attend(query, key, value, scale):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return ((query @ key.transpose(-1, -2) * scale).softmax(-1) @ value).transpose(1, 2)

    flash, xformers, ops = (
        types.ModuleType("flash_attn"),
        types.ModuleType("xformers"),
        types.ModuleType("xformers.ops"),
    )
    flash.flash_attn_func = lambda q, k, v, dropout_p, softmax_scale: attend(q, k, v, softmax_scale)
    ops.memory_efficient_attention = lambda q, k, v, p, scale: attend(q, k, v, scale)
    return {"flash_attn": flash, "xformers": xformers, "xformers.ops": ops}


@pytest.mark.parametrize("implementation", ["xformers", "flash_attention_2"])
@torch.no_grad()
def test_kernels_of_cuda_are_called_rightly(folder, monkeypatch, implementation):
    model = DeepseekVLV2ForCausalLM.from_pretrained(folder)
    inputs = make_inputs([(1, 2)])
    expected = model(**inputs).logits
    for name, module in packages_of_cuda().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: types.SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model.set_attn_implementation({"vision_config": implementation})
    torch.testing.assert_close(model(**inputs).logits, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("num_key_heads", [6, 2])
@pytest.mark.parametrize("is_padded", [False, True])
@torch.no_grad()
def test_one_token_on_a_cpu_is_attended_by_products(num_key_heads, is_padded, monkeypatch):
    config = language_config(**MHA, num_hidden_layers=1)
    config.num_key_value_heads = num_key_heads
    config._attn_implementation = "eager"
    attention = seeded(DeepseekV2MultiHeadAttention, config, 0)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 1, 48, generator=generator)
    tables = DeepseekV2RotaryEmbedding(config)(torch.tensor([[LENGTH]]))
    mask = torch.zeros(2, 1, 1, LENGTH + 1, dtype=torch.bool) if is_padded else None
    if mask is not None:
        mask[0, ..., 3:] = mask[1] = True
    outputs = []
    for implementation in ("eager", "sdpa"):
        if implementation == "sdpa":  # the fused kernel must not be asked
            monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
        config._attn_implementation = implementation
        cache = DynamicCache()
        generator.manual_seed(1)
        cache.update(*torch.randn(2, 2, num_key_heads, LENGTH, 8, generator=generator), 0)
        added = mask if mask is None or implementation == "sdpa" else torch.where(mask, 0.0, torch.finfo().min)
        outputs.append(attention(hidden, tables, attention_mask=added, past_key_values=cache)[0])
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-5)
