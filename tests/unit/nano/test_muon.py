"""Muon: updates of even singular values, for matrices and for stacks of them."""

import copy

import pytest
import torch

from deepseek_vl2.nano.muon import Muon, orthogonalize

SHAPES = [(24, 96), (96, 24), (40, 40), (3, 24, 56), (3, 56, 24)]


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one_and_directions_stay(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    result = orthogonalize(matrices)
    assert result.shape == matrices.shape and result.dtype == matrices.dtype
    values = torch.linalg.svdvals(result)
    # The iteration trades exactness for speed: its authors' figures are about 0.7 to 1.2.
    assert values.max() < 1.3
    # A square matrix has values near 0 that five rounds cannot lift.
    assert (values > 0.6).float().mean() > 0.9
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    polar = left @ right
    likeness = (polar * result).sum() / (polar.norm() * result.norm())
    assert likeness > 0.95


@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_size_of_the_gradient_does_not_matter(scale):
    torch.manual_seed(1)
    matrix = torch.randn(24, 40)
    torch.testing.assert_close(orthogonalize(matrix * scale), orthogonalize(matrix), atol=0.05, rtol=0)


def test_no_gradient_gives_no_update():
    assert torch.equal(orthogonalize(torch.zeros(8, 24)), torch.zeros(8, 24))


@pytest.mark.parametrize("shape", [(4, 24, 56), (4, 56, 24)])
def test_a_stack_is_its_matrices_one_by_one(shape):
    torch.manual_seed(2)
    stack = torch.randn(shape) * torch.tensor([1.0, 1e-3, 50.0, 7.0])[:, None, None]
    alone = torch.stack([orthogonalize(matrix) for matrix in stack])
    torch.testing.assert_close(orthogonalize(stack), alone, atol=0.02, rtol=0)


def test_the_optimiser_moves_a_stack_as_its_matrices():
    torch.manual_seed(3)
    start, gradients = torch.randn(3, 16, 24), torch.randn(2, 3, 16, 24)
    stack = torch.nn.Parameter(start.clone())
    singles = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    for parameters, get in (([stack], lambda step: [gradients[step]]), (singles, lambda step: list(gradients[step]))):
        optimizer = Muon(parameters, lr=0.1, weight_decay=0.1)
        for step in range(2):
            for parameter, gradient in zip(parameters, get(step), strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
    assert (stack - start).abs().mean() > 0.01
    torch.testing.assert_close(stack.data, torch.stack([p.data for p in singles]), atol=1e-3, rtol=0)


def test_updates_have_the_size_of_adamw():
    torch.manual_seed(4)
    for shape in ((24, 96), (64, 64), (3, 96, 24)):
        parameter = torch.nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.randn(shape)
        Muon([parameter], lr=0.01).step()
        assert parameter.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.25)


def test_weight_decay_shrinks_weights_by_lr():
    parameter = torch.nn.Parameter(torch.ones(8, 16))
    parameter.grad = torch.zeros(8, 16)
    Muon([parameter], lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(parameter.data, torch.full((8, 16), 0.95))


def test_steps_reduce_a_quadratic():
    torch.manual_seed(5)
    goal = torch.randn(2, 16, 24)
    parameter = torch.nn.Parameter(torch.zeros(2, 16, 24))
    idle = torch.nn.Parameter(torch.ones(8, 8))  # without a gradient, as the fixed tower
    optimizer = Muon([parameter, idle], lr=0.05)

    def closure():
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = (parameter - goal).square().mean()
            loss.backward()
        return loss.item()

    losses = [optimizer.step(closure) for _ in range(150)]
    assert losses[1] < losses[0]
    assert losses[-1] < 0.1 * losses[0]
    assert torch.equal(idle.data, torch.ones(8, 8))


def test_state_comes_back(tmp_path):
    torch.manual_seed(6)
    start, gradients = torch.randn(16, 24), torch.randn(4, 16, 24)

    def run(optimizer, parameter, steps):
        for step in steps:
            parameter.grad = gradients[step].clone()
            optimizer.step()

    whole = torch.nn.Parameter(start.clone())
    run(Muon([whole], lr=0.02), whole, range(4))

    first = torch.nn.Parameter(start.clone())
    optimizer = Muon([first], lr=0.02)
    run(optimizer, first, range(2))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    second = torch.nn.Parameter(first.data.clone())
    resumed = Muon([second], lr=1.0)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run(resumed, second, range(2, 4))
    assert torch.equal(second.data, whole.data)

    without_state = torch.nn.Parameter(copy.deepcopy(first.data))
    run(Muon([without_state], lr=0.02), without_state, range(2, 4))
    assert not torch.equal(without_state.data, whole.data)  # the momentum matters
