"""The three published configurations, see `published_configs/README.md` among the models."""

import pytest
import torch

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.models.modeling_deepseek import (
    DeepseekV2Attention,
    DeepseekV2MLP,
    DeepseekV2MoE,
    DeepseekV2MultiHeadAttention,
)
from deepseek_vl2.utils.model_size import published_config

SIZES = ("tiny", "small", "base")
EFFECTIVE = {
    "hidden_size": (1280, 2048, 2560),
    "num_hidden_layers": (12, 27, 30),
    "num_attention_heads": (10, 16, 32),
    "num_key_value_heads": (10, 16, 32),
    "use_mla": (False, True, True),
    "kv_lora_rank": (None, 512, 512),
    "q_lora_rank": (None, None, None),
    "qk_nope_head_dim": (0, 128, 128),
    "qk_rope_head_dim": (0, 64, 64),
    "v_head_dim": (0, 128, 128),
    "head_dim": (128, 64, 64),  # numbers a head that are rotated
    "intermediate_size": (6848, 10944, 12288),
    "moe_intermediate_size": (896, 1408, 1536),
    "n_routed_experts": (64, 64, 72),
    "n_shared_experts": (2, 2, 2),
    "num_experts_per_tok": (6, 6, 6),
    "first_k_dense_replace": (1, 1, 1),
    "moe_layer_freq": (1, 1, 1),
    "scoring_func": ("softmax", "softmax", "sigmoid"),
    "topk_method": ("greedy", "greedy", "noaux_tc"),
    "norm_topk_prob": (False, False, True),
    "routed_scaling_factor": (1.0, 1.0, 2.0),
    "vocab_size": (129280, 102400, 129280),
    "bos_token_id": (0, 100000, 0),
    "eos_token_id": (1, 100001, 1),
    "max_position_embeddings": (4096, 4096, 4096),
    "rms_norm_eps": (1e-6, 1e-6, 1e-6),
    "rope_theta": (10000, 10000, 10000),
    "attention_bias": (False, False, False),
    "aux_loss_alpha": (0.001, 0.001, 0.001),
}
VISION = {"image_size": 384, "patch_size": 14, "width": 1152, "layers": 27, "heads": 16, "mlp_ratio": 3.7362}
# Everything the checkpoints hold, the vision tower's attention pool included.
NUM_PARAMETERS = {"tiny": 3.3705e9, "small": 16.148e9, "base": 27.48e9}
ATTENTION_POOL = 15_238_352


@pytest.fixture(scope="module", params=SIZES)
def model(request):
    with torch.device("meta"):
        return DeepseekVLV2ForCausalLM(published_config(request.param)), request.param


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", EFFECTIVE)
def test_effective_language_values(name, size):
    assert getattr(published_config(size).language_config, name) == EFFECTIVE[name][SIZES.index(size)]


@pytest.mark.parametrize("size", SIZES)
def test_effective_values_of_the_other_parts(size):
    config = published_config(size)
    assert {name: getattr(config.vision_config, name) for name in VISION} == VISION
    assert config.vision_config.patches_per_side == 27
    assert config.projector_config.tokens_per_side(27) == 14
    assert config.projector_config.input_dim == 1152
    assert config.projector_config.n_embed == config.language_config.hidden_size
    assert config.projector_config.projector_type == "downsample_mlp_gelu"
    assert config.global_view_pos == "head"
    assert len(config.candidate_resolutions) == 23
    assert config.dtype == torch.bfloat16


def test_number_of_parameters(model):
    model, size = model
    count = sum(parameter.numel() for parameter in model.parameters())
    digits = {"tiny": 1e5, "small": 1e6, "base": 1e7}[size]
    assert abs(count - NUM_PARAMETERS[size]) <= digits / 2
    assert sum(p.numel() for p in model.vision.attn_pool.parameters()) == ATTENTION_POOL


def test_layers(model):
    model, size = model
    layers = model.language.model.layers
    assert [type(layer.mlp) for layer in layers] == [DeepseekV2MLP] + [DeepseekV2MoE] * (len(layers) - 1)
    attention = DeepseekV2MultiHeadAttention if size == "tiny" else DeepseekV2Attention
    assert all(type(layer.self_attn) is attention for layer in layers)
    shared = layers[1].mlp.shared_experts.gate_proj.weight.shape
    assert tuple(shared) == (
        2 * model.config.language_config.moe_intermediate_size,
        model.config.projector_config.n_embed,
    )
    assert hasattr(layers[1].mlp.gate, "e_score_correction_bias") == (size == "base")


def test_vision_tower_and_projector(model):
    model, _ = model
    vision = model.vision
    assert tuple(vision.pos_embed.shape) == (1, 27 * 27, 1152)
    assert len(vision.blocks) == 27
    assert tuple(vision.blocks[0].mlp.fc1.weight.shape) == (4304, 1152)
    assert vision.cls_token is None
    assert vision.norm.eps == vision.blocks[0].norm1.eps == 1e-6
    width = model.config.projector_config.n_embed
    assert [tuple(p.shape) for p in model.projector.parameters()] == [(width, 4608), (width,), (width, width), (width,)]
    assert model.tokens_per_side == 14
