"""nano's losses, against torch's own and by what must make them smallest."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepseek_vl2.models.special_tokens import DET_END, DET_START
from deepseek_vl2.nano.architecture import nano_processor, untrained_nano
from deepseek_vl2.nano.batches import IGNORE_ID, AnswerBatch, AnswerBatches, Cells, Curriculum, Pointings
from deepseek_vl2.nano.losses import (
    ATTENTION_NAME,
    COORDINATE_WEIGHT,
    NUM_POINTING_HEADS,
    POINTING_LAYER,
    AnswerLoss,
    DenseHeads,
    NumberTargets,
    PointingLoss,
    question_weights,
)
from deepseek_vl2.nano.questions import CELL_CLASSES
from deepseek_vl2.nano.scenes import COLOR_NAMES
from deepseek_vl2.nano.tokenizer import number_token_ids

SPREAD = 6.0
WIDTH = 40
VOCAB_SIZE = 1100
# Ids in another order than the numbers, and not from 0: a mix-up of ids and numbers would show.
NUMBER_IDS = [1050 - number for number in range(1000)]
DET, END, WORD, OTHER_WORD, EOS = 1, 2, 3, 4, 5


@pytest.fixture(scope="module")
def targets():
    return NumberTargets(NUMBER_IDS, VOCAB_SIZE, SPREAD)


def random_layer(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(WIDTH, VOCAB_SIZE, bias=False)


def batch_of(input_ids, labels, segments=None):
    """A batch of which the loss reads ids, labels and segments only; one question a row if no segments are given."""
    ids, nothing = torch.tensor(input_ids), torch.empty(0)
    questions = torch.ones_like(ids) if segments is None else torch.tensor(segments)
    cells = Cells(nothing, nothing, nothing, nothing, nothing)
    pointings = Pointings(nothing, nothing, nothing, nothing, nothing)
    return AnswerBatch(ids, torch.tensor(labels), ids, questions, ids, nothing, nothing, cells, nothing, pointings)


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
    segments = [[0, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, -1, -1, -1]]
    labels = torch.tensor(ids).where(torch.tensor(is_answer) > 0, IGNORE_ID)
    layer, hidden = random_layer(), torch.randn(2, 7, WIDTH)
    log_probabilities = layer(hidden)[:, :-1].log_softmax(dim=-1)
    costs = -log_probabilities.gather(2, torch.tensor(ids)[:, 1:, None])[..., 0]
    expected = torch.stack([costs[0, 1], costs[0, 3:6].mean(), costs[1, 1:3].mean()]).mean()
    found = loss(hidden, layer, batch_of(ids, labels.tolist(), segments))
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
    ids = tokenizer.encode("0 999", add_special_tokens=False)
    assert [targets.number_of_id[ids[0]].item(), targets.number_of_id[ids[-1]].item()] == [0, 999]
    assert (targets.number_of_id >= 0).sum() == 1000


def cells_with_objects():
    shape_ids = torch.tensor([[[2, -1], [6, -1]], [[-1, -1], [-1, 0]]])  # 6: a word, which has no colour
    color_ids = torch.tensor([[[1, -1], [-1, -1]], [[-1, -1], [-1, 7]]])
    boxes = torch.zeros(2, 2, 2, 4)
    boxes[0, 0, 0] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    boxes[0, 1, 0] = torch.tensor([0.0, 0.5, 1.0, 0.9])
    boxes[1, 1, 1] = torch.tensor([-0.5, 0.25, 1.5, 0.75])  # reaches beyond its tile
    is_center = torch.tensor([[[True, False], [False, False]], [[False, False], [False, True]]])
    return Cells(shape_ids, shape_ids, color_ids, is_center, boxes)


def perfect_heads(cells, targets):
    """Heads and tokens that say of each cell just what it sees: tokens are one-hot by cell."""
    width = cells.shape_ids.numel()
    heads = DenseHeads(width, targets)
    shape_ids, color_ids = cells.shape_ids.flatten(), cells.color_ids.flatten()
    sharp = 30.0
    with torch.no_grad():
        for head in (heads.shape, heads.color, heads.center):
            head.weight.zero_(), head.bias.zero_()
        heads.center.weight[0] = (cells.is_center.flatten().float() * 2 - 1) * sharp
        heads.shape.weight[shape_ids.where(shape_ids >= 0, len(CELL_CLASSES)), torch.arange(width)] = sharp
        seen = color_ids >= 0
        heads.color.weight[color_ids[seen], torch.arange(width)[seen]] = sharp
    return heads, torch.eye(width)


def test_perfect_heads_lose_nothing(targets):
    cells = cells_with_objects()
    heads, tokens = perfect_heads(cells, targets)
    layer = nn.Linear(tokens.shape[-1], VOCAB_SIZE, bias=False)
    losses = heads(tokens, cells, layer)
    assert losses["dense_shape"].item() == pytest.approx(0, abs=1e-5)
    assert losses["dense_color"].item() == pytest.approx(0, abs=1e-5)
    assert losses["dense_center"].item() == pytest.approx(0, abs=1e-5)
    wrong = replace(cells, shape_ids=cells.shape_ids.flip(0), color_ids=cells.color_ids.flip(0))
    assert heads(tokens, wrong, layer)["dense_shape"] > 5
    assert heads(tokens, wrong, layer)["dense_color"] > 2
    elsewhere = replace(cells, is_center=~cells.is_center)
    assert heads(tokens, elsewhere, layer)["dense_center"] > 5


def test_boxes_are_read_through_the_rows_of_numbers(targets):
    """A head that points at each number's own row reaches 0: x1, y1, x2, y2 in order, cut at 0 and 1."""
    cells = cells_with_objects()
    width = 8
    heads = DenseHeads(width, targets)
    layer = nn.Linear(width, VOCAB_SIZE, bias=False)
    numbers = torch.arange(1000.0)
    # Normalised rows on a circle; a long vector in the same direction gives a bell around its number.
    angles = torch.pi / 2 * numbers / 999
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[NUMBER_IDS, :2] = torch.stack((angles.cos(), angles.sin()), dim=1) * 3
        heads.box.weight.zero_()
        is_object = cells.shape_ids.flatten() >= 0
        told = (cells.boxes.flatten(0, 2)[is_object].clamp(0, 1) * 999).round()
        length = (999 * 2 / torch.pi / SPREAD) ** 2
        directions = torch.zeros(3, 4, width)
        directions[..., 0] = (torch.pi / 2 * told / 999).cos() * length
        directions[..., 1] = (torch.pi / 2 * told / 999).sin() * length
        heads.box.bias.zero_()
        tokens = torch.zeros(8, width)
        tokens[is_object] = torch.eye(width)[:3]
        heads.box.weight[:, :3] = directions.flatten(1).T
    right = heads(tokens, cells, layer)["dense_box"]
    assert right.item() == pytest.approx(0, abs=0.02)
    swapped = replace(cells, boxes=cells.boxes[..., [1, 0, 3, 2]])
    assert heads(tokens, swapped, layer)["dense_box"] > 10


@pytest.mark.parametrize("has_objects", [True, False])
def test_gradients_of_dense_heads_are_finite(targets, has_objects):
    """A batch without any object must not spoil the weights."""
    cells = cells_with_objects()
    if not has_objects:
        nothing = torch.full_like(cells.shape_ids, -1)
        cells = replace(cells, shape_ids=nothing, color_ids=nothing)
    torch.manual_seed(2)
    heads, layer = DenseHeads(WIDTH, targets), random_layer()
    tokens = torch.randn(8, WIDTH, requires_grad=True)
    losses = heads(tokens, cells, layer)
    assert set(losses) == {"dense_shape", "dense_color", "dense_center", "dense_box"}
    sum(losses.values()).backward()
    for name, parameter in (*heads.named_parameters(), ("layer", layer.weight), ("tokens", tokens)):
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert (losses["dense_box"] > 0) == (losses["dense_color"] > 0) == has_objects
    assert tokens.grad.abs().sum() > 0


def test_words_in_pictures_have_no_colour_to_learn(targets):
    cells = cells_with_objects()
    heads = DenseHeads(WIDTH, targets)
    assert heads.color.out_features == len(COLOR_NAMES)
    tokens = torch.randn(8, WIDTH, requires_grad=True)
    heads(tokens, cells, random_layer())["dense_color"].backward()
    has_color = tokens.grad.abs().sum(dim=-1) > 0
    assert has_color.tolist() == (cells.color_ids.flatten() >= 0).tolist()


NUM_TOKENS = 6
CELL_POSITIONS = [1, 2, 4, 5]


def pointing_batch(shares, is_count=False, positions=(5,), weights=(1.0,)):
    """One row of six tokens: the first, the cell of the global view, one tile's, a newline, two more tiles' cells.

    The second object fills two tiles and has its middle in the first of them.
    """
    nothing = torch.empty(0)
    object_ids = torch.tensor([0, 1, 1, 0]).view(4, 1, 1)
    is_center = torch.tensor([True, True, False, True]).view(4, 1, 1)
    cells = Cells(object_ids, nothing, nothing, is_center, nothing)
    pointings = Pointings(
        torch.zeros(len(positions), dtype=torch.long),
        torch.tensor(positions, dtype=torch.long),
        torch.tensor(shares).view(-1, 3),
        torch.full((len(positions),), is_count),
        torch.tensor(weights),
    )
    ids = torch.zeros(1, NUM_TOKENS, dtype=torch.long)
    places = torch.tensor([CELL_POSITIONS])
    return AnswerBatch(ids, ids, ids, ids, ids, nothing, nothing, cells, places, pointings)


def pointing_loss(batch, attention, mask=None):
    """The loss where each token of one row attends by `attention` [T] in all heads that point."""
    loss = PointingLoss(batch)
    heads = NUM_POINTING_HEADS + 1  # the last one is free
    key = torch.eye(NUM_TOKENS).expand(1, heads, -1, -1)
    query = attention.log().expand(1, heads, NUM_TOKENS, -1).clone()
    query[:, -1] = torch.randn(NUM_TOKENS, NUM_TOKENS)
    scaling = 0.5
    visible = torch.ones(1, 1, NUM_TOKENS, NUM_TOKENS, dtype=torch.bool) if mask is None else mask
    loss.read(query / scaling, key, visible, scaling)
    return loss.value


def test_pointing_costs_the_divergence_from_the_shares():
    attention = torch.tensor([0.5, 0.1, 0.05, 0.15, 0.1, 0.1])
    expected = 0.6 * torch.tensor(0.6 / 0.5).log() + 0.2 * torch.tensor(0.2 / 0.2).log()
    expected += 0.2 * torch.tensor(0.2 / 0.15).log()  # of two cells together
    batch = pointing_batch([[0.6, 0.2, 0.2]])
    torch.testing.assert_close(pointing_loss(batch, attention), expected, atol=1e-4, rtol=1e-4)


def test_only_the_middles_in_tiles_count():
    attention = torch.tensor([0.6, 0.0, 0.2, 0.0, 0.0, 0.2]) + 1e-9
    assert pointing_loss(pointing_batch([[0.6, 0.2, 0.2]], is_count=True), attention).item() == pytest.approx(
        0, abs=1e-4
    )
    for elsewhere in ([0.6, 0.2, 0.2, 0.0, 0.0, 0.0], [0.6, 0.0, 0.0, 0.0, 0.2, 0.2]):
        attention = torch.tensor(elsewhere) + 1e-9
        assert pointing_loss(pointing_batch([[0.6, 0.2, 0.2]]), attention).item() == pytest.approx(0, abs=1e-4)
        assert pointing_loss(pointing_batch([[0.6, 0.2, 0.2]], is_count=True), attention) > 1


@pytest.mark.parametrize("split", [0.05, 0.2, 0.39])
def test_attention_may_choose_among_the_cells_of_an_object(split):
    attention = torch.tensor([0.6, 0.0, split, 0.0, 0.4 - split, 0.0]) + 1e-9
    assert pointing_loss(pointing_batch([[0.6, 0.0, 0.4]]), attention).item() == pytest.approx(0, abs=1e-4)
    assert pointing_loss(pointing_batch([[0.6, 0.4, 0.0]]), attention) > 1


def test_what_is_hidden_gets_no_attention():
    attention = torch.tensor([0.3, 0.3, 0.1, 0.1, 0.1, 0.1])
    mask = torch.ones(1, 1, NUM_TOKENS, NUM_TOKENS, dtype=torch.bool)
    mask[..., 2:] = False
    batch = pointing_batch([[0.5, 0.5, 0.0]])
    assert pointing_loss(batch, attention, mask).item() == pytest.approx(0, abs=1e-4)
    assert pointing_loss(batch, attention) > 0.1


def test_pointings_are_weighted():
    attention = torch.tensor([0.5, 0.1, 0.05, 0.15, 0.1, 0.1])
    shares = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    each = [pointing_loss(pointing_batch([own]), attention) for own in shares]
    weights = (1.0, 0.25, 0.75)
    found = pointing_loss(pointing_batch(shares, positions=(3, 4, 5), weights=weights), attention)
    expected = sum(weight * own for weight, own in zip(weights, each, strict=True)) / sum(weights)
    torch.testing.assert_close(found, expected)


def test_no_pointings_cost_nothing():
    batch = pointing_batch(shares=[], positions=(), weights=())
    assert pointing_loss(batch, torch.full((NUM_TOKENS,), 1 / NUM_TOKENS)).item() == 0


def test_the_attention_that_points_is_torchs_and_moves_one_layer():
    """Same hidden states as `sdpa`; gradients of the pointing loss reach that layer's queries and those before."""
    processor = nano_processor()
    model = untrained_nano(processor.tokenizer, seed=3).language.model
    curriculum = Curriculum(1, growing_share=0.0, last_small_share=1.0)
    batch = AnswerBatches(processor, curriculum, batch_size=2, tokens_a_picture=60)[0]
    options = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask(),
        "position_ids": batch.position_ids,
        "use_cache": False,
    }
    plain = model(**options).last_hidden_state
    model.set_attn_implementation(ATTENTION_NAME)
    torch.testing.assert_close(model(**options).last_hidden_state, plain)
    pointing = PointingLoss(batch)
    torch.testing.assert_close(model(**options, pointing=pointing).last_hidden_state, plain)
    assert pointing.value > 0.5
    pointing.value.backward()
    has_gradient = [layer.self_attn.q_proj.weight.grad is not None for layer in model.layers]
    assert has_gradient == [number <= POINTING_LAYER for number in range(len(model.layers))]
    own = model.layers[POINTING_LAYER].self_attn.q_proj.weight.grad.unflatten(0, (6, -1)).abs().sum(dim=(1, 2))
    assert (own > 0).tolist() == [True] * NUM_POINTING_HEADS + [False] * (6 - NUM_POINTING_HEADS)
