import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from small_models import MHA, ROUTERS, VARIANTS, language_config, seeded
from transformers import DynamicCache

from deepseek_vl2.models.modeling_deepseek import (
    DeepseekV2ForCausalLM,
    DeepseekV2Model,
    DeepseekV2RMSNorm,
    positions_from_mask,
)


@pytest.fixture(params=VARIANTS)
def model(request) -> DeepseekV2ForCausalLM:
    return seeded(DeepseekV2ForCausalLM, language_config(**VARIANTS[request.param]))


def ids(length: int = 11, rows: int = 2) -> torch.Tensor:
    return torch.randint(4, 150, (rows, length), generator=torch.Generator().manual_seed(0))


def test_norm_in_float32():
    norm = DeepseekV2RMSNorm(48, eps=1e-5)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(3, 48) * 100
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), expected, atol=1e-6, rtol=1e-5)
    half = norm.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    # 20,000 squared is beyond float16.
    assert norm.half()(torch.full((1, 48), 20000.0, dtype=torch.float16)).isfinite().all()


def test_epsilon_of_the_inner_norms_is_fixed():
    model = DeepseekV2Model(language_config(rms_norm_eps=1e-3, q_lora_rank=80))
    attention = model.layers[0].self_attn
    assert attention.kv_a_layernorm.variance_epsilon == attention.q_a_layernorm.variance_epsilon == 1e-6
    assert model.norm.variance_epsilon == model.layers[0].input_layernorm.variance_epsilon == 1e-3


def test_positions_count_real_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert positions_from_mask(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]


@torch.no_grad()
def test_a_padded_row_gets_the_positions_it_has_alone():
    model = seeded(DeepseekV2ForCausalLM, language_config())
    seen = []
    model.model.rotary_emb.register_forward_pre_hook(lambda _, args: seen.append(args[0].tolist()))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    cache = DynamicCache(config=model.config)
    model(ids(4), attention_mask=mask[:, :4], past_key_values=cache, use_cache=True)
    model(ids(1), attention_mask=mask, past_key_values=cache, use_cache=True)
    model(ids(1), past_key_values=cache, use_cache=True)
    assert seen == [[[0, 0, 0, 1], [0, 1, 2, 3]], [[2], [4]], [[5]]]


@torch.no_grad()
def test_forms_of_the_prompt_agree(model):
    expected = model(ids()).logits
    embeds = model.get_input_embeddings()(ids())
    assert torch.equal(model(inputs_embeds=embeds).logits, expected)
    assert torch.equal(model(ids(), attention_mask=torch.ones_like(ids())).logits, expected)
    assert torch.equal(model(ids(), position_ids=torch.arange(11)[None]).logits, expected)
    hidden = model.model(ids()).last_hidden_state
    assert torch.equal(model.lm_head(hidden), expected)


@torch.no_grad()
def test_logits_to_keep(model):
    every = model(ids()).logits
    torch.testing.assert_close(model(ids(), logits_to_keep=2).logits, every[:, -2:])
    assert model(ids(), logits_to_keep=1).logits.shape == (2, 1, 160)


@torch.no_grad()
def test_loss(model):
    labels = ids().clone()
    labels[0, :5] = -100
    output = model(ids(), labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten(), ignore_index=-100)
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kept", [4, torch.tensor([2, 6, 9])], ids=["last", "positions"])
def test_loss_of_the_positions_that_are_kept(model, kept):
    labels = ids().clone()
    labels[0, 8] = -100
    output = model(ids(), labels=labels, logits_to_keep=kept)
    positions = list(range(11))[-kept:] if isinstance(kept, int) else kept.tolist()
    predicted = [position for position in positions if position < 10]  # after the last one nothing comes
    logits = model(ids()).logits[:, predicted].flatten(0, 1).double()
    targets = labels[:, [position + 1 for position in predicted]].flatten()
    assert output.logits.shape[1] == len(positions)
    assert output.loss.item() == pytest.approx(F.cross_entropy(logits, targets, ignore_index=-100).item(), abs=1e-5)


@torch.no_grad()
def test_further_outputs(model):
    output = model(ids(), output_hidden_states=True, output_router_logits=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 11, 48)] * 4
    assert len(output.router_logits) == 2
    assert output.router_logits[0].numel() == 2 * 11 * 12
    assert model(ids(), return_dict=False)[0].shape == (2, 11, 160)


def test_neither_or_both_forms_of_the_prompt():
    model = DeepseekV2ForCausalLM(language_config())
    for inputs in ({}, {"input_ids": ids(), "inputs_embeds": torch.zeros(2, 11, 48)}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**inputs)


def test_more_tokens_than_positions():
    model = DeepseekV2ForCausalLM(language_config(max_position_embeddings=16)).eval()
    with pytest.raises(ValueError, match=r"17 tokens, the model has 16 positions.*fewer pictures, no tiling"):
        model(ids(17))
    cache = DynamicCache(config=model.config)
    model(ids(12), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="18 tokens"):
        model(ids(6), past_key_values=cache, use_cache=True)
    model(ids(16))


def test_starting_weights():
    model = seeded(DeepseekV2ForCausalLM, language_config(**ROUTERS["noaux_tc"], initializer_range=0.1))
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.1, rel=0.1), name
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.shape == (12,)


def test_keys_are_those_of_the_checkpoints():
    model = DeepseekV2ForCausalLM(language_config(**ROUTERS["noaux_tc"], num_hidden_layers=2))
    layer = "model.layers.1."
    attention = ["q_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]
    shared = [f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")]
    expected = {
        *(f"{layer}self_attn.{name}.weight" for name in attention),
        *(layer + name for name in shared),
        *(f"{layer}{name}.weight" for name in ("input_layernorm", "post_attention_layernorm", "mlp.gate")),
        f"{layer}mlp.gate.e_score_correction_bias",
        f"{layer}mlp.experts.gate_up_proj",  # one by one in checkpoints, see test_conversion_mapping
        f"{layer}mlp.experts.down_proj",
    }
    keys = set(model.state_dict())
    assert {key for key in keys if key.startswith(layer)} == expected
    assert {key for key in keys if ".layers." not in key} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    plain = DeepseekV2Model(language_config(**MHA)).layers[0].self_attn
    assert [name for name, _ in plain.named_children()] == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_tied_embeddings(tmp_path):
    model = seeded(DeepseekV2ForCausalLM, language_config(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = DeepseekV2ForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids()).logits, model(ids()).logits)


def train(model: DeepseekV2ForCausalLM, num_steps: int) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(num_steps):
        loss = model(ids(), labels=ids()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_training(model, is_checkpointed):
    model.train()
    if is_checkpointed:
        model.activation_checkpointing_enable()
    losses = train(model, 20)
    assert losses[-1] < 0.5 * losses[0]


def gradients(model: DeepseekV2ForCausalLM) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids(), labels=ids()).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradient_checkpointing_changes_no_gradient(model):
    model.config.aux_loss_alpha = 0.5
    model.train()
    expected = gradients(model)
    model.activation_checkpointing_enable()
    runs = []
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *_: runs.append(1))
    actual = gradients(model)
    assert len(runs) == 2, "the layer runs again in the backward pass"
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-5, msg=name)
    router = "model.layers.1.mlp.gate.weight"
    assert gradients(model)[router].norm() > 0


def test_balancing_loss_reaches_the_whole_model():
    config = language_config(aux_loss_alpha=0.0)
    model = seeded(DeepseekV2ForCausalLM, config).train()
    plain_loss, plain = model(ids(), labels=ids()).loss, gradients(model)
    config.aux_loss_alpha = 1.0
    assert model(ids(), labels=ids()).loss == plain_loss
    changed = gradients(model)
    for name in ("model.layers.1.mlp.gate.weight", "model.layers.2.mlp.gate.weight", "model.embed_tokens.weight"):
        assert not torch.allclose(changed[name], plain[name]), name
    assert torch.equal(changed["lm_head.weight"], plain["lm_head.weight"])


def test_autocast_trains(model):
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids(), labels=ids()).loss
    loss.backward()
    assert loss.item() == pytest.approx(copy.deepcopy(model)(ids(), labels=ids()).loss.item(), rel=0.05)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_layers_stay_on_one_device():
    model = DeepseekV2ForCausalLM(language_config())
    assert set(model._no_split_modules) == {"DeepseekV2DecoderLayer"}
    assert "past_key_values" in inspect.signature(model.forward).parameters
