import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from deepseek_vl2.models.siglip_vit import SigLIP_MODEL_CONFIG, VisionTransformer, create_siglip_vit

SMALL = {"embed_dim": 32, "num_heads": 2}
NAME = "siglip_so400m_patch14_384"


def make_tower(side: int = 70, **changes) -> VisionTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = VisionTransformer(**{"img_size": side, "embed_dim": 32, "depth": 2, "num_heads": 2, **changes})
        for parameter in tower.parameters():
            nn.init.normal_(parameter, std=0.15)
    return tower.eval()


def views(side: int = 70, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def plain_tower(tower: VisionTransformer, pixels: torch.Tensor) -> torch.Tensor:
    """The tower written out."""

    def norm(layer, x):
        return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, eps=1e-6)

    x = F.conv2d(pixels, tower.patch_embed.proj.weight, tower.patch_embed.proj.bias, stride=14)
    x = x.flatten(2).transpose(1, 2) + tower.pos_embed
    for block in tower.blocks:
        query, key, value = block.attn.qkv(norm(block.norm1, x)).chunk(3, dim=-1)
        heads = [
            (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v
            for q, k, v in zip(*(part.chunk(2, dim=-1) for part in (query, key, value)), strict=True)
        ]
        x = x + block.attn.proj(torch.cat(heads, dim=-1))
        hidden = block.mlp.fc1(norm(block.norm2, x))
        gelu = 0.5 * hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
        x = x + block.mlp.fc2(gelu)
    return norm(tower.norm, x)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_values(attention):
    tower = make_tower(attn_implementation=attention)
    output = tower(views())
    assert output.shape == (2, 25, 32)
    torch.testing.assert_close(output, plain_tower(tower, views()), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_eager_equals_sdpa():
    tower = make_tower()
    expected = tower(views())
    tower.attn_implementation = "eager"
    torch.testing.assert_close(tower(views()), expected, atol=1e-5, rtol=1e-5)


def test_the_approximate_gelu():
    with torch.device("meta"):
        tower = create_siglip_vit(NAME)
    activation = tower.blocks[0].mlp.act
    values = torch.linspace(-4, 4, 101)
    assert torch.equal(activation(values), F.gelu(values, approximate="tanh"))
    assert not torch.equal(activation(values), F.gelu(values))


@torch.no_grad()
def test_the_rest_of_384_pixels_is_cut_off():
    tower = make_tower(384, depth=1)
    pixels = views(384, 1)
    output = tower(pixels)
    assert output.shape == (1, 27 * 27, 32)
    changed = pixels.clone()
    changed[:, :, 378:] = 9.0
    changed[:, :, :, 378:] = -9.0
    assert torch.equal(tower(changed), output)
    changed[:, :, 377, 0] = 9.0
    assert not torch.equal(tower(changed), output)


@torch.no_grad()
def test_the_pool_is_carried_along_and_never_run():
    tower = make_tower()
    expected = tower(views())
    nn.init.constant_(tower.attn_pool.latent, torch.nan)
    assert torch.equal(tower(views()), expected)
    assert not any(parameter.requires_grad for parameter in tower.attn_pool.parameters())
    assert make_tower(global_pool="").attn_pool is None
    pooled = make_tower(ignore_head=False)
    assert pooled(views()).shape == (2, 32)
    assert all(parameter.requires_grad for parameter in pooled.attn_pool.parameters())


def test_recomputing_gives_the_same_gradients():
    gradients = []
    for num_layers in (0, 2):
        tower = make_tower(num_recomputing_layers=num_layers).train()
        assert tower.grad_checkpointing == bool(num_layers)
        tower(views()).square().mean().backward()
        gradients.append([p.grad for name, p in tower.named_parameters() if not name.startswith("attn_pool")])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize(
    ("select_layer", "num_blocks"), [(-1, 27), (-2, 26), (-27, 1), (0, 27), (1, 1), (24, 24), (99, 27)]
)
def test_selected_layer(select_layer, num_blocks):
    with torch.device("meta"):
        tower = create_siglip_vit(NAME, select_layer=select_layer)
    assert len(tower.blocks) == num_blocks
    assert tuple(tower.pos_embed.shape) == (1, 27 * 27, 1152)


@pytest.mark.parametrize("select_layer", [-28, -100])
def test_layers_there_are_not(select_layer):
    with pytest.raises(ValueError, match=f"select_layer {select_layer} leaves no block of 27: .* at least -27"):
        create_siglip_vit(NAME, select_layer=select_layer)


@pytest.mark.parametrize("name", SigLIP_MODEL_CONFIG)
def test_published_towers(name):
    values = SigLIP_MODEL_CONFIG[name]
    with torch.device("meta"):
        tower = create_siglip_vit(name, image_size=values["image_size"])
    assert len(tower.blocks) == values["layers"]
    assert tower.embed_dim == values["width"]
    assert tower.blocks[0].attn.num_heads == values["heads"]
    assert tower.blocks[0].mlp.fc1.out_features == int(values["width"] * values["mlp_ratio"])
    assert tower.pos_embed.shape[1] == (values["image_size"] // values["patch_size"]) ** 2


def test_unknown_name():
    with pytest.raises(ValueError, match=f"'siglip_huge' is unknown. Choose one of {NAME}"):
        create_siglip_vit("siglip_huge")


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@torch.no_grad()
def test_checkpoint_of_the_tower(tmp_path, ending):
    full = make_tower(depth=27)
    path = tmp_path / f"tower.{ending}"
    save_file(full.state_dict(), path) if ending == "safetensors" else torch.save(full.state_dict(), path)
    loaded = create_siglip_vit(NAME, image_size=70, ckpt_path=str(path), **SMALL)
    assert torch.equal(loaded.eval()(views()), full(views()))
    shorter = create_siglip_vit(NAME, image_size=70, select_layer=-25, ckpt_path=str(path), **SMALL).eval()
    assert len(shorter.blocks) == 3
    full.blocks = full.blocks[:3]
    assert torch.equal(shorter(views()), full(views()))


def test_further_arguments():
    tower = create_siglip_vit(NAME, image_size=70, **SMALL, depth=3, attn_implementation="eager", deterministic=True)
    assert len(tower.blocks) == 3
    assert {block.attn.implementation for block in tower.blocks} == {"eager"}
    with pytest.raises(ValueError, match=r"'nonsense' is unknown. Choose one of sdpa, eager"):
        make_tower(attn_implementation="nonsense")
