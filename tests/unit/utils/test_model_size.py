"""Counts of weights and bytes, against the published figures and models that are really built."""

import pytest
import torch
from small_models import VARIANTS, vl_config

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.models.memory import is_quantized
from deepseek_vl2.models.weight_headers import read_header
from deepseek_vl2.utils.model_size import (
    PARTS,
    PUBLISHED_SIZES,
    active_weights_by_part,
    cache_bytes_per_token,
    checkpoint_shapes,
    parameters_by_part,
    part_of,
    published_config,
    weight_bytes,
)


@pytest.mark.parametrize(("size", "billions"), [("tiny", "3.3705"), ("small", "16.148"), ("base", "27.48")])
def test_published_numbers_of_parameters(size, billions):
    count = sum(parameters_by_part(published_config(size)).values())
    digits = len(billions.partition(".")[2])
    assert f"{count / 1e9:.{digits}f}" == billions


def test_an_unknown_size_is_named():
    with pytest.raises(ValueError, match="unknown size 'large': take one of tiny, small, base"):
        published_config("large")


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_are_those_of_a_saved_checkpoint(variant, tmp_path):
    config = vl_config(VARIANTS[variant])
    DeepseekVLV2ForCausalLM(config).save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    assert checkpoint_shapes(config) == saved


def test_a_tied_output_layer_is_counted_once_and_read_all_the_same(tmp_path):
    config, untied = vl_config(VARIANTS["tiny"]), vl_config(VARIANTS["tiny"])
    config.language_config.tie_word_embeddings = True
    DeepseekVLV2ForCausalLM(config).save_pretrained(tmp_path)
    assert checkpoint_shapes(config) == {
        name: tuple(tensor["shape"]) for name, tensor in read_header(tmp_path / "model.safetensors").items()
    }
    assert parameters_by_part(config)["lm_head"] == 0 < active_weights_by_part(config)["lm_head"]
    assert active_weights_by_part(config) == active_weights_by_part(untied)


def test_every_key_has_a_part_and_the_rest_are_norms():
    shapes = checkpoint_shapes(vl_config(VARIANTS["base"]))
    parts = {name: part_of(name) for name in shapes}
    assert set(parts.values()) == set(PARTS)
    assert all("norm" in name for name, part in parts.items() if part == "norms")
    assert parts["language.model.layers.1.mlp.experts.11.gate_proj.weight"] == "experts"
    assert parts["language.model.layers.1.mlp.gate.e_score_correction_bias"] == "router"
    assert parts["language.model.layers.0.mlp.gate_proj.weight"] == "dense_mlp"
    assert parts["view_seperator"] == "projector"


def test_active_weights_of_tiny_are_the_ones_a_token_meets():
    active = active_weights_by_part(published_config("tiny"))
    router = active.pop("router")
    assert sum(active.values()) == 573_194_240
    assert router == 11 * 64 * 1280
    assert active["experts"] == 11 * 6 * 3 * 1280 * 896


def test_linear_layers_are_quantized_and_the_rest_is_not():
    shapes = checkpoint_shapes(published_config("tiny"))
    exact = {part_of(name) for name, shape in shapes.items() if not is_quantized(name, shape)}
    assert exact == {"vision", "projector", "embeddings", "router", "norms"}
    assert is_quantized("language.lm_head.weight", shapes["language.lm_head.weight"])
    assert is_quantized("vision.blocks.3.attn.qkv.weight", shapes["vision.blocks.3.attn.qkv.weight"])
    assert not is_quantized("vision.patch_embed.proj.weight", shapes["vision.patch_embed.proj.weight"])


@pytest.mark.parametrize("size", PUBLISHED_SIZES)
def test_bytes_fall_with_the_bits(size):
    config = published_config(size)
    float32, bfloat16, int8, int4 = (weight_bytes(config, kind) for kind in ("float32", "bfloat16", "int8", "int4"))
    assert float32 == 2 * bfloat16
    assert 0.5 < int8 / bfloat16 < 0.56
    assert 0.28 < int4 / bfloat16 < 0.34


def test_bytes_of_tiny_in_bfloat16():
    assert weight_bytes(published_config("tiny"), "bfloat16") == pytest.approx(6.741e9, rel=1e-4)


def test_cache_of_a_token():
    small = published_config("small")
    assert cache_bytes_per_token(small) == 27 * 1152
    assert cache_bytes_per_token(published_config("tiny")) == 12 * 2 * 1280 * 2


@pytest.mark.parametrize("variant", ["tiny", "small"])
def test_cache_of_a_token_is_what_the_model_keeps(variant):
    config = vl_config(VARIANTS[variant])
    model = DeepseekVLV2ForCausalLM(config).eval()
    with torch.no_grad():
        cache = model.language(torch.arange(5, 12)[None], use_cache=True).past_key_values
    num_bytes = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert num_bytes == 7 * cache_bytes_per_token(config, bytes_per_number=4)
