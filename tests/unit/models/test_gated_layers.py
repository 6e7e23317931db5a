"""Feed-forward layers of one token in one call, beside the same layers called one by one."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from deepseek_vl2.models import few_row_products, gated_layers
from deepseek_vl2.models.gated_layers import run_one_token
from deepseek_vl2.models.quantization import packing
from deepseek_vl2.models.quantization.config import WeightFormat
from deepseek_vl2.models.streamed_weights import StreamedWeight, weight_of

WIDTH, HIDDEN, SHARED_WIDTH = 128, 192, 256
KINDS = [torch.float32, torch.bfloat16, WeightFormat(8), WeightFormat(4, 32), WeightFormat(4, 64)]


class Layers(nn.Module):
    """Gated layers, or experts, with random weights of some kind; `values` are theirs in float32."""

    def __init__(self, kind, width: int, num_experts: int | None = None, seed: int = 0, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.values, self.weights = [], []
        self.act_fn = nn.SiLU()
        generator = torch.Generator().manual_seed(seed)
        leading = () if num_experts is None else (num_experts,)
        for shape in ((2 * width, hidden), (hidden, width)):
            values = torch.randn(*leading, *shape, generator=generator) / shape[1] ** 0.5
            if isinstance(kind, torch.dtype):
                weight, scales = values.to(kind), None
                values = weight.float()
            else:
                weight, scales = packing.empty_weight(*shape, kind, leading)
                for number in range(num_experts or 1):
                    of_one = (
                        (values, weight, scales)
                        if num_experts is None
                        else (values[number], weight[number], scales[number])
                    )
                    packing.quantize_into(*of_one, kind)
                    of_one[0].copy_(packing.dequantize(*of_one[1:], kind, shape[0]))
            self.values.append(values)
            self.weights.append(StreamedWeight(weight, scales, num_outputs=shape[0]))

    def gated_layers(self):
        return gated_layers.gated_layers(self, *self.weights)

    def expected(self, row: torch.Tensor, number: int | None = None) -> torch.Tensor:
        gate_up, down = self.values if number is None else (values[number] for values in self.values)
        gate, up = (gate_up @ row.float()).chunk(2)
        return down @ (torch.nn.functional.silu(gate) * up)


def random_row(hidden: int = HIDDEN) -> torch.Tensor:
    return torch.randn(1, 1, hidden, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.inference_mode()
def test_experts_and_shared_ones_together_equal_their_sum(kind, dtype, num_threads):
    experts, shared = Layers(kind, WIDTH, num_experts=5), Layers(kind, SHARED_WIDTH, seed=2)
    row = random_row().to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        found = run_one_token(row, [experts, shared], [(3, 0, 4), (0,)], (0.5, 0.25, -2.0, 1.0))
    finally:
        torch.set_num_threads(before)
    if dtype == torch.float32 and kind in KINDS[3:]:
        assert found is None  # these kernels round to 16 bits
        return
    parts = [factor * experts.expected(row.flatten(), number) for number, factor in ((3, 0.5), (0, 0.25), (4, -2.0))]
    expected = sum(parts) + shared.expected(row.flatten())
    assert found.shape == row.shape and found.dtype == dtype
    error = (found.float() - expected).abs().max() / expected.abs().max()
    assert error < (2e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
@torch.inference_mode()
def test_widths_need_be_no_multiples_of_anything(kind):
    layer = Layers(kind, 37, hidden=53)
    row = random_row(53)
    found = run_one_token(row, [layer], [(0,)], (1.0,))
    torch.testing.assert_close(found.flatten(), layer.expected(row.flatten()), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_int4_outputs_are_cut_to_what_they_are():
    layer = Layers(WeightFormat(4, 32), WIDTH, hidden=160)
    row = random_row(160).bfloat16()
    found = run_one_token(row, [layer], [(0,)], (1.0,))
    expected = layer.expected(row.flatten())
    assert found.shape == row.shape
    assert (found.float().flatten() - expected).abs().max() < 2**-8 * expected.abs().max()


@torch.inference_mode()
def test_rows_that_are_not_finite_give_none_that_is():
    layer = Layers(WeightFormat(4, 64), WIDTH)
    for number in (float("nan"), float("inf")):
        row = random_row().bfloat16()
        row[0, 0, 5] = number
        assert not run_one_token(row, [layer], [(0,)], (1.0,)).isfinite().any()


def test_when_the_layers_are_to_be_called_themselves():
    layer, row = Layers(torch.float32, WIDTH), random_row()

    def run(row=row, layers=(layer,)):
        return run_one_token(row, layers, [(0,)] * len(layers), [1.0] * len(layers))

    assert run() is not None
    assert run(row.expand(1, 2, -1)) is None
    assert run(row.to("meta")) is None
    assert run(row.clone().requires_grad_()) is None
    assert run(layers=[layer, Layers(torch.bfloat16, WIDTH)]) is None
    assert run(layers=[layer, nn.Linear(HIDDEN, HIDDEN)]) is None
    assert run(row.bfloat16(), [Layers(WeightFormat(4, 32), 96)]) is None  # widths are filled up to 128
    hook = layer.register_forward_hook(lambda *args: None)
    assert run() is None
    hook.remove()
    layer.forward = lambda hidden: hidden
    assert run() is None


def test_the_activation_that_the_kernels_compute():
    assert gated_layers.is_silu(ACT2FN["silu"]) and gated_layers.is_silu(nn.SiLU())
    assert not gated_layers.is_silu(ACT2FN["gelu"])


def test_an_adapter_around_a_layer_is_not_passed_by():
    class Wrapper(nn.Module):
        def __init__(self, layer) -> None:
            super().__init__()
            self.layer = layer

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("layer"), name)

    layer = few_row_products.StreamedLinear(4, 4, bias=False)
    wrapped = Wrapper(layer)
    assert wrapped.streamed_weight().values is layer.weight
    assert weight_of(layer).values is layer.weight
    assert weight_of(wrapped) is None
    assert weight_of(few_row_products.StreamedLinear(4, 4)) is None  # a bias
