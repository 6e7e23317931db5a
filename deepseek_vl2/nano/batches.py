"""Training batches for nano: views by themselves for the tower, then pictures with questions.

In a batch of questions a row is a shared beginning (the user's mark and the picture) and, one after the other,
questions with their answers that do not see each other. Attention and positions are those of each question standing
alone behind the beginning, so a picture is encoded once for all of its questions and the model learns single questions.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from deepseek_vl2.models import DeepseekVLV2Processor
from deepseek_vl2.models.modeling_deepseek_vl_v2 import arrange_views
from deepseek_vl2.models.special_tokens import ASSISTANT, DET_END, DET_START, IMAGE, REF_END, REF_START, USER
from deepseek_vl2.models.tiling import TileGrid, choose_grid
from deepseek_vl2.nano.questions import (
    MAX_COUNT,
    TASKS,
    TRAIN_SPLIT,
    Example,
    counting_scene,
    dense_targets,
    make_count,
    split_rng,
    view_rectangles,
)
from deepseek_vl2.nano.scenes import Scene, Size, random_scene, random_size

IGNORE_ID = -100
BEGINNING = f"{USER}: {IMAGE}"
# How often each task is asked of a scene.
TASK_WEIGHTS = {"locate": 28.0, "locate_all": 8.0, "count": 44.0, "color": 10.0, "shape": 6.0, "read": 6.0}
DESCRIBE_PROBABILITY = 0.3
MAX_QUESTIONS = 9
COUNTING_SCENE_PROBABILITY = 0.5
MIN_COVER = 0.1
# Attention that counts n objects leaves 3 / (n + 3) with the beginning, so that what it brings together tells n.
BEGINNING_SHARE = 3.0
# The tokens that end a box, in the tokenizer's spelling (Ġ is a space).
BOX_ENDS = ("],Ġ[", "]]")
ONE_TILE = TileGrid(1, 1)
LARGER_GRIDS = (TileGrid(1, 2), TileGrid(2, 1), TileGrid(2, 2))
LARGER_GRID_WEIGHTS = (1, 1, 3)


@dataclass
class Cells:
    """What each image token should see. V views, G image tokens a side.

    Attributes:
        object_ids: Index of the object in its scene [V, G, G]; -1 for nothing.
        shape_ids: Class [V, G, G]; -1 for nothing.
        color_ids: Colour [V, G, G]; -1 for nothing or text.
        is_center: Whether the cell is the one of its object nearest to the object's middle, [V, G, G]: one cell of the
            global view and one of all tiles.
        boxes: Box x1, y1, x2, y2 of the object, [V, G, G, 4], as parts of the picture or of the view, see `cells_of`.
    """

    object_ids: torch.Tensor
    shape_ids: torch.Tensor
    color_ids: torch.Tensor
    is_center: torch.Tensor
    boxes: torch.Tensor

    def chosen(self, views: Sequence[int]) -> "Cells":
        """Those of some views."""
        return Cells(*(getattr(self, field.name)[views] for field in fields(self)))


class Pointing(NamedTuple):
    """One of `Pointings`, in its row."""

    position: int
    shares: list[float]
    is_count: bool
    weight: float


@dataclass
class Pointings:
    """Where attention from tokens of answers should go: to the objects that the next token is about. P pointings.

    Attributes:
        rows: Row of the batch [P].
        positions: Token that attends [P].
        shares: Part of the attention [P, 1 + O]: for the first token, then for each object of the scene. Sums to 1.
        is_count: Whether objects are counted, [P]: then only the middle of each object counts.
        weights: [P]; those of a question sum to 1.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    shares: torch.Tensor
    is_count: torch.Tensor
    weights: torch.Tensor


@dataclass
class ViewBatch:
    """Views without questions: views [V, 3, S, S] and what their tokens should see."""

    views: torch.Tensor
    cells: Cells


@dataclass
class AnswerBatch:
    """Pictures with questions. B rows, T tokens, V views a row.

    Attributes:
        input_ids: [B, T].
        labels: [B, T], `IGNORE_ID` outside answers; position t is predicted from t - 1.
        position_ids: [B, T].
        segments: [B, T]; 0 for the beginning, k for question k, -1 for padding on the right.
        images_seq_mask: [B, T].
        images: [B, V, 3, S, S].
        images_spatial_crop: [B, 1, 2].
        cells: Of all B * V views, boxes as parts of the picture.
        cell_positions: Token of each cell of a row's views, [B, V * G * G].
        pointings: Where attention from answers should go.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    segments: torch.Tensor
    images_seq_mask: torch.Tensor
    images: torch.Tensor
    images_spatial_crop: torch.Tensor
    cells: Cells
    cell_positions: torch.Tensor
    pointings: Pointings

    def attention_mask(self) -> torch.Tensor:
        """Which tokens each token may see, [B, 1, T, T]: earlier ones of the beginning and of its own question."""
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
    """

    num_batches: int
    growing_share: float = 0.5
    first_num_objects: int = 3
    max_num_objects: int = 6
    first_small_share: float = 1.0
    last_small_share: float = 0.15

    def num_objects(self, batch: int) -> tuple[int, int]:
        """Fewest and most objects in a scene."""
        return 1, int(self._grown(self.first_num_objects, self.max_num_objects, batch) + 1e-9)

    def small_share(self, batch: int) -> float:
        """How often a picture has one tile only."""
        return self._grown(self.first_small_share, self.last_small_share, batch)

    def _grown(self, first: float, last: float, batch: int) -> float:
        progress = min(1.0, batch / self.num_batches / self.growing_share) if self.growing_share else 1.0
        return first + (last - first) * progress


class ViewBatches(Dataset[ViewBatch]):
    """Batch `i` of views, drawn from its seed alone, so that a run can go on anywhere.

    Args:
        processor: nano's processor.
        num_batches: Length of the stage.
        batch_size: Views a batch, about.
    """

    def __init__(self, processor: DeepseekVLV2Processor, num_batches: int, batch_size: int) -> None:
        self.processor = processor
        self.num_batches = num_batches
        self.batch_size = batch_size

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> ViewBatch:
        rng = split_rng(f"{TRAIN_SPLIT}-views", index)
        views: list[torch.Tensor] = []
        cells: list[Cells] = []
        while len(views) < self.batch_size:
            grid = ONE_TILE if rng.random() < 0.6 else _larger_grid(rng)
            scene = draw_scene(rng, self.processor, grid, (1, MAX_COUNT))
            all_views = self.processor.image_transform.views(scene.draw(), grid, self.processor.image_size)
            chosen = [0] if grid == ONE_TILE else [0, rng.randint(1, grid.num_tiles)]
            views += [all_views[number] for number in chosen]
            cells.append(cells_of(self.processor, scene, grid, is_by_view=True).chosen(chosen))
        return ViewBatch(torch.stack(views), join_cells(cells))


class AnswerBatches(Dataset[AnswerBatch]):
    """Batch `i` of pictures with questions, drawn from its seed alone, so that a run can go on anywhere.

    Args:
        processor: nano's processor.
        curriculum: What to draw when.
        batch_size: Pictures a batch.
        tokens_a_picture: Tokens of questions and answers for each picture; as many are asked as fit.
        split: Name of the stream of seeds.
    """

    def __init__(
        self,
        processor: DeepseekVLV2Processor,
        curriculum: Curriculum,
        batch_size: int,
        tokens_a_picture: int,
        split: str = TRAIN_SPLIT,
    ) -> None:
        self.processor = processor
        self.curriculum = curriculum
        self.batch_size = batch_size
        self.tokens_a_picture = tokens_a_picture
        self.split = split

    def __len__(self) -> int:
        return self.curriculum.num_batches

    def __getitem__(self, index: int) -> AnswerBatch:
        rng = split_rng(self.split, index)
        # All pictures of a batch have the same number of views, so that they stack.
        grid = ONE_TILE if rng.random() < self.curriculum.small_share(index) else _larger_grid(rng)
        rows: list[dict[str, Any]] = []
        while len(rows) < self.batch_size:
            scene = draw_scene(rng, self.processor, grid, self.curriculum.num_objects(index))
            row = encode_row(self.processor, scene, ask(rng, scene), self.tokens_a_picture)
            if max(row["segments"]) > 0:
                rows.append(row)
        return collate(rows, self.processor.pad_id)


def _larger_grid(rng: random.Random) -> TileGrid:
    return rng.choices(LARGER_GRIDS, LARGER_GRID_WEIGHTS)[0]


def draw_scene(
    rng: random.Random, processor: DeepseekVLV2Processor, grid: TileGrid, num_objects: tuple[int, int]
) -> Scene:
    """Draws a scene whose picture is tiled to a grid, sometimes one to count in."""
    size = _size_for(rng, processor, grid)
    if rng.random() < COUNTING_SCENE_PROBABILITY:
        return counting_scene(rng, rng.randint(1, min(MAX_COUNT, num_objects[1])), size=size)
    return random_scene(rng, size=size, num_objects=num_objects)


def _size_for(rng: random.Random, processor: DeepseekVLV2Processor, grid: TileGrid) -> Size:
    side = processor.image_size
    while True:
        if grid != ONE_TILE:
            size = random_size(rng)
        elif rng.random() < 0.3:
            size = (side, side)
        else:
            size = (rng.randint(side // 2, side), rng.randint(side // 2, side))
        if choose_grid(size, 1, side, processor.candidate_resolutions) == grid:
            return size


def ask(rng: random.Random, scene: Scene, num_questions: int = MAX_QUESTIONS) -> Iterator[Example]:
    """Asks a scene several questions, leaving out tasks that do not fit it."""
    if rng.random() < DESCRIBE_PROBABILITY:
        example = TASKS["describe"](rng, scene)
        if example is not None:
            yield example
    for task in rng.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()), k=num_questions):
        if task == "count":
            # Wanted counts are drawn evenly, zero once in ten; a scene without the count gives whatever it has.
            wanted = 0 if rng.random() < 0.1 else rng.randint(1, MAX_COUNT)
            example = make_count(rng, scene, wanted) or make_count(rng, scene)
        else:
            example = TASKS[task](rng, scene)
        if example is not None:
            yield example


def cells_of(processor: DeepseekVLV2Processor, scene: Scene, grid: TileGrid, is_by_view: bool) -> Cells:
    """What each image token of each view of a scene should see.

    Args:
        processor: nano's processor.
        scene: The scene.
        grid: Its tiles.
        is_by_view: Whether boxes in tiles are parts of the tile, reaching beyond 0 and 1 where the object does: all
            that the tower can know. Otherwise they are parts of the whole picture, as in global views.
    """
    rectangles = view_rectangles(*scene.size, *grid, side=processor.image_size)
    targets = dense_targets(scene, rectangles, processor.num_tokens_per_side, MIN_COVER)
    boxes = targets.boxes
    if is_by_view:
        pixels = boxes[1:] * np.array(scene.size * 2)
        origins = rectangles[1:, None, None, [0, 1, 0, 1]]
        extents = (rectangles[1:, 2:] - rectangles[1:, :2])[:, None, None, [0, 1, 0, 1]]
        boxes = np.concatenate([boxes[:1], (pixels - origins) / extents]).astype(np.float32)
    is_center = _centers(scene, rectangles, targets.presence)
    arrays = (targets.presence, targets.shape_ids, targets.color_ids, is_center, boxes)
    return Cells(*(torch.from_numpy(array) for array in arrays))


def _centers(scene: Scene, rectangles: NDArray[np.float64], presence: NDArray[np.int64]) -> NDArray[np.bool_]:
    """See `Cells.is_center`; rectangles [V, 4] of the views in pixels, objects [V, G, G] that the cells see."""
    middles = (np.arange(presence.shape[1]) + 0.5) / presence.shape[1]
    x, y = (rectangles[:, [low]] + middles * (rectangles[:, [low + 2]] - rectangles[:, [low]]) for low in (0, 1))
    is_center = np.zeros(presence.shape, bool)
    for number, item in enumerate(scene.objects):
        distances = (x[:, None] - item.center[0]) ** 2 + (y[:, :, None] - item.center[1]) ** 2  # [V, G, G]
        distances = np.where(presence == number, distances, np.inf)
        for views in (slice(0, 1), slice(1, None)):
            nearest = distances[views].argmin()
            is_center[views].reshape(-1)[nearest] |= np.isfinite(distances[views].flat[nearest])
    return is_center


def join_cells(cells: Sequence[Cells]) -> Cells:
    """Joins the cells of several pictures along their views."""
    return Cells(*(torch.cat([getattr(own, field.name) for own in cells]) for field in fields(Cells)))


@lru_cache
def cell_places(grid: TileGrid, side: int) -> tuple[int, ...]:
    """Place of each cell of each view [V * side * side] among the image tokens of a picture."""
    num_cells = grid.num_views * side**2
    cells = torch.arange(num_cells).view(grid.num_views, side**2, 1)
    no_cell = torch.tensor([-1])
    order = arrange_views(cells, grid, newline=no_cell, separator=no_cell)[:, 0].tolist()
    places = {cell: place for place, cell in enumerate(order)}
    return tuple(places[cell] for cell in range(num_cells))


def pointed_objects(processor: DeepseekVLV2Processor, example: Example, answer: Sequence[int]) -> list[list[int]]:
    """For each token of an answer the objects of the scene that it is about; none for marks and repeated labels.

    Args:
        processor: nano's processor.
        example: The question.
        answer: The ids of its answer, the end of sentence included.
    """
    targets = [example.scene.objects.index(target) for target in example.targets]
    if not example.boxes:
        # A count, a colour or a shape is one token; every letter and digit of a text is about that text.
        last = len(answer) - 1 if example.task == "read" else 1
        return [targets if place < last else [] for place in range(len(answer))]
    objects: list[list[int]] = []
    num_boxes, is_label, is_box = 0, False, False
    for token in processor.tokenizer.convert_ids_to_tokens(answer):
        is_label = is_label and token != REF_END
        # Where several objects share a label it was copied from the question.
        is_about_one = (is_box and token.isdigit()) or (is_label and example.task == "describe")
        objects.append([targets[num_boxes]] if is_about_one else [])
        is_label = is_label or token == REF_START
        is_box = (is_box or token == DET_START) and token != DET_END
        num_boxes += token in BOX_ENDS
    return objects


def _shares(objects: Sequence[int], seen: Sequence[bool], is_count: bool) -> list[float] | None:
    """Where attention should go, see `Pointings`; None for no object, or one that no image token sees."""
    beginning = BEGINNING_SHARE if is_count else 0.0
    total = beginning + len(objects)
    if total == 0 or not all(seen[item] for item in objects):
        return None
    shares = [0.0] * len(seen)
    for item in objects:
        shares[item] = 1 / total
    return [beginning / total, *shares]


def encode_row(
    processor: DeepseekVLV2Processor, scene: Scene, examples: Iterable[Example], max_tokens: int
) -> dict[str, Any]:
    """Encodes a scene and questions about it as one row of a batch, see `AnswerBatch`.

    Args:
        processor: nano's processor.
        scene: The scene.
        examples: The questions; those are left out that do not fit behind the ones before them.
        max_tokens: Most tokens of questions and answers.
    """
    beginning = processor.tokenize_with_images(BEGINNING, [scene.draw()], bos=True, eos=False)
    grid = beginning.images_spatial_crop[0]
    cells = cells_of(processor, scene, grid, is_by_view=False)
    seen = [bool((cells.object_ids == index).any()) for index in range(len(scene.objects))]
    input_ids = list(beginning.input_ids)
    first = len(input_ids)
    labels = [IGNORE_ID] * first
    position_ids = list(range(first))
    segments = [0] * first
    pointings: list[Pointing] = []
    number = 0
    for example in examples:
        question = processor.encode(f"\n{example.question}\n\n{ASSISTANT}:", bos=False)
        answer = processor.encode(example.answer, bos=False, eos=True)
        num_tokens = len(question) + len(answer)
        if len(input_ids) - first + num_tokens > max_tokens:
            continue
        number += 1
        # Attention of the token before brings together what a token is about.
        start = len(input_ids) + len(question) - 1
        own = []
        for place, objects in enumerate(pointed_objects(processor, example, answer), start=start):
            shares = _shares(objects, seen, is_count=example.task == "count" and place == start)
            if shares is not None:
                own.append((place, shares))
        pointings += [
            Pointing(place, shares, is_count=example.task == "count", weight=1 / len(own)) for place, shares in own
        ]
        input_ids += question + answer
        labels += [IGNORE_ID] * len(question) + answer
        position_ids += range(first, first + num_tokens)
        segments += [number] * num_tokens
    first_image_token = beginning.images_seq_mask.index(True)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "segments": segments,
        "images_seq_mask": [*beginning.images_seq_mask, *[False] * (len(input_ids) - first)],
        "images": torch.stack(beginning.images),
        "images_spatial_crop": torch.tensor([list(grid)]),
        "cells": cells,
        "cell_positions": [first_image_token + place for place in cell_places(grid, processor.num_tokens_per_side)],
        "pointings": pointings,
    }


def collate(rows: Sequence[dict[str, Any]], pad_id: int) -> AnswerBatch:
    """Joins rows of the same number of views, texts padded on the right."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int | bool) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])

    return AnswerBatch(
        input_ids=padded("input_ids", pad_id),
        labels=padded("labels", IGNORE_ID),
        position_ids=padded("position_ids", 0),
        segments=padded("segments", -1),
        images_seq_mask=padded("images_seq_mask", False),
        images=torch.stack([row["images"] for row in rows]),
        images_spatial_crop=torch.stack([row["images_spatial_crop"] for row in rows]),
        cells=join_cells([row["cells"] for row in rows]),
        cell_positions=torch.tensor([row["cell_positions"] for row in rows]),
        pointings=_join_pointings([row["pointings"] for row in rows]),
    )


def _join_pointings(of_rows: Sequence[Sequence[Pointing]]) -> Pointings:
    """Joins the pointings of rows; scenes of fewer objects get shares of 0."""
    joined = [pointing for pointings in of_rows for pointing in pointings]
    shares = torch.zeros(len(joined), max((len(own.shares) for own in joined), default=1))
    for number, own in enumerate(joined):
        shares[number, : len(own.shares)] = torch.tensor(own.shares)
    rows = [row for row, pointings in enumerate(of_rows) for _ in pointings]
    return Pointings(
        rows=torch.tensor(rows, dtype=torch.long),
        positions=torch.tensor([own.position for own in joined], dtype=torch.long),
        shares=shares,
        is_count=torch.tensor([own.is_count for own in joined], dtype=torch.bool),
        weights=torch.tensor([own.weight for own in joined]),
    )
