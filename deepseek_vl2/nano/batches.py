"""Training batches for nano: views by themselves for the tower, then pictures with questions.

In a batch of questions a row is a shared beginning (the user's mark and the pictures) and, one after the other,
conversations that do not see each other. Attention and positions are those of each conversation standing alone behind
the beginning, so pictures are encoded once for all of their questions and the model learns single conversations.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from deepseek_vl2.models import DeepseekVLV2Processor
from deepseek_vl2.models.modeling_deepseek_vl_v2 import arrange_views
from deepseek_vl2.models.special_tokens import ASSISTANT, USER
from deepseek_vl2.models.tiling import MAX_TILED_IMAGES, TileGrid
from deepseek_vl2.nano import questions
from deepseek_vl2.nano.drawing import LATER_SCENE_KINDS, ONE_TILE, SCENE_KINDS, draw_scene, larger_grid, size_for
from deepseek_vl2.nano.layouts import page_scene, table_cells
from deepseek_vl2.nano.questions import (
    MAX_COUNT,
    Example,
    Piece,
    Target,
    num_new_pictures,
    split_rng,
)
from deepseek_vl2.nano.scenes import Scene
from deepseek_vl2.nano.several import beginning_of, compared_scenes, in_context_scenes, make_compare, make_in_context
from deepseek_vl2.nano.targets import (
    Cells,
    LetterCell,
    cells_and_letters,
    cells_of,
    join_cells,
    letters_of_patches,
)
from deepseek_vl2.nano.tasks import TRAIN_SPLIT

IGNORE_ID = -100
# Attention that counts n objects leaves 3 / (n + 3) with the beginning, so that what it brings together tells n.
BEGINNING_SHARE = 3.0
# How many pictures a batch's rows have, and how often.
NUM_PICTURES = {1: 76, 2: 10, 3: 14}
# The same where counting or reading is practised.
PRACTISING_NUM_PICTURES = {1: 86, 2: 6, 3: 8}
# How often each question is asked of shapes, beside a description once in a while.
Make = Callable[[random.Random, Scene], Example | None]
SHAPE_QUESTIONS: Mapping[Make, float] = {
    questions.make_locate: 20,
    questions.make_locate_zh: 13,
    questions.make_locate_all: 14,
    questions.make_count: 34,
    questions.make_color: 8,
    questions.make_shape: 7,
    questions.make_ground: 8,
    questions.make_follow_up: 9,
    questions.make_parts: 8,
    questions.make_read: 6,
}
TEXT_QUESTIONS: Mapping[Make, float] = {
    questions.make_read: 50,
    questions.make_read_all: 25,
    questions.make_locate: 5,
    questions.make_color: 3,
}
CHART_QUESTIONS: Mapping[Make, float] = {questions.make_bar: 80, questions.make_locate: 10}
DESCRIBE_PROBABILITY = 0.25
MAX_QUESTIONS = 9
# How often a question comes after others about the same picture, and after how many.
LATER_PROBABILITY = 0.35
NUM_EARLIER = {1: 7, 2: 3}
# Of rows of two pictures: how often the second picture comes later in a conversation.
LATER_PICTURE_PROBABILITY = 0.5
NUMBERED_PROBABILITY = 0.6
# How often questions about a picture of shapes and print are about the print.
TEXT_AMONG_SHAPES_PROBABILITY = 0.5


class Aim(NamedTuple):
    """Where the attention of a head should go.

    Attributes:
        groups: For each group the cells that show the same thing, as indices into the cells of the row.
        shares: Part of the attention for the first token, then for each group. Sums to 1.
    """

    groups: list[list[int]]
    shares: list[float]


class Pointing(NamedTuple):
    """Where attention from a token of an answer should go, in its row.

    Attributes:
        position: The token, one before those that it is about.
        aims: Of the first and of the second half of the heads that point. Of a letter they differ: the first half goes
            to cells whose first letter it is, the second to those where others come before it, so that what a head
            brings along is always the same one of a cell's letters. Who has nothing to look at stays with the first
            token.
        weight: Those of a question sum to 1.
        is_about_one: Whether the token says something of one object.
    """

    position: int
    aims: tuple[Aim, Aim]
    weight: float
    is_about_one: bool


@dataclass
class Pointings:
    """Pointings of a batch. P pointings, C cells a row at most, K groups at most, two halves of the heads.

    Attributes:
        rows: Row of the batch [P].
        positions: Token that attends [P].
        group_ids: Group of each cell of the row [2, P, C]; -1 for none.
        shares: [2, P, 1 + K], see `Aim`.
        weights: [P]; those of a question sum to 1.
        attended: Pointings that are about one object, [A].
        attended_cells: A cell that shows that object, as a number among all cells of the batch, [A].
    """

    rows: torch.Tensor
    positions: torch.Tensor
    group_ids: torch.Tensor
    shares: torch.Tensor
    weights: torch.Tensor
    attended: torch.Tensor
    attended_cells: torch.Tensor


@dataclass
class AnswerBatch:
    """Pictures with questions. B rows, T tokens, V views a row at most, N cells in all rows.

    Attributes:
        input_ids: [B, T].
        labels: [B, T], `IGNORE_ID` outside answers; position t is predicted from t - 1.
        position_ids: [B, T].
        segments: [B, T]; 0 for the beginning, k for conversation k, -1 for padding on the right.
        question_ids: Number of the question in its row, [B, T]; 0 outside answers.
        images_seq_mask: [B, T].
        images: [B, V, 3, S, S].
        images_spatial_crop: [B, I, 2].
        cells: Of the views of all rows, boxes as parts of the picture.
        picture_ids: Which of its row's pictures each cell belongs to, [N].
        cell_rows: Row of each cell [N].
        cell_positions: Token of each cell [N].
        cell_table: Token of each cell of each row [B, C]; 0 where a row has fewer.
        pointings: Where attention from answers should go.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    segments: torch.Tensor
    question_ids: torch.Tensor
    images_seq_mask: torch.Tensor
    images: torch.Tensor
    images_spatial_crop: torch.Tensor
    cells: Cells
    picture_ids: torch.Tensor
    cell_rows: torch.Tensor
    cell_positions: torch.Tensor
    cell_table: torch.Tensor
    pointings: Pointings

    def attention_mask(self) -> torch.Tensor:
        """Which tokens each token may see, [B, 1, T, T]: earlier ones of the beginning and of its own conversation."""
        queries, keys = self.segments[:, :, None], self.segments[:, None]
        num_tokens = self.segments.shape[1]
        is_earlier = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
        return (is_earlier & ((keys == 0) | (keys == queries)))[:, None]


@dataclass(frozen=True)
class Curriculum:
    """What scenes are drawn at a point of the training.

    Attributes:
        num_batches: Batches of the stage.
        growing_share: Part of the stage, at its start, over which scenes and pictures grow.
        first_num_objects: Most objects in a scene at the start.
        max_num_objects: Most objects in a scene after growing.
        first_small_share: How often a picture has one tile only at the start, which is fastest.
        last_small_share: The same after growing.
        count_weight: How often a question asks for a count, see `SHAPE_QUESTIONS`.
        num_pictures: How many pictures a batch's rows have, and how often.
        scene_kinds: What single pictures show, and how often.
    """

    num_batches: int
    growing_share: float = 0.5
    first_num_objects: int = 3
    max_num_objects: int = 6
    first_small_share: float = 1.0
    last_small_share: float = 0.15
    count_weight: float = SHAPE_QUESTIONS[questions.make_count]
    num_pictures: Mapping[int, int] = field(default_factory=lambda: NUM_PICTURES)
    scene_kinds: Mapping[str, int] = field(default_factory=lambda: SCENE_KINDS)

    def num_objects(self, batch: int) -> tuple[int, int]:
        """Fewest and most objects in a scene."""
        return 1, int(self._grown(self.first_num_objects, self.max_num_objects, batch) + 1e-9)

    def small_share(self, batch: int) -> float:
        """How often a picture has one tile only."""
        return self._grown(self.first_small_share, self.last_small_share, batch)

    def _grown(self, first: float, last: float, batch: int) -> float:
        progress = min(1.0, batch / self.num_batches / self.growing_share) if self.growing_share else 1.0
        return first + (last - first) * progress


@dataclass
class ViewBatch:
    """Views without questions: views [V, 3, S, S] and what their tokens and patches should see.

    Attributes:
        views: [V, 3, S, S].
        cells: Of their image tokens.
        patch_letters: Letter of each patch, index into `SIGNS`, -1 for none, [V, P, P].
        patch_places: Place of that letter in what the view shows of its text, see `PatchLetters.places`, [V, P, P].
    """

    views: torch.Tensor
    cells: Cells
    patch_letters: torch.Tensor
    patch_places: torch.Tensor


class ViewBatches(Dataset[ViewBatch]):
    """Batch `i` of views, drawn from its seed alone, so that a run can go on anywhere.

    Args:
        processor: nano's processor.
        num_batches: Length of the stage.
        batch_size: Views a batch, about.
        page_share: How often a picture is a page of text.
        split: Name of the stream of seeds.
    """

    def __init__(
        self,
        processor: DeepseekVLV2Processor,
        num_batches: int,
        batch_size: int,
        page_share: float = 0.0,
        split: str = f"{TRAIN_SPLIT}-views",
    ) -> None:
        self.processor = processor
        self.num_batches = num_batches
        self.batch_size = batch_size
        self.page_share = page_share
        self.split = split

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> ViewBatch:
        rng = split_rng(self.split, index)
        views: list[torch.Tensor] = []
        cells: list[Cells] = []
        letters: list[NDArray[np.int64]] = []
        places: list[NDArray[np.int64]] = []
        while len(views) < self.batch_size:
            grid = ONE_TILE if rng.random() < 0.4 else larger_grid(rng)
            is_page = bool(self.page_share) and rng.random() < self.page_share
            if is_page:
                scene = page_scene(rng, size=size_for(rng, self.processor, grid, is_for_text=True))
            else:
                scene = draw_scene(rng, self.processor, grid, (1, MAX_COUNT), SCENE_KINDS)
            all_views = self.processor.image_transform.views(scene.draw(), grid, self.processor.image_size)
            tiles = range(1, 1 + grid.num_tiles)
            chosen = [0] if grid == ONE_TILE else [0, *rng.sample(tiles, 2)]
            if is_page and grid != ONE_TILE:
                # Cut into tiles, a page has letters too low to be read in its global view.
                chosen = list(tiles)
            views += [all_views[number] for number in chosen]
            cells.append(cells_of(self.processor, scene, grid, is_by_view=True).chosen(chosen))
            found = letters_of_patches(self.processor, scene, grid)
            letters.append(found.signs[chosen])
            places.append(found.places[chosen])
        of_patches = (torch.from_numpy(np.concatenate(own)) for own in (letters, places))
        return ViewBatch(torch.stack(views), join_cells(cells), *of_patches)


class AnswerBatches(Dataset[AnswerBatch]):
    """Batch `i` of pictures with questions, drawn from its seed alone, so that a run can go on anywhere.

    Args:
        processor: nano's processor.
        curriculum: What to draw when.
        batch_size: Rows a batch; half as many where each has two large pictures.
        max_tokens: Tokens of questions and answers of a row; as many are asked as fit.
        split: Name of the stream of seeds.
    """

    def __init__(
        self,
        processor: DeepseekVLV2Processor,
        curriculum: Curriculum,
        batch_size: int,
        max_tokens: int,
        split: str = TRAIN_SPLIT,
    ) -> None:
        self.processor = processor
        self.curriculum = curriculum
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.split = split

    def __len__(self) -> int:
        return self.curriculum.num_batches

    def __getitem__(self, index: int) -> AnswerBatch:
        rng = split_rng(self.split, index)
        weights = self.curriculum.num_pictures
        num_pictures = rng.choices(list(weights), list(weights.values()))[0]
        is_small = rng.random() < self.curriculum.small_share(index)
        # Rows of a batch have pictures of about the same size, so that little is padded.
        num_rows = max(1, self.batch_size // 2) if num_pictures == 2 and not is_small else self.batch_size
        rows: list[dict[str, Any]] = []
        while len(rows) < num_rows:
            grids = [ONE_TILE if is_small else larger_grid(rng) for _ in range(num_pictures)]
            scenes, examples = self._ask(rng, grids, self.curriculum.num_objects(index))
            is_numbered = num_pictures == 3 and rng.random() < NUMBERED_PROBABILITY
            row = encode_row(self.processor, scenes, examples, self.max_tokens, is_numbered)
            if max(row["segments"]) > 0:
                rows.append(row)
        return collate(rows, self.processor.pad_id)

    def _ask(
        self, rng: random.Random, grids: Sequence[TileGrid], num_objects: tuple[int, int]
    ) -> tuple[Sequence[Scene], Iterable[Example]]:
        """Draws pictures for grids, and questions about them."""
        if len(grids) == 1:
            scene = draw_scene(rng, self.processor, grids[0], num_objects, self.curriculum.scene_kinds)
            return [scene], ask(rng, scene, count_weight=self.curriculum.count_weight)
        if len(grids) == 2 and rng.random() < LATER_PICTURE_PROBABILITY:
            return self._ask_later(rng, grids, num_objects)
        scenes: Sequence[Scene]
        sizes = [size_for(rng, self.processor, grid, is_for_text=False) for grid in grids]
        if len(grids) == 2:
            scenes = in_context_scenes(rng, sizes=sizes, num_objects=(1, max(2, num_objects[1] - 1)))
            found = [make_in_context(rng, scenes)]
        else:
            # Three pictures are never cut into tiles, however large they are.
            scenes = compared_scenes(rng, sizes=sizes)
            found = [make_compare(rng, scenes) for _ in range(MAX_QUESTIONS)]
        return scenes, [example for example in found if example is not None]

    def _ask_later(
        self, rng: random.Random, grids: Sequence[TileGrid], num_objects: tuple[int, int]
    ) -> tuple[Sequence[Scene], Iterable[Example]]:
        """Draws two pictures, a question about the first one, and after it some about the second one."""
        first, second = (draw_scene(rng, self.processor, grid, num_objects, LATER_SCENE_KINDS) for grid in grids)
        opening = next(ask(rng, first), None)
        if opening is None:
            return [first, second], []
        asked = ask(rng, second, count_weight=self.curriculum.count_weight)
        return [first, second], [own.about_a_further_picture(opening) for own in asked if not own.history]


def ask(
    rng: random.Random,
    scene: Scene,
    num_questions: int = MAX_QUESTIONS,
    count_weight: float = SHAPE_QUESTIONS[questions.make_count],
) -> Iterator[Example]:
    """Asks a scene several questions, some of them after earlier ones, leaving out those that do not fit it."""
    weights: Mapping[Make, float]
    earlier: list[Example] = []
    if scene.bars:
        weights = CHART_QUESTIONS
    elif table_cells(scene):
        weights = {questions.make_table: 1}
    else:
        is_of_texts = len(scene.texts) > len(scene.shapes) or (
            bool(scene.texts) and rng.random() < TEXT_AMONG_SHAPES_PROBABILITY
        )
        weights = TEXT_QUESTIONS if is_of_texts else {**SHAPE_QUESTIONS, questions.make_count: count_weight}
        if not scene.texts and rng.random() < DESCRIBE_PROBABILITY:
            example = questions.make_describe(rng, scene)
            if example is not None:
                earlier.append(example)
                yield example
    for make in rng.choices(list(weights), list(weights.values()), k=num_questions):
        if make is questions.make_count:
            # A scene without the wanted count gives whatever it has.
            example = questions.make_count(rng, scene, questions.wanted_count(rng)) or questions.make_count(rng, scene)
        else:
            example = make(rng, scene)
        if example is None:
            continue
        if not example.history:
            if earlier and rng.random() < LATER_PROBABILITY:
                (number,) = rng.choices(list(NUM_EARLIER), list(NUM_EARLIER.values()))
                example = example.after(*rng.sample(earlier, min(number, len(earlier))))
            else:
                earlier.append(example)
        yield example


@lru_cache
def cell_places(grid: TileGrid, side: int) -> tuple[int, ...]:
    """Place of each cell of each view [V * side * side] among the image tokens of a picture."""
    num_cells = grid.num_views * side**2
    cells = torch.arange(num_cells).view(grid.num_views, side**2, 1)
    no_cell = torch.tensor([-1])
    order = arrange_views(cells, grid, newline=no_cell, separator=no_cell)[:, 0].tolist()
    places = {cell: place for place, cell in enumerate(order)}
    return tuple(places[cell] for cell in range(num_cells))


class RowCells:
    """The cells of all pictures of a row, one after the other, and which of them show what.

    Args:
        processor: nano's processor.
        scenes: The pictures.
        grids: Their tiles.
    """

    def __init__(self, processor: DeepseekVLV2Processor, scenes: Sequence[Scene], grids: Sequence[TileGrid]) -> None:
        side = processor.num_tokens_per_side
        self.cells: list[Cells] = []
        self.places: list[list[int]] = []
        self._seen: dict[Target, list[int]] = {}
        self._middles: dict[Target, list[int]] = {}
        self._letters: dict[tuple[Target, int], list[LetterCell]] = {}
        first = 0
        for picture, (scene, grid) in enumerate(zip(scenes, grids, strict=True)):
            cells, letters = cells_and_letters(processor, scene, grid, is_by_view=False)
            self.cells.append(cells)
            self.places.append(list(cell_places(grid, side)))
            object_ids = cells.object_ids.flatten().tolist()
            # Only the tiles' middle of an object is counted; they show more of small ones than the global view.
            is_counted = cells.is_center.clone()
            is_counted[0] = False
            for cell, (number, counts) in enumerate(zip(object_ids, is_counted.flatten().tolist(), strict=True)):
                if number >= 0:
                    self._seen.setdefault(Target(picture, number), []).append(first + cell)
                    if counts:
                        self._middles.setdefault(Target(picture, number), []).append(first + cell)
            for (number, place), found in letters.cells.items():
                own = [LetterCell(first + cell, slot) for cell, slot in found]
                self._letters[Target(picture, number), place] = own
            first += len(object_ids)

    def attended(self, piece: Piece, offset: int) -> tuple[Aim, Aim] | None:
        """Where heads should look for the token at an offset (characters) of a piece, see `Pointing.aims`.

        Returns:
            None where nothing should be attended to, or something that no cell shows.
        """
        if piece.how == "letters":
            (target,) = piece.targets
            found = self._letters.get((target, offset), [])
            of_halves = ([own.cell for own in found if (own.slot > 0) == is_later] for is_later in (False, True))
            first, later = (Aim([cells], [0.0, 1.0]) if cells else Aim([], [1.0]) for cells in of_halves)
            return (first, later) if found else None
        beginning = BEGINNING_SHARE if piece.how == "count" else 0.0
        of_targets = self._middles if piece.how == "count" else self._seen
        groups = [of_targets[target] for target in piece.targets if target in of_targets]
        total = beginning + len(groups)
        if total == 0 or len(groups) < len(piece.targets):
            return None
        aim = Aim(groups, [beginning / total, *[1 / total] * len(groups)])
        return aim, aim


def encode_row(
    processor: DeepseekVLV2Processor,
    scenes: Sequence[Scene],
    examples: Iterable[Example],
    max_tokens: int,
    is_numbered: bool = False,
) -> dict[str, Any]:
    """Encodes pictures and conversations about them as one row of a batch, see `AnswerBatch`.

    Args:
        processor: nano's processor.
        scenes: The pictures.
        examples: The questions; those are left out that do not fit behind the ones before them. Where pictures come
            later in a conversation, all have the same turns before the last picture, which are no part of the answers
            to learn.
        max_tokens: Most tokens of questions and answers.
        is_numbered: Whether the pictures are introduced by number, see `beginning_of`.
    """
    examples = list(examples)
    opening = _turns_before_the_last_picture(examples)
    pictures = [scene.draw() for scene in scenes]
    is_tiled = len(scenes) <= MAX_TILED_IMAGES
    text = _beginning_in_words(processor, scenes, opening, is_numbered)
    beginning = processor.tokenize_with_images(text, pictures, bos=True, eos=False, cropping=is_tiled)
    grids = [TileGrid(*grid) for grid in beginning.images_spatial_crop]
    row_cells = RowCells(processor, scenes, grids)
    input_ids = list(beginning.input_ids)
    first = len(input_ids)
    labels = [IGNORE_ID] * first
    position_ids = list(range(first))
    segments = [0] * first
    question_ids = [0] * first
    pointings: list[Pointing] = []
    segment = question = 0
    for example in examples:
        own_turns = example.turns[len(opening) :]
        turns = [_encode_turn(processor, turn, is_first=number == 0) for number, turn in enumerate(own_turns)]
        num_tokens = sum(len(asked) + len(answer) for asked, answer, _ in turns)
        if len(input_ids) - first + num_tokens > max_tokens:
            continue
        segment += 1
        position_ids += range(first, first + num_tokens)
        segments += [segment] * num_tokens
        for asked, answer, pieces in turns:
            question += 1
            # Attention of the token before brings together what a token is about.
            start = len(input_ids) + len(asked) - 1
            own = []
            for place, (piece, offset) in enumerate(pieces, start=start):
                aims = row_cells.attended(piece, offset)
                if aims is not None:
                    own.append((place, aims, piece.how == "objects" and len(aims[0].groups) == 1))
            pointings += [Pointing(place, aims, 1 / len(own), is_about_one) for place, aims, is_about_one in own]
            input_ids += asked + answer
            labels += [IGNORE_ID] * len(asked) + answer
            question_ids += [0] * len(asked) + [question] * len(answer)
    spans = _image_spans(beginning.images_seq_mask, row_cells.places)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "segments": segments,
        "question_ids": question_ids,
        "images_seq_mask": [*beginning.images_seq_mask, *[False] * (len(input_ids) - first)],
        "images": torch.stack(beginning.images),
        "grids": [list(grid) for grid in grids],
        "cells": join_cells(row_cells.cells),
        "picture_ids": [picture for picture, own in enumerate(row_cells.places) for _ in own],
        "cell_positions": spans,
        "pointings": pointings,
    }


def _turns_before_the_last_picture(examples: Sequence[Example]) -> tuple[Example, ...]:
    """The turns that all conversations of a row begin with."""
    found = set()
    for example in examples:
        new = num_new_pictures(example.turns)
        found.add(example.turns[: max(number for number, count in enumerate(new) if count)])
    if len(found) > 1:
        raise ValueError(f"conversations of one row have {len(found)} different beginnings")
    return found.pop() if found else ()


def _beginning_in_words(
    processor: DeepseekVLV2Processor, scenes: Sequence[Scene], opening: Sequence[Example], is_numbered: bool
) -> str:
    """The text of a row up to its last picture."""
    parts = []
    for turn, new in zip(opening, num_new_pictures(opening), strict=True):
        marks = f"{beginning_of(new)}\n" if new else ""
        parts.append(f"{_asked(turn, f'{USER}: {marks}')}{turn.answer}{processor.tokenizer.eos_token}")
    num_shown = len(opening[-1].scenes) if opening else 0
    return "".join(parts) + f"{USER}: {beginning_of(len(scenes) - num_shown, is_numbered)}"


def _asked(turn: Example, before: str) -> str:
    """The text of a turn from what stands before its question to where its answer begins."""
    return f"{before}{turn.question}\n\n{ASSISTANT}:"


def _encode_turn(
    processor: DeepseekVLV2Processor, turn: Example, is_first: bool
) -> tuple[list[int], list[int], list[tuple[Piece, int]]]:
    """Ids of a question and its answer, and for each token of the answer its piece and where in that it begins."""
    question = processor.encode(_asked(turn, "\n" if is_first else f"{USER}: "), bos=False)
    encoded = processor.tokenizer(turn.answer, add_special_tokens=False, return_offsets_mapping=True)
    ends = np.cumsum([len(piece.text) for piece in turn.pieces])
    pieces = []
    for start, _ in encoded["offset_mapping"]:
        number = int(np.searchsorted(ends, start, side="right"))
        piece = turn.pieces[number]
        pieces.append((piece, start - int(ends[number]) + len(piece.text)))
    return question, [*encoded["input_ids"], processor.eos_id], pieces


def _image_spans(images_seq_mask: Sequence[bool], places: Sequence[Sequence[int]]) -> list[int]:
    """Position in the row of each cell, from the places of cells among their own picture's tokens."""
    tokens = [position for position, is_image in enumerate(images_seq_mask) if is_image]
    positions: list[int] = []
    first = 0
    for own in places:
        positions += [tokens[first + place] for place in own]
        # Newlines and the separator are image tokens, too; the last one is a newline.
        first += max(own) + 2
    return positions


def collate(rows: Sequence[dict[str, Any]], pad_id: int) -> AnswerBatch:
    """Joins rows, texts padded on the right, views and grids with zeros."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int | bool) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])

    num_cells = max(len(row["cell_positions"]) for row in rows)
    tables = [row["cell_positions"] + [0] * (num_cells - len(row["cell_positions"])) for row in rows]
    return AnswerBatch(
        input_ids=padded("input_ids", pad_id),
        labels=padded("labels", IGNORE_ID),
        position_ids=padded("position_ids", 0),
        segments=padded("segments", -1),
        question_ids=padded("question_ids", 0),
        images_seq_mask=padded("images_seq_mask", False),
        images=torch.nn.utils.rnn.pad_sequence([row["images"] for row in rows], batch_first=True),
        images_spatial_crop=torch.tensor([row["grids"] for row in rows]),
        cells=join_cells([row["cells"] for row in rows]),
        picture_ids=torch.tensor([picture for row in rows for picture in row["picture_ids"]]),
        cell_rows=torch.tensor([number for number, row in enumerate(rows) for _ in row["cell_positions"]]),
        cell_positions=torch.tensor([position for row in rows for position in row["cell_positions"]]),
        cell_table=torch.tensor(tables),
        pointings=_join_pointings(
            [row["pointings"] for row in rows], [len(row["cell_positions"]) for row in rows], num_cells
        ),
    )


def _join_pointings(of_rows: Sequence[Sequence[Pointing]], cells_of_rows: Sequence[int], num_cells: int) -> Pointings:
    """Joins the pointings of rows; those of fewer groups get shares of 0."""
    joined = [pointing for pointings in of_rows for pointing in pointings]
    num_groups = max((len(aim.groups) for own in joined for aim in own.aims), default=0)
    shares = torch.zeros(2, len(joined), 1 + num_groups)
    group_ids = torch.full((2, len(joined), num_cells), -1)
    for number, own in enumerate(joined):
        for half, aim in enumerate(own.aims):
            shares[half, number, : len(aim.shares)] = torch.tensor(aim.shares)
            for group, cells in enumerate(aim.groups):
                group_ids[half, number, cells] = group
    rows = [row for row, pointings in enumerate(of_rows) for _ in pointings]
    first_cells = np.cumsum([0, *cells_of_rows]).tolist()
    attended = [number for number, own in enumerate(joined) if own.is_about_one]
    return Pointings(
        rows=torch.tensor(rows, dtype=torch.long),
        positions=torch.tensor([own.position for own in joined], dtype=torch.long),
        group_ids=group_ids,
        shares=shares,
        weights=torch.tensor([own.weight for own in joined]),
        attended=torch.tensor(attended, dtype=torch.long),
        attended_cells=torch.tensor(
            [first_cells[rows[number]] + joined[number].aims[0].groups[0][0] for number in attended], dtype=torch.long
        ),
    )
