"""Plans of tensor and expert parallelism, and sizes that cannot be shared out."""

import pytest
import torch
from small_models import VARIANTS, language_config, vl_config

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.models.parallel import check_shares

# Every process has them whole: what they do is the same in all, and small.
REPLICATED = ("norm", "gate.weight", "e_score_correction_bias", "q_a_proj", "kv_a_proj_with_mqa")


def heads(count):
    return {"num_attention_heads": count, "num_key_value_heads": count}


@pytest.mark.parametrize("changes", [*VARIANTS.values(), {"q_lora_rank": 24}, {"n_shared_experts": None}])
def test_the_plan_names_every_weight_of_the_language_model_and_nothing_else(changes):
    with torch.device("meta"):
        model = DeepseekVLV2ForCausalLM(vl_config(changes))
    names = [name.replace(f".layers.{index}.", ".layers.*.") for name, _ in model.named_parameters() for index in "012"]
    names = {name for name in names if not any(f".layers.{index}." in name for index in "012")}
    modules = {name.removesuffix(".weight") for name in names}
    planned = {name for name in model.tp_plan if not name.endswith((".experts", "kv_a_proj_with_mqa"))}
    assert planned <= modules
    left = {name for name in names if name.removesuffix(".weight") not in planned}
    assert all(not name.startswith("language.") or any(part in name for part in REPLICATED) for name in left)
    assert model.tp_plan["language.model.embed_tokens"] == "embedding_rowwise"
    assert model.tp_plan["language.lm_head"] == "colwise_gather_output"
    experts = "language.model.layers.*.mlp.experts"
    assert set(model.ep_plan) == {experts, f"{experts}.gate_up_proj", f"{experts}.down_proj"}


def test_dense_models_have_no_plan_for_experts():
    config = language_config(n_routed_experts=None, num_experts_per_tok=None)
    assert config.base_model_ep_plan == {}
    assert not any("experts" in name for name in config.base_model_tp_plan)


def test_plans_are_no_part_of_a_saved_configuration():
    assert not any("plan" in name for name in language_config().to_dict())


@pytest.mark.parametrize(
    ("changes", "tp_size", "ep_size", "complaint"),
    [
        ({}, 4, 1, r"num_attention_heads is 6, which 4 processes cannot share evenly; .* sizes of this model: 1, 2\.$"),
        ({"use_mla": False, "num_key_value_heads": 2}, 3, 1, r"num_key_value_heads is 2"),
        ({}, 3, 1, r"moe_intermediate_size \(width of an expert\) is 56"),
        ({"n_routed_experts": 10}, 3, 3, r"n_routed_experts is 10, which 3 .*: 1, 2\.$"),
        ({**heads(10), "intermediate_size": 90, "moe_intermediate_size": 35}, 3, 1, r": 1, 5\.$"),
        ({**heads(8), "intermediate_size": 30}, 3, 1, r": 1, 2\.$"),
    ],
)
def test_what_cannot_be_shared_out_is_named(changes, tp_size, ep_size, complaint):
    with pytest.raises(ValueError, match=complaint):
        check_shares(language_config(**changes), tp_size, ep_size)


def test_what_can_be_shared_out_passes():
    check_shares(language_config(), 2, 1)
    check_shares(language_config(), 3, 3)
