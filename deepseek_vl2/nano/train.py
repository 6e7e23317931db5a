"""nano's training in stages, from single views over answers to counting and reading. Resumable, on two CPU cores."""

import copy
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.cpu_features import has_fast_bfloat16
from deepseek_vl2.nano.architecture import nano_processor, untrained_nano
from deepseek_vl2.nano.batches import (
    NUM_PICTURES,
    PRACTISING_NUM_PICTURES,
    SHAPE_QUESTIONS,
    AnswerBatch,
    AnswerBatches,
    Curriculum,
    ViewBatch,
    ViewBatches,
)
from deepseek_vl2.nano.drawing import (
    COUNTING_SCENE_KINDS,
    FINISHING_SCENE_KINDS,
    LAST_SCENE_KINDS,
    READING_SCENE_KINDS,
    SCENE_KINDS,
)
from deepseek_vl2.nano.growth import grow_from
from deepseek_vl2.nano.losses import (
    ATTENDED_LAYER,
    ATTENTION_NAME,
    READING_LAYER,
    AnswerLoss,
    DenseHeads,
    LetterHead,
    NumberTargets,
    PointingLoss,
    keeping_loss,
    views_beside_print,
)
from deepseek_vl2.nano.muon import Muon
from deepseek_vl2.nano.questions import make_count
from deepseek_vl2.nano.tasks import TRAIN_SPLIT
from deepseek_vl2.nano.tokenizer import number_token_ids

logger = logging.getLogger(__name__)

# What heads read off tokens of answers, of views, and of whole pictures.
OF_OBJECTS = ("class_ids", "color_ids")
OF_VIEWS = (*OF_OBJECTS, "bar_values")
OF_SCENES = (*OF_VIEWS, "row_ids", "column_ids", "first_places")
FLAGS = ("is_center", "is_marked")
STAGES = ("views", "letters", "answers", "together", "counting", "print", "reading", "finish", "counts")
# Stages whose batches are views without questions.
VIEW_STAGES = ("views", "letters", "print")
# They may be gone through in several rounds, each from the mean of the weights that the one before ended with.
REPEATED_STAGES = ("print", "reading", "finish", "counts")
# Its last weights and those of the round's end are averaged: their mean answers better than either.
AVERAGED_STAGE = "finish"
LOG_EVERY = 20
# Beside the losses on image tokens.
PATCHES_WEIGHT = 3.0
KEEPING_WEIGHT = 10.0
# Beside the weights of `SHAPE_QUESTIONS`: counts take longest to learn.
COUNT_WEIGHT = 90.0


@dataclass(frozen=True)
class StageSettings:
    """Numbers of one stage.

    Attributes:
        num_batches: Length; 0 leaves the stage out.
        batch_size: Views (first two stages) or pictures (others) a batch.
        matrix_lr: Peak step of Muon, for matrices and stacks of experts.
        other_lr: Peak step of AdamW, for everything else.
        warmup_batches: Batches over which steps grow from 0.
        decay_share: Part of the stage, at its end, over which they shrink.
        last_factor: Part of the peak that they shrink to.
        growing_share: Part of the stage, at its start, over which scenes and pictures grow.
        last_small_share: How often a picture has one tile only after that.
        count_weight: How often a question asks for a count, see `SHAPE_QUESTIONS`.
        page_share: How often a picture is a page of text, where views are learnt from.
        num_pictures: How many pictures a batch's rows have, and how often, where answers are learnt.
        scene_kinds: What single pictures show, and how often, where answers are learnt.
        pointing_weight: Weight of the loss on where attention goes, beside that of answers.
        text_weight: Weight of the losses on letters and their places, among those on what tokens see.
    """

    num_batches: int
    batch_size: int
    matrix_lr: float
    other_lr: float
    warmup_batches: int = 36
    decay_share: float = 0.4
    last_factor: float = 0.0
    growing_share: float = 0.0
    last_small_share: float = 0.15
    count_weight: float = SHAPE_QUESTIONS[make_count]
    page_share: float = 0.0
    num_pictures: dict[int, int] = field(default_factory=lambda: dict(NUM_PICTURES))
    scene_kinds: dict[str, int] = field(default_factory=lambda: dict(SCENE_KINDS))
    pointing_weight: float = 0.5
    text_weight: float = 1.0

    def lr_factor(self, batch: int) -> float:
        """Factor on both steps: linear growth, a plateau, linear decay."""
        progress = (batch + 1) / self.num_batches
        decay = self.last_factor + (1 - self.last_factor) * (1 - progress) / self.decay_share
        return max(0.0, min(1.0, (batch + 1) / self.warmup_batches, decay))


def _practising_stage(
    num_batches: int,
    scene_kinds: dict[str, int],
    matrix_lr: float = 1.6e-3,
    other_lr: float = 1.1e-3,
    **numbers: float,
) -> StageSettings:
    return StageSettings(
        num_batches,
        32,
        matrix_lr,
        other_lr,
        last_small_share=0.35,
        pointing_weight=8.0,
        num_pictures=dict(PRACTISING_NUM_PICTURES),
        scene_kinds=dict(scene_kinds),
        **numbers,  # type: ignore[arg-type]
    )


def _counting_stage(num_batches: int) -> StageSettings:
    return _practising_stage(
        num_batches,
        COUNTING_SCENE_KINDS,
        warmup_batches=10,
        decay_share=1.0,
        count_weight=200.0,
    )


def _print_stage(num_batches: int) -> StageSettings:
    return StageSettings(
        num_batches, 96, 2.4e-3, 1.6e-3, warmup_batches=20, decay_share=0.6, page_share=0.7, text_weight=3.0
    )


def _reading_stage(num_batches: int) -> StageSettings:
    return _practising_stage(
        num_batches,
        READING_SCENE_KINDS,
        warmup_batches=15,
        decay_share=0.7,
        last_factor=0.4,
        count_weight=150.0,
        text_weight=5.0,
    )


def _finishing_stage(
    num_batches: int, scene_kinds: dict[str, int], matrix_lr: float, other_lr: float, count_weight: float
) -> StageSettings:
    return _practising_stage(
        num_batches,
        scene_kinds,
        matrix_lr,
        other_lr,
        warmup_batches=10,
        decay_share=1.0,
        count_weight=count_weight,
        text_weight=5.0,
    )


@dataclass(frozen=True)
class TrainingSettings:
    """All numbers of the training; with the same ones on the same machine it ends at the same weights.

    Attributes:
        views: Tower and projector learn what each image token of single views sees.
        letters: They learn on with pages of text.
        answers: Projector and language model learn answers, the tower is fixed.
        together: Everything learns answers.
        counting: Projector and language model learn on, above all to count: attention has to give all objects of a
            kind the same. The tower, which sees them by now, is fixed.
        print: Tower and projector learn print once more, and stay the same for the language model beside it.
        reading: Projector and language model learn answers again, above all about print.
        finish: Everything learns answers, above all to count: print has blurred what the tower tells of objects. In
            later rounds it has been blurred less, and the tower is fixed.
        counts: Projector and language model learn answers once more, most of them counts.
        later_batches: Lengths of `REPEATED_STAGES` in the rounds after the first.
        tokens_a_row: Tokens of questions and answers of each row.
        dense_weight: Weight of the losses on what tokens see, beside that of answers.
        coordinate_spread: Standard deviation, in 1/1000 of the picture, of the targets of coordinates.
        weight_decay: Of matrices.
        clip_norm: Largest norm of all gradients together.
        seed: Of the starting weights; scenes have seeds of their own.
        num_threads: CPU threads.
        save_every: Batches between two resumable states.
        start_from: Folder of an earlier edition whose weights are grown, see `grow_from`; from nothing if empty.
    """

    views: StageSettings = field(default_factory=lambda: StageSettings(1200, 128, 3e-3, 2e-3))
    letters: StageSettings = field(
        default_factory=lambda: StageSettings(
            700, 128, 2.4e-3, 1.6e-3, warmup_batches=21, decay_share=0.7, page_share=0.6
        )
    )
    answers: StageSettings = field(
        default_factory=lambda: StageSettings(
            800, 32, 3e-3, 2e-3, warmup_batches=24, last_factor=1.0, growing_share=0.5, count_weight=COUNT_WEIGHT
        )
    )
    together: StageSettings = field(
        default_factory=lambda: StageSettings(
            1100, 32, 2e-3, 1.4e-3, warmup_batches=57, decay_share=0.5, last_small_share=0.35, count_weight=COUNT_WEIGHT
        )
    )
    counting: StageSettings = field(default_factory=lambda: _counting_stage(700))
    print: StageSettings = field(default_factory=lambda: _print_stage(1500))
    reading: StageSettings = field(default_factory=lambda: _reading_stage(800))
    finish: StageSettings = field(
        default_factory=lambda: _finishing_stage(450, FINISHING_SCENE_KINDS, 0.8e-3, 0.55e-3, 150.0)
    )
    counts: StageSettings = field(
        default_factory=lambda: _finishing_stage(270, LAST_SCENE_KINDS, 1.1e-3, 0.75e-3, 200.0)
    )
    later_batches: dict[str, int] = field(
        default_factory=lambda: {"print": 650, "reading": 420, "finish": 380, "counts": 260}
    )
    tokens_a_row: int = 160
    dense_weight: float = 0.3
    coordinate_spread: float = 6.0
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    seed: int = 0
    num_threads: int = 2
    save_every: int = 100
    start_from: str = ""

    @classmethod
    def of_growth(cls, start_from: Path, **numbers: Any) -> "TrainingSettings":
        """The shorter training of an earlier edition that sees and answers already: pages first, then everything."""
        return cls(
            views=StageSettings(0, 128, 3e-3, 2e-3),
            letters=StageSettings(250, 128, 2e-3, 1.4e-3, warmup_batches=20, decay_share=0.7, page_share=0.6),
            answers=StageSettings(0, 32, 3e-3, 2e-3),
            together=StageSettings(
                1580,
                32,
                2e-3,
                1.4e-3,
                warmup_batches=40,
                decay_share=0.5,
                last_small_share=0.35,
                count_weight=COUNT_WEIGHT,
            ),
            counting=_counting_stage(1220),
            start_from=str(start_from),
            **numbers,
        )

    def scaled(self, share: float) -> "TrainingSettings":
        """The same training with a part of each stage's batches and of its warm-up, at least one."""
        stages = {name: getattr(self, name) for name in STAGES}
        return replace(
            self,
            later_batches={name: max(1, round(batches * share)) for name, batches in self.later_batches.items()},
            **{
                name: replace(
                    stage,
                    num_batches=max(min(1, stage.num_batches), round(stage.num_batches * share)),
                    warmup_batches=max(1, round(stage.warmup_batches * share)),
                )
                for name, stage in stages.items()
            },
        )


def _prefixed(prefix: str, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}_{name}": loss for name, loss in losses.items()}


class NanoTrainer:
    """State of a training run: model, heads, stage, position.

    Args:
        settings: All numbers.
        folder: Where states and the log are kept; a state found there is gone on from.
        num_rounds: How often `REPEATED_STAGES` are gone through; a training that has ended goes on with a higher
            number.
    """

    def __init__(self, settings: TrainingSettings, folder: Path, num_rounds: int = 1) -> None:
        self.settings = settings
        self.folder = folder
        self.num_rounds = num_rounds
        self.processor: DeepseekVLV2Processor = nano_processor()
        tokenizer = self.processor.tokenizer
        self.model: DeepseekVLV2ForCausalLM = untrained_nano(tokenizer, settings.seed).train()
        # Products in bfloat16 are several times faster than in float32, or, on a CPU without them, slower.
        self.dtype = torch.bfloat16 if has_fast_bfloat16() else torch.float32
        # Among 64 patches a view, written-out attention learns a third faster than the CPU's fused kernel.
        self.model.vision.attn_implementation = "eager"
        targets = NumberTargets(number_token_ids(tokenizer), len(tokenizer), settings.coordinate_spread)
        self.answer_loss = AnswerLoss.for_tokenizer(targets, tokenizer)
        width = self.model.config.projector_config.n_embed
        self.heads = nn.ModuleDict(
            {
                "views": DenseHeads(width, targets, OF_VIEWS, reads_letters=True, flags=FLAGS),
                "scenes": DenseHeads(width, targets, OF_SCENES, reads_letters=True, flags=FLAGS, names_pictures=True),
                "attended": DenseHeads(width, targets, OF_OBJECTS),
                "patches": LetterHead(self.model.config.vision_config.width),
            }
        )
        self.model.language.set_attn_implementation(ATTENTION_NAME)
        self.states: dict[int, torch.Tensor] = {}
        for layer in (READING_LAYER, ATTENDED_LAYER):
            self.model.language.model.layers[layer].register_forward_hook(partial(self._keep_states, layer))
        # The tower and the projector as the language model knows them, see `TrainingSettings.print`.
        self.earlier: nn.ModuleDict | None = None
        # What model and heads were at the end of this round's `AVERAGED_STAGE`.
        self.averaged: dict[str, dict[str, torch.Tensor]] | None = None
        self.round = 1
        self.stage_index = 0
        self.next_batch = 0
        self.optimizers: list[torch.optim.Optimizer] = []

    @property
    def stage(self) -> str:
        """Name of the present stage."""
        return STAGES[self.stage_index]

    @property
    def stage_settings(self) -> StageSettings:
        """Numbers of the present stage in the present round."""
        numbers: StageSettings = getattr(self.settings, self.stage)
        return numbers if self.round == 1 else replace(numbers, num_batches=self.settings.later_batches[self.stage])

    def _keep_states(self, layer: int, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self.states[layer] = output

    def _enter_stage(self) -> None:
        """Sets what learns, with fresh optimisers."""
        is_kept = self.stage == "print"
        self.earlier = nn.ModuleDict(copy.deepcopy(dict(self._seeing()))).requires_grad_(False) if is_kept else None
        for name, parameter in self.model.named_parameters():
            is_tower, is_language = name.startswith("vision."), name.startswith("language.")
            is_learning = {
                "views": not is_language or name.endswith("lm_head.weight"),
                "letters": not is_language or name.endswith("lm_head.weight"),
                "answers": not is_tower,
                "together": True,
                "counting": not is_tower,
                "print": not is_language,
                "reading": not is_tower,
                "finish": self.round == 1 or not is_tower,
                "counts": not is_tower,
            }[self.stage]
            parameter.requires_grad_(is_learning)
        matrices: list[nn.Parameter] = []
        others = list(self.heads.parameters())
        for name, parameter in self.model.named_parameters():
            is_matrix = parameter.dim() in (2, 3) and min(parameter.shape[-2:]) > 8
            is_table = "embed" in name or "lm_head" in name
            if parameter.requires_grad:
                (matrices if is_matrix and not is_table else others).append(parameter)
        self.optimizers = [
            Muon(matrices, lr=self.stage_settings.matrix_lr, weight_decay=self.settings.weight_decay, dtype=self.dtype),
            torch.optim.AdamW(others, lr=self.stage_settings.other_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def losses(self, batch: ViewBatch | AnswerBatch) -> dict[str, torch.Tensor]:
        """Losses of a batch by name."""
        output_layer = self.model.get_output_embeddings()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            if isinstance(batch, ViewBatch):
                return self._losses_of_views(batch)
            pointing = PointingLoss(batch)
            hidden = self.model.language.model(
                inputs_embeds=self.model.prepare_inputs_embeds(
                    batch.input_ids, batch.images, batch.images_seq_mask, batch.images_spatial_crop
                ),
                attention_mask=batch.attention_mask(),
                position_ids=batch.position_ids,
                use_cache=False,
                pointing=pointing,
            ).last_hidden_state
            of_cells = self.states[READING_LAYER][batch.cell_rows, batch.cell_positions]
            dense = self.heads["scenes"](of_cells, batch.cells, output_layer, batch.picture_ids)
            losses = self.answer_loss(hidden, output_layer, batch) | _prefixed("dense", dense)
            losses |= {"pointing": pointing.value}
            pointings = batch.pointings
            places = pointings.rows[pointings.attended], pointings.positions[pointings.attended]
            of_tokens = self.states[ATTENDED_LAYER][places]
            attended = self.heads["attended"](of_tokens, batch.cells.at(pointings.attended_cells), output_layer)
            return losses | _prefixed("attended", attended)

    def _losses_of_views(self, batch: ViewBatch) -> dict[str, torch.Tensor]:
        patches = self.model.vision(batch.views)
        tokens = self.model.projector(patches)
        output_layer = self.model.get_output_embeddings()
        losses = _prefixed("dense", self.heads["views"](tokens.flatten(0, 1), batch.cells, output_layer))
        losses |= _prefixed(
            "patch", self.heads["patches"](patches.flatten(0, 1), batch.patch_letters, batch.patch_places)
        )
        if self.earlier is not None:
            views = views_beside_print(batch.cells)
            with torch.no_grad():
                earlier = self.earlier["projector"](self.earlier["vision"](batch.views[views]))
            losses["keeping"] = keeping_loss(tokens[views], earlier, batch.cells.chosen(views))
        return losses

    def _seeing(self) -> dict[str, nn.Module]:
        return {"vision": self.model.vision, "projector": self.model.projector}

    def _total(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        weights = dict.fromkeys(("dense_letters", "dense_first_places"), self.stage_settings.text_weight)
        read = {name: loss for name, loss in losses.items() if name.startswith(("dense_", "attended_"))}
        dense = sum((weights.get(name, 1.0) * loss for name, loss in read.items()), torch.zeros(()))
        if "answer" not in losses:
            of_patches = PATCHES_WEIGHT * (losses["patch_letters"] + losses["patch_places"])
            return dense + of_patches + KEEPING_WEIGHT * losses.get("keeping", 0.0)
        pointing = self.stage_settings.pointing_weight * losses["pointing"]
        return losses["answer"] + self.settings.dense_weight * dense + pointing

    def step(self, batch: ViewBatch | AnswerBatch) -> dict[str, float]:
        """Learns from one batch; returns its losses and the norm of the gradients."""
        settings = self.stage_settings
        factor = settings.lr_factor(self.next_batch)
        for optimizer, lr in zip(self.optimizers, (settings.matrix_lr, settings.other_lr), strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
        losses = self.losses(batch)
        self._total(losses).backward()
        norm = nn.utils.clip_grad_norm_([*self.model.parameters(), *self.heads.parameters()], self.settings.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.next_batch += 1
        return {name: loss.item() for name, loss in losses.items()} | {"grad_norm": norm.item()}

    def save_state(self) -> None:
        """Writes everything that going on needs; the file is complete or not there at all."""
        state = {
            "settings": asdict(self.settings),
            "round": self.round,
            "stage_index": self.stage_index,
            "next_batch": self.next_batch,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "earlier": None if self.earlier is None else self.earlier.state_dict(),
            "averaged": self.averaged,
        }
        unfinished = self.folder / "state.pt.unfinished"
        torch.save(state, unfinished)
        unfinished.replace(self.folder / "state.pt")

    def load_state(self) -> None:
        """Goes on from a saved state, or starts the first stage if there is none.

        Raises:
            ValueError: If the state belongs to other settings.
        """
        path = self.folder / "state.pt"
        if not path.exists():
            if self.settings.start_from:
                grow_from(self.model, self.processor.tokenizer, Path(self.settings.start_from))
            self._enter_stage()
            return
        state = torch.load(path, weights_only=True)
        if state["settings"] != asdict(self.settings):
            raise ValueError(
                f"{path} was written with other settings: {state['settings']}. Choose another folder, or remove it."
            )
        self.round, self.stage_index, self.next_batch = state["round"], state["stage_index"], state["next_batch"]
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.averaged = state["averaged"]
        self._enter_stage()
        if self.earlier is not None:
            self.earlier.load_state_dict(state["earlier"])
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        logger.info("going on at batch %d of stage %r", self.next_batch, self.stage)

    def final_weights(self) -> dict[str, torch.Tensor]:
        """The mean of the present weights and of those at the end of this round's `AVERAGED_STAGE`, once it is over."""
        return self._mean_weights()["model"]

    def _present_weights(self) -> dict[str, dict[str, torch.Tensor]]:
        return {"model": self.model.state_dict(), "heads": self.heads.state_dict()}

    def _mean_weights(self) -> dict[str, dict[str, torch.Tensor]]:
        present = self._present_weights()
        if self.averaged is None:
            return present
        return {
            part: {name: (self.averaged[part][name] + tensor) / 2 for name, tensor in weights.items()}
            for part, weights in present.items()
        }

    def save_checkpoint(self, folder: Path) -> None:
        """Writes `final_weights` in bfloat16 and the processor, as `from_pretrained` loads them."""
        model = untrained_nano(self.processor.tokenizer, self.settings.seed)
        model.load_state_dict(self.final_weights())
        model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
        self.processor.save_pretrained(folder)

    def _batches(self) -> Iterator[ViewBatch | AnswerBatch]:
        """The stage's batches from the present one on, drawn by a second process ahead of need."""
        settings = self.stage_settings
        order = range(self.next_batch, settings.num_batches)
        if not order:
            return iter(())
        dataset: Dataset
        split = f"{TRAIN_SPLIT}-{self.stage}" + (f"-{self.round}" if self.round > 1 else "")
        if self.stage in VIEW_STAGES:
            dataset = ViewBatches(self.processor, settings.num_batches, settings.batch_size, settings.page_share, split)
        else:
            curriculum = Curriculum(
                settings.num_batches,
                settings.growing_share,
                last_small_share=settings.last_small_share,
                count_weight=settings.count_weight,
                num_pictures=settings.num_pictures,
                scene_kinds=settings.scene_kinds,
            )
            dataset = AnswerBatches(
                self.processor,
                curriculum,
                settings.batch_size,
                self.settings.tokens_a_row,
                split=split,
            )
        return iter(DataLoader(dataset, batch_size=None, sampler=order, num_workers=1, prefetch_factor=8))

    def run(self) -> None:
        """Trains to the end; writes `log.jsonl` and states on the way."""
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(self.settings.num_threads)
        self.load_state()
        with (self.folder / "log.jsonl").open("a") as log:
            self._run_stage(log)
            while self._has_next_stage():
                self._go_to_next_stage()
                self.save_state()
                self._run_stage(log)

    def _has_next_stage(self) -> bool:
        return self.stage_index + 1 < len(STAGES) or self.round < self.num_rounds

    def _go_to_next_stage(self) -> None:
        if self.stage == AVERAGED_STAGE:
            self.averaged = copy.deepcopy(self._present_weights())
        if self.stage_index + 1 < len(STAGES):
            self.stage_index += 1
        else:
            mean = self._mean_weights()
            self.model.load_state_dict(mean["model"])
            self.heads.load_state_dict(mean["heads"])
            self.averaged = None
            self.round, self.stage_index = self.round + 1, STAGES.index(REPEATED_STAGES[0])
        self.next_batch = 0
        self._enter_stage()

    def _run_stage(self, log: Any) -> None:
        start = time.monotonic()
        total = self.stage_settings.num_batches
        with tqdm(total=total, initial=self.next_batch, desc=self.stage, unit="batch") as bar:
            for batch in self._batches():
                metrics = self.step(batch)
                bar.update()
                if self.next_batch % LOG_EVERY == 0:
                    position = {"round": self.round, "stage": self.stage, "batch": self.next_batch}
                    line = position | {"seconds": round(time.monotonic() - start, 1)} | metrics
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                if self.next_batch % self.settings.save_every == 0:
                    self.save_state()
        self.save_state()
