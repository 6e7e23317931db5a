"""Training batches for nano: views by themselves for the tower, then pictures with questions.

In a batch of questions a row is a shared beginning (the user's mark and the picture) and, one after the other,
questions with their answers that do not see each other. Attention and positions are those of each question standing
alone behind the beginning, so a picture is encoded once for all of its questions and the model learns single questions.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from deepseek_vl2.models import DeepseekVLV2Processor
from deepseek_vl2.models.special_tokens import ASSISTANT, IMAGE, USER
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
TASK_WEIGHTS = {"locate": 40.0, "locate_all": 6.0, "count": 22.0, "color": 14.0, "shape": 8.0, "read": 4.0}
DESCRIBE_PROBABILITY = 0.5
COUNTING_SCENE_PROBABILITY = 0.35
MIN_COVER = 0.1
ONE_TILE = TileGrid(1, 1)
LARGER_GRIDS = (TileGrid(1, 2), TileGrid(2, 1), TileGrid(2, 2))
LARGER_GRID_WEIGHTS = (1, 1, 3)


@dataclass
class Cells:
    """What each image token should see. V views, G image tokens a side.

    Attributes:
        shape_ids: Class [V, G, G]; -1 for nothing.
        color_ids: Colour [V, G, G]; -1 for nothing or text.
        boxes: Box x1, y1, x2, y2 of the object, [V, G, G, 4]: for global views as parts of the picture, for tiles as
            parts of the tile, reaching beyond 0 and 1 where the object does.
    """

    shape_ids: torch.Tensor
    color_ids: torch.Tensor
    boxes: torch.Tensor


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
        cells: Of all B * V views.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    segments: torch.Tensor
    images_seq_mask: torch.Tensor
    images: torch.Tensor
    images_spatial_crop: torch.Tensor
    cells: Cells

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
        growing_share: Part of the stage over which scenes grow from `first_num_objects` to `max_num_objects`.
        first_num_objects: Most objects in a scene at the start.
        max_num_objects: Most objects in a scene in the end.
        first_small_share: How often a picture has one tile only at the start, which is fastest.
        last_small_share: The same in the end.
    """

    num_batches: int
    growing_share: float = 0.25
    first_num_objects: int = 2
    max_num_objects: int = 6
    first_small_share: float = 0.8
    last_small_share: float = 0.3

    def num_objects(self, batch: int) -> tuple[int, int]:
        """Fewest and most objects in a scene."""
        progress = min(1.0, batch / self.num_batches / self.growing_share) if self.growing_share else 1.0
        most = self.first_num_objects + (self.max_num_objects - self.first_num_objects) * progress
        return 1, int(most + 1e-9)

    def small_share(self, batch: int) -> float:
        """How often a picture has one tile only."""
        progress = batch / self.num_batches
        return self.first_small_share + (self.last_small_share - self.first_small_share) * progress


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
            own = cells_of(self.processor, scene, grid)
            cells.append(Cells(own.shape_ids[chosen], own.color_ids[chosen], own.boxes[chosen]))
        return ViewBatch(torch.stack(views), join_cells(cells))


class AnswerBatches(Dataset[AnswerBatch]):
    """Batch `i` of pictures with questions, drawn from its seed alone, so that a run can go on anywhere.

    Args:
        processor: nano's processor.
        curriculum: What to draw when.
        batch_size: Pictures a batch.
        questions_a_picture: Questions asked of each picture, beside its description.
        split: Name of the stream of seeds.
    """

    def __init__(
        self,
        processor: DeepseekVLV2Processor,
        curriculum: Curriculum,
        batch_size: int,
        questions_a_picture: int,
        split: str = TRAIN_SPLIT,
    ) -> None:
        self.processor = processor
        self.curriculum = curriculum
        self.batch_size = batch_size
        self.questions_a_picture = questions_a_picture
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
            examples = list(ask(rng, scene, self.questions_a_picture))
            if examples:
                rows.append(encode_row(self.processor, scene, examples))
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


def ask(rng: random.Random, scene: Scene, num_questions: int) -> Iterator[Example]:
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


def cells_of(processor: DeepseekVLV2Processor, scene: Scene, grid: TileGrid) -> Cells:
    """What each image token of each view of a scene should see."""
    rectangles = view_rectangles(*scene.size, *grid, side=processor.image_size)
    targets = dense_targets(scene, rectangles, processor.num_tokens_per_side, MIN_COVER)
    pixels = targets.boxes[1:] * np.array(scene.size * 2)
    origins = rectangles[1:, None, None, [0, 1, 0, 1]]
    extents = (rectangles[1:, 2:] - rectangles[1:, :2])[:, None, None, [0, 1, 0, 1]]
    boxes = np.concatenate([targets.boxes[:1], (pixels - origins) / extents]).astype(np.float32)
    return Cells(torch.from_numpy(targets.shape_ids), torch.from_numpy(targets.color_ids), torch.from_numpy(boxes))


def join_cells(cells: Sequence[Cells]) -> Cells:
    """Joins the cells of several pictures along their views."""
    return Cells(
        torch.cat([own.shape_ids for own in cells]),
        torch.cat([own.color_ids for own in cells]),
        torch.cat([own.boxes for own in cells]),
    )


def encode_row(processor: DeepseekVLV2Processor, scene: Scene, examples: Sequence[Example]) -> dict[str, Any]:
    """Encodes a scene and questions about it as one row of a batch, see `AnswerBatch`."""
    beginning = processor.tokenize_with_images(BEGINNING, [scene.draw()], bos=True, eos=False)
    input_ids = list(beginning.input_ids)
    first = len(input_ids)
    labels = [IGNORE_ID] * first
    position_ids = list(range(first))
    segments = [0] * first
    for number, example in enumerate(examples, start=1):
        question = processor.encode(f"\n{example.question}\n\n{ASSISTANT}:", bos=False)
        answer = processor.encode(example.answer, bos=False, eos=True)
        num_tokens = len(question) + len(answer)
        input_ids += question + answer
        labels += [IGNORE_ID] * len(question) + answer
        position_ids += range(first, first + num_tokens)
        segments += [number] * num_tokens
    grid = beginning.images_spatial_crop[0]
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "segments": segments,
        "images_seq_mask": [*beginning.images_seq_mask, *[False] * (len(input_ids) - first)],
        "images": torch.stack(beginning.images),
        "images_spatial_crop": torch.tensor([list(grid)]),
        "cells": cells_of(processor, scene, grid),
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
    )
