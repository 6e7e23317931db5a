"""The router against its definition, written out for one token at a time."""

import math

import pytest
import torch
from small_models import ROUTERS, language_config

from deepseek_vl2.models.balancing_loss import load_balancing_loss
from deepseek_vl2.models.modeling_deepseek import DeepseekV2ForCausalLM, DeepseekV2MoE, DeepseekV2TopkRouter

BATCH, TOKENS, EXPERTS, CHOSEN = 2, 40, 12, 3


def make_router(**changes) -> DeepseekV2TopkRouter:
    router = DeepseekV2TopkRouter(language_config(**changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        router.weight.normal_(std=0.3, generator=generator)
    if hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias.uniform_(-0.3, 0.3, generator=generator)
    return router.eval()


def tokens(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(BATCH, TOKENS, 48, generator=torch.Generator().manual_seed(0)).to(dtype)


def route_one_token(router: DeepseekV2TopkRouter, hidden: torch.Tensor) -> dict[int, float]:
    """Experts of one token and their weights."""
    config = router.config
    logits = (router.weight.double() @ hidden.double()).tolist()
    if config.scoring_func == "softmax":
        total = sum(math.exp(x) for x in logits)
        scores = [math.exp(x) / total for x in logits]
    else:
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    merit = list(scores)
    candidates = list(range(EXPERTS))
    if config.topk_method != "greedy":
        size = EXPERTS // config.n_group
        groups = [candidates[i * size : (i + 1) * size] for i in range(config.n_group)]
        if config.topk_method == "noaux_tc":
            merit = [s + b for s, b in zip(scores, router.e_score_correction_bias.tolist(), strict=True)]
            groups.sort(key=lambda group: -sum(sorted(merit[i] for i in group)[-2:]))
        else:
            groups.sort(key=lambda group: -max(merit[i] for i in group))
        candidates = [i for group in groups[: config.topk_group] for i in group]
    chosen = sorted(candidates, key=lambda i: -merit[i])[:CHOSEN]
    weights = {i: scores[i] for i in chosen}
    if config.norm_topk_prob:
        weights = {i: weight / sum(weights.values()) for i, weight in weights.items()}
    return {i: weight * config.routed_scaling_factor for i, weight in weights.items()}


@pytest.mark.parametrize("scaling", [1.0, 2.5])
@pytest.mark.parametrize("is_normalised", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("method", ROUTERS)
def test_choice_and_weights(method, scoring, is_normalised, scaling):
    changes = {"scoring_func": scoring, "norm_topk_prob": is_normalised, "routed_scaling_factor": scaling}
    router = make_router(**{**ROUTERS[method], **changes})
    logits, weights, indices, loss = router(tokens())
    assert logits.shape == (BATCH, TOKENS, EXPERTS)
    assert weights.shape == indices.shape == (BATCH, TOKENS, CHOSEN)
    assert loss == 0
    for row in range(BATCH):
        for token in range(TOKENS):
            expected = route_one_token(router, tokens()[row, token])
            actual = dict(zip(indices[row, token].tolist(), weights[row, token].tolist(), strict=True))
            assert actual.keys() == expected.keys()
            assert actual == pytest.approx(expected, abs=1e-5)


def test_one_expert_keeps_its_weight():
    _, weights, _, _ = make_router(num_experts_per_tok=1, norm_topk_prob=True)(tokens())
    assert weights.max() < 1


def test_the_three_methods_differ():
    sets = {}
    for method, changes in ROUTERS.items():
        router = make_router(**{**changes, "scoring_func": "softmax"})
        sets[method] = [set(row) for row in router(tokens())[2].flatten(0, 1).tolist()]
    assert sets["greedy"] != sets["group_limited_greedy"] != sets["noaux_tc"] != sets["greedy"]


def test_bias_moves_the_choice_and_not_the_weights():
    router = make_router(**ROUTERS["noaux_tc"])
    router.e_score_correction_bias.zero_()
    router.e_score_correction_bias[5] = 10.0
    logits, weights, indices, _ = router(tokens())
    assert (indices == 5).any(dim=-1).all()
    scores = logits.sigmoid().gather(-1, indices)
    torch.testing.assert_close(weights, scores / scores.sum(-1, keepdim=True) * 2.0)


@pytest.mark.parametrize("method", ROUTERS)
def test_float32_under_bfloat16_and_autocast(method):
    router = make_router(**ROUTERS[method]).to(torch.bfloat16)
    expected = make_router(**ROUTERS[method])
    with torch.no_grad():
        expected.weight.copy_(router.weight)
    if method == "noaux_tc":
        expected.e_score_correction_bias.copy_(router.e_score_correction_bias)
    half = tokens(torch.bfloat16)
    for context in (torch.autocast("cpu", enabled=False), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            logits, weights, indices, _ = router(half)
        assert logits.dtype == weights.dtype == torch.float32
        assert torch.equal(logits, expected(half.float())[0])
        assert torch.equal(weights, expected(half.float())[1])
        assert torch.equal(indices, expected(half.float())[2])


def test_float32_weights_under_autocast():
    router = make_router()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = router(tokens())[0]
    assert torch.equal(logits, router(tokens())[0])


# Two sequences of two tokens, four experts, two chosen.
SCORES = torch.tensor([[[0.4, 0.3, 0.2, 0.1], [0.5, 0.1, 0.3, 0.1]], [[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]]])
CHOICES = torch.tensor([[[0, 1], [0, 2]], [[3, 2], [0, 3]]])


def test_balancing_loss_by_hand():
    # Sequence 1: mean scores .45 .20 .25 .10, chosen 2 1 1 0 of 4 times, so load 2 1 1 0: .90 + .20 + .25 = 1.35
    # Sequence 2: mean scores .175 .225 .275 .325, load 1 0 1 2: .175 + .275 + .65 = 1.10
    assert load_balancing_loss(SCORES, CHOICES, is_per_sequence=True).item() == pytest.approx((1.35 + 1.10) / 2)
    # Together: mean scores .3125 .2125 .2625 .2125, chosen 3 1 2 2 of 8 times, so load 1.5 .5 1 1
    expected = 0.3125 * 1.5 + 0.2125 * 0.5 + 0.2625 + 0.2125
    assert load_balancing_loss(SCORES, CHOICES, is_per_sequence=False).item() == pytest.approx(expected)


def test_padding_does_not_count_in_the_balancing_loss():
    is_token = torch.tensor([[True, True], [True, False]])
    # Sequence 2 has one token, scores .1 .2 .3 .4, chosen 0 0 1 1 of 2 times, so load 0 0 2 2: .60 + .80 = 1.40
    loss = load_balancing_loss(SCORES, CHOICES, True, is_token)
    assert loss.item() == pytest.approx((1.35 + 1.40) / 2)
    # Together: mean scores 1/3 .2 .8/3 .2, chosen 2 1 2 1 of 6 times, so load 4/3 2/3 4/3 2/3
    expected = 1 / 3 * 4 / 3 + 0.2 * 2 / 3 + 0.8 / 3 * 4 / 3 + 0.2 * 2 / 3
    assert load_balancing_loss(SCORES, CHOICES, False, is_token).item() == pytest.approx(expected)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_padded_batch_is_balanced_like_its_rows_alone(is_checkpointed):
    torch.manual_seed(0)
    model = DeepseekV2ForCausalLM(language_config(aux_loss_alpha=1.0, seq_aux=True)).train()
    if is_checkpointed:
        model.activation_checkpointing_enable()
    ids = torch.randint(10, 150, (2, 11), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0

    def router_gradient(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """That of the balancing loss alone."""
        model.zero_grad()
        (0 * model(ids, attention_mask=mask).logits).sum().backward()
        return model.model.layers[1].mlp.gate.weight.grad.clone()

    alone = [router_gradient(ids[row : row + 1, :end], mask[row : row + 1, :end]) for row, end in ((0, 11), (1, 4))]
    assert alone[1].norm() > 1e-3
    torch.testing.assert_close(router_gradient(ids, mask), (alone[0] + alone[1]) / 2)


def test_balancing_loss_of_even_load_is_one():
    scores = torch.full((1, 4, 4), 0.25)
    choices = torch.tensor([[[0, 1], [2, 3], [1, 0], [3, 2]]])
    assert load_balancing_loss(scores, choices, True).item() == pytest.approx(1.0)


@pytest.mark.parametrize("is_per_sequence", [True, False])
def test_balancing_loss_in_training(is_per_sequence):
    router = make_router(aux_loss_alpha=0.25, seq_aux=is_per_sequence).train()
    logits, _, indices, loss = router(tokens())
    expected = 0.25 * load_balancing_loss(logits.softmax(-1), indices, is_per_sequence)
    assert loss.item() == pytest.approx(expected.item())
    assert loss.requires_grad


@pytest.mark.parametrize("changes", [ROUTERS["noaux_tc"], {"aux_loss_alpha": 0.0}])
def test_no_balancing_loss(changes):
    loss = make_router(**{"aux_loss_alpha": 0.25, **changes}).train()(tokens())[3]
    assert loss == 0
    assert not loss.requires_grad


def gate_gradient(method: str, alpha: float) -> tuple[float, torch.Tensor]:
    """Loss of a mixture of experts, and the gradient of its router."""
    torch.manual_seed(0)
    moe = DeepseekV2MoE(language_config(**ROUTERS[method], aux_loss_alpha=alpha)).train()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    loss = moe(tokens()).square().mean()
    loss.backward()
    return loss.item(), moe.gate.weight.grad


def test_balancing_loss_acts_on_gradients_and_not_on_the_loss():
    plain_loss, plain = gate_gradient("greedy", 0.0)
    loss, gradient = gate_gradient("greedy", 0.5)
    assert loss == plain_loss
    torch.manual_seed(0)
    moe = DeepseekV2MoE(language_config(aux_loss_alpha=0.5)).train()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    moe.gate(tokens())[3].backward()
    torch.testing.assert_close(gradient - plain, moe.gate.weight.grad)
    assert moe.gate.weight.grad.norm() > 1e-3


def test_noaux_tc_trains_without_a_balancing_loss():
    with_alpha, without = gate_gradient("noaux_tc", 0.5), gate_gradient("noaux_tc", 0.0)
    assert with_alpha[0] == without[0]
    assert torch.equal(with_alpha[1], without[1])
    assert without[1].norm() > 0
