"""nano's batches: drawn from a seed alone; a packed row teaches exactly the single questions that it holds."""

from dataclasses import fields, is_dataclass

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
    Curriculum,
    ViewBatches,
    ask,
    cell_places,
    cells_of,
    collate,
    draw_scene,
    encode_row,
    join_cells,
    pointed_objects,
)
from deepseek_vl2.nano.questions import (
    CELL_CLASSES,
    TASKS,
    Example,
    format_grounding,
    quantize_box,
    split_rng,
)
from deepseek_vl2.nano.scenes import COLOR_NAMES, Background, Scene, SceneObject

GROUND = Background("plain", (255, 255, 255), (255, 255, 255), True, 8)
ALL_GRIDS = (ONE_TILE, *LARGER_GRIDS)
MANY_TOKENS = 1000


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
        yield from tensors_of(value) if is_dataclass(value) else [value]


def is_same(first, second):
    pairs = list(zip(tensors_of(first), tensors_of(second), strict=True))
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def answer_batches(processor, small_share=0.5, split="test"):
    curriculum = Curriculum(10, first_small_share=small_share, last_small_share=small_share)
    return AnswerBatches(processor, curriculum, batch_size=3, tokens_a_picture=70, split=split)


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
    batch = collate([encode_row(processor, scene, examples, MANY_TOKENS)], processor.pad_id)
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
    batch = collate([encode_row(processor, scene, examples, MANY_TOKENS)], processor.pad_id)

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
        rows.append(encode_row(processor, scene, examples, MANY_TOKENS))
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
    row = encode_row(processor, scene, examples, MANY_TOKENS)
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
    # Most cells that see nothing are plain; the rest hold a corner of something.
    spread = batch.views.unflatten(2, (4, 28)).unflatten(4, (4, 28)).std(dim=(3, 5)).mean(dim=1)  # [V, G, G]
    is_object = batch.cells.shape_ids >= 0
    assert spread[is_object].median() > 10 * spread[~is_object].median()


def object_at(box, name="square", color="red", kind="shape"):
    return SceneObject(kind, name, color, box, (200, 30, 30))


def test_cells_of_a_known_scene(processor):
    """224x224 fills two by two tiles of 112 pixels; a cell of a tile is 28 pixels, one of the global view 56."""
    red_square = object_at((126.0, 14.0, 182.0, 98.0))
    word = object_at((28.0, 168.0, 84.0, 196.0), "CAT", "dark", "word")
    cells = cells_of(processor, Scene(224, 224, GROUND, (red_square, word)), TileGrid(2, 2), is_by_view=True)
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
    cells = cells_of(processor, scene, TileGrid(2, 2), is_by_view=True)
    torch.testing.assert_close(cells.boxes[1, 3, 3], torch.tensor([0.5, 0.5, 1.5, 1.25]))
    torch.testing.assert_close(cells.boxes[4, 0, 0], torch.tensor([-0.5, -0.5, 0.5, 0.25]))


def test_for_answers_boxes_are_parts_of_the_picture_in_all_views(processor):
    items = (object_at((56.0, 56.0, 168.0, 140.0)), object_at((0.0, 200.0, 56.0, 224.0), "star", "blue"))
    cells = cells_of(processor, Scene(224, 224, GROUND, items), TileGrid(2, 2), is_by_view=False)
    assert set(cells.object_ids.unique().tolist()) == {-1, 0, 1}
    assert torch.equal(cells.object_ids >= 0, cells.shape_ids >= 0)
    for number, item in enumerate(items):
        is_own = cells.object_ids == number
        assert is_own[0].any() and is_own[1:].any()
        torch.testing.assert_close(cells.boxes[is_own], torch.tensor(item.box).expand(int(is_own.sum()), 4) / 224)


def test_the_middle_of_an_object_is_one_cell_of_the_global_view_and_one_of_the_tiles(processor):
    """224x224 in two by two tiles: cells of tiles are 28 pixels, those of the global view 56."""
    square = object_at((100.0, 20.0, 200.0, 120.0))  # middle 150, 70
    circle = object_at((4.0, 144.0, 24.0, 220.0), "circle")  # middle 14, 182
    cells = cells_of(processor, Scene(224, 224, GROUND, (square, circle)), TileGrid(2, 2), is_by_view=False)
    centers = [tuple(place) for place in torch.nonzero(cells.is_center).tolist()]
    upper_right, lower_left = 2, 3
    assert centers == [(0, 1, 2), (0, 3, 0), (upper_right, 2, 1), (lower_left, 2, 0)]
    assert cells.object_ids[cells.is_center].tolist() == [0, 1, 0, 1]


def test_a_hidden_object_has_no_middle(processor):
    sliver, neighbour = object_at((0.0, 0.0, 224.0, 2.0)), object_at((0.0, 4.0, 224.0, 112.0), "circle")
    cells = cells_of(processor, Scene(224, 224, GROUND, (sliver, neighbour)), TileGrid(2, 2), is_by_view=False)
    assert cells.object_ids[cells.is_center].tolist() == [1, 1]


def test_chosen_and_joined_cells(processor):
    scene = Scene(224, 224, GROUND, (object_at((56.0, 56.0, 168.0, 140.0)),))
    cells = cells_of(processor, scene, TileGrid(2, 2), is_by_view=True)
    assert is_same(join_cells([cells.chosen([0, 1]), cells.chosen([2, 3, 4])]), cells)


@pytest.mark.parametrize("grid", ALL_GRIDS)
def test_cell_places_are_those_of_the_model(processor, model, grid):
    """Each cell is filled with its own number, and found among the image tokens where it should be."""
    num_cells = grid.num_views * 16
    features = torch.arange(1.0, num_cells + 1).view(grid.num_views, 16, 1).expand(-1, -1, 192)
    tokens = model._arrange_views(features, grid)
    assert tokens[cell_places(grid, 4), 0].tolist() == list(range(1, num_cells + 1))


TWO_CIRCLES = Scene(
    224,
    224,
    GROUND,
    (
        object_at((120.0, 120.0, 200.0, 200.0), "circle", "blue"),
        object_at((10.0, 10.0, 90.0, 90.0), "circle", "blue"),
        object_at((120.0, 20.0, 180.0, 60.0), "CAT", "dark", "word"),
    ),
)


def example_of(task, answer, targets, has_boxes):
    items = tuple(TWO_CIRCLES.objects[target] for target in targets)
    return Example(task, "?", answer, [item.box for item in items] if has_boxes else [], items, TWO_CIRCLES)


@pytest.mark.parametrize(
    ("task", "targets", "labels", "expected"),
    [
        # mark, word, word, mark, mark, brackets, four numbers with commas between, brackets, mark, end
        ("locate", [0], ["blue circle"], "......0.0.0.0..."),
        ("locate_all", [1, 0], ["blue circle"], "......1.1.1.1.0.0.0.0..."),
        ("describe", [1, 2], ["blue circle", "word CAT"], None),
    ],
)
def test_coordinates_and_labels_are_about_their_object(processor, task, targets, labels, expected):
    items = [TWO_CIRCLES.objects[target] for target in targets]
    groups = [[item.box for item in items]] if len(labels) == 1 else [[item.box] for item in items]
    answer = ", ".join(
        format_grounding(label, boxes, TWO_CIRCLES.size) for label, boxes in zip(labels, groups, strict=True)
    )
    ids = processor.encode(answer, bos=False, eos=True)
    found = pointed_objects(processor, example_of(task, answer, targets, True), ids)
    assert len(found) == len(ids) and all(len(objects) <= 1 for objects in found)
    if expected is not None:
        assert "".join(str(objects[0]) if objects else "." for objects in found) == expected
        return
    told = [(objects[0], token) for objects, token in zip(found, ids, strict=True) if objects]
    for target, label in zip(targets, labels, strict=True):
        own = [token for number, token in told if number == target]
        coordinates = quantize_box(TWO_CIRCLES.objects[target].box, TWO_CIRCLES.size)
        assert processor.decode(own) == label + "".join(map(str, coordinates))


@pytest.mark.parametrize(
    ("task", "answer", "targets", "expected"),
    [
        ("count", "2", [0, 1], [[0, 1], []]),
        ("count", "0", [], [[], []]),
        ("color", "blue", [1], [[1], []]),
        ("read", "CAT", [2], [[2], [2], [2], []]),
    ],
)
def test_words_are_about_what_is_asked(processor, task, answer, targets, expected):
    ids = processor.encode(answer, bos=False, eos=True)
    assert pointed_objects(processor, example_of(task, answer, targets, False), ids) == expected


def test_pointings_go_from_the_token_before(processor):
    """A count leaves a part with the beginning, so that the rest tells how many there are; a box takes all."""
    box = format_grounding("word", [TWO_CIRCLES.objects[2].box], TWO_CIRCLES.size)
    examples = [
        example_of("count", "2", [0, 1], False),
        example_of("count", "0", [], False),
        example_of("locate", box, [2], True),
    ]
    row = encode_row(processor, TWO_CIRCLES, examples, MANY_TOKENS)
    batch = collate([row, row], processor.pad_id)
    pointings = batch.pointings
    assert pointings.rows.tolist() == [0] * 6 + [1] * 6
    assert torch.equal(pointings.shares[:6], pointings.shares[6:])
    expected = [[0.6, 0.2, 0.2, 0], [1, 0, 0, 0]] + [[0, 0, 0, 1]] * 4
    torch.testing.assert_close(pointings.shares[:6], torch.tensor(expected, dtype=torch.float))
    assert pointings.is_count[:6].tolist() == [True, True, False, False, False, False]
    assert pointings.weights[:6].tolist() == [1, 1, 0.25, 0.25, 0.25, 0.25]
    answers = batch.labels[pointings.rows, pointings.positions + 1]
    assert (answers != IGNORE_ID).all()
    numbers = [str(value) for value in quantize_box(TWO_CIRCLES.objects[2].box, TWO_CIRCLES.size)]
    assert [processor.decode([token]) for token in answers[:6].tolist()] == ["2", "0", *numbers]
    is_cell = torch.zeros_like(batch.images_seq_mask).scatter_(1, batch.cell_positions, True)
    assert is_cell.sum(dim=1).tolist() == [5 * 16] * 2
    assert not (is_cell & ~batch.images_seq_mask).any()


def test_nothing_is_pointed_at_where_no_image_token_sees_it(processor):
    """A neighbour fills more of every cell than the sliver that is asked for."""
    sliver, neighbour = object_at((0.0, 0.0, 224.0, 2.0)), object_at((0.0, 4.0, 224.0, 112.0), "circle")
    scene = Scene(224, 224, GROUND, (sliver, neighbour))
    example = Example("color", "?", "red", [], (sliver,), scene)
    assert encode_row(processor, scene, [example], MANY_TOKENS)["pointings"] == []


def test_questions_fill_a_row_up_to_its_end(processor):
    scene, examples = scene_and_examples(processor, 6, ONE_TILE, num_questions=9)
    whole = encode_row(processor, scene, examples, MANY_TOKENS)
    lengths = [whole["segments"].count(number) for number in range(1, len(examples) + 1)]
    limit = sum(lengths) - 1
    part = encode_row(processor, scene, examples, limit)
    assert 0 < max(part["segments"]) < len(examples)
    num_tokens = len(part["segments"]) - part["segments"].count(0)
    assert limit - max(lengths) < num_tokens <= limit
    none = encode_row(processor, scene, examples, min(lengths) - 1)
    assert set(none["segments"]) == {0} and none["pointings"] == []


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
        cells = cells_of(processor, scene, grid, is_by_view=True)
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
    objects = [curriculum.num_objects(batch) for batch in (0, 16, 17, 49, 50, 99)]
    assert objects == [(1, 3), (1, 3), (1, 4), (1, 5), (1, 6), (1, 6)]
    assert [curriculum.small_share(batch) for batch in (0, 10, 50, 99)] == pytest.approx([1.0, 0.83, 0.15, 0.15])
    last = Curriculum(100, growing_share=0.0)
    assert last.num_objects(0) == last.num_objects(99) == (1, 6)
    assert last.small_share(0) == last.small_share(99) == pytest.approx(0.15)
