import pytest
import torch
import torch.nn.functional as F
from small_models import language_config, make_inputs, seeded, vl_config
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.models.modeling_deepseek import DeepseekV2Experts, DeepseekV2ForCausalLM, DeepseekV2MoE

KERNELS = ("eager", "grouped_mm", "batched_mm")


def make_moe(kernel: str, dtype: torch.dtype = torch.float32, **changes) -> DeepseekV2MoE:
    config = language_config(**changes)
    config._experts_implementation = kernel
    with torch.random.fork_rng():
        torch.manual_seed(0)
        moe = DeepseekV2MoE(config)
        for parameter in moe.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return moe.to(dtype).eval()


def tokens(count: int = 20) -> torch.Tensor:
    return torch.randn(2, count, 48, generator=torch.Generator().manual_seed(0))


def plain_mixture(moe: DeepseekV2MoE, hidden: torch.Tensor) -> torch.Tensor:
    """The mixture for one token after the other, one expert after the other."""
    _, weights, indices, _ = moe.gate(hidden)
    output = torch.zeros_like(hidden)
    for row in range(hidden.shape[0]):
        for token in range(hidden.shape[1]):
            x = hidden[row, token]
            for weight, expert in zip(weights[row, token], indices[row, token].tolist(), strict=True):
                gate = moe.experts.gate_up_proj[expert, :56] @ x
                up = moe.experts.gate_up_proj[expert, 56:] @ x
                output[row, token] += weight * (moe.experts.down_proj[expert] @ (F.silu(gate) * up))
            shared = moe.shared_experts
            if shared is not None:
                output[row, token] += shared.down_proj.weight @ (
                    F.silu(shared.gate_proj.weight @ x) * (shared.up_proj.weight @ x)
                )
    return output


@pytest.mark.parametrize("num_shared", [None, 2])
@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_kernels_equal_a_plain_loop(kernel, num_shared):
    moe = make_moe(kernel, n_shared_experts=num_shared)
    assert (moe.shared_experts is None) == (num_shared is None)
    torch.testing.assert_close(moe(tokens()), plain_mixture(moe, tokens()), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_kernels_in_bfloat16(kernel):
    output = make_moe(kernel, torch.bfloat16)(tokens().bfloat16())
    assert output.dtype == torch.bfloat16
    expected = make_moe("eager", torch.bfloat16).float()(tokens().bfloat16().float())
    assert (output.float() - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("kernel", ["eager", "grouped_mm"])
@torch.no_grad()
def test_one_token(kernel):
    moe = make_moe(kernel)
    torch.testing.assert_close(moe(tokens(1)), plain_mixture(moe, tokens(1)), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", ["eager", "grouped_mm"])
def test_gradients_reach_only_the_chosen_experts(kernel):
    moe = make_moe(kernel)
    hidden = tokens(1)
    chosen = set(moe.gate(hidden)[2].flatten().tolist())
    moe(hidden).sum().backward()
    for parameter in (moe.experts.gate_up_proj, moe.experts.down_proj):
        touched = {expert for expert in range(12) if parameter.grad[expert].any()}
        assert touched == chosen


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_that_is_asked_for_runs(monkeypatch, kernel):
    runs = []
    for name in KERNELS[1:]:
        original = ALL_EXPERTS_FUNCTIONS[name]
        spy = lambda *args, name=name, original=original: runs.append(name) or original(*args)  # noqa: E731
        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, name, spy)
    make_moe(kernel)(tokens())
    assert runs == [kernel] * (kernel != "eager")


@pytest.mark.parametrize("build", ["vl", "language"])
@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_choice_at_loading_reaches_every_layer(tmp_path, build, kernel):
    if build == "vl":
        model, inputs = seeded(DeepseekVLV2ForCausalLM, vl_config()), make_inputs([(1, 1)])
    else:
        model, inputs = seeded(DeepseekV2ForCausalLM, language_config()), {"input_ids": torch.tensor([[2, 30, 31]])}
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, experts_implementation=kernel)
    changed = type(model).from_pretrained(tmp_path)
    changed.set_experts_implementation(kernel)
    for other in (loaded, changed):
        layers = [module for module in other.modules() if isinstance(module, DeepseekV2Experts)]
        assert [layer.config._experts_implementation for layer in layers] == [kernel, kernel]
        torch.testing.assert_close(other(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_unknown_kernel(tmp_path):
    seeded(DeepseekVLV2ForCausalLM, vl_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="nonsense"):
        DeepseekVLV2ForCausalLM.from_pretrained(tmp_path, experts_implementation="nonsense")
