"""Quantised loading and saving through transformers."""

import copy
import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import make_inputs, seeded, vl_config
from test_quantized_layers import PROJECTOR, WIDTHS, values_of

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, WeightOnlyConfig
from deepseek_vl2.models.memory import checkpoint_bytes
from deepseek_vl2.models.quantization import kernels, packing
from deepseek_vl2.models.quantization.config import METHOD
from deepseek_vl2.models.quantization.layers import QuantizedExperts, QuantizedLinear, int4_weights

CONFIGS = [WeightOnlyConfig(8), WeightOnlyConfig(4, 32)]


@pytest.fixture(scope="module")
def original():
    return seeded(DeepseekVLV2ForCausalLM, vl_config(WIDTHS, projector_config=PROJECTOR)).bfloat16()


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory):
    """A sharded checkpoint in bfloat16."""
    path = tmp_path_factory.mktemp("original")
    original.save_pretrained(path, max_shard_size="300KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda config: config.name)
def loaded(request, folder):
    model, info = DeepseekVLV2ForCausalLM.from_pretrained(
        folder, quantization_config=request.param, output_loading_info=True
    )
    assert not any(info.values()), info
    return model


@pytest.fixture(scope="module")
def saved(loaded, tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized")
    loaded.save_pretrained(path, max_shard_size="200KB")
    return path


def bits(model) -> int:
    return model.config.quantization_config.bits


@torch.no_grad()
def test_quantised_weights_are_near_and_the_others_equal(original, loaded):
    floats = original.state_dict()
    for name, module in loaded.named_modules():
        if isinstance(module, QuantizedLinear):
            pairs = [(values_of(module, "weight"), floats[f"{name}.weight"])]
        elif isinstance(module, QuantizedExperts):
            pairs = [
                (values_of(module, weight, expert), floats[f"{name}.{weight}"][expert])
                for weight in ("gate_up_proj", "down_proj")
                for expert in range(12)
            ]
        else:
            continue
        for back, value in pairs:
            cosine = torch.cosine_similarity(back.flatten(), value.float().flatten(), dim=0)
            assert cosine > (0.9999 if bits(loaded) == 8 else 0.99), name
    exact = dict(loaded.named_parameters())
    assert len(exact) > 40
    for name, parameter in exact.items():
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, floats[name]), name


@torch.no_grad()
def test_logits_are_those_of_the_quantised_values(original, saved, loaded):
    """In float32, where no rounding may send a token to another expert."""
    quantized = DeepseekVLV2ForCausalLM.from_pretrained(saved, dtype=torch.float32)
    floats = copy.deepcopy(original).float()
    for name, module in loaded.named_modules():
        if isinstance(module, QuantizedLinear):
            floats.get_submodule(name).weight.copy_(values_of(module, "weight"))
        elif isinstance(module, QuantizedExperts):
            for weight in ("gate_up_proj", "down_proj"):
                for expert, values in enumerate(getattr(floats.get_submodule(name), weight)):
                    values.copy_(values_of(module, weight, expert))
    inputs = make_inputs([(2, 1)])
    expected, logits = (model(**inputs).logits for model in (floats, quantized))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


# In a model as small as this, int4 sends tokens to other experts.
@pytest.mark.parametrize("loaded", CONFIGS[:1], indirect=True, ids=lambda config: config.name)
@torch.no_grad()
def test_logits_are_near_those_of_the_original(original, loaded):
    inputs = make_inputs([(2, 1)])
    inputs["images"] = inputs["images"].bfloat16()
    expected, logits = (model(**inputs).logits.float().flatten() for model in (original, loaded))
    assert torch.cosine_similarity(expected, logits, dim=0) > 0.995


@torch.no_grad()
def test_saved_and_loaded_has_the_same_keys_bits_and_answers(loaded, saved):
    again, info = DeepseekVLV2ForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(info.values()), info
    assert again.config.quantization_config.to_dict() == loaded.config.quantization_config.to_dict()
    before, after = loaded.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    inputs = make_inputs([(1, 1)])
    inputs["images"] = inputs["images"].bfloat16()
    assert torch.equal(loaded(**inputs).logits, again(**inputs).logits)
    assert json.loads((saved / "config.json").read_text())["quantization_config"]["quant_method"] == METHOD


def test_loading_in_float32_leaves_the_quantised_weights(saved, loaded):
    again = DeepseekVLV2ForCausalLM.from_pretrained(saved, dtype=torch.float32)
    assert again.dtype == torch.float32
    layer, before = again.projector.layers[0], loaded.projector.layers[0]
    assert torch.equal(layer.weight, before.weight) and layer.weight_scales.dtype == torch.bfloat16
    with torch.no_grad():
        assert again(**make_inputs([(1, 1)])).logits.isfinite().all()


@pytest.mark.parametrize("part", ["language", "language.model"])
def test_a_part_is_not_saved_alone(loaded, part, tmp_path):
    with pytest.raises(ValueError, match=rf"'{part}' is a part of a quantised model .* Save the whole model"):
        loaded.get_submodule(part).save_pretrained(tmp_path / "part")
    assert not (tmp_path / "part").exists()


def test_the_file_holds_the_layout_of_checkpoints_on_every_machine(folder, saved, loaded, tmp_path, monkeypatch):
    """As if the kernel of this machine read the other number of outputs side by side."""
    if bits(loaded) == 8:
        assert not any(weight.dtype == torch.uint8 for weight in loaded.state_dict().values())
        return
    here = kernels.machine_block_rows()
    other = {64: 32, 32: 64}[here]
    monkeypatch.setattr(kernels, "machine_block_rows", lambda: other)
    elsewhere = DeepseekVLV2ForCausalLM.from_pretrained(saved)
    for name, weight in int4_weights(elsewhere).items():
        assert torch.equal(weight, packing.with_block_rows(loaded.get_buffer(name), here, other)), name
    elsewhere.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    expected = {key: tensor for file in saved.glob("*.safetensors") for key, tensor in load_file(file).items()}
    assert written.keys() == expected.keys() and all(torch.equal(written[key], expected[key]) for key in expected)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_weights_in_flight_are_those_of_one_parameter(folder, config, monkeypatch):
    """While a weight is quantised, none that was quantised before it is still there in bfloat16."""
    seen: list[weakref.ref] = []
    alive: list[int] = []
    original = packing.quantize_into

    def spy(values, *args):
        alive.append(sum(1 for reference in seen if reference() is not None))
        seen.append(weakref.ref(values))
        original(values, *args)

    monkeypatch.setattr(packing, "quantize_into", spy)
    DeepseekVLV2ForCausalLM.from_pretrained(folder, quantization_config=config)
    assert len(seen) > 60
    assert max(alive) <= 2 * 12  # the experts of the layer that is read, which are views of the file


def test_estimated_bytes_are_those_of_the_loaded_model(folder, loaded, saved, original):
    held = sum(tensor.nbytes for tensor in loaded.state_dict().values())
    name = f"int{bits(loaded)}"
    if bits(loaded) == 8:
        assert checkpoint_bytes(folder, name) == held
    assert checkpoint_bytes(saved) == held
    assert checkpoint_bytes(folder) == sum(tensor.nbytes for tensor in original.state_dict().values())


UNQUANTIZED = ("language.model.embed_tokens.weight", "language.model.norm.weight", "vision.blocks.0.attn.qkv.bias")


def damaged_copy(source, target, change) -> None:
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    change(target)


def _cut(folder):
    shard = max(folder.glob("model-*"))
    shard.write_bytes(shard.read_bytes()[:-100])


def _lose(name):
    def change(folder):
        for shard in folder.glob("model-*"):
            tensors = load_file(shard)
            if tensors.pop(name, None) is not None:
                save_file(tensors, shard, metadata={"format": "pt"})

    return change


def _lose_a_shard(folder):
    max(folder.glob("model-*")).unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_cut, "half written"),
        (_lose_a_shard, "half written|No such file"),
        *((_lose(name), f"half written.*{name}") for name in ("language.lm_head.weight_scales", *UNQUANTIZED)),
    ],
)
def test_half_written_checkpoints_are_refused(saved, tmp_path, change, message):
    damaged_copy(saved, tmp_path, change)
    with pytest.raises(ValueError, match=message):
        DeepseekVLV2ForCausalLM.from_pretrained(tmp_path)


def test_a_model_that_is_quantised_in_place_loads_again(saved, loaded, tmp_path):
    """Its one file replaces the shards that were there, of which transformers leaves the index."""
    damaged_copy(saved, tmp_path, lambda folder: None)
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() and (tmp_path / "model.safetensors").exists()
    again = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in loaded.state_dict().items())


def test_weights_under_other_names_are_quantised_and_loaded_too(original, loaded, tmp_path):
    """Of a variant, in files of which what they hold would be looked for under the usual names."""
    original.save_pretrained(tmp_path / "plain", variant="other")
    config = loaded.config.quantization_config
    again = DeepseekVLV2ForCausalLM.from_pretrained(
        tmp_path / "plain", variant="other", dtype=torch.bfloat16, quantization_config=config
    )
    again.save_pretrained(tmp_path / "quantised", variant="other")
    both = [again, DeepseekVLV2ForCausalLM.from_pretrained(tmp_path / "quantised", variant="other")]
    for model in both:
        found = model.state_dict()
        assert all(torch.equal(value, found[name]) for name, value in loaded.state_dict().items())


def test_files_of_an_earlier_checkpoint_are_named(saved, tmp_path):
    """Where shards were saved beside one file, that one is read."""
    damaged_copy(saved, tmp_path, lambda folder: None)
    save_file({"old": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"half written.* in model\.safetensors, .*into an empty folder"):
        DeepseekVLV2ForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_of_another_layout_or_size_is_refused(saved, tmp_path):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["layout_version"] = 99
        (folder / "config.json").write_text(json.dumps(config))

    damaged_copy(saved, tmp_path, change)
    with pytest.raises(ValueError, match="layout 99"):
        DeepseekVLV2ForCausalLM.from_pretrained(tmp_path)


def test_widened_scales_are_saved_as_they_were(saved, loaded, tmp_path):
    DeepseekVLV2ForCausalLM.from_pretrained(saved).to(torch.float32).save_pretrained(tmp_path)
    again = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == again[name].dtype and torch.equal(tensor, again[name]), name


@pytest.mark.skipif(torch.accelerator.is_available(), reason="with a GPU, auto is the GPU")
@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential"])
def test_without_a_gpu_an_automatic_map_is_the_cpu(folder, saved, loaded, device_map):
    again = DeepseekVLV2ForCausalLM.from_pretrained(saved, device_map=device_map)
    assert {parameter.device.type for parameter in again.parameters()} == {"cpu"}
    config = WeightOnlyConfig(bits(loaded))
    fresh = DeepseekVLV2ForCausalLM.from_pretrained(folder, device_map=device_map, quantization_config=config)
    assert not hasattr(fresh, "_hf_hook")  # nothing is moved between devices


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": {"": "cuda:0"}}, "work on the CPU only, not on cuda:0"),
        ({"dtype": torch.float16}, "do not work in float16"),
    ],
)
def test_devices_and_types_that_cannot_be(folder, options, message):
    with pytest.raises(ValueError, match=message):
        DeepseekVLV2ForCausalLM.from_pretrained(folder, quantization_config=WeightOnlyConfig(8), **options)


def test_a_name_in_place_of_a_configuration_is_refused_with_what_to_give(folder):
    with pytest.raises(ValueError, match=r"'int8' is no configuration: give one, such as WeightOnlyConfig\(bits=8\)"):
        DeepseekVLV2ForCausalLM.from_pretrained(folder, quantization_config="int8")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_a_missing_expert_is_refused(folder, tmp_path, config):
    def change(target):
        for shard in target.glob("model-*"):
            tensors = load_file(shard)
            if tensors.pop("language.model.layers.1.mlp.experts.11.up_proj.weight", None) is not None:
                save_file(tensors, shard, metadata={"format": "pt"})

    damaged_copy(folder, tmp_path, change)
    with pytest.raises(RuntimeError):
        DeepseekVLV2ForCausalLM.from_pretrained(tmp_path, quantization_config=config)
