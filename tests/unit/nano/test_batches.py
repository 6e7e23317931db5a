"""nano's batches: drawn from a seed alone; a packed row teaches exactly the single questions that it holds."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from deepseek_vl2.models.special_tokens import ASSISTANT, IMAGE, USER
from deepseek_vl2.models.tiling import TileGrid, choose_grid, letterbox
from deepseek_vl2.nano.architecture import nano_processor, untrained_nano
from deepseek_vl2.nano.batches import (
    IGNORE_ID,
    LARGER_GRIDS,
    ONE_TILE,
    TASK_WEIGHTS,
    AnswerBatches,
    Cells,
    Curriculum,
    ViewBatches,
    ask,
    cells_of,
    collate,
    draw_scene,
    encode_row,
)
from deepseek_vl2.nano.questions import CELL_CLASSES, TASKS, split_rng
from deepseek_vl2.nano.scenes import COLOR_NAMES, Background, Scene, SceneObject

GROUND = Background("plain", (255, 255, 255), (255, 255, 255), True, 8)
ALL_GRIDS = (ONE_TILE, *LARGER_GRIDS)


@pytest.fixture(scope="module")
def processor():
    return nano_processor()


@pytest.fixture(scope="module")
def model(processor):
    model = untrained_nano(processor.tokenizer, seed=5).eval()
    with torch.no_grad():  # starting weights barely tell one token from another
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def scene_and_examples(processor, seed, grid, num_questions=4):
    rng = split_rng("test-batches", seed)
    while True:
        scene = draw_scene(rng, processor, grid, (2, 4))
        examples = list(ask(rng, scene, num_questions))
        if len(examples) > 2:
            return scene, examples


def tensors_of(batch):
    for field in fields(batch):
        value = getattr(batch, field.name)
        yield from tensors_of(value) if isinstance(value, Cells) else [value]


def is_same(first, second):
    pairs = list(zip(tensors_of(first), tensors_of(second), strict=True))
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def answer_batches(processor, small_share=0.5, split="test"):
    curriculum = Curriculum(10, first_small_share=small_share, last_small_share=small_share)
    return AnswerBatches(processor, curriculum, batch_size=3, questions_a_picture=2, split=split)


def test_a_batch_is_the_same_each_time_and_unlike_its_neighbour(processor):
    for dataset in (ViewBatches(processor, 10, 5), answer_batches(processor, small_share=1.0)):
        third = dataset[3]
        dataset[4]
        assert is_same(third, dataset[3])
        assert not is_same(third, dataset[4])
        assert len(dataset) == 10
    assert not is_same(answer_batches(processor)[0], answer_batches(processor, split="other")[0])


@pytest.mark.parametrize("grid", ALL_GRIDS)
def test_a_packed_row_is_each_question_alone(processor, model, grid):
    scene, examples = scene_and_examples(processor, 1, grid)
    batch = collate([encode_row(processor, scene, examples)], processor.pad_id)
    with torch.no_grad():
        embeds = model.prepare_inputs_embeds(
            batch.input_ids, batch.images, batch.images_seq_mask, batch.images_spatial_crop
        )
        packed = model(
            inputs_embeds=embeds, attention_mask=batch.attention_mask(), position_ids=batch.position_ids
        ).logits[0]
    segments = batch.segments[0]
    for number, example in enumerate(examples, start=1):
        alone = processor.process_one(
            conversations=[
                {"role": USER, "content": f"{IMAGE}\n{example.question}"},
                {"role": ASSISTANT, "content": example.answer},
            ],
            images=[scene.draw()],
            inference_mode=False,
        )
        places = (segments == 0) | (segments == number)
        assert batch.input_ids[0][places].tolist() == alone.input_ids.tolist()
        own_labels = batch.labels[0][segments == number].tolist()
        assert own_labels == alone.target_ids[-len(own_labels) :].tolist()
        inputs = processor.batchify([alone])
        assert torch.equal(inputs["images"], batch.images)
        with torch.no_grad():
            expected = model(
                input_ids=inputs["input_ids"],
                images=inputs["images"],
                images_seq_mask=inputs["images_seq_mask"],
                images_spatial_crop=inputs["images_spatial_crop"],
            ).logits[0]
        torch.testing.assert_close(packed[places], expected, atol=1e-4, rtol=1e-4)
        assert expected.std(dim=0).mean() > 0.01  # positions differ, so that the comparison says something


def test_nothing_leaks_between_questions_or_into_the_picture(processor, model):
    scene, examples = scene_and_examples(processor, 2, ONE_TILE)
    batch = collate([encode_row(processor, scene, examples)], processor.pad_id)

    def logits(input_ids):
        with torch.no_grad():
            embeds = model.prepare_inputs_embeds(
                input_ids, batch.images, batch.images_seq_mask, batch.images_spatial_crop
            )
            options = {"attention_mask": batch.attention_mask(), "position_ids": batch.position_ids}
            return model(inputs_embeds=embeds, **options).logits[0]

    segments = batch.segments[0]
    changed_ids = batch.input_ids.clone()
    changed_ids[0, segments == 2] = processor.encode("star", bos=False)[0]
    before, after = logits(batch.input_ids), logits(changed_ids)
    torch.testing.assert_close(after[segments != 2], before[segments != 2], atol=1e-5, rtol=0)
    assert (after[segments == 2] - before[segments == 2]).abs().max() > 1e-3


def test_rows_pad_on_the_right_and_padding_teaches_nothing(processor):
    rows = []
    for seed, num_questions in ((3, 3), (4, 6)):
        scene, examples = scene_and_examples(processor, seed, TileGrid(2, 1), num_questions)
        rows.append(encode_row(processor, scene, examples))
    batch = collate(rows, processor.pad_id)
    shorter = min(range(2), key=lambda row: len(rows[row]["input_ids"]))
    length = len(rows[shorter]["input_ids"])
    assert length < batch.input_ids.shape[1]
    assert (batch.input_ids[shorter, length:] == processor.pad_id).all()
    assert (batch.labels[shorter, length:] == IGNORE_ID).all()
    assert (batch.segments[shorter, length:] == -1).all()
    mask = batch.attention_mask()
    assert mask.shape == (2, 1, batch.input_ids.shape[1], batch.input_ids.shape[1])
    assert not mask[shorter, 0, :length, length:].any()
    assert mask.any(dim=-1).all()  # a row that sees nothing would give NaN
    assert not mask.triu(1).any()
    assert batch.cells.shape_ids.shape == (2 * 3, 4, 4)


def test_labels_are_the_answers_and_their_end(processor):
    scene, examples = scene_and_examples(processor, 5, ONE_TILE, num_questions=6)
    row = encode_row(processor, scene, examples)
    labels, segments = np.array(row["labels"]), np.array(row["segments"])
    assert (labels[segments == 0] == IGNORE_ID).all()
    for number, example in enumerate(examples, start=1):
        own = labels[segments == number]
        learnt = own[own != IGNORE_ID]
        assert learnt[-1] == processor.eos_id
        assert processor.decode(learnt[:-1].tolist()) == example.answer
        ids = np.array(row["input_ids"])[segments == number]
        assert (ids[own != IGNORE_ID] == learnt).all()
        question = processor.decode(ids[own == IGNORE_ID].tolist())
        assert question == f"\n{example.question}\n\n{ASSISTANT}:"


def test_pictures_of_a_batch_have_one_grid_and_all_grids_come(processor):
    dataset = answer_batches(processor, small_share=0.3)
    seen = set()
    for index in range(10):
        batch = dataset[index]
        grids = {tuple(grid) for grid in batch.images_spatial_crop[:, 0].tolist()}
        assert len(grids) == 1
        grid = TileGrid(*grids.pop())
        seen.add(grid)
        assert batch.images.shape == (3, grid.num_views, 3, 112, 112)
        assert batch.cells.boxes.shape == (3 * grid.num_views, 4, 4, 4)
        assert batch.images_seq_mask.sum(dim=1).tolist() == [21 + 4 * grid.rows * (4 * grid.columns + 1)] * 3
    assert len(seen) >= 3
    assert answer_batches(processor, small_share=1.0)[7].images.shape[1] == 2


@pytest.mark.parametrize("grid", ALL_GRIDS)
def test_scenes_are_drawn_for_their_grid(processor, grid):
    rng = split_rng("test-sizes", 0)
    for _ in range(10):
        scene = draw_scene(rng, processor, grid, (1, 3))
        assert choose_grid(scene.size, 1, 112, processor.candidate_resolutions) == grid


def test_questions_leave_out_what_does_not_fit(processor):
    assert set(TASK_WEIGHTS) | {"describe"} == set(TASKS)
    rng = split_rng("test-ask", 0)
    empty = Scene(120, 100, GROUND, ())
    assert {example.task for _ in range(20) for example in ask(rng, empty, 5)} == {"count"}
    tasks = [example.task for _ in range(60) for example in ask(rng, draw_scene(rng, processor, ONE_TILE, (1, 4)), 6)]
    assert set(tasks) == set(TASKS)


def test_views_and_cells_of_a_view_batch_belong_together(processor):
    batch = ViewBatches(processor, 4, 12)[0]
    num_views = len(batch.views)
    assert 12 <= num_views <= 13
    assert batch.views.shape == (num_views, 3, 112, 112)
    assert batch.cells.shape_ids.shape == batch.cells.color_ids.shape == (num_views, 4, 4)
    assert batch.cells.boxes.shape == (num_views, 4, 4, 4)
    # A cell that sees nothing is plainer than one that sees an object.
    spread = batch.views.unflatten(2, (4, 28)).unflatten(4, (4, 28)).std(dim=(3, 5)).mean(dim=1)  # [V, G, G]
    is_object = batch.cells.shape_ids >= 0
    assert spread[is_object].mean() > 4 * spread[~is_object].mean()


def object_at(box, name="square", color="red", kind="shape"):
    return SceneObject(kind, name, color, box, (200, 30, 30))


def test_cells_of_a_known_scene(processor):
    """224x224 fills two by two tiles of 112 pixels; a cell of a tile is 28 pixels, one of the global view 56."""
    red_square = object_at((126.0, 14.0, 182.0, 98.0))
    word = object_at((28.0, 168.0, 84.0, 196.0), "CAT", "dark", "word")
    cells = cells_of(processor, Scene(224, 224, GROUND, (red_square, word)), TileGrid(2, 2))
    square_id, word_id, red = CELL_CLASSES.index("square"), CELL_CLASSES.index("word"), COLOR_NAMES.index("red")
    s, w = square_id, word_id
    # The square covers 42 and 14 of 56 pixels across, 42 and 42 down.
    assert cells.shape_ids[0].tolist() == [[-1, -1, s, s], [-1, -1, s, s], [-1, -1, -1, -1], [w, w, -1, -1]]
    upper_right, lower_left = 2, 3
    columns = [s, s, s, -1]  # covers 14, 28 and 14 of 28 pixels across
    assert cells.shape_ids[upper_right].tolist() == [columns, columns, columns, columns]
    assert cells.shape_ids[lower_left].tolist() == [[-1] * 4, [-1] * 4, [-1, w, w, -1], [-1] * 4]
    for empty in (1, 4):
        assert (cells.shape_ids[empty] == -1).all() and (cells.color_ids[empty] == -1).all()
    assert torch.equal(cells.color_ids == red, cells.shape_ids == square_id)
    assert (cells.color_ids[cells.shape_ids != square_id] == -1).all()  # a word has no colour
    as_parts = torch.tensor(red_square.box) / 224
    torch.testing.assert_close(cells.boxes[0, 0, 2], as_parts)
    in_tile = torch.tensor([14 / 112, 14 / 112, 70 / 112, 98 / 112])
    torch.testing.assert_close(cells.boxes[upper_right, 1, 1], in_tile)
    torch.testing.assert_close(cells.boxes[lower_left, 2, 1], torch.tensor([28 / 112, 56 / 112, 84 / 112, 84 / 112]))


def test_a_box_reaches_beyond_its_tile(processor):
    scene = Scene(224, 224, GROUND, (object_at((56.0, 56.0, 168.0, 140.0)),))
    cells = cells_of(processor, scene, TileGrid(2, 2))
    torch.testing.assert_close(cells.boxes[1, 3, 3], torch.tensor([0.5, 0.5, 1.5, 1.25]))
    torch.testing.assert_close(cells.boxes[4, 0, 0], torch.tensor([-0.5, -0.5, 0.5, 0.25]))


def painted_box(processor, scene, grid, number):
    """Where an object's box lies in each view, found in pixels: [V, 4], NaN where there is nothing of it."""
    mask = Image.new("RGB", scene.size)
    empty_views = processor.image_transform.views(mask, grid, 112)
    x1, y1, x2, y2 = scene.objects[number].box
    ImageDraw.Draw(mask).rectangle((x1, y1, x2 - 1, y2 - 1), fill="white")
    boxes = []
    for view, empty in zip(processor.image_transform.views(mask, grid, 112), empty_views, strict=True):
        rows, columns = torch.nonzero(view[0] - empty[0] > 1.0, as_tuple=True)  # half of black to white
        found = len(rows) > 0
        edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if found else [float("nan")] * 4
        boxes.append([float(edge) for edge in edges])
    return torch.tensor(boxes)


@pytest.mark.parametrize("grid", ALL_GRIDS)
def test_cells_agree_with_the_pixels_of_the_views(processor, grid):
    """Every object's box goes through the processor as a picture, and comes out where the cells say."""
    rng = split_rng("test-cells", ALL_GRIDS.index(grid))
    num_compared = 0
    for _ in range(4):
        scene = draw_scene(rng, processor, grid, (2, 4))
        cells = cells_of(processor, scene, grid)
        fit = letterbox(scene.size, (112, 112))
        told = cells.boxes * 112
        told[0] = cells.boxes[0] * torch.tensor([fit.width, fit.height] * 2)
        told[0] += torch.tensor([fit.left, fit.top] * 2)
        for number, item in enumerate(scene.objects):
            kind = CELL_CLASSES.index(item.name if item.kind == "shape" else item.kind)
            for view, painted in enumerate(painted_box(processor, scene, grid, number)):
                if painted.isnan().any():
                    assert view > 0  # the global view shows everything
                    continue
                # Cells whose box, cut at the edges of the view, is the painted one.
                differences = (told[view].clamp(0, 112) - painted).abs().amax(dim=-1)
                is_own = (cells.shape_ids[view] == kind) & (differences <= 1.1)
                # What fills no part of a cell to speak of, or less than a neighbour, is not told.
                is_large = min(painted[2] - painted[0], painted[3] - painted[1]) > 28
                assert is_own.any() or not is_large
                num_compared += int(is_own.any())
                rows, columns = torch.nonzero(is_own, as_tuple=True)
                assert (columns * 28 < painted[2]).all() and (columns * 28 + 28 > painted[0]).all()
                assert (rows * 28 < painted[3]).all() and (rows * 28 + 28 > painted[1]).all()
    assert num_compared >= 8


def test_curriculum():
    curriculum = Curriculum(100)
    assert [curriculum.num_objects(batch) for batch in (0, 6, 7, 24, 25, 99)] == [
        (1, 2),
        (1, 2),
        (1, 3),
        (1, 5),
        (1, 6),
        (1, 6),
    ]
    assert [curriculum.small_share(batch) for batch in (0, 50, 100)] == pytest.approx([0.8, 0.55, 0.3])
    last = Curriculum(100, growing_share=0.0, first_num_objects=6, first_small_share=0.3)
    assert last.num_objects(0) == last.num_objects(99) == (1, 6)
    assert last.small_share(0) == last.small_share(99) == pytest.approx(0.3)
