"""nano's batches: drawn from a seed alone; a packed row teaches exactly the conversations that it holds."""

import itertools
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch

from deepseek_vl2.models.special_tokens import ASSISTANT, DET_END, DET_START, IMAGE, USER
from deepseek_vl2.models.tiling import TileGrid, choose_grid
from deepseek_vl2.nano import batches, questions
from deepseek_vl2.nano.architecture import nano_processor, untrained_nano
from deepseek_vl2.nano.batches import (
    BEGINNING_SHARE,
    CHART_QUESTIONS,
    IGNORE_ID,
    SHAPE_QUESTIONS,
    TEXT_QUESTIONS,
    AnswerBatches,
    Curriculum,
    RowCells,
    ViewBatches,
    ask,
    cell_places,
    collate,
    encode_row,
)
from deepseek_vl2.nano.drawing import LARGER_GRIDS, ONE_TILE, draw_scene
from deepseek_vl2.nano.questions import (
    Example,
    Piece,
    Target,
    format_grounding,
    grounding_pieces,
    quantize_box,
    split_rng,
)
from deepseek_vl2.nano.scenes import COLOR_NAMES, SHAPE_NAMES, Background, Scene, SceneObject, random_scene
from deepseek_vl2.nano.several import compared_scenes, in_context_scenes, make_compare, make_in_context
from deepseek_vl2.nano.targets import CELL_CLASSES, SIGNS, cells_of
from deepseek_vl2.nano.tasks import TASKS

GROUND = Background("plain", (255, 255, 255), (255, 255, 255), True, 8)
ALL_GRIDS = (ONE_TILE, *LARGER_GRIDS)
TWO_BY_TWO = TileGrid(2, 2)
MANY_TOKENS = 1000
# What rows of several pictures are drawn for: their grids, and how they begin.
NUMBERED = "This is image_1: <image>\nThis is image_2: <image>\nThis is image_3: <image>"
BEGINNINGS = {1: IMAGE, 2: f"{IMAGE}\n{IMAGE}", 3: f"{IMAGE}\n{IMAGE}\n{IMAGE}"}


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


def some(make, rng, draw, number):
    """The first scene about which so many questions fit, and these."""
    while True:
        scenes = draw(rng)
        found = [example for example in (make(rng, scenes) for _ in range(4 * number)) if example is not None]
        if len(found) >= number:
            return scenes, found[:number]


def one_picture(seed, grid, number=3, processor=None):
    def questions_of(rng, scene):
        return next(iter(ask(rng, scene, 1)), None)

    scene, examples = some(
        questions_of, split_rng("test-one", seed), lambda rng: draw_scene(rng, processor, grid, (2, 4)), number
    )
    return [scene], examples


def row_of(kind, processor):
    """Pictures, conversations about them, and whether the pictures are numbered."""
    rng = split_rng(f"test-{kind}", 0)
    if isinstance(kind, TileGrid):
        return *one_picture(1, kind, processor=processor), False
    if kind == "history":
        draw, make = (lambda rng: random_scene(rng, size=(224, 112), num_objects=(2, 3))), questions.make_follow_up
        scene, examples = some(make, rng, draw, 3)
        return [scene], examples, False
    if kind == "later":
        first = random_scene(rng, size=(100, 112), num_objects=(2, 3))
        opening = questions.make_describe(rng, first)
        second, examples = some(questions.make_locate, rng, lambda rng: random_scene(rng, size=(224, 224)), 3)
        return [first, second], [example.about_a_further_picture(opening) for example in examples], False
    if kind == "two":
        # The first one is one tile, the second has four.
        scenes, examples = some(
            make_in_context, rng, lambda rng: in_context_scenes(rng, sizes=((100, 112), (224, 224))), 2
        )
        return scenes, examples, False
    sizes = ((112, 112), (300, 200), (90, 110))
    scenes, examples = some(make_compare, rng, lambda rng: compared_scenes(rng, sizes=sizes), 3)
    return scenes, examples, kind == "numbered"


def embeds_of(model, batch):
    return model.prepare_inputs_embeds(batch.input_ids, batch.images, batch.images_seq_mask, batch.images_spatial_crop)


@torch.no_grad()
def logits_of(model, batch):
    options = {"attention_mask": batch.attention_mask(), "position_ids": batch.position_ids}
    return model(inputs_embeds=embeds_of(model, batch), **options).logits


def tensors_of(batch):
    for field in fields(batch):
        value = getattr(batch, field.name)
        yield from tensors_of(value) if is_dataclass(value) else [value]


def is_same(first, second):
    pairs = list(zip(tensors_of(first), tensors_of(second), strict=True))
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def answer_batches(processor, small_share=0.5, split="test", batch_size=3):
    curriculum = Curriculum(10, first_small_share=small_share, last_small_share=small_share)
    return AnswerBatches(processor, curriculum, batch_size=batch_size, max_tokens=90, split=split)


def test_a_batch_is_the_same_each_time_and_unlike_its_neighbour(processor):
    for dataset in (ViewBatches(processor, 10, 5), answer_batches(processor, small_share=1.0)):
        third = dataset[3]
        dataset[4]
        assert is_same(third, dataset[3])
        assert not is_same(third, dataset[4])
        assert len(dataset) == 10
    assert not is_same(answer_batches(processor)[0], answer_batches(processor, split="other")[0])


@pytest.mark.parametrize("kind", [*ALL_GRIDS, "history", "later", "two", "three", "numbered"], ids=str)
def test_a_packed_row_is_each_conversation_alone(processor, model, kind):
    scenes, examples, is_numbered = row_of(kind, processor)
    batch = collate([encode_row(processor, scenes, examples, MANY_TOKENS, is_numbered)], processor.pad_id)
    packed, segments = logits_of(model, batch)[0], batch.segments[0]
    assert int(segments.max()) == len(examples) > 1
    for number, example in enumerate(examples, start=1):
        beginnings = [f"{NUMBERED if is_numbered else BEGINNINGS[len(scenes)]}\n", ""]
        if kind == "later":
            beginnings = [f"{IMAGE}\n"] * 2
        messages = []
        for turn, beginning in zip((*example.history, example), beginnings, strict=False):
            content = f"{beginning}{turn.question}"
            messages += [{"role": USER, "content": content}, {"role": ASSISTANT, "content": turn.answer}]
        pictures = [scene.draw() for scene in scenes]
        alone = processor.process_one(conversations=messages, images=pictures, inference_mode=False)
        places = (segments == 0) | (segments == number)
        assert batch.input_ids[0][places].tolist() == alone.input_ids.tolist()
        own_labels = batch.labels[0][segments == number].tolist()
        assert own_labels == alone.target_ids[-len(own_labels) :].tolist()
        inputs = processor.batchify([alone])
        assert torch.equal(inputs["images"], batch.images)
        names = ("input_ids", "images", "images_seq_mask", "images_spatial_crop")
        with torch.no_grad():
            expected = model(**{name: inputs[name] for name in names}).logits[0]
        torch.testing.assert_close(packed[places], expected, atol=1e-4, rtol=1e-4)
        assert expected.std(dim=0).mean() > 0.01  # positions differ, so that the comparison says something


@pytest.mark.parametrize("kind", ["history", "later", "two", "numbered"])
def test_nothing_leaks_between_conversations_or_into_the_pictures(processor, model, kind):
    scenes, examples, is_numbered = row_of(kind, processor)
    batch = collate([encode_row(processor, scenes, examples, MANY_TOKENS, is_numbered)], processor.pad_id)
    segments = batch.segments[0]
    before = logits_of(model, batch)[0]
    batch.input_ids = batch.input_ids.clone()
    batch.input_ids[0, segments == 2] = processor.encode("star", bos=False)[0]
    after = logits_of(model, batch)[0]
    torch.testing.assert_close(after[segments != 2], before[segments != 2], atol=1e-5, rtol=0)
    assert (after[segments == 2] - before[segments == 2]).abs().max() > 1e-3


def test_a_later_turn_sees_the_earlier_one(processor, model):
    scenes, examples, _ = row_of("history", processor)
    batch = collate([encode_row(processor, scenes, examples[:1], MANY_TOKENS)], processor.pad_id)
    before = logits_of(model, batch)[0]
    first_answer = (batch.question_ids[0] == 1).nonzero()[0]
    batch.input_ids[0, first_answer] = processor.encode("star", bos=False)[0]
    changed = (logits_of(model, batch)[0] - before).abs().amax(dim=-1) > 1e-5
    assert changed[batch.question_ids[0] == 2].all() and not changed[: int(first_answer)].any()


def test_rows_pad_on_the_right_and_padding_teaches_nothing(processor):
    rows = []
    for seed, number in ((3, 2), (4, 5)):
        scenes, examples = one_picture(seed, TileGrid(2, 1), number, processor)
        rows.append(encode_row(processor, scenes, examples, MANY_TOKENS))
    batch = collate(rows, processor.pad_id)
    shorter = min(range(2), key=lambda row: len(rows[row]["input_ids"]))
    length = len(rows[shorter]["input_ids"])
    assert length < batch.input_ids.shape[1]
    assert (batch.input_ids[shorter, length:] == processor.pad_id).all()
    assert (batch.labels[shorter, length:] == IGNORE_ID).all()
    assert (batch.segments[shorter, length:] == -1).all()
    assert (batch.question_ids[shorter, length:] == 0).all()
    mask = batch.attention_mask()
    assert mask.shape == (2, 1, batch.input_ids.shape[1], batch.input_ids.shape[1])
    assert not mask[shorter, 0, :length, length:].any()
    assert mask.any(dim=-1).all()  # a row that sees nothing would give NaN
    assert not mask.triu(1).any()
    assert batch.cells.class_ids.shape == (2 * 3, 4, 4)


def test_rows_of_fewer_views_are_filled_up(processor, model):
    """One row of three views, one of five: each row's pictures come out as they do alone."""
    rows = []
    for seed, grid in ((7, TileGrid(1, 2)), (8, TWO_BY_TWO)):
        scenes, examples = one_picture(seed, grid, 2, processor)
        rows.append(encode_row(processor, scenes, examples, MANY_TOKENS))
    batch = collate(rows, processor.pad_id)
    assert batch.images.shape[:2] == (2, 5) and not batch.images[0, 3:].any()
    assert batch.images_spatial_crop.tolist() == [[[1, 2]], [[2, 2]]]
    assert batch.cells.object_ids.shape == (3 + 5, 4, 4)
    assert batch.cell_rows.tolist() == [0] * 48 + [1] * 80
    with torch.no_grad():
        together = embeds_of(model, batch)
        for number, row in enumerate(rows):
            alone = collate([row], processor.pad_id)
            own = embeds_of(model, alone)[0]
            torch.testing.assert_close(together[number, : len(own)], own)
            num_cells = len(row["cell_positions"])
            assert batch.cell_positions[batch.cell_rows == number].tolist() == row["cell_positions"]
            assert batch.cell_table[number, :num_cells].tolist() == row["cell_positions"]
            assert not batch.cell_table[number, num_cells:].any()


@pytest.mark.parametrize("kind", [TileGrid(1, 1), "history"], ids=str)
def test_labels_are_the_answers_and_their_ends(processor, kind):
    scenes, examples, _ = row_of(kind, processor)
    row = encode_row(processor, scenes, examples, MANY_TOKENS)
    labels, segments = np.array(row["labels"]), np.array(row["segments"])
    question_ids, ids = np.array(row["question_ids"]), np.array(row["input_ids"])
    assert (labels[segments == 0] == IGNORE_ID).all()
    assert ((question_ids > 0) == (labels != IGNORE_ID)).all()
    question = 0
    for segment, example in enumerate(examples, start=1):
        asked = processor.decode(ids[(segments == segment) & (question_ids == 0)].tolist())
        turns = (*example.history, example)
        texts = [f"{turn.question}\n\n{ASSISTANT}:" for turn in turns]
        assert asked == "\n" + f"{USER}: ".join(texts)
        for turn in turns:
            question += 1
            learnt = labels[question_ids == question]
            assert (segments[question_ids == question] == segment).all()
            assert learnt[-1] == processor.eos_id
            assert processor.decode(learnt[:-1].tolist()) == turn.answer
            assert (ids[question_ids == question] == learnt).all()
    assert question_ids.max() == question


def test_pictures_are_tiled_as_asked_and_all_grids_come(processor, monkeypatch):
    monkeypatch.setattr(batches, "NUM_PICTURES", {1: 1})
    dataset, seen = answer_batches(processor, small_share=0.3, batch_size=2), set()
    for index in range(8):
        batch = dataset[index]
        grids = [TileGrid(*grid) for grid in batch.images_spatial_crop[:, 0].tolist()]
        seen |= set(grids)
        # Rows of a batch are all of one tile, or none is.
        assert len({grid == ONE_TILE for grid in grids}) == 1
        assert batch.images.shape == (2, max(grid.num_views for grid in grids), 3, 112, 112)
        assert batch.cells.boxes.shape == (sum(grid.num_views for grid in grids), 4, 4, 4)
        num_tokens = [21 + 4 * grid.rows * (4 * grid.columns + 1) for grid in grids]
        assert batch.images_seq_mask.sum(dim=1).tolist() == num_tokens
    assert len(seen) >= 3 and ONE_TILE in seen
    assert answer_batches(processor, small_share=1.0)[7].images.shape[1] == 2


def text_before(processor, batch, row, position):
    """What the conversation at a position says up to there, and the token after it."""
    is_own = batch.question_ids[row] == batch.question_ids[row, position + 1]
    is_own[position + 1 :] = False
    ids = batch.input_ids[row]
    return processor.decode(ids[is_own].tolist()), processor.decode([int(ids[position + 1])])


def check_pointing(batch, text, token, groups, shares, half):
    """Compares the cells that are pointed at with the token that they shall give; returns what was compared."""
    cells = batch.cells
    every = torch.cat(groups) if groups else torch.zeros(0, dtype=torch.long)
    boxes, letters = cells.boxes.flatten(0, 2), cells.letters.flatten(0, 2)
    if text.count(DET_START) > text.count(DET_END):
        # The cells of one object, whose edge is the number.
        place = text[text.rindex("[") + 1 :].count(",")
        assert len(groups) == 1 and shares == [0, 1]
        assert ((boxes[every, place] * 999).round() == int(token)).all()
        return "coordinate"
    if shares[0] > 0:
        assert len(groups) == int(token) and shares[0] == pytest.approx(BEGINNING_SHARE / (len(groups) + 3))
        # One cell of a tile each: the middle of the object.
        assert all(len(group) == 1 for group in groups) and cells.is_center.flatten()[every].all()
        return "count"
    if text.endswith("_"):
        return "picture"
    if (cells.bar_values.flatten()[every] >= 0).all():
        values = set(cells.bar_values.flatten()[every].tolist())
        if token.isdigit():
            assert len(values) == 1 and token in str(*values)
            return "bar"
    if token in SIGNS and len(token) == 1:
        # What the first half of the heads looks at is the first of a cell's letters, the rest is for the second half.
        slots = letters[every, :1] if half == 0 else letters[every, 1:]
        assert len(groups) == 1 and (slots == SIGNS.index(token)).any(dim=1).all()
        return "letter" if half == 0 else "later letter"
    word = token.strip()
    if word in SHAPE_NAMES:
        assert (cells.class_ids.flatten()[every] == CELL_CLASSES.index(word)).all()
        return "shape"
    if word in COLOR_NAMES:
        assert (cells.color_ids.flatten()[every] == COLOR_NAMES.index(word)).all()
        return "color"
    return "other"


@pytest.mark.parametrize(
    ("num_pictures", "expected"),
    [
        (1, {"coordinate", "count", "letter", "later letter", "shape", "color", "bar"}),
        (2, {"coordinate", "shape"}),
        (3, {"count", "picture", "shape", "color"}),
    ],
)
def test_attention_is_told_to_go_where_the_next_token_is_seen(processor, monkeypatch, num_pictures, expected):
    monkeypatch.setattr(batches, "NUM_PICTURES", {num_pictures: 1})
    compared = set()
    dataset = answer_batches(processor, small_share=0.2, split="test-pointing", batch_size=6)
    for index in range(14 if num_pictures == 1 else 2):
        batch = dataset[index]
        pointings, firsts = batch.pointings, torch.bincount(batch.cell_rows).cumsum(0).roll(1)
        firsts[0] = 0
        assert len(batch.input_ids) == (3 if num_pictures == 2 and batch.images.shape[1] > 4 else 6)
        assert batch.images_spatial_crop.shape[1] == num_pictures
        torch.testing.assert_close(pointings.shares.sum(dim=2), torch.ones(2, len(pointings.rows)))
        for half, (number, (row, position)) in itertools.product(
            range(2), enumerate(zip(pointings.rows, pointings.positions, strict=True))
        ):
            assert batch.labels[row, position + 1] != IGNORE_ID
            ids, shares = pointings.group_ids[half, number], pointings.shares[half, number].tolist()
            num_groups = int(ids.max()) + 1
            assert not any(shares[1 + num_groups :])
            groups = [(ids == group).nonzero()[:, 0] + firsts[row] for group in range(num_groups)]
            assert all(len(group) and (batch.cell_rows[group] == row).all() for group in groups)
            text, token = text_before(processor, batch, row, int(position))
            if shares[0] == 1 and token in SIGNS and pointings.shares[1 - half, number, 0] == 0:
                continue  # a letter that the other half looks at
            found = check_pointing(batch, text, token, groups, shares[: 1 + num_groups], half)
            if found == "picture":
                # Three pictures of one tile each: 32 cells a picture.
                assert {int(cell - firsts[row]) // 32 for group in groups for cell in group} == {int(token) - 1}
            compared.add(found)
        # Pointings of a question weigh 1 together.
        asked = batch.question_ids[pointings.rows, pointings.positions + 1] + 1000 * pointings.rows
        for question in asked.unique():
            assert pointings.weights[asked == question].sum().item() == pytest.approx(1)
        is_cell = batch.images_seq_mask[batch.cell_rows, batch.cell_positions]
        assert is_cell.all() and len(is_cell) == batch.cells.object_ids.numel()
    assert compared - {"other"} >= expected


@pytest.mark.parametrize("kind", ["two", "later"])
def test_cells_of_several_pictures_follow_each_other(processor, kind):
    """The picture's tokens are runs in the text: cells lie in the run of their own picture as they do alone."""
    scenes, examples, _ = row_of(kind, processor)
    row = encode_row(processor, scenes, examples, MANY_TOKENS)
    mask = np.array([False, *row["images_seq_mask"]], int)
    starts = np.flatnonzero(np.diff(mask) == 1).tolist()
    grids = [TileGrid(*grid) for grid in row["grids"]]
    assert grids == [ONE_TILE, TWO_BY_TWO] and len(starts) == 2
    expected = [start + place for start, grid in zip(starts, grids, strict=True) for place in cell_places(grid, 4)]
    assert row["cell_positions"] == expected
    own = [cells_of(processor, scene, grid, False).object_ids for scene, grid in zip(scenes, grids, strict=True)]
    assert torch.equal(row["cells"].object_ids, torch.cat(own))


@pytest.mark.parametrize("grid", ALL_GRIDS)
def test_scenes_are_drawn_for_their_grid(processor, grid):
    rng = split_rng("test-sizes", 0)
    for _ in range(10):
        scene = draw_scene(rng, processor, grid, (1, 3))
        assert choose_grid(scene.size, 1, 112, processor.candidate_resolutions) == grid


def test_all_kinds_of_scenes_come(processor):
    found = {"bars": 0, "table": 0, "texts": 0, "marked": 0, "small": 0}
    for seed in range(200):
        scene = draw_scene(split_rng("test-kinds", seed), processor, TWO_BY_TWO, (1, 5))
        sides = [side for item in scene.shapes for side in (item.box[2] - item.box[0], item.box[3] - item.box[1])]
        found["bars"] += bool(scene.bars)
        found["table"] += any(item.row for item in scene.objects)
        found["texts"] += len(scene.texts) > 1 and not scene.bars and not any(item.row for item in scene.objects)
        found["marked"] += scene.marked is not None
        found["small"] += bool(sides) and 12 * max(sides) <= min(scene.size)
    assert min(found.values()) >= 3, found
    assert all(found[name] > 10 for name in ("bars", "table", "texts"))


def test_a_curriculum_chooses_what_single_pictures_show(processor):
    for kind, is_shown in (("chart", lambda scene: bool(scene.bars)), ("counting", lambda scene: not scene.texts)):
        scenes = [draw_scene(split_rng("test", seed), processor, ONE_TILE, (1, 6), {kind: 1}) for seed in range(8)]
        assert all(is_shown(scene) for scene in scenes)
    curriculum = Curriculum(1, growing_share=0.0, scene_kinds={"table": 1})
    dataset = AnswerBatches(processor, curriculum, 4, MANY_TOKENS, split="test-tables")
    of_tables = [batch for batch in map(dataset.__getitem__, range(8)) if (batch.cells.row_ids >= 0).any()]
    assert len(of_tables) >= 4  # the others have several pictures
    curriculum = Curriculum(1, growing_share=0.0, num_pictures={1: 1}, scene_kinds={"page": 1})
    of_pages = AnswerBatches(processor, curriculum, 8, MANY_TOKENS, split="test-pages")[0]
    assert len(set(of_pages.cell_rows.tolist())) == 8 and of_pages.images_spatial_crop.shape[1] == 1
    # A page has more letters than a scene of a few texts.
    assert (of_pages.cells.letters >= 0).sum() / 8 > 20


@pytest.mark.parametrize("num_pictures", [1, 2, 3])
def test_a_curriculum_chooses_how_many_pictures_rows_have(processor, num_pictures):
    curriculum = Curriculum(1, growing_share=0.0, num_pictures={num_pictures: 1})
    batch = AnswerBatches(processor, curriculum, 4, MANY_TOKENS, split="test-numbers")[0]
    assert batch.images_spatial_crop.shape[1] == num_pictures


def test_questions_fit_what_is_shown(processor):
    makers = {**SHAPE_QUESTIONS, **TEXT_QUESTIONS, **CHART_QUESTIONS}
    assert all(callable(make) and weight > 0 for make, weight in makers.items())
    rng = split_rng("test-ask", 0)
    empty = Scene(120, 100, GROUND, ())
    assert {example.task for _ in range(20) for example in ask(rng, empty, 5)} == {"count"}
    tasks = {}
    for _ in range(150):
        scene = draw_scene(rng, processor, ONE_TILE, (1, 4))
        is_table = any(item.row for item in scene.objects)
        kind = "chart" if scene.bars else "table" if is_table else "text" if len(scene.texts) > 1 else "shapes"
        tasks.setdefault(kind, set()).update(example.task for example in ask(rng, scene, 6))
    assert tasks["chart"] == {"bar", "locate"} and tasks["table"] == {"table"}
    assert tasks["text"] >= {"word", "number", "read_all"}
    # Every ability is practised: small objects are asked by the shape, several pictures have questions of their own.
    practised = set().union(*tasks.values()) | {"in_context", "compare", "small"}
    assert practised == set(TASKS) - {"second_question", "second_picture"}


def test_some_questions_come_after_others_about_the_picture(processor):
    rng = split_rng("test-later", 0)
    pairs, lengths = set(), []
    for _ in range(60):
        scene = random_scene(rng, num_objects=(2, 4))
        for example in ask(rng, scene):
            lengths.append(len(example.history))
            assert all(turn.scenes == (scene,) and not turn.history for turn in example.turns[:-1])
            pairs.update((earlier.task, example.task) for earlier in example.history)
    assert set(lengths) == {0, 1, 2}
    assert 0.2 < sum(length > 0 for length in lengths) / len(lengths) < 0.5
    assert {("locate", "count"), ("count", "locate"), ("locate", "locate_zh")} <= pairs
    assert "describe" in {earlier for earlier, _ in pairs}


def test_a_second_picture_comes_later_in_half_of_the_rows_of_two(processor, monkeypatch):
    monkeypatch.setattr(batches, "NUM_PICTURES", {2: 1})
    dataset = answer_batches(processor, small_share=1.0, split="test-later", batch_size=8)
    num_later = 0
    for index in range(5):
        batch = dataset[index]
        for row, mask in enumerate(batch.images_seq_mask):
            runs = (mask[1:].int() - mask[:-1].int()).clamp(min=0).cumsum(0) * mask[1:]
            between = batch.input_ids[row, 1:][: int((runs == 2).nonzero()[0])]
            is_later = processor.eos_id in between.tolist()
            num_later += is_later
            assert (batch.labels[row][: len(between)] == IGNORE_ID).all()
    assert 10 <= num_later <= 30  # of 40


def test_conversations_of_a_row_share_what_comes_before_its_last_picture(processor):
    scenes, examples, _ = row_of("later", processor)
    other = questions.make_count(split_rng("test", 0), scenes[0])
    with pytest.raises(ValueError, match="2 different beginnings"):
        encode_row(processor, scenes, [examples[0], examples[1].after(other)], MANY_TOKENS)


def test_views_and_cells_of_a_view_batch_belong_together(processor, monkeypatch):
    monkeypatch.setattr(batches, "SCENE_KINDS", {"shapes": 1})  # lines of tables are no objects
    batch = ViewBatches(processor, 4, 12)[0]
    num_views = len(batch.views)
    assert 12 <= num_views <= 14
    assert batch.views.shape == (num_views, 3, 112, 112)
    assert batch.cells.class_ids.shape == batch.cells.color_ids.shape == (num_views, 4, 4)
    assert batch.cells.boxes.shape == (num_views, 4, 4, 4)
    # Most cells that see nothing are plain; the rest hold a corner of something.
    spread = batch.views.unflatten(2, (4, 28)).unflatten(4, (4, 28)).std(dim=(3, 5)).mean(dim=1)  # [V, G, G]
    is_object = batch.cells.class_ids >= 0
    assert spread[is_object].median() > 10 * spread[~is_object].median()


def test_pages_make_up_their_share_of_view_batches(processor):
    def share_with_letters(page_share):
        dataset = ViewBatches(processor, 1, 60, page_share=page_share, split="test-pages")
        return float((dataset[0].cells.letters >= 0).any(-1).flatten(1).any(1).float().mean())

    # No global views of pages that are cut into tiles, whose letters are too low.
    assert share_with_letters(0.0) < 0.6 < 0.9 < share_with_letters(1.0)
    assert not is_same(ViewBatches(processor, 2, 4, split="one")[1], ViewBatches(processor, 2, 4, split="two")[1])


@pytest.mark.parametrize("grid", ALL_GRIDS)
def test_cell_places_are_those_of_the_model(processor, model, grid):
    """Each cell is filled with its own number, and found among the image tokens where it should be."""
    num_cells = grid.num_views * 16
    features = torch.arange(1.0, num_cells + 1).view(grid.num_views, 16, 1).expand(-1, -1, 192)
    tokens = model._arrange_views(features, grid)
    assert tokens[list(cell_places(grid, 4)), 0].tolist() == list(range(1, num_cells + 1))


def object_at(box, name="square", color="red", kind="shape"):
    return SceneObject(kind, name, color, box, (200, 30, 30))


TWO_CIRCLES = Scene(
    224,
    224,
    GROUND,
    (
        object_at((120.0, 120.0, 200.0, 200.0), "circle", "blue"),
        object_at((10.0, 10.0, 90.0, 90.0), "circle", "blue"),
        object_at((130.0, 20.0, 214.0, 44.0), "CAT", "dark", "word"),
    ),
)


def told(answer, *numbers, how="objects"):
    pieces = (Piece(answer, tuple(Target(0, number) for number in numbers), how),)
    return Example("told", "?", pieces, (), (TWO_CIRCLES,))


def located(number):
    pieces = tuple(grounding_pieces("it", [TWO_CIRCLES.objects[number]], TWO_CIRCLES))
    return Example("located", "?", pieces, (), (TWO_CIRCLES,))


def test_groups_are_the_cells_of_objects_middles_or_letters(processor):
    row_cells = RowCells(processor, [TWO_CIRCLES], [TWO_BY_TWO])
    cells = row_cells.cells[0]

    def of_object(number):
        return (cells.object_ids.flatten() == number).nonzero()[:, 0].tolist()

    for number in range(3):
        aims = row_cells.attended(Piece("?", (Target(0, number),)), 0)
        assert aims == (([of_object(number)], [0, 1]),) * 2
    # Middles 160, 160 and 50, 50 in tiles of 112 and cells of 28: view 4 at 1, 1 and view 1 at 1, 1.
    both = Piece("2", (Target(0, 0), Target(0, 1)), "count")
    (groups, shares), other_half = row_cells.attended(both, 0)
    assert other_half == (groups, shares)
    assert groups == [[4 * 16 + 4 + 1], [16 + 4 + 1]] and shares == pytest.approx([0.6, 0.2, 0.2])
    assert row_cells.attended(Piece("0", (), "count"), 0) == (([], [1]),) * 2
    # The letters' middles are about 144, 174 and 202 across and 32 down: view 2, row 1.
    word = Piece("CAT", (Target(0, 2),), "letters")
    nothing = ([], [1])
    assert [row_cells.attended(word, place) for place in range(3)] == [
        (([[2 * 16 + 4 + column]], [0, 1]), nothing) for column in (1, 2, 3)
    ]
    assert row_cells.attended(word, 3) is None
    assert row_cells.attended(Piece("of nothing"), 0) is None
    assert row_cells.attended(Piece("?", (Target(1, 0),)), 0) is None


def test_halves_of_the_heads_share_the_letters_of_a_cell(processor):
    """What comes after another letter in its cell is looked at by the second half, the rest by the first."""
    word = object_at((2.0, 30.0, 90.0, 50.0), "ABCDEF", "dark", "word")
    scene = Scene(112, 112, GROUND, (word,))
    row_cells = RowCells(processor, [scene], [ONE_TILE])
    letters = row_cells.cells[0].letters.flatten(0, 2)
    piece = Piece("ABCDEF", (Target(0, 0),), "letters")
    slots = []
    for place, sign in enumerate("ABCDEF"):
        aims = row_cells.attended(piece, place)
        (half,) = [number for number, aim in enumerate(aims) if aim.groups]
        assert aims[1 - half] == ([], [1.0]) and aims[half].shares == [0.0, 1.0]
        ((_, *in_tile),) = aims[half].groups  # seen in both views
        slots.append(letters[in_tile[0]].tolist().index(SIGNS.index(sign)))
        assert (slots[-1] > 0) == (half == 1)
    assert set(slots) == {0, 1}


def test_pointings_go_from_the_token_before(processor):
    """A count leaves a part with the beginning, so that the rest tells how many there are; a box takes all."""
    examples = [told("2", 0, 1, how="count"), told("0", how="count"), located(2), told("CAT", 2, how="letters")]
    row = encode_row(processor, [TWO_CIRCLES], examples, MANY_TOKENS)
    batch = collate([row, row], processor.pad_id)
    pointings = batch.pointings
    assert pointings.rows.tolist() == [0] * 9 + [1] * 9
    assert torch.equal(pointings.shares[:, :9], pointings.shares[:, 9:])
    expected = [[0.6, 0.2, 0.2], [1, 0, 0]] + [[0, 1, 0]] * 7
    torch.testing.assert_close(pointings.shares[0, :9], torch.tensor(expected, dtype=torch.float))
    # Each letter of the word is the first of its cell.
    expected[6:] = [[1, 0, 0]] * 3
    torch.testing.assert_close(pointings.shares[1, :9], torch.tensor(expected, dtype=torch.float))
    torch.testing.assert_close(pointings.weights[:9], torch.tensor([1, 1] + [1 / 4] * 4 + [1 / 3] * 3))
    answers = batch.labels[pointings.rows, pointings.positions + 1]
    assert (answers != IGNORE_ID).all()
    numbers = [str(value) for value in quantize_box(TWO_CIRCLES.objects[2].box, TWO_CIRCLES.size)]
    assert [processor.decode([token]) for token in answers[:9].tolist()] == ["2", "0", *numbers, *"CAT"]
    # Coordinates are about one object; what it is can be read off a cell of their own row's picture.
    assert pointings.attended.tolist() == [2, 3, 4, 5, 11, 12, 13, 14]
    assert batch.cells.object_ids.flatten()[pointings.attended_cells].tolist() == [2] * 8
    assert torch.equal(batch.cell_rows[pointings.attended_cells], pointings.rows[pointings.attended])
    attended = batch.cells.at(pointings.attended_cells)
    assert attended.boxes.shape == (8, 1, 1, 4)
    torch.testing.assert_close(attended.boxes[5, 0, 0], torch.tensor(TWO_CIRCLES.objects[2].box) / 224)
    assert located(2).answer == format_grounding("it", [TWO_CIRCLES.objects[2]], TWO_CIRCLES)
    is_cell = torch.zeros_like(batch.images_seq_mask).scatter_(1, batch.cell_table, True)
    assert is_cell.sum(dim=1).tolist() == [5 * 16] * 2
    assert not (is_cell & ~batch.images_seq_mask).any()


def test_nothing_is_pointed_at_where_no_image_token_sees_it(processor):
    """A neighbour fills more of every cell than the sliver that is asked for."""
    sliver, neighbour = object_at((0.0, 0.0, 224.0, 2.0)), object_at((0.0, 4.0, 224.0, 112.0), "circle")
    scene = Scene(224, 224, GROUND, (sliver, neighbour))
    for how, targets in (("objects", (Target(0, 0),)), ("count", (Target(0, 0), Target(0, 1)))):
        example = Example("told", "?", (Piece("2", targets, how),), (), (scene,))
        assert encode_row(processor, [scene], [example], MANY_TOKENS)["pointings"] == []


def test_cells_know_which_picture_they_belong_to(processor):
    rng = split_rng("test-pictures", 0)
    scenes = compared_scenes(rng, sizes=[(112, 112)] * 3)
    row = encode_row(processor, scenes, [], MANY_TOKENS)
    batch = collate([row, row], processor.pad_id)
    assert batch.picture_ids.tolist() == ([0] * 32 + [1] * 32 + [2] * 32) * 2
    assert batch.picture_ids.shape == batch.cell_rows.shape == batch.cell_positions.shape


def test_a_row_without_pointings_beside_one_with(processor):
    empty, full = (encode_row(processor, [TWO_CIRCLES], [example], MANY_TOKENS) for example in (told("?"), located(0)))
    pointings = collate([empty, full], processor.pad_id).pointings
    assert pointings.rows.tolist() == [1] * 4 and pointings.group_ids.shape == (2, 4, 80)
    nothing = collate([empty], processor.pad_id).pointings
    assert nothing.rows.shape == nothing.positions.shape == nothing.weights.shape == (0,)
    assert nothing.rows.dtype == torch.long and nothing.shares.shape == (2, 0, 1)


def test_conversations_fill_a_row_up_to_its_end(processor):
    scenes, examples = one_picture(6, ONE_TILE, 6, processor)
    history = row_of("history", processor)[:2]
    for pictures, asked in ((scenes, examples), history):
        whole = encode_row(processor, pictures, asked, MANY_TOKENS)
        lengths = [whole["segments"].count(number) for number in range(1, len(asked) + 1)]
        limit = sum(lengths) - 1
        part = encode_row(processor, pictures, asked, limit)
        assert 0 < max(part["segments"]) < len(asked)
        num_tokens = len(part["segments"]) - part["segments"].count(0)
        assert limit - max(lengths) < num_tokens <= limit
        none = encode_row(processor, pictures, asked, min(lengths) - 1)
        assert set(none["segments"]) == {0} and none["pointings"] == []


def test_curriculum():
    curriculum = Curriculum(100)
    objects = [curriculum.num_objects(batch) for batch in (0, 16, 17, 49, 50, 99)]
    assert objects == [(1, 3), (1, 3), (1, 4), (1, 5), (1, 6), (1, 6)]
    assert [curriculum.small_share(batch) for batch in (0, 10, 50, 99)] == pytest.approx([1.0, 0.83, 0.15, 0.15])
    last = Curriculum(100, growing_share=0.0)
    assert last.num_objects(0) == last.num_objects(99) == (1, 6)
    assert last.small_share(0) == last.small_share(99) == pytest.approx(0.15)
