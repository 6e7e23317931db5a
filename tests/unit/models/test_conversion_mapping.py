"""Checkpoints hold experts one by one, the models hold them fused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import LANGUAGE, VARIANTS, language_config, make_inputs, seeded, vl_config
from torch.nn import Linear
from transformers import AutoModelForCausalLM
from transformers import DeepseekV2Config as TransformersConfig
from transformers import DeepseekV2ForCausalLM as TransformersModel

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.models.modeling_deepseek import DeepseekV2ForCausalLM

PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys")
PROMPT = torch.tensor([[2, 30, 31, 77, 100]])


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def published_form(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a model under the keys of the published checkpoints."""
    tensors = {}
    for key, value in model.state_dict().items():
        if key.endswith(".experts.gate_up_proj"):
            for expert, both in enumerate(value):
                gate, up = both.chunk(2)
                prefix = key.removesuffix("gate_up_proj")
                tensors[f"{prefix}{expert}.gate_proj.weight"] = gate.contiguous()
                tensors[f"{prefix}{expert}.up_proj.weight"] = up.contiguous()
        elif key.endswith(".experts.down_proj"):
            for expert, down in enumerate(value):
                tensors[f"{key.removesuffix('down_proj')}{expert}.down_proj.weight"] = down.contiguous()
        else:
            tensors[key] = value.contiguous()
    return tensors


def write(folder: Path, model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(cls, folder: Path, **kwargs):
    """The model, after a look at what transformers says about loading it."""
    model, info = cls.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert {name: list(info[name]) for name in PROBLEMS} == {name: [] for name in PROBLEMS}
    assert not info.get("error_msgs")
    return model.eval()


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        assert torch.equal(actual[key], value), key


@pytest.fixture(params=["vl", "language"])
def cls(request):
    return {"vl": DeepseekVLV2ForCausalLM, "language": DeepseekV2ForCausalLM}[request.param]


@pytest.fixture(params=VARIANTS)
def model(request, cls):
    config = vl_config if cls is DeepseekVLV2ForCausalLM else lambda changes: language_config(**changes)
    return seeded(cls, config(VARIANTS[request.param]))


def logits(model: torch.nn.Module) -> torch.Tensor:
    inputs = make_inputs([(1, 1)]) if isinstance(model, DeepseekVLV2ForCausalLM) else {"input_ids": PROMPT}
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_and_save_keep_keys_and_bits(tmp_path, model, dtype):
    model.to(dtype)
    tensors = published_form(model)
    prefix = "language." if isinstance(model, DeepseekVLV2ForCausalLM) else ""
    assert f"{prefix}model.layers.2.mlp.experts.11.up_proj.weight" in tensors
    loaded = load(type(model), write(tmp_path / "published", model, tensors))
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "saved")
    assert_same(checkpoint(tmp_path / "saved"), tensors)


def test_in_pieces(tmp_path, model):
    tensors = published_form(model)
    model.save_pretrained(tmp_path / "saved", max_shard_size="150KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 5
    assert_same(checkpoint(tmp_path / "saved"), tensors)
    loaded = load(type(model), tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again", max_shard_size="250KB")
    assert_same(checkpoint(tmp_path / "again"), tensors)


def test_experts_keep_their_order(tmp_path, cls):
    model = seeded(cls, vl_config() if cls is DeepseekVLV2ForCausalLM else language_config())
    tensors = published_form(model)
    for key, value in tensors.items():
        if ".experts." in key:
            expert, projection, _ = key.split(".experts.")[1].split(".")
            value.fill_(int(expert) + {"gate_proj": 0.25, "up_proj": 0.5, "down_proj": 0.75}[projection])
    loaded = load(cls, write(tmp_path, model, tensors))
    layers = [module for module in loaded.modules() if type(module).__name__ == "DeepseekV2Experts"]
    assert len(layers) == 2
    for layer in layers:
        assert layer.gate_up_proj[:, 0, 0].tolist() == [expert + 0.25 for expert in range(12)]
        assert layer.gate_up_proj[:, 55, 3].tolist() == [expert + 0.25 for expert in range(12)]
        assert layer.gate_up_proj[:, 56, 0].tolist() == [expert + 0.5 for expert in range(12)]
        assert layer.down_proj[:, 0, 0].tolist() == [expert + 0.75 for expert in range(12)]


def test_without_the_attention_pool(tmp_path):
    model = seeded(DeepseekVLV2ForCausalLM, vl_config())
    tensors = published_form(model)
    pool = {key for key in tensors if key.startswith("vision.attn_pool.")}
    assert len(pool) == 13
    kept = {key: value for key, value in tensors.items() if key not in pool}
    loaded = load(DeepseekVLV2ForCausalLM, write(tmp_path / "without", model, kept))
    assert torch.equal(logits(loaded), logits(model))
    assert all(parameter.isfinite().all() for parameter in loaded.vision.attn_pool.parameters())
    # Started afresh, not what happened to lie in memory.
    width = loaded.vision.embed_dim
    assert 0.5 < loaded.vision.attn_pool.latent.std() * width**0.5 < 1.5
    assert all(
        0.1 < layer.weight.std() < 0.4 for layer in loaded.vision.attn_pool.modules() if isinstance(layer, Linear)
    )


def test_model_that_has_no_attention_pool(tmp_path):
    config = vl_config()
    config.vision_config.global_pool = ""
    model = seeded(DeepseekVLV2ForCausalLM, config)
    model.save_pretrained(tmp_path)
    assert not any("attn_pool" in key for key in checkpoint(tmp_path))
    assert torch.equal(logits(load(DeepseekVLV2ForCausalLM, tmp_path)), logits(model))


@pytest.mark.parametrize("which", ["7.up_proj", "11.down_proj", "0.gate_proj", "7."])
def test_a_missing_expert_is_never_silent(tmp_path, caplog, cls, which):
    model = seeded(cls, vl_config() if cls is DeepseekVLV2ForCausalLM else language_config())
    tensors = published_form(model)
    kept = {key: value for key, value in tensors.items() if f"layers.2.mlp.experts.{which}" not in key}
    assert len(kept) == len(tensors) - (3 if which == "7." else 1)
    with pytest.raises(RuntimeError):
        cls.from_pretrained(write(tmp_path, model, kept))
    assert "model.layers.2.mlp.experts" in caplog.text


def test_a_missing_layer_of_experts_is_told(tmp_path):
    model = seeded(DeepseekV2ForCausalLM, language_config())
    kept = {key: value for key, value in published_form(model).items() if "layers.2.mlp.experts." not in key}
    _, info = DeepseekV2ForCausalLM.from_pretrained(write(tmp_path, model, kept), output_loading_info=True)
    assert sorted(info["missing_keys"]) == [f"model.layers.2.mlp.experts.{name}_proj" for name in ("down", "gate_up")]


@pytest.mark.parametrize(
    "key", ["image_newline", "view_seperator", "language.lm_head.weight", "projector.layers.2.bias"]
)
def test_other_missing_tensors_are_told(tmp_path, key):
    model = seeded(DeepseekVLV2ForCausalLM, vl_config())
    tensors = published_form(model)
    del tensors[key]
    _, info = DeepseekVLV2ForCausalLM.from_pretrained(write(tmp_path, model, tensors), output_loading_info=True)
    assert list(info["missing_keys"]) == [key]


def test_the_language_part_of_the_whole_model(tmp_path):
    whole = seeded(DeepseekVLV2ForCausalLM, vl_config(VARIANTS["base"]))
    whole.language.save_pretrained(tmp_path)
    expected = {
        key.removeprefix("language."): value
        for key, value in published_form(whole).items()
        if key.startswith("language.")
    }
    assert_same(checkpoint(tmp_path), expected)
    assert "model.layers.1.mlp.experts.11.gate_proj.weight" in expected
    alone = load(DeepseekV2ForCausalLM, tmp_path)
    with torch.no_grad():
        assert torch.equal(alone(PROMPT).logits, whole.language(PROMPT).logits)
    assert alone.config.to_diff_dict().items() >= {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}.items()


def transformers_model(seed: int = 0) -> TransformersModel:
    config = TransformersConfig(**{**LANGUAGE, "topk_method": "greedy", "n_group": 1})
    return seeded(TransformersModel, config, seed=seed)


def test_transformers_own_model_goes_on_as_before(tmp_path):
    model = transformers_model()
    model.save_pretrained(tmp_path)
    assert_same(checkpoint(tmp_path), published_form(model))
    for cls in (TransformersModel, AutoModelForCausalLM):
        loaded = load(cls, tmp_path)
        assert type(loaded) is TransformersModel
        assert torch.equal(logits(loaded), logits(model))


def test_transformers_own_model_loads_into_ours(tmp_path):
    theirs = transformers_model()
    theirs.save_pretrained(tmp_path)
    ours = load(DeepseekV2ForCausalLM, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=1e-4)


def test_transformers_saves_the_same_without_this_package(tmp_path):
    transformers_model().save_pretrained(tmp_path / "with")
    script = (
        "import sys; from transformers import DeepseekV2ForCausalLM as M; "
        "assert 'deepseek_vl2' not in sys.modules; M.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "with", tmp_path / "without"], check=True)
    assert_same(checkpoint(tmp_path / "without"), checkpoint(tmp_path / "with"))
