"""Quantised layers beside the layers that they replace."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import language_config, make_inputs, seeded, vl_config

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, WeightOnlyConfig, few_row_products
from deepseek_vl2.models.modeling_deepseek import DeepseekV2Experts, DeepseekV2TopkRouter
from deepseek_vl2.models.quantization import kernels, packing
from deepseek_vl2.models.quantization.layers import QuantizedExperts, QuantizedLinear, replace_layers

CONFIGS = [WeightOnlyConfig(8), WeightOnlyConfig(4, 32)]
# Multiples of 32, so that 4 bits are not replaced by 8.
WIDTHS = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "moe_intermediate_size": 64,
    "kv_lora_rank": 32,
    "v_head_dim": 32,
}


def fill(module: QuantizedLinear | QuantizedExperts, name: str, values: torch.Tensor) -> None:
    """Quantises float weights into a layer, as it would lie in memory."""
    weight, scales = getattr(module, name), getattr(module, f"{name}_scales")
    pairs = zip(values, weight, scales, strict=True) if values.dim() == 3 else [(values, weight, scales)]
    for matrix, target, target_scales in pairs:
        packing.quantize_into(matrix.detach(), target, target_scales, module.format_of(name))
    if module.format_of(name).bits == 4:
        weight.copy_(packing.with_block_rows(weight, packing.BLOCK_ROWS, kernels.machine_block_rows()))


def values_of(module: QuantizedLinear | QuantizedExperts, name: str, expert: int | None = None) -> torch.Tensor:
    """The float32 weights that a layer stands for."""
    weight, scales = getattr(module, name), getattr(module, f"{name}_scales")
    if expert is not None:
        weight, scales = weight[expert], scales[expert]
    num_rows = module.shape_of(name)[-2]
    return packing.dequantize(weight, scales, module.format_of(name), num_rows, block_rows=kernels.machine_block_rows())


@pytest.fixture(params=CONFIGS, ids=lambda config: config.name)
def config(request):
    return request.param


def make_experts(config: WeightOnlyConfig) -> QuantizedExperts:
    original = DeepseekV2Experts(language_config(**WIDTHS))
    for parameter in original.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    experts = QuantizedExperts(original, config).eval()
    for name in ("gate_up_proj", "down_proj"):
        fill(experts, name, getattr(original, name))
    return experts


def routed(num_tokens: int, num_experts: int = 12, top_k: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, 96, generator=generator)
    chosen = torch.stack([torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(num_tokens)])
    return hidden, chosen, torch.rand(num_tokens, top_k, generator=generator)


def plain_loop(experts: QuantizedExperts, hidden, chosen, weights) -> torch.Tensor:
    output = torch.zeros(hidden.shape[0], 96)
    for token in range(hidden.shape[0]):
        for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
            gate, up = (values_of(experts, "gate_up_proj", expert) @ hidden[token].float()).chunk(2)
            output[token] += weight * (values_of(experts, "down_proj", expert) @ (F.silu(gate) * up))
    return output


@pytest.mark.parametrize("num_tokens", [1, 7, 90])
@torch.no_grad()
def test_experts_equal_a_plain_loop(config, num_tokens):
    experts = make_experts(config)
    assert {experts.format_of(name).bits for name in experts.shapes} == {config.bits}
    hidden, chosen, weights = routed(num_tokens)
    expected = plain_loop(experts, hidden, chosen, weights)
    torch.testing.assert_close(experts(hidden, chosen, weights), expected, atol=2e-4, rtol=1e-4)
    output = experts(hidden.bfloat16(), chosen, weights)
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).abs().max() <= 0.03 * expected.abs().max()


@pytest.mark.parametrize("is_compiled", [True, False])
@torch.no_grad()
def test_each_chosen_expert_is_read_once_and_no_other(config, monkeypatch, is_compiled):
    experts = make_experts(config)
    counts: dict[int, list] = {0: [], 1: []}  # products one by one, and of all experts together
    original, original_of_all = kernels.linear, few_row_products.multiply

    def spy(rows, weight, *args):
        counts[0].append(rows.shape[0])
        return original(rows, weight, *args)

    def spy_on_all(rows, weight, matrices, rows_of_each):
        counts[1].append(dict(zip(matrices, rows_of_each, strict=True)))
        return original_of_all(rows, weight, matrices, rows_of_each)

    monkeypatch.setattr(kernels, "linear", spy)
    few_row_products.is_supported(torch.float32, experts.gate_up_proj.dtype)  # it multiplies, too
    monkeypatch.setattr(few_row_products, "multiply", spy_on_all)
    if not is_compiled:
        monkeypatch.setattr(few_row_products, "is_supported", lambda *kinds: False)
    hidden, _, weights = routed(4)
    chosen = torch.tensor([[5, 0, 2], [5, 1, 0], [2, 5, 0], [0, 5, 1]])
    experts(hidden, chosen, weights)
    if is_compiled:
        assert counts == {0: [], 1: [{0: 4, 1: 2, 2: 2, 5: 4}] * 2}
    else:
        assert counts == {0: [4, 2, 2, 4] * 2, 1: []}


@pytest.mark.parametrize("has_bias", [False, True])
@torch.no_grad()
def test_linear_equals_the_linear_of_its_values(config, has_bias):
    linear = torch.nn.Linear(96, 40, bias=has_bias)
    quantized = QuantizedLinear(linear, config.choose_format("linear", 96))
    fill(quantized, "weight", linear.weight)
    inputs = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(0))
    expected = F.linear(inputs, values_of(quantized, "weight"), linear.bias)
    torch.testing.assert_close(quantized(inputs), expected, atol=1e-5, rtol=1e-4)
    cosine = torch.cosine_similarity(quantized(inputs).flatten(), linear(inputs).flatten(), dim=0)
    assert cosine > (0.9999 if config.bits == 8 else 0.99)


def test_gradients_are_refused_in_training_only(config):
    linear = torch.nn.Linear(96, 40)
    quantized = QuantizedLinear(linear, config.choose_format("linear", 96))
    fill(quantized, "weight", linear.weight)
    inputs = torch.randn(2, 96, requires_grad=True)
    quantized.eval()(inputs)
    with pytest.raises(RuntimeError, match="cannot be trained"):
        quantized.train()(inputs)


def test_what_is_replaced_and_what_stays(config):
    model = seeded(DeepseekVLV2ForCausalLM, vl_config({**WIDTHS, "use_mla": True}, projector_config=PROJECTOR))
    before = copy.deepcopy(model)
    replace_layers(model, config)
    stayed = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name.rpartition(".")[2] for name in stayed if ".attn_pool." not in name} == {"kv_b_proj"}
    quantized = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert {
        "language.lm_head",
        "projector.layers.0",
        "vision.blocks.0.attn.qkv",
        "vision.blocks.1.mlp.fc2",
        "language.model.layers.0.mlp.down_proj",
        "language.model.layers.1.mlp.shared_experts.up_proj",
        "language.model.layers.2.self_attn.q_proj",
    } <= quantized
    assert sum(isinstance(module, QuantizedExperts) for module in model.modules()) == 2
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before.get_parameter(name)), name
    routers = [module for module in model.modules() if isinstance(module, DeepseekV2TopkRouter)]
    assert len(routers) == 2 and all(router.weight.dtype == torch.float32 for router in routers)
    assert {"language.model.embed_tokens.weight", "image_newline", "view_seperator", "vision.pos_embed"} <= {
        name for name, _ in model.named_parameters()
    }


PROJECTOR = {"input_dim": 64, "n_embed": 96}


def test_an_output_layer_tied_to_the_embeddings_stays_exact(config):
    language = {**WIDTHS, "tie_word_embeddings": True}
    model = seeded(DeepseekVLV2ForCausalLM, vl_config(language, projector_config=PROJECTOR))
    replace_layers(model, config)
    assert model.language.lm_head.weight is model.language.model.embed_tokens.weight


@torch.no_grad()
def test_absorbed_and_expanded_attention_agree(config):
    """`kv_b_proj` is read as a matrix by the one and run as a layer by the other."""
    model = seeded(DeepseekVLV2ForCausalLM, vl_config(WIDTHS, projector_config=PROJECTOR))
    original = copy.deepcopy(model)
    replace_layers(model, config)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            fill(module, "weight", original.get_submodule(name).weight)
        elif isinstance(module, QuantizedExperts):
            for weight in ("gate_up_proj", "down_proj"):
                fill(module, weight, getattr(original.get_submodule(name), weight))
    inputs = make_inputs([(1, 1)])
    whole = model(**inputs).logits[0, -1]
    embeds = model.prepare_inputs_embeds(**inputs)
    first = model(inputs_embeds=embeds[:, :-1], use_cache=True)
    last = model(inputs_embeds=embeds[:, -1:], past_key_values=first.past_key_values).logits[0, -1]
    torch.testing.assert_close(last, whole, atol=2e-4, rtol=1e-3)
