"""nano's configuration, processor and starting weights: the published kinds of layers, in 15 MB."""

import pytest
import torch

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.tiling import TileGrid, choose_grid, num_image_tokens
from deepseek_vl2.nano.architecture import CANDIDATE_RESOLUTIONS, nano_config, nano_processor, untrained_nano
from deepseek_vl2.nano.tokenizer import number_token_ids

MAX_PARAMETERS = 7_500_000  # 15 MB in bfloat16


@pytest.fixture(scope="module")
def processor():
    return nano_processor()


@pytest.fixture(scope="module")
def model(processor):
    return untrained_nano(processor.tokenizer, seed=3)


def test_it_fits_in_15_megabytes(model):
    assert 6_000_000 < sum(parameter.numel() for parameter in model.parameters()) <= MAX_PARAMETERS
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_layers_are_of_the_kinds_of_small(model):
    language = model.config.language_config
    assert language.use_mla and language.kv_lora_rank > 0 and language.q_lora_rank is None
    assert language.n_shared_experts >= 1
    assert 1 < language.num_experts_per_tok < language.n_routed_experts
    keys = set(model.state_dict())
    layers = range(language.num_hidden_layers)
    assert {f"language.model.layers.{layer}.self_attn.kv_b_proj.weight" for layer in layers} <= keys
    has_router = [f"language.model.layers.{layer}.mlp.gate.weight" in keys for layer in layers]
    has_shared = [
        f"language.model.layers.{layer}.mlp.shared_experts.up_proj.weight" in keys
        for layer in range(language.num_hidden_layers)
    ]
    assert has_router == has_shared == [False] + [True] * 5  # the first layer is dense


def test_configuration_and_processor_fit_each_other(model, processor):
    config, tokenizer = model.config, processor.tokenizer
    assert config.language_config.vocab_size == len(tokenizer)
    processor.check_vocab(config.language_config.vocab_size)
    assert processor.num_tokens_per_side == model.tokens_per_side == 4
    assert processor.image_size == config.vision_config.image_size
    assert processor.patch_size == config.vision_config.patch_size
    assert [list(size) for size in processor.candidate_resolutions] == [list(s) for s in config.candidate_resolutions]
    for part in (config, config.language_config):
        ids = part.bos_token_id, part.eos_token_id, part.pad_token_id
        assert ids == (processor.bos_id, processor.eos_id, processor.pad_id)


@pytest.mark.parametrize(
    ("size", "grid", "num_tokens"),
    [
        ((100, 90), (1, 1), 4 * 5 + 1 + 4 * 5),
        ((448, 224), (2, 1), 4 * 5 + 1 + 4 * 9),
        ((224, 448), (1, 2), 4 * 5 + 1 + 8 * 5),
        ((640, 480), (2, 2), 4 * 5 + 1 + 8 * 9),
    ],
)
def test_pictures_are_tiled(processor, size, grid, num_tokens):
    chosen = choose_grid(size, 1, processor.image_size, CANDIDATE_RESOLUTIONS)
    assert chosen == TileGrid(*grid)
    assert num_image_tokens(chosen, processor.num_tokens_per_side) == num_tokens


def test_a_seed_names_the_weights(model, processor):
    same = untrained_nano(processor.tokenizer, seed=3).state_dict()
    other = untrained_nano(processor.tokenizer, seed=4).state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in model.state_dict().items())
    assert not torch.equal(same["language.model.embed_tokens.weight"], other["language.model.embed_tokens.weight"])


def test_near_numbers_start_alike(model, processor):
    ids = number_token_ids(processor.tokenizer)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        rows = table.weight.detach()[ids]
        likeness = torch.nn.functional.cosine_similarity(rows[500], rows)
        assert likeness.argmax() == 500
        assert likeness[501] > likeness[510] > likeness[560] > likeness[900]
        assert rows.std().item() == pytest.approx(0.02, rel=0.3)


def test_patch_positions_start_as_row_and_column(model):
    """One half says how far down a patch is, the other how far across; no two patches are alike."""
    positions = model.vision.pos_embed.detach()[0].view(8, 8, -1)
    down, across = positions.chunk(2, dim=-1)
    assert torch.equal(down, down[:, :1].expand_as(down))
    assert torch.equal(across, across[:1].expand_as(across))
    for half in (down[:, 0], across[0]):
        distances = torch.cdist(half, half) + 1e3 * torch.eye(8)
        assert distances.min() > 1


def test_it_saves_and_loads_without_a_key_too_many_or_too_few(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, info = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    built, read = (
        {**config.language_config.to_dict(), "dtype": None}
        for config in (nano_config(processor.tokenizer), loaded.config)
    )
    assert built == read
    reloaded = DeepseekVLV2Processor.from_pretrained(tmp_path)
    assert reloaded.encode("[[1, 20, 300, 999]]") == processor.encode("[[1, 20, 300, 999]]")
    assert reloaded.candidate_resolutions == processor.candidate_resolutions
