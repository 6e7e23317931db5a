"""The bias of noaux_tc routers: moved by the load, by hand-computed steps (arXiv:2408.15664, algorithm 1)."""

import pytest
import torch
from training_models import NOAUX, build_config

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.train.router_bias import RouterBiasUpdate

SPEED = 0.25


@pytest.fixture
def model(processor):
    torch.manual_seed(0)
    return DeepseekVLV2ForCausalLM(build_config(processor, **NOAUX, num_hidden_layers=3)).train()


def routers(model):
    return [model.language.model.layers[index].mlp.gate for index in (1, 2)]


def chosen_experts(model, inputs):
    """What each router chooses for real tokens, recorded by the test itself."""
    found = []
    hooks = [
        router.register_forward_hook(lambda module, args, out: found.append(out[2][inputs["attention_mask"].bool()]))
        for router in routers(model)
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return found


def test_experts_below_the_mean_rise_and_those_above_it_fall(model):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 200, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    update = RouterBiasUpdate(model, SPEED)
    chosen = chosen_experts(model, inputs)
    update.on_optimizer_step(None, None, None)
    for router, experts in zip(routers(model), chosen, strict=True):
        load = [int((experts == expert).sum()) for expert in range(12)]
        assert sum(load) == 13 * 3  # 9 + 4 tokens that are no padding, 3 experts each
        mean = sum(load) / 12
        expected = [SPEED * ((count < mean) - (count > mean)) for count in load]
        assert router.e_score_correction_bias.tolist() == expected
        assert len(set(expected)) > 1


def test_loads_are_forgotten_after_a_step_and_not_counted_when_measuring(model):
    update = RouterBiasUpdate(model, SPEED)
    inputs = {"input_ids": torch.arange(10, 20)[None], "attention_mask": torch.ones(1, 10, dtype=torch.long)}
    chosen_experts(model, inputs)
    update.on_optimizer_step(None, None, None)
    before = [router.e_score_correction_bias.clone() for router in routers(model)]
    chosen_experts(model.eval(), inputs)
    update.on_optimizer_step(None, None, None)
    for router, bias in zip(routers(model), before, strict=True):
        assert torch.equal(router.e_score_correction_bias, bias)


def test_small_steps_do_not_vanish_in_bfloat16(model):
    model.to(torch.bfloat16)
    for router in routers(model):
        router.e_score_correction_bias.fill_(4.0)
    update = RouterBiasUpdate(model, 0.001)
    chosen_experts(model, {"input_ids": torch.arange(10, 20)[None], "attention_mask": torch.ones(1, 10)})
    update.on_optimizer_step(None, None, None)
    moved = {round(float(value) - 4.0, 4) for router in routers(model) for value in router.e_score_correction_bias}
    assert moved <= {-0.001, 0.0, 0.001}
    assert len(moved) > 1


def test_other_routers_have_nothing_to_move(processor):
    model = DeepseekVLV2ForCausalLM(build_config(processor))
    assert RouterBiasUpdate(model, SPEED).routers == []
