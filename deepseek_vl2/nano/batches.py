"""Training batches for nano: views by themselves, then pictures with questions.

In a batch of questions a row is a shared beginning (the user's mark and the picture) and, one after the other, questions with their answers
that do not see each other. Attention and positions are those of each question standing alone behind the beginning, so a picture is encoded once
for all of its questions and the model still learns single questions.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
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
ONE_TILE = TileGrid(1, 1)
GRIDS = (ONE_TILE, TileGrid(1, 2), TileGrid(2, 1), TileGrid(2, 2))


@dataclass
class NanoBatch:
    """One training batch. B rows, T tokens, V views a row, G image tokens a side.

    Attributes:
        input_ids: [B, T].
        labels: [B, T], `IGNORE_ID` outside answers; position t is predicted from t - 1.
        position_ids: [B, T].
        segments: [B, T]; 0 for the beginning, k for question k, -1 for padding on the right.
        images: [B, V, 3, S, S].
        images_spatial_crop: [B, 1, 2].
        images_seq_mask: [B, T].
        shape_ids: Class of what each image token should see, [B, V, G, G]; -1 for nothing.
        color_ids: Its colour, [B, V, G, G]; -1 for nothing or text.
        cell_boxes: Its box x1, y1, x2, y2, [B, V, G, G, 4]: for global views as parts of the picture, for tiles as
            parts of the tile.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    segments: torch.Tensor
    images: torch.Tensor
    images_spatial_crop: torch.Tensor
    images_seq_mask: torch.Tensor
    shape_ids: torch.Tensor
    color_ids: torch.Tensor
    cell_boxes: torch.Tensor

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
        num_batches: Batches of the whole training.
        growing_share: Part of the training over which scenes grow from `first_num_objects` to the full number.
        first_num_objects: Most objects in a scene at the start.
        max_num_objects: Most objects in a scene in the end.
        first_small_share: How often a batch has one tile only at the start, which is fastest.
        last_small_share: The same in the end.
        small_until: Part of the training over which the one falls to the other.
    """

    num_batches: int
    growing_share: float = 0.3
    first_num_objects: int = 2
    max_num_objects: int = 6
    first_small_share: float = 0.9
    last_small_share: float = 0.25
    small_until: float = 0.6

    def num_objects(self, batch: int) -> tuple[int, int]:
        """Fewest and most objects in a scene."""
        progress = min(1.0, batch / self.num_batches / self.growing_share)
        most = self.first_num_objects + (self.max_num_objects - self.first_num_objects) * progress
        return 1, int(most + 1e-9)

    def small_share(self, batch: int) -> float:
        """How often a batch has one tile only."""
        progress = min(1.0, batch / self.num_batches / self.small_until)
        return self.first_small_share + (self.last_small_share - self.first_small_share) * progress


class TrainingBatches(Dataset[NanoBatch]):
    """Batch `i` of the training, drawn from seeds alone, so that a run can go on anywhere.

    Args:
        processor: nano's processor.
        curriculum: What to draw when.
        batch_size: Pictures a batch.
        questions_a_picture: Questions asked of each picture.
    """

    def __init__(
        self, processor: DeepseekVLV2Processor, curriculum: Curriculum, batch_size: int, questions_a_picture: int
    ) -> None:
        self.processor = processor
        self.curriculum = curriculum
        self.batch_size = batch_size
        self.questions_a_picture = questions_a_picture

    def __len__(self) -> int:
        return self.curriculum.num_batches

    def __getitem__(self, index: int) -> NanoBatch:
        rng = split_rng(TRAIN_SPLIT, index)
        is_small = rng.random() < self.curriculum.small_share(index)
        grid = ONE_TILE if is_small else rng.choices(GRIDS[1:], (1, 1, 3))[0]
        rows: list[Any] = []
        while len(rows) < self.batch_size:
            scene = self._draw_scene(rng, grid, self.curriculum.num_objects(index))
            examples = list(ask(rng, scene, self.questions_a_picture))
            if examples:
                rows.append(encode_row(self.processor, scene, examples))
        return collate(rows, self.processor.pad_id)

    def _draw_scene(self, rng: random.Random, grid: TileGrid, num_objects: tuple[int, int]) -> Scene:
        size = self._draw_size(rng, grid)
        if rng.random() < COUNTING_SCENE_PROBABILITY:
            most = min(MAX_COUNT, num_objects[1])
            return counting_scene(rng, rng.randint(1, most), size=size)
        return random_scene(rng, size=size, num_objects=num_objects)

    def _draw_size(self, rng: random.Random, grid: TileGrid) -> Size:
        side = self.processor.image_size
        while True:
            if grid == ONE_TILE:
                size = (
                    (side, side) if rng.random() < 0.3 else (rng.randint(side // 2, side), rng.randint(side // 2, side))
                )
            else:
                size = random_size(rng)
            if choose_grid(size, 1, side, self.processor.candidate_resolutions) == grid:
                return size


def ask(rng: random.Random, scene: Scene, num_questions: int) -> Iterator[Example]:
    """Asks a scene several questions, leaving out tasks that do not fit it."""
    if rng.random() < DESCRIBE_PROBABILITY:
        example = TASKS["describe"](rng, scene)
        if example is not None:
            yield example
    for task in rng.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()), k=num_questions):
        if task == "count":
            # Wanted counts are drawn evenly: zero once in ten, then whatever the scene has.
            wanted = 0 if rng.random() < 0.1 else rng.randint(1, MAX_COUNT)
            example = make_count(rng, scene, wanted) or make_count(rng, scene)
        else:
            example = TASKS[task](rng, scene)
        if example is not None:
            yield example


def encode_row(processor: DeepseekVLV2Processor, scene: Scene, examples: Sequence[Example]) -> dict[str, Any]:
    """Encodes a scene and questions about it as one row of a batch, see `NanoBatch`."""
    beginning = processor.tokenize_with_images(BEGINNING, [scene.draw()], bos=True, eos=False)
    input_ids = list(beginning.input_ids)
    labels = [IGNORE_ID] * len(input_ids)
    position_ids = list(range(len(input_ids)))
    segments = [0] * len(input_ids)
    first = len(input_ids)
    for number, example in enumerate(examples, start=1):
        question = processor.encode(f"\n{example.question}\n\n{ASSISTANT}:", bos=False)
        answer = processor.encode(example.answer, bos=False, eos=True)
        input_ids += question + answer
        labels += [IGNORE_ID] * len(question) + answer
        num_tokens = len(question) + len(answer)
        position_ids += range(first, first + num_tokens)
        segments += [number] * num_tokens
    grid = beginning.images_spatial_crop[0]
    rectangles = view_rectangles(*scene.size, *grid, side=processor.image_size)
    cells = dense_targets(scene, rectangles, processor.num_tokens_per_side)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "segments": segments,
        "images_seq_mask": [*beginning.images_seq_mask, *[False] * (len(input_ids) - first)],
        "images": torch.stack(beginning.images),
        "images_spatial_crop": torch.tensor([list(grid)]),
        "shape_ids": torch.from_numpy(cells.shape_ids),
        "color_ids": torch.from_numpy(cells.color_ids),
        "cell_boxes": torch.from_numpy(_boxes_in_views(cells.boxes, rectangles, scene.size)),
    }


def _boxes_in_views(boxes: np.ndarray, rectangles: np.ndarray, size: Size) -> np.ndarray:
    """Turns boxes [V, G, G, 4] from parts of the picture to parts of the tile, for all views but the global one."""
    pixels = boxes[1:] * np.array(size * 2)
    origins = rectangles[1:, None, None, [0, 1, 0, 1]]
    extents = (rectangles[1:, 2:] - rectangles[1:, :2])[:, None, None, [0, 1, 0, 1]]
    return np.concatenate([boxes[:1], ((pixels - origins) / extents).clip(-1, 2)]).astype(np.float32)


def collate(rows: Sequence[dict[str, Any]], pad_id: int) -> NanoBatch:
    """Joins rows of the same number of views, texts padded on the right."""
    length = max(len(row["input_ids"]) for row in rows)
    padding = {"input_ids": pad_id, "labels": IGNORE_ID, "position_ids": 0, "segments": -1, "images_seq_mask": False}
    joined = {}
    for field in fields(NanoBatch):
        values = [row[field.name] for row in rows]
        if field.name in padding:
            values = [torch.tensor(value + [padding[field.name]] * (length - len(value))) for value in values]
        joined[field.name] = torch.stack(values)
    return NanoBatch(**joined)
