import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepseek_vl2.models.configuration_deepseek_vl_v2 import MlpProjectorConfig
from deepseek_vl2.models.projector import MlpProjector, merge_blocks

LAYERS = {
    "identity": [],
    "linear": [(16, 24)],
    "mlp_gelu": [(16, 24), (24, 24), (24, 24)],
    "downsample_mlp_gelu": [(64, 72), (72, 72), (72, 24)],
}


def patches(side: int, width: int = 16, count: int = 3) -> torch.Tensor:
    return torch.randn(count, side * side, width, generator=torch.Generator().manual_seed(side))


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_and_shapes(kind):
    config = MlpProjectorConfig(projector_type=kind, input_dim=16, n_embed=24, depth=3, mlp_ratio=3)
    projector = MlpProjector(config)
    linear = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == LAYERS[kind]
    tokens = projector(patches(5))
    num_tokens = 9 if kind == "downsample_mlp_gelu" else 25
    assert config.tokens_per_side(5) ** 2 == num_tokens
    assert tokens.shape == (3, num_tokens, 24 if linear else 16)


def test_published_keys():
    projector = MlpProjector(MlpProjectorConfig(input_dim=16, n_embed=24))
    assert list(projector.state_dict()) == ["layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias"]


@torch.no_grad()
def test_values():
    projector = MlpProjector(MlpProjectorConfig(input_dim=16, n_embed=24))
    first, activation, second = projector.layers
    assert isinstance(activation, nn.GELU)
    assert activation.approximate == "none"
    # Token 1 of the 3x3 tokens: patches of rows 0 and 1, columns 2 and 3; channel by channel.
    view = patches(5)[1].unflatten(0, (5, 5))
    block = torch.stack((view[0, 2], view[0, 3], view[1, 2], view[1, 3]), dim=1).flatten()
    expected = second(F.gelu(first(block)))
    torch.testing.assert_close(projector(patches(5))[1, 1], expected)


@pytest.mark.parametrize(
    ("side", "ratio", "tokens"), [(27, 2, 14), (28, 2, 14), (5, 2, 3), (7, 3, 3), (9, 3, 3), (4, 1, 4)]
)
def test_blocks_as_torch_unfolds_them(side, ratio, tokens):
    image = patches(side).transpose(1, 2).unflatten(2, (side, side))
    missing = tokens * ratio - side
    unfolded = F.unfold(F.pad(image, (0, missing, 0, missing)), kernel_size=ratio, stride=ratio).transpose(1, 2)
    merged = merge_blocks(patches(side), ratio)
    assert merged.shape == (3, tokens**2, 16 * ratio**2)
    assert torch.equal(merged, unfolded)
    assert MlpProjectorConfig(downsample_ratio=ratio).tokens_per_side(side) == tokens


def test_filling_of_27_patches_by_hand():
    # Patch (row, column) of one channel is the number 100 * row + column.
    numbers = torch.arange(27)[:, None] * 100.0 + torch.arange(27)
    merged = merge_blocks(numbers.reshape(1, 27 * 27, 1), 2).unflatten(1, (14, 14))[0]
    assert merged[0, 0].tolist() == [0, 1, 100, 101]
    assert merged[3, 12].tolist() == [624, 625, 724, 725]
    assert merged[3, 13].tolist() == [626, 0, 726, 0], "no patch to the right of the last"
    assert merged[13, 2].tolist() == [2604, 2605, 0, 0], "no patch below the last"
    assert merged[13, 13].tolist() == [2626, 0, 0, 0]


def test_views_that_are_not_square():
    with pytest.raises(ValueError, match="24 patches a view are no square number"):
        MlpProjector(MlpProjectorConfig(input_dim=16, n_embed=24))(torch.zeros(1, 24, 16))
