import json

import pytest
from small_models import language_config, vl_config
from transformers import AutoConfig

from deepseek_vl2.models import DeepseekV2Config, DeepseekVLV2Config, DeepseekVLV2ForCausalLM
from deepseek_vl2.models.configuration_deepseek_vl_v2 import MlpProjectorConfig, VisionEncoderConfig

# What the reference's own class fills in where a checkpoint's config.json says nothing.
LANGUAGE_DEFAULTS = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "n_shared_experts": None,
    "n_routed_experts": None,
    "ep_size": 1,
    "routed_scaling_factor": 1.0,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": None,
    "topk_group": None,
    "num_experts_per_tok": None,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 0,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "rope_theta": 10000,
    "attention_bias": False,
    "use_mla": True,
}


@pytest.mark.parametrize(("name", "value"), LANGUAGE_DEFAULTS.items())
def test_defaults_of_the_language_model(name, value):
    assert getattr(DeepseekV2Config(), name) == value


def test_published_spelling_of_rope_reaches_the_model():
    assert DeepseekV2Config(rope_theta=50000).rope_parameters == {"rope_theta": 50000, "rope_type": "default"}
    scaled = DeepseekV2Config(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512})
    assert scaled.rope_parameters["rope_type"] == "yarn"
    assert scaled.rope_parameters["factor"] == 4.0
    assert scaled.rope_parameters["rope_theta"] == 10000


def test_layers_that_are_mixtures_of_experts():
    config = language_config(num_hidden_layers=7, first_k_dense_replace=2, moe_layer_freq=3)
    assert [config.is_moe_layer(i) for i in range(7)] == [False, False, False, True, False, False, True]
    dense = language_config(n_routed_experts=None, first_k_dense_replace=0)
    assert not any(dense.is_moe_layer(i) for i in range(3))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"topk_method": "best"}, ["topk_method", "'best'", "greedy", "group_limited_greedy", "noaux_tc"]),
        ({"scoring_func": "tanh"}, ["scoring_func", "'tanh'", "softmax", "sigmoid"]),
        ({"kv_lora_rank": None}, ["kv_lora_rank", "None", "use_mla"]),
        ({"use_mla": False, "num_attention_heads": 7}, ["hidden_size 48", "num_attention_heads 7"]),
        ({"num_experts_per_tok": None}, ["num_experts_per_tok", "None", "1 to 12"]),
        ({"num_experts_per_tok": 13}, ["num_experts_per_tok", "13", "1 to 12"]),
        ({"topk_method": "noaux_tc"}, ["n_group", "None", "12"]),
        ({"topk_method": "noaux_tc", "n_group": 5}, ["n_group", "5", "12"]),
        ({"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 4}, ["topk_group", "4", "1 to n_group 3"]),
        ({"topk_method": "noaux_tc", "n_group": 4, "topk_group": 1, "num_experts_per_tok": 4}, ["4", "3"]),
        ({"use_mla": False, "num_attention_heads": 16, "num_key_value_heads": 16}, ["3 numbers a head"]),
        ({"qk_rope_head_dim": 7}, ["7 numbers a head"]),
        ({"head_dim": 64}, ["head_dim is 64", "8"]),
        ({"num_attention_heads": 6, "num_key_value_heads": 4, "use_mla": False}, ["num_key_value_heads 4", "6"]),
    ],
)
def test_bad_language_values(changes, words):
    with pytest.raises(ValueError) as error:
        language_config(**changes)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: vl_config(tile_tag="1D"), ["tile_tag", "'1D'", "'2D'"]),
        (lambda: vl_config(global_view_pos="middle"), ["global_view_pos", "'middle'", "head", "tail"]),
        (
            lambda: MlpProjectorConfig(projector_type="conv"),
            ["projector_type", "'conv'", "identity", "linear", "mlp_gelu", "downsample_mlp_gelu"],
        ),
        (lambda: vl_config(projector_config={"projector_type": "conv"}), ["'conv'", "downsample_mlp_gelu"]),
        (lambda: MlpProjectorConfig(token_pooling=True), ["token_pooling"]),
        (lambda: VisionEncoderConfig(class_token=True), ["class_token=True", "class_token=False"]),
    ],
)
def test_bad_values_of_the_other_parts(build, words):
    with pytest.raises(ValueError) as error:
        build()
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("projector", "words"),
    [
        ({"input_dim": 56, "n_embed": 48}, ["input_dim 56", "width 64"]),
        ({"input_dim": 64, "n_embed": 40}, ["n_embed 40", "hidden_size 48"]),
        ({"input_dim": 64, "n_embed": 48, "projector_type": "identity"}, ["identity", "64", "48"]),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_the_model(projector, words):
    config = vl_config(projector_config=projector)
    with pytest.raises(ValueError) as error:
        DeepseekVLV2ForCausalLM(config)
    for word in words:
        assert word in str(error.value)


def test_round_trip_through_json():
    config = vl_config({"topk_method": "noaux_tc", "n_group": 3, "topk_group": 2, "aux_loss_alpha": 0.25})
    again = DeepseekVLV2Config.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert again.language_config.aux_loss_alpha == 0.25
    assert isinstance(again.vision_config, VisionEncoderConfig)
    assert isinstance(again.projector_config, MlpProjectorConfig)
    assert isinstance(again.language_config, DeepseekV2Config)


@pytest.mark.parametrize("scaling", [None, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}])
def test_round_trip_through_a_folder(tmp_path, scaling):
    config = vl_config({"rope_scaling": scaling, "rope_theta": 5000.0})
    config.save_pretrained(tmp_path)
    for again in (DeepseekVLV2Config.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(again) is DeepseekVLV2Config
        assert again.language_config.rope_parameters == config.language_config.rope_parameters
        assert again.to_diff_dict() == config.to_diff_dict()


def test_parts_may_be_given_as_configs():
    config = DeepseekVLV2Config(vision_config=VisionEncoderConfig(width=64), language_config=language_config())
    assert config.vision_config.width == 64
    assert config.get_text_config() is config.language_config
    assert DeepseekVLV2Config().language_config.hidden_size == 4096
