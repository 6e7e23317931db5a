import pytest
import torch
import torch.nn.functional as F
from small_models import language_config, make_inputs, seeded, vl_config
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, few_row_products
from deepseek_vl2.models.few_row_products import StreamedLinear
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2])
@torch.no_grad()
def test_few_tokens_stream_the_weights(monkeypatch, dtype, num_tokens):
    moe = make_moe("grouped_mm", dtype)
    hidden = tokens(num_tokens).to(dtype)
    expected = make_moe("eager", dtype).float()(hidden.float())
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "grouped_mm", None)  # not to be called
    found = moe(hidden).float()
    assert (found - expected).abs().max() < (1e-5 if dtype == torch.float32 else 0.02) * expected.abs().max()


@torch.no_grad()
def test_many_tokens_and_shares_of_other_processes_do_not(monkeypatch):
    runs = []
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "grouped_mm", lambda experts, hidden, *routing: runs.append(1) or hidden)
    moe = make_moe("grouped_mm")
    moe(tokens(moe.experts.num_experts))
    moe.experts._is_expert_parallel = True
    moe(tokens(1))
    assert len(runs) == 2


@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_layers_stream_their_weight_for_few_rows_without_gradients(monkeypatch, has_bias):
    monkeypatch.setattr(few_row_products, "MIN_LINEAR_BYTES", 40 * 48 * 4)
    layer = StreamedLinear(48, 40, bias=has_bias)
    for shape in ((48,), (1, 48), (2, 2, 48), (9, 48), (0, 48)):
        inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        expected = F.linear(inputs, layer.weight, layer.bias)
        assert layer(inputs).requires_grad
        with torch.no_grad():
            torch.testing.assert_close(layer(inputs), expected, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(F, "linear", None)
    with torch.inference_mode():
        layer(torch.ones(few_row_products.MAX_ROWS, 48))
        with pytest.raises(TypeError):
            layer(torch.ones(few_row_products.MAX_ROWS + 1, 48))
        with pytest.raises(TypeError):
            StreamedLinear(48, 39)(torch.ones(1, 48))  # too small


def test_autocast_chooses_the_type_of_few_rows_too(monkeypatch):
    monkeypatch.setattr(few_row_products, "MIN_LINEAR_BYTES", 0)
    layer = StreamedLinear(48, 40)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(1, 48)).dtype == torch.bfloat16
