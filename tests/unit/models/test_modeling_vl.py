import copy

import pytest
import torch
from small_models import (
    IMAGE_ID,
    SIDE,
    VARIANTS,
    join,
    make_inputs,
    num_tokens,
    seeded,
    vl_config,
)
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM, machine_limits
from deepseek_vl2.models.modeling_deepseek_vl_v2 import DeepSeekVLV2CausalLMOutputWithPast
from deepseek_vl2.models.tiling import TileGrid
from deepseek_vl2.models.view_batches import MEMORY_SHARE, bytes_per_view

G = 3
NEWLINE, SEPARATOR = -1.0, -2.0


class NumberedViews(nn.Module):
    """Stands in for vision tower and projector: token i of a view showing the number n is n + i / 100."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1))
        self.num_views = self.largest_batch = 0

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        self.num_views += len(views)
        self.largest_batch = max(self.largest_batch, len(views))
        return views[:, 0, 0, 0, None, None] + torch.arange(G * G).reshape(1, -1, 1) / 100


class Widen(nn.Module):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.expand(-1, -1, 48)


def numbered_model(global_view_pos: str = "head") -> DeepseekVLV2ForCausalLM:
    model = seeded(DeepseekVLV2ForCausalLM, vl_config(global_view_pos=global_view_pos))
    model.vision, model.projector = NumberedViews(), Widen()
    nn.init.constant_(model.image_newline, NEWLINE)
    nn.init.constant_(model.view_seperator, SEPARATOR)
    return model


def expected_tokens(columns: int, rows: int, first_view: int, position: str = "head") -> list[float]:
    """The tokens of a picture whose views show the numbers from `first_view` on, row by row."""

    def line(views: list[int], row: int) -> list[float]:
        return [view + (row * G + i) / 100 for view in views for i in range(G)] + [NEWLINE]

    view = [token for row in range(G) for token in line([first_view], row)]
    tiles = []
    for tile_row in range(rows):
        views = [first_view + 1 + tile_row * columns + column for column in range(columns)]
        tiles += [token for row in range(G) for token in line(views, row)]
    return [*view, SEPARATOR, *tiles] if position == "head" else [*tiles, SEPARATOR, *view]


def number_views(inputs: dict[str, torch.Tensor]) -> None:
    """Fills each view with its number: 1, 2, ... in the first row, 101, 102, ... in the second."""
    for row, views in enumerate(inputs["images"]):
        for i, view in enumerate(views):
            view.fill_(100 * row + i + 1)


@pytest.mark.parametrize(("fitting", "largest"), [(0.5, 1), (2.5, 2), (3, 3), (100, 6)])
@torch.no_grad()
def test_views_are_cut_into_batches_that_fit_into_memory(monkeypatch, fitting, largest):
    model, inputs = numbered_model(), join([make_inputs([(2, 1)]), make_inputs([(1, 2)], seed=1)])
    inputs["images"] = torch.arange(6.0).reshape(2, 3, 1, 1, 1).expand(2, 3, 3, SIDE, SIDE) + 1
    inputs["images"][1, 2] = 9.0
    whole = model.get_image_features(inputs["images"], inputs["images_spatial_crop"])
    size = bytes_per_view(model.config.vision_config, torch.float32)
    monkeypatch.setattr(machine_limits, "available_bytes", lambda: int(size * fitting / MEMORY_SHARE))
    model.vision.num_views = model.vision.largest_batch = 0
    cut = model.get_image_features(inputs["images"], inputs["images_spatial_crop"])
    assert (model.vision.num_views, model.vision.largest_batch) == (6, largest)
    assert all(torch.equal(first, second) for first, second in zip(cut, whole, strict=True))


def test_views_are_not_cut_where_gradients_are_kept(monkeypatch):
    monkeypatch.setattr(machine_limits, "available_bytes", lambda: 0)
    model, inputs = numbered_model(), make_inputs([(2, 1)])
    model.get_image_features(inputs["images"], inputs["images_spatial_crop"])
    assert model.vision.largest_batch == 3
    with torch.no_grad():
        model.get_image_features(inputs["images"], inputs["images_spatial_crop"])
    assert model.vision.num_views == 6


@pytest.mark.parametrize("position", ["head", "tail"])
@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (1, 2), (2, 3), (3, 2), (5, 1)])
@torch.no_grad()
def test_every_view_comes_out_where_the_layout_says(grid, position):
    model, inputs = numbered_model(position), make_inputs([grid])
    number_views(inputs)
    embeds = model.prepare_inputs_embeds(**inputs)
    image_tokens = embeds[0][inputs["images_seq_mask"][0]]
    assert len(image_tokens) == num_tokens(*grid)
    expected = torch.tensor(expected_tokens(*grid, 1, position))[:, None].expand(-1, 48)
    torch.testing.assert_close(image_tokens, expected)
    text = ~inputs["images_seq_mask"]
    assert torch.equal(embeds[text], model.get_input_embeddings()(inputs["input_ids"][text]))


@torch.no_grad()
def test_several_pictures_in_a_padded_batch():
    model = numbered_model()
    rows = [[(2, 1), (1, 3)], [(1, 1)], [], [(1, 2), (3, 1), (1, 1)]]
    batch = join([make_inputs(grids, num_text=2 + i, seed=i) for i, grids in enumerate(rows)])
    number_views(batch)
    embeds = model.prepare_inputs_embeds(**batch)
    for row, grids in enumerate(rows):
        expected, first_view = [], 100 * row + 1
        for grid in grids:
            expected += expected_tokens(*grid, first_view)
            first_view += 1 + grid[0] * grid[1]
        actual = embeds[row, batch["images_seq_mask"][row], 7].tolist()
        assert actual == pytest.approx(expected)
    real_views = sum(1 + columns * rows_ for grids in rows for columns, rows_ in grids)
    assert model.vision.num_views == real_views, "filled up views are not encoded"


@torch.no_grad()
def test_features_of_each_picture():
    model, inputs = numbered_model(), make_inputs([(2, 1), (1, 1)])
    number_views(inputs)
    features = model.get_image_features(inputs["images"], inputs["images_spatial_crop"])
    assert [tuple(picture.shape) for picture in features] == [(34, 48), (25, 48)]
    assert features[1][:, 0].tolist() == pytest.approx(expected_tokens(1, 1, 4))


def encoded_one_by_one(
    model: DeepseekVLV2ForCausalLM, images: torch.Tensor, images_spatial_crop: torch.Tensor
) -> list[torch.Tensor]:
    """The image tokens of the pictures of one row, with every view in a batch of its own."""
    views, pictures = images[0], []
    for columns, rows in images_spatial_crop[0].tolist():
        own, views = views[: 1 + columns * rows], views[1 + columns * rows :]
        tokens = torch.cat([model.projector(model.vision(view[None])) for view in own])
        pictures.append(model._arrange_views(tokens, TileGrid(columns, rows)))
    return pictures


def make_twins(inputs: dict[str, torch.Tensor]) -> None:
    """Gives pictures of one tile the same pixels in both views, as the processor does."""
    first = 0
    for columns, rows in inputs["images_spatial_crop"][0].tolist():
        if columns * rows == 1:
            inputs["images"][0, first + 1] = inputs["images"][0, first]
        first += 1 + columns * rows


@pytest.mark.parametrize(
    ("grids", "num_encoded"), [([(1, 1)], 1), ([(1, 1), (1, 1), (1, 1)], 3), ([(2, 1), (1, 1), (1, 2)], 3 + 1 + 3)]
)
@torch.no_grad()
def test_a_view_shown_twice_is_encoded_once(grids, num_encoded):
    model, inputs = numbered_model(), make_inputs(grids)
    number_views(inputs)
    make_twins(inputs)
    features = model.get_image_features(inputs["images"], inputs["images_spatial_crop"])
    assert model.vision.num_views == num_encoded
    first = 1
    for grid, tokens in zip(grids, features, strict=True):
        expected = expected_tokens(*grid, first)
        if grid == (1, 1):  # the tile has the number of the global view
            half = len(expected) // 2
            expected = [*expected[: half + 1], *expected[:half]]
        assert tokens[:, 0].tolist() == pytest.approx(expected)
        first += 1 + grid[0] * grid[1]


@torch.no_grad()
def test_twins_of_one_row_only():
    """Rows are looked at one by one, and filled up views are no twins."""
    model = numbered_model()
    batch = join([make_inputs([(1, 1)]), make_inputs([(1, 1), (1, 1)])])
    number_views(batch)
    batch["images"][1, 3] = batch["images"][1, 2]
    embeds = model.prepare_inputs_embeds(**batch)
    assert model.vision.num_views == 2 + 2 + 1
    actual = embeds[1, batch["images_seq_mask"][1], 7].tolist()
    twin = expected_tokens(1, 1, 103)
    half = len(twin) // 2
    assert actual == pytest.approx([*expected_tokens(1, 1, 101), *twin[: half + 1], *twin[:half]])


@torch.no_grad()
def test_views_that_differ_in_one_pixel_are_both_encoded():
    model, inputs = numbered_model(), make_inputs([(1, 1)])
    make_twins(inputs)
    inputs["images"][0, 1, 2, -1, -1] += 1e-3
    model.get_image_features(inputs["images"], inputs["images_spatial_crop"])
    assert model.vision.num_views == 2


@pytest.mark.parametrize("are_twins", [True, False])
def test_twins_give_the_tokens_and_gradients_of_both_views(mla_model, are_twins):
    model = copy.deepcopy(mla_model)
    inputs = make_inputs([(1, 1), (2, 1), (1, 1)])
    if are_twins:
        make_twins(inputs)
    results = []
    for encode in (DeepseekVLV2ForCausalLM.get_image_features, encoded_one_by_one):
        pictures = encode(model, inputs["images"], inputs["images_spatial_crop"])
        model.zero_grad()
        sum(
            (picture * torch.linspace(-1, 1, picture.numel()).view_as(picture)).sum() for picture in pictures
        ).backward()
        moved = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((torch.cat(pictures), moved))
    (found, found_gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert found_gradients.keys() == expected_gradients.keys() and "vision.pos_embed" in found_gradients
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_grids_of_zeros_are_no_pictures():
    model, inputs = numbered_model(), make_inputs([(1, 2)])
    number_views(inputs)
    expected = model.prepare_inputs_embeds(**inputs)
    inputs["images_spatial_crop"] = torch.tensor([[[0, 0], [1, 2], [0, 0]]])
    assert torch.equal(model.prepare_inputs_embeds(**inputs), expected)


def test_more_views_asked_for_than_given():
    model, inputs = numbered_model(), make_inputs([(2, 2)])
    with pytest.raises(ValueError, match="asks for 5 views in a row, images hold 3"):
        model.prepare_inputs_embeds(**{**inputs, "images": inputs["images"][:, :3]})


@pytest.mark.parametrize("change", [-1, 1])
def test_placeholders_that_do_not_match(change):
    model, inputs = numbered_model(), make_inputs([(2, 1)])
    position = inputs["images_seq_mask"][0].nonzero()[-1].item() + (change == 1)
    inputs["images_seq_mask"][0, position] = change == 1
    with pytest.raises(ValueError, match=f"Row 0 has {34 + change} image placeholders, its pictures make 34"):
        model.prepare_inputs_embeds(**inputs)
    with pytest.raises(ValueError, match="Row 0"):
        model(**inputs)
    with pytest.raises(ValueError, match="Row 0"):
        model.generate(**inputs)


def test_rows_are_checked_one_by_one():
    # Together the placeholders fit: one picture of 2x1 and one of 1x1, but in the wrong rows.
    model = numbered_model()
    batch = join([make_inputs([(2, 1)]), make_inputs([(1, 1)])])
    batch["images_spatial_crop"] = batch["images_spatial_crop"].flip(0)
    with pytest.raises(ValueError, match="Row 0 has 34 image placeholders, its pictures make 25"):
        model.prepare_inputs_embeds(**batch)


def test_placeholders_without_pictures():
    model, inputs = numbered_model(), make_inputs([(1, 1)])
    with pytest.raises(ValueError, match="25 image tokens, but no pictures"):
        model(input_ids=inputs["input_ids"], images_seq_mask=inputs["images_seq_mask"])


def test_pictures_without_their_layout():
    model, inputs = numbered_model(), make_inputs([(1, 1)])
    with pytest.raises(ValueError, match="images_seq_mask and images_spatial_crop"):
        model(input_ids=inputs["input_ids"], images=inputs["images"])


@torch.no_grad()
def test_text_only(vl_model):
    inputs = make_inputs([])
    expected = vl_model.language(inputs["input_ids"]).logits
    assert torch.equal(vl_model(**inputs).logits, expected), "one view of zeros, no grids, as the processor gives it"
    assert torch.equal(vl_model(input_ids=inputs["input_ids"]).logits, expected)
    assert torch.equal(vl_model(**{**inputs, "images": None}).logits, expected)
    embeds = vl_model.prepare_inputs_embeds(**{**inputs, "images": None})
    assert torch.equal(embeds, vl_model.get_input_embeddings()(inputs["input_ids"]))


def test_too_many_tokens_say_what_to_do():
    model = seeded(DeepseekVLV2ForCausalLM, vl_config({"max_position_embeddings": 40}))
    inputs = make_inputs([(2, 1)])
    length = inputs["input_ids"].shape[1]
    for call in (model.prepare_inputs_embeds, model, model.generate, model.incremental_prefilling):
        with pytest.raises(ValueError, match=f"{length} tokens, the model has 40 positions.*fewer pictures, no tiling"):
            call(**inputs)


@torch.no_grad()
def test_padded_rows_equal_the_rows_alone(vl_model):
    rows = [make_inputs([(2, 1)], seed=1), make_inputs([(1, 1)], seed=2), make_inputs([], seed=3)]
    batch = join(rows)
    logits = vl_model(**batch).logits
    for row, inputs in enumerate(rows):
        alone = vl_model(**inputs).logits[0]
        torch.testing.assert_close(logits[row, -len(alone) :], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_forms_of_the_prompt_agree(vl_model):
    inputs = make_inputs([(1, 2)])
    output = vl_model(**inputs)
    assert isinstance(output, DeepSeekVLV2CausalLMOutputWithPast)
    embeds = vl_model.prepare_inputs_embeds(**inputs)
    torch.testing.assert_close(vl_model(inputs_embeds=embeds).logits, output.logits)
    torch.testing.assert_close(vl_model.language(inputs_embeds=embeds).logits, output.logits)
    torch.testing.assert_close(vl_model(**inputs, return_dict=False)[0], output.logits)
    torch.testing.assert_close(vl_model(**inputs, logits_to_keep=1).logits, output.logits[:, -1:])
    further = vl_model(
        **inputs, sft_format=["text"], seq_lens=[1], output_hidden_states=True, output_router_logits=True
    )
    assert len(further.hidden_states) == 4
    assert len(further.router_logits) == 2


def test_neither_ids_nor_embeddings():
    model = numbered_model()
    for call in (model, model.incremental_prefilling):
        with pytest.raises(ValueError, match="input_ids"):
            call()


@torch.no_grad()
def test_pictures_change_the_answer(vl_model):
    inputs = make_inputs([(1, 1)])
    other = {**inputs, "images": -inputs["images"]}
    assert (vl_model(**inputs).logits[0, -1] - vl_model(**other).logits[0, -1]).abs().max() > 1e-3


def test_pictures_of_another_type():
    model = seeded(DeepseekVLV2ForCausalLM, vl_config()).to(torch.bfloat16)
    inputs = make_inputs([(1, 1)])
    embeds = model.prepare_inputs_embeds(**inputs)
    assert embeds.dtype == torch.bfloat16
    assert torch.equal(embeds, model.prepare_inputs_embeds(**{**inputs, "images": inputs["images"].bfloat16()}))


def labelled(grids: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    inputs = make_inputs(grids)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["images_seq_mask"], -100)}


def gradients(model: DeepseekVLV2ForCausalLM, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_reach_every_part(vl_model):
    model = copy.deepcopy(vl_model).train()
    reached = gradients(model, labelled([(2, 1)]))
    for name, parameter in model.named_parameters():
        if not name.startswith("vision.attn_pool"):
            assert reached[name].norm() > 0, name
        else:
            assert not parameter.requires_grad


def test_training_with_pictures(vl_model):
    model, inputs = copy.deepcopy(vl_model).train(), labelled([(1, 2)])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=3e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_activation_checkpointing_reaches_both_towers(vl_model):
    model, inputs = copy.deepcopy(vl_model).train(), labelled([(1, 1)])
    model.config.language_config.aux_loss_alpha = 0.5
    runs = {"vision": 0, "language": 0}

    def count(part: str):
        return lambda *_: runs.update({part: runs[part] + 1})

    model.vision.blocks[0].attn.register_forward_hook(count("vision"))
    model.language.model.layers[1].self_attn.register_forward_hook(count("language"))
    plain = gradients(model, inputs)
    assert runs == {"vision": 1, "language": 1}
    model.activation_checkpointing_enable()
    recomputed = gradients(model, inputs)
    assert runs == {"vision": 3, "language": 3}
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    model.activation_checkpointing_disable()
    gradients(model, inputs)
    assert runs == {"vision": 4, "language": 4}


def test_recomputing_can_be_chosen_in_the_config():
    config = vl_config()
    config.vision_config.use_checkpoint = True
    assert DeepseekVLV2ForCausalLM(config).vision.grad_checkpointing
    assert not DeepseekVLV2ForCausalLM(vl_config()).vision.grad_checkpointing


def test_embeddings_and_output_layer():
    model = seeded(DeepseekVLV2ForCausalLM, vl_config())
    assert model.get_input_embeddings() is model.language.model.embed_tokens
    assert model.get_output_embeddings() is model.language.lm_head
    model.resize_token_embeddings(168)
    assert model.language.lm_head.weight.shape == model.language.model.embed_tokens.weight.shape == (168, 48)
    assert model.config.language_config.vocab_size == 168
    assert model(**make_inputs([(1, 1)])).logits.shape[-1] == 168


def test_starting_weights():
    model = seeded(DeepseekVLV2ForCausalLM, vl_config())
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
    for parameter in (model.image_newline, model.view_seperator):
        assert parameter.std().item() == pytest.approx(48**-0.5, rel=0.4)
    assert model.vision.pos_embed.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert model.vision.blocks[0].mlp.fc1.weight.std() > 0


def test_transformers_finds_the_classes(tmp_path):
    model = seeded(DeepseekVLV2ForCausalLM, vl_config(VARIANTS["base"]))
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is DeepseekVLV2Config
    inputs = make_inputs([(1, 1)])
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is DeepseekVLV2ForCausalLM
        assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)
    assert type(AutoModelForCausalLM.from_config(model.config)) is DeepseekVLV2ForCausalLM


def test_layers_stay_on_one_device():
    assert set(DeepseekVLV2ForCausalLM(vl_config())._no_split_modules) == {
        "DeepseekV2DecoderLayer",
        "VisionTransformer",
        "Block",
    }


def test_training_on_text_gives_the_parts_that_see_a_gradient_of_zero():
    """Processes that train together wait for each other's gradients."""
    model = seeded(DeepseekVLV2ForCausalLM, vl_config()).train()
    ids = make_inputs([])["input_ids"]
    model.vision.requires_grad_(False)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(weight.grad is None for weight in model.vision.parameters())
    for weight in (*model.projector.parameters(), model.image_newline, model.view_seperator):
        assert weight.grad is not None and not weight.grad.any()
    assert model.get_input_embeddings().weight.grad.any()
    loss = model(input_ids=ids, labels=ids).loss
    assert torch.equal(loss, model.eval()(input_ids=ids, labels=ids).loss)


def test_sizes_of_the_small_model_do_not_repeat():
    config = vl_config()
    language = config.language_config
    sizes = [
        SIDE,
        IMAGE_ID,
        config.vision_config.width,
        language.hidden_size,
        language.vocab_size,
        language.intermediate_size,
        language.moe_intermediate_size,
        language.n_routed_experts,
        language.kv_lora_rank,
        language.qk_head_dim,
        language.qk_nope_head_dim,
        language.qk_rope_head_dim,
        language.v_head_dim,
    ]
    assert len(set(sizes)) == len(sizes)


def test_pictures_on_the_meta_device():
    """There are no pixels to compare: every view counts."""
    with torch.device("meta"):
        model = DeepseekVLV2ForCausalLM(vl_config())
    inputs = make_inputs([(1, 1), (2, 1)])
    features = model.get_image_features(inputs["images"].to("meta"), inputs["images_spatial_crop"])
    assert [tuple(picture.shape) for picture in features] == [(25, 48), (34, 48)]
