import copy

import pytest
import torch
from small_models import MHA, language_config
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from deepseek_vl2.models.modeling_deepseek import DeepseekV2ForCausalLM
from deepseek_vl2.models.rotary_positions import (
    DeepseekV2RotaryEmbedding,
    rotate_halves,
    rotate_interleaved,
    yarn_score_scaling,
)

# The rotated numbers a head of small and base, and of tiny.
PUBLISHED = {"mla": {"qk_rope_head_dim": 64}, "mha": {**MHA, "hidden_size": 384, "num_attention_heads": 3}}
CASTS = {
    "none": lambda model: model,
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "twice": lambda model: model.to(torch.bfloat16).to(torch.bfloat16),
    "and back": lambda model: model.to(torch.bfloat16).float(),
}


def positions(*values: int) -> torch.Tensor:
    return torch.tensor([values])


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("kind", PUBLISHED)
def test_tables_stay_exact_under_casts(kind, cast):
    config = language_config(
        **PUBLISHED[kind], num_key_value_heads=3, max_position_embeddings=4096, n_routed_experts=None
    )
    model = CASTS[cast](DeepseekV2ForCausalLM(config))
    cos, sin = model.model.rotary_emb(positions(0, 1, 256, 257, 1000, 4095))
    assert cos.dtype == sin.dtype == torch.float32
    size = config.head_dim
    assert cos.shape == (1, 6, size // 2)
    frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = positions(0, 1, 256, 257, 1000, 4095)[..., None].double() * frequencies
    # An angle of 4,095 has 2.4e-4 between neighbouring float32 numbers.
    torch.testing.assert_close(cos.double(), angles.cos(), atol=4e-4, rtol=0)
    torch.testing.assert_close(sin.double(), angles.sin(), atol=4e-4, rtol=0)
    assert (cos[0, 3] - cos[0, 2]).abs().max() > 0.1, "position 257 must not become 256, as in bfloat16"


@pytest.mark.parametrize("cast", CASTS)
def test_casts_change_no_bit(cast):
    rotary = DeepseekV2RotaryEmbedding(language_config())
    changed = CASTS[cast](copy.deepcopy(rotary))
    every = torch.arange(4096)[None]
    for table, expected in zip(changed(every), rotary(every), strict=True):
        assert torch.equal(table, expected)


def test_tables_are_no_part_of_the_checkpoint():
    assert not DeepseekV2RotaryEmbedding(language_config()).state_dict()


def test_tables_of_a_model_made_on_the_meta_device():
    with torch.device("meta"):
        rotary = DeepseekV2RotaryEmbedding(language_config())
    cos, _ = rotary(positions(3))
    assert torch.equal(cos, DeepseekV2RotaryEmbedding(language_config())(positions(3))[0])


def test_interleaved_pairs():
    rotary = DeepseekV2RotaryEmbedding(language_config())
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    where = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 200]])
    cos, sin = rotary(where)
    rotated = rotate_interleaved(x, cos, sin)
    for batch, head, token, pair in [(0, 1, 0, 2), (0, 2, 3, 0), (1, 0, 4, 3), (1, 2, 2, 1)]:
        a, b = x[batch, head, token, 2 * pair : 2 * pair + 2].tolist()
        angle = where[batch, token].double() * 10000.0 ** (-2 * pair / 8)
        expected = torch.polar(torch.tensor(1.0, dtype=torch.float64), angle) * complex(a, b)
        assert rotated[batch, head, token, pair].item() == pytest.approx(expected.real.item(), abs=1e-4)
        assert rotated[batch, head, token, 4 + pair].item() == pytest.approx(expected.imag.item(), abs=1e-4)


def test_halves():
    rotary = DeepseekV2RotaryEmbedding(language_config(**MHA))
    x = torch.randn(1, 6, 3, 8, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary(positions(5, 6, 90))
    rotated = rotate_halves(x, cos, sin)
    for head, token, pair, position in [(0, 0, 0, 5), (5, 1, 3, 6), (2, 2, 1, 90)]:
        a, b = x[0, head, token, pair].item(), x[0, head, token, 4 + pair].item()
        angle = torch.tensor(position * 10000.0 ** (-2 * pair / 8), dtype=torch.float64)
        c, s = angle.cos().item(), angle.sin().item()
        assert rotated[0, head, token, pair].item() == pytest.approx(a * c - b * s, abs=1e-4)
        assert rotated[0, head, token, 4 + pair].item() == pytest.approx(b * c + a * s, abs=1e-4)


@pytest.mark.parametrize("rotate", [rotate_interleaved, rotate_halves])
def test_scores_depend_on_distance_only(rotate):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 8, generator=generator)
    rotary = DeepseekV2RotaryEmbedding(language_config())

    def score(at_query: int, at_key: int) -> float:
        return (rotate(query, *rotary(positions(at_query))) * rotate(key, *rotary(positions(at_key)))).sum().item()

    assert score(20, 13) == pytest.approx(score(107, 100), abs=1e-4)
    assert score(20, 13) != pytest.approx(score(20, 12), abs=1e-2)


@pytest.mark.parametrize("rotate", [rotate_interleaved, rotate_halves])
def test_bfloat16_is_rotated_in_float32(rotate):
    x = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    tables = DeepseekV2RotaryEmbedding(language_config())(torch.arange(4092, 4096)[None])
    rotated = rotate(x, *tables)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, rotate(x.float(), *tables).bfloat16())


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_scaled_positions_as_in_transformers(scaling):
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=48,
            num_attention_heads=6,
            max_position_embeddings=256,
            rope_parameters={**scaling, "rope_theta": 10000.0},
        )
    )
    cos, sin = DeepseekV2RotaryEmbedding(language_config(rope_scaling=scaling))(positions(0, 1, 70, 255))
    expected_cos, expected_sin = theirs(torch.zeros(1), positions(0, 1, 70, 255))
    torch.testing.assert_close(cos, expected_cos[..., :4])
    torch.testing.assert_close(sin, expected_sin[..., :4])


def test_yarn_scales_scores():
    assert yarn_score_scaling({"rope_type": "default"}) == 1.0
    assert yarn_score_scaling({"rope_type": "yarn", "factor": 40.0}) == 1.0
    # (0.1 * 0.707 * ln 40 + 1) ** 2
    scaling = yarn_score_scaling({"rope_type": "yarn", "factor": 40.0, "mscale_all_dim": 0.707})
    assert scaling == pytest.approx(1.589626, abs=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "nonsense"])
def test_unknown_scaling(kind):
    scaling = {"rope_type": kind, "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    with pytest.raises(ValueError, match=f"'{kind}' is unknown. Choose one of default, linear, yarn, llama3"):
        DeepseekV2RotaryEmbedding(language_config(rope_scaling=scaling))
