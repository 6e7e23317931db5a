"""A few tokens through compiled layers, beside the same layers called one by one."""

import copy
import pickle

import pytest
import torch
from small_models import MHA, ROUTERS, language_config, seeded
from transformers import DynamicCache

from deepseek_vl2.models import WeightOnlyConfig, few_tokens
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
PROMPT = torch.randint(2, 150, (1, few_tokens.MAX_TOKENS + 3), generator=torch.Generator().manual_seed(5))


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
        original = getattr(few_tokens, name)

        def spy(*arguments, name=name, original=original):
            output = original(*arguments)
            if output is not None:
                halves.append(name)
            return output

        monkeypatch.setattr(few_tokens, name, spy)
    return halves


@torch.no_grad()
def decode(model, num_tokens: int = 3, cache=None, batch_size: int = 1, num_padded: int = 0) -> torch.Tensor:
    """Logits [B, tokens, vocabulary] of some tokens after a prompt, one by one; rows begin with more and more padding.

    Args:
        model: A language model.
        num_tokens: How many.
        cache: What is to be filled.
        batch_size: B, rows of the same prompt.
        num_padded: Tokens of padding of the last row, the first has none.
    """
    cache = GrowingCache(NUM_LAYERS) if cache is None else cache
    width = PROMPT.shape[1] + num_padded
    padding = [num_padded * row // max(batch_size - 1, 1) for row in range(batch_size)]
    ids, mask = torch.ones(batch_size, width, dtype=torch.long), torch.zeros(batch_size, width, dtype=torch.long)
    for row, start in enumerate(padding):
        ids[row, start : start + PROMPT.shape[1]] = PROMPT[0]
        ids[row, start + PROMPT.shape[1] :] = 40 + row
        mask[row, start:] = 1
    masks = {"attention_mask": mask} if num_padded else {}
    model(ids, past_key_values=cache, use_cache=True, **masks)
    logits = []
    for number in range(num_tokens):
        if num_padded:
            masks["attention_mask"] = torch.cat((mask, torch.ones(batch_size, number + 1, dtype=torch.long)), dim=1)
        new = torch.tensor([[11 + (number + 7 * row) % 100] for row in range(batch_size)])
        logits.append(model(new, past_key_values=cache, use_cache=True, **masks).logits)
    return torch.cat(logits, dim=1)


def decode_without(monkeypatch, model, *arguments, **keywords) -> torch.Tensor:
    """The same without the kernels."""
    with monkeypatch.context() as patch:
        for name in ("attend", "feed_forward"):
            patch.setattr(few_tokens, name, lambda *args: None)
        return decode(model, *arguments, **keywords)


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


def mean_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of all logits; a single one may depend on an expert that is chosen by the last bit."""
    return float((found.float() - expected.float()).square().mean().sqrt() / expected.float().square().mean().sqrt())


def assert_as_near_to_float32(monkeypatch, runs, model, exact, **rows) -> None:
    """In bfloat16 compiled layers are as near to the same weights in float32 as layers called one by one."""
    expected = decode_without(monkeypatch, exact, 16, **rows)
    without = mean_difference(decode_without(monkeypatch, model, 16, **rows), expected)
    found = decode(model, 16, **rows)
    assert found.dtype == torch.bfloat16 and len(runs) == 2 * NUM_LAYERS * 16
    assert mean_difference(found, expected) < 1.25 * without < 0.1


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_both_kinds_of_attention(monkeypatch, runs, attention, num_threads):
    model = make_model(**ATTENTIONS[attention])
    expected = decode_without(monkeypatch, model)
    monkeypatch.setattr(few_tokens, "threads_for", lambda num_bytes: num_threads)
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
    assert_as_near_to_float32(monkeypatch, runs, model, copy.deepcopy(model).float())


@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize("attention", ["mla_query_lora", "mha"])
@pytest.mark.parametrize("config", [WeightOnlyConfig(8), WeightOnlyConfig(4, 32)], ids=lambda config: config.name)
def test_quantised_weights(monkeypatch, runs, tmp_path, config, attention, batch_size):
    kind = MHA if attention == "mha" else {"q_lora_rank": 96}
    make_model(torch.bfloat16, **{**WIDTHS, **kind}).save_pretrained(tmp_path)
    model = DeepseekV2ForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    exact = DeepseekV2ForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    assert_as_near_to_float32(monkeypatch, runs, model, exact, batch_size=batch_size)


def test_int4_in_float32_is_left_to_layers_that_round_nothing(monkeypatch, runs, tmp_path):
    make_model(torch.bfloat16, **WIDTHS).save_pretrained(tmp_path)
    quantized = {"quantization_config": WeightOnlyConfig(4, 32), "dtype": torch.float32}
    model = DeepseekV2ForCausalLM.from_pretrained(tmp_path, **quantized)
    assert largest_difference(decode(model), decode_without(monkeypatch, model)) < 1e-5
    assert runs.count("feed_forward") == 3  # of the first layer, which is int8


@pytest.mark.parametrize("num_padded", [0, 6])
@pytest.mark.parametrize("batch_size", [2, 3, few_tokens.MAX_TOKENS])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_rows_of_a_batch(monkeypatch, runs, attention, batch_size, num_padded):
    model = make_model(**ATTENTIONS[attention])
    rows = {"batch_size": batch_size, "num_padded": num_padded}
    expected = decode_without(monkeypatch, model, **rows)
    assert largest_difference(decode(model, **rows), expected) < 1e-5
    assert runs == ["attend", "feed_forward"] * (NUM_LAYERS * 3)


@pytest.mark.parametrize("router", EACH_ROUTER)
def test_each_row_is_routed_by_itself(monkeypatch, runs, router):
    model = make_model(**EACH_ROUTER[router])
    expected = decode_without(monkeypatch, model, batch_size=5)
    assert largest_difference(decode(model, batch_size=5), expected) < 1e-5
    assert len(runs) == 2 * NUM_LAYERS * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widths_that_fill_no_vectors(monkeypatch, runs, dtype):
    odd = {"hidden_size": 88, "moe_intermediate_size": 40, "intermediate_size": 51, "kv_lora_rank": 43}
    model = make_model(dtype, **odd)
    if dtype == torch.bfloat16:
        assert_as_near_to_float32(monkeypatch, runs, model, copy.deepcopy(model).float(), batch_size=6)
    else:
        expected = decode_without(monkeypatch, model, batch_size=6)
        assert largest_difference(decode(model, batch_size=6), expected) < 1e-5


def test_prompts_and_larger_batches_are_none_of_their_business(runs):
    decode(make_model(), batch_size=few_tokens.MAX_TOKENS + 1)
    assert not runs


def test_a_few_tokens_of_one_row_share_experts(monkeypatch, runs):
    model = make_model()
    new = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        cache, other = GrowingCache(NUM_LAYERS), GrowingCache(NUM_LAYERS)
        for some in (cache, other):
            model(PROMPT, past_key_values=some, use_cache=True)
        found = model(new, past_key_values=cache, use_cache=True).logits
        assert runs == ["feed_forward"] * NUM_LAYERS
        monkeypatch.setattr(few_tokens, "feed_forward", lambda *args: None)
        assert largest_difference(found, model(new, past_key_values=other, use_cache=True).logits) < 1e-5


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
    alone = decode(model)
    padded = decode(model, batch_size=3, num_padded=4)
    assert largest_difference(padded[:1, :1], alone[:, :1]) > 1e-3  # its prompt is longer
    assert largest_difference(padded[2:, :1], decode_without(monkeypatch, model, batch_size=3)[2:, :1]) < 1e-5


def test_a_first_token_without_a_prompt(monkeypatch):
    model = make_model()
    with torch.no_grad():
        found = model(PROMPT[:, :1], use_cache=True).logits
        for name in ("attend", "feed_forward"):
            monkeypatch.setattr(few_tokens, name, lambda *args: None)
        assert largest_difference(found, model(PROMPT[:, :1], use_cache=True).logits) < 1e-5


def make_linear(layer: torch.nn.Linear) -> torch.nn.Linear:
    return torch.nn.Linear(layer.in_features, layer.out_features, bias=False)


LATER_CHANGES = {
    "a hook": (lambda layer: layer.self_attn.o_proj.register_forward_hook(lambda *args: 2 * args[2]), "attend"),
    "a hook before": (
        lambda layer: layer.mlp.register_forward_pre_hook(lambda *args: (2 * args[1][0],)),
        "feed_forward",
    ),
    "another function": (lambda layer: setattr(layer.mlp.gate, "forward", layer.mlp.gate.forward), "feed_forward"),
    "another activation": (lambda layer: setattr(layer.mlp.experts, "act_fn", torch.nn.GELU()), "feed_forward"),
    "another layer": (lambda layer: setattr(layer.self_attn, "k_proj", make_linear(layer.self_attn.k_proj)), "attend"),
    "a bias": (
        lambda layer: setattr(
            layer.self_attn.v_proj, "bias", torch.nn.Parameter(torch.ones(layer.self_attn.v_proj.out_features))
        ),
        "attend",
    ),
}


@pytest.mark.parametrize("change", LATER_CHANGES)
def test_what_is_changed_later_is_noticed(monkeypatch, runs, change):
    model = make_model(**MHA)
    decode(model)
    runs.clear()
    function, half = LATER_CHANGES[change]
    function(model.model.layers[1])
    assert largest_difference(decode(model), decode_without(monkeypatch, model)) < 1e-5
    assert runs.count(half) == (NUM_LAYERS - 1) * 3


def test_other_implementations_that_are_chosen_later(runs):
    model = make_model(**MHA)
    decode(model)
    runs.clear()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    decode(model)
    assert runs == ["feed_forward"] * 3  # the first layer, which has no experts


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
        assert copied.model.layers[1].self_attn._few_tokens is None
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

    monkeypatch.setattr(few_tokens.kernels(), half, lambda *block_rows: fail)
    with caplog.at_level("WARNING"):
        assert largest_difference(decode(model), expected) < 1e-5
    assert runs == [{"attention_kernel": "feed_forward", "feed_forward_kernel": "attend"}[half]] * (NUM_LAYERS * 3)
    assert len(caplog.records) == NUM_LAYERS and "no such processor" in caplog.text
