"""One token through compiled layers, beside the same layers called one by one."""

import copy
import pickle

import pytest
import torch
from small_models import MHA, ROUTERS, language_config, seeded
from transformers import DynamicCache

from deepseek_vl2.models import WeightOnlyConfig, one_token
from deepseek_vl2.models.growing_cache import GrowingCache
from deepseek_vl2.models.modeling_deepseek import DeepseekV2ForCausalLM

ATTENTIONS = {
    "mla": {},
    "mla_query_lora": {"q_lora_rank": 80},
    "mla_seven_heads": {"num_attention_heads": 7, "num_key_value_heads": 7},
    "mha": MHA,
    "mha_shared_keys": {**MHA, "num_key_value_heads": 2},
}
EACH_ROUTER = {
    **ROUTERS,
    "normalised": {"norm_topk_prob": True},
    "one": {"num_experts_per_tok": 1},
    "all": {"num_experts_per_tok": 12},
}
# Those of a model that has int4 weights in whole blocks.
WIDTHS = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "kv_lora_rank": 64,
    "v_head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
NUM_LAYERS = 3
PROMPT = torch.tensor([[5, 9, 31, 77, 8, 120, 4]])


def make_model(dtype: torch.dtype = torch.float32, **changes) -> DeepseekV2ForCausalLM:
    model = seeded(DeepseekV2ForCausalLM, language_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(8)))
    return model.to(dtype)


@pytest.fixture
def runs(monkeypatch) -> list[str]:
    """Which halves of layers ran as kernels."""
    halves: list[str] = []
    for name in ("attend", "feed_forward"):
        original = getattr(one_token, name)

        def spy(*arguments, name=name, original=original):
            output = original(*arguments)
            if output is not None:
                halves.append(name)
            return output

        monkeypatch.setattr(one_token, name, spy)
    return halves


@torch.no_grad()
def decode(model, num_tokens: int = 3, cache=None, **inputs) -> torch.Tensor:
    """Logits of some tokens after a prompt, one by one."""
    cache = GrowingCache(NUM_LAYERS) if cache is None else cache
    model(PROMPT, past_key_values=cache, use_cache=True)
    return torch.cat(
        [
            model(torch.tensor([[11 + number % 100]]), past_key_values=cache, use_cache=True, **inputs).logits
            for number in range(num_tokens)
        ],
        dim=1,
    )


def decode_without(monkeypatch, model, *arguments) -> torch.Tensor:
    """The same without the kernels."""
    with monkeypatch.context() as patch:
        for name in ("attend", "feed_forward"):
            patch.setattr(one_token, name, lambda *args: None)
        return decode(model, *arguments)


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_both_kinds_of_attention(monkeypatch, runs, attention, num_threads):
    model = make_model(**ATTENTIONS[attention])
    expected = decode_without(monkeypatch, model)
    monkeypatch.setattr(one_token, "threads_for", lambda num_bytes: num_threads)
    assert largest_difference(decode(model), expected) < 1e-5
    assert runs == ["attend", "feed_forward"] * (NUM_LAYERS * 3)


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("router", EACH_ROUTER)
def test_all_kinds_of_router(monkeypatch, runs, router, shared):
    model = make_model(n_shared_experts=shared, **EACH_ROUTER[router])
    assert largest_difference(decode(model), decode_without(monkeypatch, model)) < 1e-5
    assert len(runs) == 2 * NUM_LAYERS * 3


@pytest.mark.parametrize("attention", ["mla_query_lora", "mha"])
def test_bfloat16_is_as_near_to_float32_as_without(monkeypatch, runs, attention):
    model = make_model(torch.bfloat16, **ATTENTIONS[attention], hidden_size=96)
    exact = decode_without(monkeypatch, copy.deepcopy(model).float())
    without = largest_difference(decode_without(monkeypatch, model), exact)
    found = decode(model)
    assert found.dtype == torch.bfloat16 and len(runs) == 2 * NUM_LAYERS * 3
    assert largest_difference(found, exact) < max(1.5 * without, 0.02)


@pytest.mark.parametrize("attention", ["mla_query_lora", "mha"])
@pytest.mark.parametrize("config", [WeightOnlyConfig(8), WeightOnlyConfig(4, 32)], ids=lambda config: config.name)
def test_quantised_weights(monkeypatch, runs, tmp_path, config, attention):
    kind = MHA if attention == "mha" else {"q_lora_rank": 96}
    make_model(torch.bfloat16, **{**WIDTHS, **kind}).save_pretrained(tmp_path)
    model = DeepseekV2ForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert largest_difference(decode(model), decode_without(monkeypatch, model)) < 0.03
    assert len(runs) == 2 * NUM_LAYERS * 3


def test_int4_in_float32_is_left_to_layers_that_round_nothing(monkeypatch, runs, tmp_path):
    make_model(torch.bfloat16, **WIDTHS).save_pretrained(tmp_path)
    quantized = {"quantization_config": WeightOnlyConfig(4, 32), "dtype": torch.float32}
    model = DeepseekV2ForCausalLM.from_pretrained(tmp_path, **quantized)
    assert largest_difference(decode(model), decode_without(monkeypatch, model)) < 1e-5
    assert runs.count("feed_forward") == 3  # of the first layer, which is int8


def test_prompts_and_batches_are_none_of_their_business(runs):
    model = make_model()
    with torch.no_grad():
        cache = GrowingCache(NUM_LAYERS)
        both = PROMPT.repeat(2, 1)
        model(both, past_key_values=cache, use_cache=True)
        model(torch.tensor([[3], [4]]), past_key_values=cache, use_cache=True)
    assert not runs


@pytest.mark.parametrize("change", ["hook", "forward", "eager", "bias"])
def test_attention_that_is_called_itself(monkeypatch, runs, change):
    model = make_model(**MHA, attention_bias=change == "bias")
    expected = decode_without(monkeypatch, model)
    attention = model.model.layers[1].self_attn
    called = []
    if change == "hook":
        attention.o_proj.register_forward_hook(lambda *args: called.append(1))
    elif change == "forward":
        original = attention.forward
        attention.forward = lambda *args, **kwargs: called.append(1) or original(*args, **kwargs)
    elif change == "eager":
        model.set_attn_implementation("eager")
    assert largest_difference(decode(model), expected) < 1e-5
    if change in ("hook", "forward"):
        assert len(called) == 4 and runs.count("attend") == 2 * 3
    else:
        assert "attend" not in runs
    assert runs.count("feed_forward") == NUM_LAYERS * 3


@pytest.mark.parametrize("part", ["gate", "experts", "shared_experts", "shared_experts.up_proj"])
def test_parts_of_a_feed_forward_layer_that_are_watched(monkeypatch, runs, part):
    model = make_model()
    expected = decode_without(monkeypatch, model)
    called = []
    model.model.layers[1].mlp.get_submodule(part).register_forward_hook(lambda *args: called.append(1))
    assert largest_difference(decode(model), expected) < 1e-5
    assert len(called) == 4 and runs.count("feed_forward") == 2 * 3


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_experts_that_the_user_chose_another_way_for(monkeypatch, runs, implementation):
    model = make_model()
    model.set_experts_implementation(implementation)
    decode(model)
    assert runs.count("feed_forward") == 3  # the first layer, which has none


def test_other_activations(monkeypatch, runs):
    model = make_model(hidden_act="gelu")
    assert largest_difference(decode(model), decode_without(monkeypatch, model)) < 1e-5
    assert "feed_forward" not in runs and runs.count("attend") == NUM_LAYERS * 3


def test_other_caches_and_padding(monkeypatch, runs):
    model = make_model()
    expected = decode_without(monkeypatch, model)
    assert largest_difference(decode(model, 3, DynamicCache()), expected) < 1e-5
    assert "attend" not in runs
    cache = GrowingCache(NUM_LAYERS)
    padded = torch.cat((torch.full((1, 2), 1), PROMPT), dim=1)
    mask = torch.tensor([[0, 0] + [1] * PROMPT.shape[1]])
    with torch.no_grad():
        model(padded, attention_mask=mask, past_key_values=cache, use_cache=True)
        mask = torch.cat((mask, torch.ones(1, 1, dtype=mask.dtype)), dim=1)
        logits = model(torch.tensor([[11]]), attention_mask=mask, past_key_values=cache, use_cache=True).logits
    assert largest_difference(logits, expected[:, :1]) < 1e-5
    assert "attend" not in runs


def test_a_first_token_without_a_prompt(monkeypatch):
    model = make_model()
    with torch.no_grad():
        found = model(PROMPT[:, :1], use_cache=True).logits
        for name in ("attend", "feed_forward"):
            monkeypatch.setattr(one_token, name, lambda *args: None)
        assert largest_difference(found, model(PROMPT[:, :1], use_cache=True).logits) < 1e-5


def test_a_latent_norm_of_another_type(monkeypatch, runs):
    """Its float32 latent goes into a cache of float32."""
    model = make_model()
    model.model.layers[1].self_attn.kv_a_layernorm.bfloat16()
    assert largest_difference(decode(model), decode_without(monkeypatch, model)) < 1e-5
    assert runs.count("attend") == 2 * 3


def test_gradients(runs):
    model = make_model()
    cache = GrowingCache(NUM_LAYERS)
    model(PROMPT, past_key_values=cache, use_cache=True)
    model(torch.tensor([[11]]), past_key_values=cache, use_cache=True).logits.sum().backward()
    assert not runs
    assert model.model.layers[2].self_attn.o_proj.weight.grad is not None


@pytest.mark.parametrize("attention", ["mla", "mha"])
def test_weights_that_were_changed_moved_or_replaced(monkeypatch, runs, attention):
    model = make_model(**ATTENTIONS[attention], **ROUTERS["noaux_tc"])
    decode(model)
    layer = model.model.layers[1]

    def replace(module, name="weight"):
        values = getattr(module, name)
        setattr(module, name, torch.nn.Parameter(values + 0.1 * torch.randn_like(values)))

    def move(module, name="weight"):
        values = getattr(module, name)
        values.data = values.data.flip(0).clone()

    changes = [
        lambda: [parameter.data.mul_(0.9) for parameter in model.parameters()],
        lambda: replace(layer.self_attn.o_proj),
        lambda: move(layer.input_layernorm),
        lambda: move(layer.mlp.gate),
        lambda: replace(layer.mlp.experts, "down_proj"),
        lambda: setattr(layer.mlp.gate, "e_score_correction_bias", torch.linspace(-3, 3, 12)),
        lambda: model.double().float(),
    ]
    for change in changes:
        before = decode(model)
        change()
        after = decode(model)
        assert largest_difference(after, decode_without(monkeypatch, model)) < 1e-5
        assert change is changes[-1] or largest_difference(after, before) > 1e-3
    model.bfloat16()
    assert decode(model).dtype == torch.bfloat16
    model.float()
    expected = decode(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.model.layers[1].self_attn._one_token is None
        assert largest_difference(decode(copied), expected) < 1e-5


def test_the_cache_grows_and_can_be_cut_back(monkeypatch, runs):
    model = make_model(**MHA)
    expected = decode_without(monkeypatch, model, 240)
    cache = GrowingCache(NUM_LAYERS)
    found = decode(model, 240, cache)
    assert largest_difference(found, expected) < 1e-5
    cache.crop(10 - 240)
    with torch.no_grad():
        again = model(torch.tensor([[21]]), past_key_values=cache, use_cache=True).logits
    assert largest_difference(again, expected[:, 10:11]) < 1e-5
    assert len(runs) == 2 * NUM_LAYERS * 241


@pytest.mark.parametrize("half", ["attention_kernel", "feed_forward_kernel"])
def test_kernels_that_cannot_be_compiled_are_asked_once(monkeypatch, caplog, runs, half):
    model = make_model(**MHA)
    expected = decode_without(monkeypatch, model)

    def fail(*arguments):
        raise RuntimeError("LLVM knows no such processor")

    monkeypatch.setattr(one_token.compiled_layers(), half, lambda *block_rows: fail)
    with caplog.at_level("WARNING"):
        assert largest_difference(decode(model), expected) < 1e-5
    assert runs == [{"attention_kernel": "feed_forward", "feed_forward_kernel": "attend"}[half]] * (NUM_LAYERS * 3)
    assert len(caplog.records) == NUM_LAYERS and "no such processor" in caplog.text
