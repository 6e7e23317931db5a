"""A packed model is the same model: answers, keys, bits."""

import copy
import logging
import pickle
import sys
from pathlib import Path

import pytest
import torch
from small_models import LANGUAGE, VARIANTS, language_config, make_inputs, seeded, vl_config
from torch import nn

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, cpu_packing
from deepseek_vl2.models.cpu_packing import (
    PLAIN_LINEARS,
    PackedExperts,
    PackedLinear,
    is_packing_supported,
    pack_weights,
)
from deepseek_vl2.models.modeling_deepseek import DeepseekV2Experts, DeepseekV2ForCausalLM


@pytest.fixture(autouse=True)
def untested():
    is_packing_supported.cache_clear()
    yield
    is_packing_supported.cache_clear()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    if request.param == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no AVX512, on which oneDNN's products in bfloat16 rest")
    return request.param


def plain_model(dtype: torch.dtype, variant: str = "small") -> DeepseekVLV2ForCausalLM:
    return seeded(DeepseekVLV2ForCausalLM, vl_config(VARIANTS[variant])).to(dtype)


def packed_model(dtype: torch.dtype, variant: str = "small") -> DeepseekVLV2ForCausalLM:
    model = plain_model(dtype, variant)
    assert pack_weights(model) > 0
    return model


def is_same(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_are_those_of_the_plain_model(dtype, variant):
    inputs = make_inputs([(2, 1)])
    exact = plain_model(torch.float32, variant)(**inputs).logits
    packed = packed_model(dtype, variant)(**inputs).logits.float()
    if dtype == torch.float32:
        # Sums come in another order, which differs from processor to processor.
        torch.testing.assert_close(packed, exact, rtol=0, atol=1e-5 * float(exact.abs().max()))
        return
    plain = plain_model(dtype, variant)(**inputs).logits.float()
    # Both round on the way, in different places: neither is farther from the exact numbers than the other by much.
    assert (packed - exact).norm() < 1.2 * (plain - exact).norm()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which pages of a file are in memory")
def test_packed_weights_do_not_stay_in_memory_as_pages_of_their_file(tmp_path):
    plain_model(torch.float32).save_pretrained(tmp_path)
    model = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path)
    linear = model.language.model.layers[0].self_attn.o_proj.weight
    assert all(weight.isfinite().all() for weight in model.parameters())  # reads them
    before = resident_file_bytes(tmp_path / "model.safetensors")
    assert before > linear.nbytes
    bias = model.vision.blocks[0].mlp.fc1.bias.detach().clone()
    pack_weights(model)
    assert resident_file_bytes(tmp_path / "model.safetensors") < before / 2
    assert torch.equal(model.vision.blocks[0].mlp.fc1.bias, bias)


def resident_file_bytes(file) -> int:
    total, is_of_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:  # 7f31f6200000-7f31fe200000 rw-p 00000000 fe:00 1234    /path/model.safetensors
            is_of_file = line.endswith(str(file))
        elif is_of_file and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_every_layer_is_packed_but_those_read_elsewhere(dtype):
    model = plain_model(dtype)
    num_linear = sum(type(layer) in PLAIN_LINEARS for layer in model.modules())
    num_experts = sum(isinstance(layer, DeepseekV2Experts) for layer in model.modules())
    assert num_experts == 2
    assert pack_weights(model) == num_linear - LANGUAGE["num_hidden_layers"] + num_experts
    left = {name.rsplit(".", 1)[1] for name, layer in model.named_modules() if type(layer) in PLAIN_LINEARS}
    assert left == {"kv_b_proj"}
    assert not any(isinstance(layer, DeepseekV2Experts) for layer in model.modules())
    assert pack_weights(model) == 0  # nothing is left to do
    assert all(isinstance(block.mlp.act, nn.Identity) for block in model.vision.blocks)


def test_a_tied_output_layer_stays(dtype):
    model = seeded(DeepseekV2ForCausalLM, language_config(tie_word_embeddings=True)).to(dtype)
    pack_weights(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_keys_and_bits_survive_saving_copying_and_pickling(tmp_path, dtype):
    plain, packed = plain_model(dtype, "base"), packed_model(dtype, "base")
    assert is_same(packed, plain)
    assert is_same(copy.deepcopy(packed), plain)
    assert isinstance(copy.deepcopy(packed).language.lm_head, PackedLinear)
    layer = pickle.loads(pickle.dumps(packed.language.lm_head))
    assert torch.equal(layer.state_dict()["weight"], plain.language.lm_head.weight)
    packed.save_pretrained(tmp_path)
    assert is_same(DeepseekVLV2ForCausalLM.from_pretrained(tmp_path), plain)


@torch.no_grad()
def test_another_type_makes_weights_plain_again(dtype):
    inputs = make_inputs([(1, 1)])
    packed = packed_model(dtype)
    assert packed.to(dtype).language.lm_head.packed  # nothing changes, nothing is unpacked
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    plain, packed = plain_model(dtype).to(other), packed.to(other)
    assert not packed.language.lm_head.packed and is_same(packed, plain)
    torch.testing.assert_close(packed(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("num_tokens", [1, 2, 40])
@torch.no_grad()
def test_experts_equal_the_plain_loop(dtype, num_tokens):
    experts = seeded(DeepseekV2Experts, language_config()).to(dtype)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(num_tokens, 48, generator=generator).to(dtype)
    scores = torch.rand(num_tokens, 12, generator=generator)
    weights, indices = scores.topk(3)
    exact = copy.deepcopy(experts).float()(hidden.float(), indices, weights)
    found = PackedExperts(experts)(hidden, indices, weights)
    assert found.dtype == dtype
    rtol = 0.02 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.float(), exact, atol=rtol * float(exact.abs().max()), rtol=rtol)


@torch.no_grad()
def test_each_hit_expert_is_read_once(monkeypatch, dtype):
    experts = PackedExperts(seeded(DeepseekV2Experts, language_config()).to(dtype))
    calls = []
    original = experts.project
    monkeypatch.setattr(experts, "project", lambda x, name, expert: calls.append(expert) or original(x, name, expert))
    indices = torch.tensor([[3, 7, 11], [3, 0, 7], [7, 3, 11], [3, 7, 0]])
    experts(torch.randn(4, 48).to(dtype), indices, torch.rand(4, 3))
    assert calls == [0, 3, 7, 11] * 2  # once for each of the two projections


def test_gradients_pass_through(dtype):
    layer = nn.Linear(24, 40).to(dtype)
    rows = torch.randn(3, 24).to(dtype).requires_grad_()
    layer(rows).float().square().sum().backward()
    expected, rows.grad = rows.grad, None
    PackedLinear(layer)(rows).float().square().sum().backward()
    torch.testing.assert_close(rows.grad, expected)


def test_a_training_model_is_refused():
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        pack_weights(plain_model(torch.float32).train())


def test_types_that_are_not_supported_are_left_alone(monkeypatch):
    assert pack_weights(plain_model(torch.float64)) == 0
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert pack_weights(plain_model(torch.bfloat16)) == 0


@pytest.mark.parametrize("failure", ["wrong", "raises"])
def test_operators_that_fail_are_announced_and_not_used(monkeypatch, caplog, failure):
    def broken(*args):
        if failure == "raises":
            raise RuntimeError("no such primitive")
        return torch.zeros(3, 48)

    monkeypatch.setattr(cpu_packing, "_packed_linear", broken)
    with caplog.at_level(logging.WARNING):
        assert pack_weights(plain_model(torch.float32)) == 0
        assert pack_weights(plain_model(torch.float32)) == 0
    assert len(caplog.records) == 1
    assert ("no such primitive" if failure == "raises" else "wrong results") in caplog.text
