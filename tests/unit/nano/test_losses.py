"""nano's losses, against torch's own and by what must make them smallest."""

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepseek_vl2.models.special_tokens import DET_END, DET_START
from deepseek_vl2.nano.architecture import nano_processor, untrained_nano
from deepseek_vl2.nano.batches import IGNORE_ID, AnswerBatch, AnswerBatches, Curriculum, Pointings
from deepseek_vl2.nano.layouts import COLUMN_NAMES, MAX_BAR, ROW_NAMES
from deepseek_vl2.nano.losses import (
    ATTENTION_NAME,
    COORDINATE_WEIGHT,
    AnswerLoss,
    DenseHeads,
    LetterHead,
    NumberTargets,
    PointingLoss,
    keeping_loss,
    pointing_attention,
    question_weights,
    views_beside_print,
)
from deepseek_vl2.nano.scenes import COLOR_NAMES
from deepseek_vl2.nano.targets import CELL_CLASSES, MAX_LETTERS_A_CELL, MAX_TEXT_LENGTH, SIGNS, Cells
from deepseek_vl2.nano.tokenizer import number_token_ids

SPREAD = 6.0
WIDTH = 40
VOCAB_SIZE = 1100
# Ids in another order than the numbers, and not from 0: a mix-up of ids and numbers would show.
NUMBER_IDS = [1050 - number for number in range(1000)]
DET, END, WORD, OTHER_WORD, EOS = 1, 2, 3, 4, 5


# Layers in which attention is told where to look, and how many heads of each.
POINTING_LAYER, NUM_POINTING_HEADS = 3, 2
HEADS = {POINTING_LAYER: NUM_POINTING_HEADS}
NO_PLACES = torch.full((1, 4, 4), -1)
NOTHING_ATTENDED = {"attended": torch.empty(0), "attended_cells": torch.empty(0)}


@pytest.fixture(scope="module")
def targets():
    return NumberTargets(NUMBER_IDS, VOCAB_SIZE, SPREAD)


def random_layer(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(WIDTH, VOCAB_SIZE, bias=False)


def only(**parts):
    """A batch of which the loss under test reads these parts alone."""
    return AnswerBatch(**{field.name: None for field in fields(AnswerBatch)} | parts)


def batch_of(input_ids, labels, question_ids=None):
    """A batch of answers; one question a row if none are given."""
    ids = torch.tensor(input_ids)
    questions = torch.ones_like(ids) if question_ids is None else torch.tensor(question_ids)
    return only(input_ids=ids, labels=torch.tensor(labels), question_ids=questions)


def number(value):
    return NUMBER_IDS[value]


def bell(value, spread=SPREAD):
    return torch.softmax(-((torch.arange(1000.0) - value) ** 2) / (2 * spread**2), dim=0)


@pytest.mark.parametrize("value", [0, 3, 500, 999])
def test_divergence_is_nothing_at_the_bell_and_grows_with_distance(targets, value):
    def divergence(center):
        log_bell = torch.log_softmax(-((torch.arange(1000.0) - center) ** 2) / (2 * SPREAD**2), dim=0)
        return targets.divergence(log_bell[None], torch.tensor([value])).item()

    assert divergence(value) == pytest.approx(0, abs=1e-4)  # 6e-5 of a bell lies beyond four deviations
    step = 1 if value < 500 else -1
    distances = [divergence(value + step * distance) for distance in (0, 1, 3, 10, 30, 100)]
    assert distances == sorted(distances)
    assert distances[1] > 1e-3
    if 100 <= value <= 900:  # away from the ends, two bells are half the squared distance apart
        assert distances[3] == pytest.approx(10**2 / (2 * SPREAD**2), rel=1e-3)


def test_divergence_is_torchs_kl_divergence(targets):
    torch.manual_seed(1)
    log_probabilities = torch.randn(3, 1000).log_softmax(dim=-1)
    values = torch.tensor([0, 421, 998])
    wanted = torch.stack([bell(value) for value in values.tolist()])
    expected = F.kl_div(log_probabilities, wanted, reduction="none").sum(dim=1)
    torch.testing.assert_close(targets.divergence(log_probabilities, values), expected, atol=1e-4, rtol=1e-4)


def test_words_get_plain_cross_entropy_even_if_they_are_numbers(targets):
    loss = AnswerLoss(targets, DET, END)
    # The question's numbers are no labels; "3" as an answer is a word like others.
    ids = [[WORD, number(7), number(3), EOS], [OTHER_WORD, WORD, OTHER_WORD, EOS]]
    labels = [[IGNORE_ID, IGNORE_ID, number(3), EOS], [IGNORE_ID, WORD, OTHER_WORD, EOS]]
    batch, layer = batch_of(ids, labels), random_layer()
    hidden = torch.randn(2, 4, WIDTH)
    found = loss(hidden, layer, batch)
    logits = layer(hidden)
    each = [
        F.cross_entropy(row[:-1], row_labels[1:], ignore_index=IGNORE_ID)
        for row, row_labels in zip(logits, batch.labels, strict=True)
    ]
    # Every question counts the same, however long its answer.
    torch.testing.assert_close(found["answer"], torch.stack(each).mean())
    all_tokens = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORE_ID)
    torch.testing.assert_close(found["words"], all_tokens)
    assert found["coordinates"] == 0  # there are none; NaN would end up in the log


def test_coordinates_are_the_numbers_between_det_marks(targets):
    loss = AnswerLoss(targets, DET, END)
    # A word, a box of two numbers, a number after it, and a second box: as in packed rows.
    ids = [[WORD, DET, number(10), number(990), END, number(4), DET, number(5), END, EOS]]
    labels = [[IGNORE_ID, *ids[0][1:]]]
    batch, layer = batch_of(ids, labels), random_layer()
    hidden = torch.randn(1, 10, WIDTH)
    log_probabilities = layer(hidden)[0, :-1].log_softmax(dim=-1)
    words = [-log_probabilities[place - 1, ids[0][place]] for place in (1, 4, 5, 6, 8, 9)]
    coordinates = []
    for place, value in ((2, 10), (3, 990), (7, 5)):
        over_numbers = log_probabilities[place - 1, NUMBER_IDS]  # what leaks to other tokens costs, too
        wanted = bell(value)
        coordinates.append((wanted * (wanted.clamp(min=1e-30).log() - over_numbers)).sum())
    found = loss(hidden, layer, batch)
    torch.testing.assert_close(found["words"], torch.stack(words).mean())
    torch.testing.assert_close(found["coordinates"], torch.stack(coordinates).mean(), atol=1e-4, rtol=1e-4)
    expected = (sum(words) + COORDINATE_WEIGHT * sum(coordinates)) / (len(words) + COORDINATE_WEIGHT * len(coordinates))
    torch.testing.assert_close(found["answer"], expected, atol=1e-4, rtol=1e-4)


def test_questions_have_the_same_weight_however_long():
    questions = torch.tensor([3, 3, 3, 3, 8, 11, 11])
    is_coordinate = torch.tensor([False, True, True, False, False, False, True])
    weights = question_weights(questions, is_coordinate)
    assert weights.sum().item() == pytest.approx(1)
    for question in (3, 8, 11):
        assert weights[questions == question].sum().item() == pytest.approx(1 / 3)
    assert (weights[1] / weights[0]).item() == pytest.approx(COORDINATE_WEIGHT)


def test_every_question_counts_the_same(targets):
    """Answers of one, three and two tokens in two rows, the second row padded: the mean of three means."""
    loss = AnswerLoss(targets, DET, END)
    ids = [[WORD, WORD, EOS, OTHER_WORD, WORD, OTHER_WORD, EOS], [WORD, WORD, OTHER_WORD, EOS, 0, 0, 0]]
    is_answer = [[0, 0, 1, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0]]
    question_ids = [[0, 0, 1, 0, 2, 2, 2], [0, 0, 1, 1, 0, 0, 0]]
    labels = torch.tensor(ids).where(torch.tensor(is_answer) > 0, IGNORE_ID)
    layer, hidden = random_layer(), torch.randn(2, 7, WIDTH)
    log_probabilities = layer(hidden)[:, :-1].log_softmax(dim=-1)
    costs = -log_probabilities.gather(2, torch.tensor(ids)[:, 1:, None])[..., 0]
    expected = torch.stack([costs[0, 1], costs[0, 3:6].mean(), costs[1, 1:3].mean()]).mean()
    found = loss(hidden, layer, batch_of(ids, labels.tolist(), question_ids))
    torch.testing.assert_close(found["answer"], expected)


def test_a_near_miss_costs_less_than_a_far_one(targets):
    """With all weight on one number, the nearer it is the smaller the loss."""
    loss = AnswerLoss(targets, DET, END)
    layer = nn.Linear(VOCAB_SIZE, VOCAB_SIZE, bias=False)
    layer.weight.data = torch.eye(VOCAB_SIZE)
    batch = batch_of([[WORD, DET, number(500), END]], [[IGNORE_ID, IGNORE_ID, number(500), IGNORE_ID]])
    costs = []
    for guess in (500, 503, 510, 540):
        hidden = torch.zeros(1, 4, VOCAB_SIZE)
        hidden[0, 1, number(guess)] = 10.0
        costs.append(loss(hidden, layer, batch)["coordinates"].item())
    assert costs == sorted(costs) and costs[0] < costs[1]


def test_gradients_of_answers_are_finite_and_only_where_answers_are(targets):
    loss = AnswerLoss(targets, DET, END)
    ids = [[WORD, WORD, DET, number(10), END, EOS]]
    batch, layer = batch_of(ids, [[IGNORE_ID, IGNORE_ID, *ids[0][2:]]]), random_layer()
    hidden = torch.randn(1, 6, WIDTH, requires_grad=True)
    loss(hidden, layer, batch)["answer"].backward()
    assert hidden.grad.isfinite().all() and layer.weight.grad.isfinite().all()
    assert (hidden.grad.abs().sum(dim=-1) > 0).tolist() == [[False, True, True, True, True, False]]


def test_marks_are_looked_up_in_the_tokenizer():
    tokenizer = nano_processor().tokenizer
    targets = NumberTargets(number_token_ids(tokenizer), len(tokenizer), SPREAD)
    loss = AnswerLoss.for_tokenizer(targets, tokenizer)
    assert tokenizer.convert_ids_to_tokens([loss.det_start, loss.det_end]) == [DET_START, DET_END]
    ids = tokenizer.encode("[0, 999", add_special_tokens=False)
    assert [targets.number_of_id[ids[1]].item(), targets.number_of_id[ids[-1]].item()] == [0, 999]
    assert (targets.number_of_id >= 0).sum() == 1000


def cells_with_objects():
    """Two views of two by two cells, which see a triangle, a word of a table and a bar."""
    triangle, word, bar = (0, 0, 0), (0, 1, 0), (1, 1, 1)

    def filled(values, shape=(), empty=-1):
        ids = torch.full((2, 2, 2, *shape), empty)
        for place, value in values.items():
            ids[place] = torch.tensor(value)
        return ids

    return Cells(
        object_ids=filled({triangle: 0, word: 1, bar: 0}),
        class_ids=filled({triangle: 2, word: 6, bar: 8}),
        color_ids=filled({triangle: 1, bar: 7}),  # words have none
        is_center=filled({triangle: True, bar: True}, empty=False),
        is_marked=filled({triangle: True}, empty=False),
        bar_values=filled({bar: MAX_BAR}),
        row_ids=filled({word: 3}),
        column_ids=filled({word: 1}),
        letters=filled({word: [3, 14, -1, -1], bar: [30, -1, -1, -1]}, (MAX_LETTERS_A_CELL,)),
        first_places=filled({word: 1, bar: 0}),
        # The last one reaches beyond its tile.
        boxes=filled(
            {triangle: [0.1, 0.2, 0.3, 0.4], word: [0.0, 0.5, 1.0, 0.9], bar: [-0.5, 0.25, 1.5, 0.75]}, (4,), 0.0
        ),
    )


CATEGORIES = {"class_ids": len(CELL_CLASSES) + 1, "color_ids": len(COLOR_NAMES), "bar_values": MAX_BAR + 1}
OF_SCENES = {"row_ids": len(ROW_NAMES), "column_ids": len(COLUMN_NAMES), "first_places": MAX_TEXT_LENGTH}
# What is read by heads of views and of scenes, boxes not counted.
READ = {
    False: {*CATEGORIES, "letters", "is_center", "is_marked"},
    True: {*CATEGORIES, *OF_SCENES, "letters", "is_center", "is_marked"},
}


def heads_of(width, targets, knows_scene):
    """Heads of scenes or of views, as in training; only tokens of scenes can name their picture."""
    categories = [*CATEGORIES, *(OF_SCENES if knows_scene else ())]
    flags = ["is_center", "is_marked"]
    return DenseHeads(width, targets, categories, reads_letters=True, flags=flags, names_pictures=knows_scene)


def heads_without_letters(targets):
    """Heads of tokens that have attended to an object."""
    return DenseHeads(WIDTH, targets, ["class_ids", "color_ids"])


def perfect_heads(cells, targets, knows_scene):
    """Heads and tokens that say of each cell just what it sees: tokens are one-hot by cell."""
    width = cells.class_ids.numel()
    heads = heads_of(width, targets, knows_scene)
    sharp, every = 30.0, torch.arange(width)
    with torch.no_grad():
        for head in (*heads.categories.values(), heads.letters, *heads.flags.values()):
            head.weight.zero_(), head.bias.zero_()
        for name, head in heads.categories.items():
            ids = getattr(cells, name).flatten()
            ids = ids.where(ids >= 0, len(CELL_CLASSES)) if name == "class_ids" else ids
            head.weight[ids[ids >= 0], every[ids >= 0]] = sharp
        ids = cells.letters.flatten(0, -2)  # [cells, slots]
        for slot in range(ids.shape[1]):
            # One more than there are signs: none stands there.
            signs = ids[:, slot].where(ids[:, slot] >= 0, len(SIGNS))
            heads.letters.weight[slot * (len(SIGNS) + 1) + signs, every] = sharp
        for name, head in heads.flags.items():
            head.weight[0] = (getattr(cells, name).flatten().float() * 2 - 1) * sharp
    return heads, torch.eye(width)


@pytest.mark.parametrize("knows_scene", [False, True])
def test_perfect_heads_lose_nothing(targets, knows_scene):
    cells = cells_with_objects()
    heads, tokens = perfect_heads(cells, targets, knows_scene)
    layer = nn.Linear(tokens.shape[-1], VOCAB_SIZE, bias=False)
    losses = heads(tokens, cells, layer)
    assert set(losses) == READ[knows_scene] | {"boxes"}
    for name in READ[knows_scene]:
        assert losses[name].item() == pytest.approx(0, abs=1e-5), name
        other = getattr(cells, name)
        other = ~other if other.dtype == torch.bool else other.where(other < 0, (other - 1).clamp(min=0))
        wrong = heads(tokens, replace(cells, **{name: other}), layer)
        assert wrong[name] > 5, name
        # Each is read by a head of its own.
        assert {own for own in losses if wrong[own] != losses[own]} == {name}


def test_heads_are_as_wide_as_what_they_read(targets):
    heads = heads_of(WIDTH, targets, True)
    assert {name: head.out_features for name, head in heads.categories.items()} == CATEGORIES | OF_SCENES
    assert heads.letters.out_features == 4 * 37
    views = heads_of(WIDTH, targets, False)
    assert {name: head.out_features for name, head in views.categories.items()} == CATEGORIES
    assert views.letters.out_features == 4 * 37 and heads_without_letters(targets).letters is None


@pytest.mark.parametrize("num_cells", [2, 40])
def test_rare_flags_weigh_as_much_as_common_ones(targets, num_cells):
    """A head that says yes to all is wrong about half, however few objects are marked."""
    one = cells_with_objects().chosen([0])
    cells = Cells(*(getattr(one, field.name)[:, :1, :1].repeat_interleave(num_cells, 1) for field in fields(Cells)))
    cells.is_marked[0, 1:] = False
    heads = heads_of(WIDTH, targets, False)
    with torch.no_grad():
        heads.flags["is_marked"].weight.zero_(), heads.flags["is_marked"].bias.fill_(8.0)
    loss = heads(torch.randn(num_cells, WIDTH), cells, random_layer())["is_marked"]
    assert loss.item() == pytest.approx(8 / 2, abs=0.01)


def test_boxes_are_read_through_the_rows_of_numbers(targets):
    """A head that points at each number's own row reaches 0: x1, y1, x2, y2 in order, cut at 0 and 1."""
    cells = cells_with_objects()
    width = 8
    heads = heads_of(width, targets, False)
    layer = nn.Linear(width, VOCAB_SIZE, bias=False)
    numbers = torch.arange(1000.0)
    # Normalised rows on a circle; a long vector in the same direction gives a bell around its number.
    angles = torch.pi / 2 * numbers / 999
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[NUMBER_IDS, :2] = torch.stack((angles.cos(), angles.sin()), dim=1) * 3
        heads.box.weight.zero_()
        is_object = cells.class_ids.flatten() >= 0
        told = (cells.boxes.flatten(0, 2)[is_object].clamp(0, 1) * 999).round()
        length = (999 * 2 / torch.pi / SPREAD) ** 2
        directions = torch.zeros(3, 4, width)
        directions[..., 0] = (torch.pi / 2 * told / 999).cos() * length
        directions[..., 1] = (torch.pi / 2 * told / 999).sin() * length
        heads.box.bias.zero_()
        tokens = torch.zeros(8, width)
        tokens[is_object] = torch.eye(width)[:3]
        heads.box.weight[:, :3] = directions.flatten(1).T
    right = heads(tokens, cells, layer)["boxes"]
    assert right.item() == pytest.approx(0, abs=0.02)
    swapped = replace(cells, boxes=cells.boxes[..., [1, 0, 3, 2]])
    assert heads(tokens, swapped, layer)["boxes"] > 10


@pytest.mark.parametrize("has_objects", [True, False])
@pytest.mark.parametrize("knows_scene", [True, False])
def test_gradients_of_dense_heads_are_finite(targets, has_objects, knows_scene):
    """A batch without any object must not spoil the weights."""
    cells = cells_with_objects()
    if not has_objects:
        parts = {field.name: getattr(cells, field.name) for field in fields(Cells)}
        nothing = {torch.bool: False, torch.float32: 0.0}
        cells = Cells(**{name: torch.full_like(part, nothing.get(part.dtype, -1)) for name, part in parts.items()})
    torch.manual_seed(2)
    heads, layer = heads_of(WIDTH, targets, knows_scene), random_layer()
    tokens = torch.randn(8, WIDTH, requires_grad=True)
    picture_ids = torch.arange(8) % 3 if knows_scene else None
    losses = heads(tokens, cells, layer, picture_ids)
    sum(losses.values()).backward()
    for name, parameter in (*heads.named_parameters(), ("layer", layer.weight), ("tokens", tokens)):
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    # That cells see nothing, and of which picture they are, is what there is to learn from empty pictures.
    always = {"class_ids"} | ({"pictures"} if knows_scene else set())
    assert {name for name, loss in losses.items() if loss > 0} == (set(losses) if has_objects else always)
    assert tokens.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "name", ["color_ids", "bar_values", "row_ids", "first_places", "letters", "is_marked", "boxes"]
)
def test_only_cells_that_see_something_of_a_kind_learn_it(targets, name):
    """Words have no colour, triangles no letters."""
    cells = cells_with_objects()
    tokens = torch.randn(8, WIDTH, requires_grad=True)
    heads_of(WIDTH, targets, True)(tokens, cells, random_layer())[name].backward()
    of_objects = {"is_marked": cells.object_ids, "boxes": cells.object_ids, "letters": cells.letters.amax(dim=-1)}
    is_seen = of_objects.get(name, getattr(cells, name)).flatten() >= 0
    assert (tokens.grad.abs().sum(dim=-1) > 0).tolist() == is_seen.tolist()


NUM_TOKENS = 6
CELL_POSITIONS = [1, 2, 4, 5]
NO_GROUP = -1


def pointing_batch(shares, groups, positions=(5,), weights=(1.0,)):
    """One row of six tokens: the first, two cells, a newline, two more cells; `groups` says whose the cells are."""
    num_pointings = len(positions)
    pointings = Pointings(
        rows=torch.zeros(num_pointings, dtype=torch.long),
        positions=torch.tensor(positions, dtype=torch.long),
        # Both halves of the heads have the same aim.
        group_ids=torch.tensor(groups, dtype=torch.long).view(num_pointings, 4).expand(2, -1, -1),
        shares=(torch.tensor(shares).view(num_pointings, -1) if num_pointings else torch.zeros(0, 1)).expand(2, -1, -1),
        weights=torch.tensor(weights),
        **NOTHING_ATTENDED,
    )
    return only(cell_table=torch.tensor([CELL_POSITIONS]), pointings=pointings)


def pointing_loss(batch, attention):
    """The loss where each token of one row attends by `attention` [T] in all heads that point; the last one is free."""
    free = torch.rand(1, 1, NUM_TOKENS, NUM_TOKENS).softmax(dim=-1)
    pointing = attention.expand(1, NUM_POINTING_HEADS, NUM_TOKENS, -1)
    loss = PointingLoss(batch, HEADS)
    loss.read(POINTING_LAYER, torch.cat((pointing, free), dim=1))
    return loss.value


def test_pointing_costs_the_divergence_from_the_shares():
    attention = torch.tensor([0.5, 0.2, 0.05, 0.05, 0.1, 0.1])
    expected = 0.6 * torch.tensor(0.6 / 0.5).log() + 0.2 * torch.tensor(0.2 / 0.2).log()
    expected += 0.2 * torch.tensor(0.2 / 0.15).log()  # of two cells together
    batch = pointing_batch([[0.6, 0.2, 0.2]], [[0, 1, 1, NO_GROUP]])
    torch.testing.assert_close(pointing_loss(batch, attention), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("split", [0.05, 0.2, 0.39])
def test_attention_may_choose_among_the_cells_of_a_group(split):
    attention = torch.tensor([0.6, 0.0, split, 0.0, 0.4 - split, 0.0])
    groups = [[0, 1, 1, 0]]
    assert pointing_loss(pointing_batch([[0.6, 0.0, 0.4]], groups), attention).item() == pytest.approx(0, abs=1e-4)
    assert pointing_loss(pointing_batch([[0.6, 0.4, 0.0]], groups), attention) > 1


def test_cells_of_no_group_take_attention_away():
    attention = torch.tensor([0.5, 0.25, 0.25, 0.0, 0.0, 0.0])
    with_both = pointing_loss(pointing_batch([[0.5, 0.5]], [[0, 0, 0, 0]]), attention)
    with_one = pointing_loss(pointing_batch([[0.5, 0.5]], [[0, NO_GROUP, 0, 0]]), attention)
    assert with_both.item() == pytest.approx(0, abs=1e-4)
    assert with_one.item() == pytest.approx(0.5 * torch.tensor(2.0).log().item(), abs=1e-4)


def test_halves_of_the_heads_have_aims_of_their_own():
    """The first half should go to the first cell, the second stay with the first token."""
    batch = pointing_batch([[0.0, 1.0]], [[0, NO_GROUP, NO_GROUP, NO_GROUP]])
    pointings = batch.pointings
    pointings.shares = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]])
    pointings.group_ids = torch.stack((pointings.group_ids[0], torch.full((1, 4), NO_GROUP)))
    to_cell, to_first = (torch.eye(NUM_TOKENS)[place] for place in (1, 0))

    def loss_of(first_half, second_half):
        halves = [half.expand(1, NUM_POINTING_HEADS // 2, NUM_TOKENS, -1) for half in (first_half, second_half)]
        loss = PointingLoss(batch, HEADS)
        loss.read(POINTING_LAYER, torch.cat(halves, dim=1))
        return loss.value.item()

    assert NUM_POINTING_HEADS % 2 == 0
    assert loss_of(to_cell, to_first) == pytest.approx(0, abs=1e-4)
    assert min(loss_of(to_cell, to_cell), loss_of(to_first, to_first)) > 5


def test_each_pointing_reads_its_own_row_and_token():
    """Two rows, the second with fewer cells: the rest of its table is 0, the first token, which no group may take."""
    torch.manual_seed(6)
    attention = torch.rand(2, 3, NUM_TOKENS, NUM_TOKENS).softmax(dim=-1)
    pointings = Pointings(
        rows=torch.tensor([1, 0]),
        positions=torch.tensor([3, 5]),
        group_ids=torch.tensor([[NO_GROUP, 0, NO_GROUP, NO_GROUP], [1, 0, NO_GROUP, 1]]).expand(2, -1, -1),
        shares=torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]).expand(2, -1, -1),
        weights=torch.ones(2),
        **NOTHING_ATTENDED,
    )
    loss = PointingLoss(only(cell_table=torch.tensor([[1, 2, 4, 5], [3, 4, 0, 0]]), pointings=pointings), HEADS)
    loss.read(POINTING_LAYER, attention)
    first = attention[1, :NUM_POINTING_HEADS, 3]
    second = attention[0, :NUM_POINTING_HEADS, 5]
    found = torch.stack((first[:, 0], first[:, 4], second[:, 2], second[:, 1] + second[:, 5]))
    expected = (0.5 * (0.5 / found).log()).mean(dim=1).sum() / 2
    torch.testing.assert_close(loss.value, expected, atol=1e-4, rtol=1e-4)


def test_pointings_are_weighted():
    attention = torch.tensor([0.5, 0.1, 0.05, 0.15, 0.1, 0.1])
    shares, groups = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [[0, 1, 1, 0]] * 3
    each = [pointing_loss(pointing_batch([own], groups[:1]), attention) for own in shares]
    weights = (1.0, 0.25, 0.75)
    found = pointing_loss(pointing_batch(shares, groups, positions=(3, 4, 5), weights=weights), attention)
    expected = sum(weight * own for weight, own in zip(weights, each, strict=True)) / sum(weights)
    torch.testing.assert_close(found, expected)


def test_tokens_name_their_picture_where_it_is_asked(targets):
    """A head that reads the picture off the token loses nothing; without the numbers nothing is asked."""
    cells = cells_with_objects()
    torch.manual_seed(8)
    heads, layer = heads_of(WIDTH, targets, True), random_layer()
    num_cells = cells.object_ids.numel()
    picture_ids = torch.arange(num_cells) % 3
    tokens = torch.randn(num_cells, WIDTH)
    tokens[:, :3] = 0
    tokens[torch.arange(num_cells), picture_ids] = 30.0
    with torch.no_grad():
        heads.picture.weight.zero_()
        heads.picture.weight[:, :3] = torch.eye(3)
    assert heads(tokens, cells, layer, picture_ids)["pictures"].item() == pytest.approx(0, abs=1e-4)
    assert heads(tokens, cells, layer, (picture_ids + 1) % 3)["pictures"] > 5
    assert "pictures" not in heads(tokens, cells, layer)


def test_no_pointings_cost_nothing():
    batch = pointing_batch(shares=[], groups=[], positions=(), weights=())
    assert pointing_loss(batch, torch.full((NUM_TOKENS,), 1 / NUM_TOKENS)).item() == 0


def test_layers_that_do_not_point_cost_nothing_and_others_are_averaged():
    attention = torch.tensor([0.5, 0.1, 0.05, 0.15, 0.1, 0.1])
    batch = pointing_batch([[0.0, 1.0, 0.0]], [[0, 1, 1, 0]])
    alone = pointing_loss(batch, attention)
    loss = PointingLoss(batch, {2: 2, 4: 4})
    of_heads = torch.stack((attention, attention, torch.full((NUM_TOKENS,), 1 / NUM_TOKENS), attention))
    layer = of_heads[None, :, None].expand(1, 4, NUM_TOKENS, -1)
    for number in range(6):
        loss.read(number, layer)
    uniform = pointing_loss(batch, torch.full((NUM_TOKENS,), 1 / NUM_TOKENS))
    torch.testing.assert_close(loss.value, (alone + (3 * alone + uniform) / 4) / 2)


def test_attention_written_out_is_torchs_and_is_read_with_its_layer():
    torch.manual_seed(7)
    query, key = torch.randn(2, 2, 3, NUM_TOKENS, 8)
    value = torch.randn(2, 3, NUM_TOKENS, 5)
    mask = torch.rand(2, 1, NUM_TOKENS, NUM_TOKENS) < 0.5
    mask[..., 0] = True
    read = []
    pointing = SimpleNamespace(read=lambda *values: read.append(values))
    module = SimpleNamespace(scaling=0.3, layer_idx=5)
    found, _ = pointing_attention(module, query, key, value, mask, pointing=pointing)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2))
    ((layer, weights),) = read
    assert layer == 5
    torch.testing.assert_close(weights @ value, expected)
    assert not weights[~mask.expand_as(weights)].any()
    again, _ = pointing_attention(module, query, key, value, mask)
    assert torch.equal(again, found)


def test_the_attention_that_points_is_torchs_and_moves_one_layer():
    """Same hidden states as `sdpa`; gradients of the pointing loss reach that layer's queries and those before."""
    processor = nano_processor()
    model = untrained_nano(processor.tokenizer, seed=3).language.model
    curriculum = Curriculum(1, growing_share=0.0, last_small_share=1.0)
    batch = AnswerBatches(processor, curriculum, batch_size=2, max_tokens=60)[0]
    options = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask(),
        "position_ids": batch.position_ids,
        "use_cache": False,
    }
    plain = model(**options).last_hidden_state
    model.set_attn_implementation(ATTENTION_NAME)
    torch.testing.assert_close(model(**options).last_hidden_state, plain)
    pointing = PointingLoss(batch, HEADS)
    torch.testing.assert_close(model(**options, pointing=pointing).last_hidden_state, plain)
    assert pointing.value > 0.5
    pointing.value.backward()
    has_gradient = [layer.self_attn.q_proj.weight.grad is not None for layer in model.layers]
    assert has_gradient == [number <= POINTING_LAYER for number in range(len(model.layers))]
    own = model.layers[POINTING_LAYER].self_attn.q_proj.weight.grad.unflatten(0, (6, -1)).abs().sum(dim=(1, 2))
    assert (own > 0).tolist() == [True] * NUM_POINTING_HEADS + [False] * (6 - NUM_POINTING_HEADS)


def test_letters_of_patches_weigh_as_much_as_the_many_without():
    head = LetterHead(WIDTH)
    letters = torch.full((1, 4, 4), -1)
    letters[0, 0, :2] = torch.tensor([SIGNS.index("C"), SIGNS.index("7")])
    patches = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(0))
    wanted = letters.flatten().where(letters.flatten() >= 0, len(SIGNS))
    losses = F.cross_entropy(head.letter(patches), wanted, reduction="none")
    expected = losses[:2].mean() + losses[2:].mean()
    torch.testing.assert_close(head(patches, letters, NO_PLACES)["letters"], expected)


def test_places_are_asked_of_patches_that_have_one():
    head = LetterHead(WIDTH)
    patches = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(0))
    places = NO_PLACES.clone()
    places[0, 1, 1:3] = torch.tensor([0, 4])
    losses = head(patches, NO_PLACES, places)
    expected = F.cross_entropy(head.place(patches[5:7]), torch.tensor([0, 4]))
    torch.testing.assert_close(losses["places"], expected)
    assert head(patches, NO_PLACES, NO_PLACES)["places"].item() == 0


def cells_of_classes(class_ids):
    return Cells(**{field.name: None for field in fields(Cells)} | {"class_ids": torch.tensor(class_ids)})


def test_views_with_more_than_print_are_found():
    word, number, bar = (CELL_CLASSES.index(name) for name in ("word", "number", "bar"))
    cells = cells_of_classes([[[-1, word]], [[0, number]], [[-1, -1]], [[bar, -1]]])
    assert views_beside_print(cells) == [1, 3]


def test_tokens_are_kept_where_nothing_is_printed():
    cells = cells_of_classes([[[CELL_CLASSES.index("word"), 0], [CELL_CLASSES.index("number"), -1]]])
    earlier = torch.full((1, 4, WIDTH), 2.0)
    tokens = earlier.clone()
    tokens[0, [0, 2]] = 9.0
    assert keeping_loss(tokens, earlier, cells).item() == 0
    tokens[0, 1] = 3.0
    assert keeping_loss(tokens, earlier, cells).item() == pytest.approx(0.5 / 4)
    nothing = keeping_loss(tokens[:0], earlier[:0], replace(cells, class_ids=cells.class_ids[:0]))
    assert nothing.item() == 0
