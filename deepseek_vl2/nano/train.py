"""nano's training: from nothing to the shipped files, resumable, on two CPU cores."""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.nano.architecture import nano_processor, untrained_nano
from deepseek_vl2.nano.batches import IGNORE_ID, Curriculum, NanoBatch, TrainingBatches
from deepseek_vl2.nano.muon import Muon
from deepseek_vl2.nano.questions import CELL_CLASSES
from deepseek_vl2.nano.scenes import COLOR_NAMES
from deepseek_vl2.nano.tokenizer import number_token_ids

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingSettings:
    """All numbers of the training; with the same ones on the same machine it ends at the same weights.

    Attributes:
        num_batches: Length of the training.
        batch_size: Pictures a batch.
        questions_a_picture: Questions asked of each picture.
        matrix_lr: Peak step of Muon, for matrices and stacks of experts.
        other_lr: Peak step of AdamW, for everything else.
        warmup_share: Part of the training over which steps grow from 0.
        decay_share: Part of the training, at its end, over which they shrink to 0.
        weight_decay: Weight decay of the matrices.
        dense_weight: Weight of the loss on what each image token sees.
        coordinate_spread: Standard deviation, in 1/1000 of the picture, of the targets of coordinates.
        clip_norm: Largest norm of all gradients together.
        seed: Of the starting weights; scenes have seeds of their own.
        num_threads: CPU threads.
        save_every: Batches between two resumable states.
    """

    num_batches: int = 4000
    batch_size: int = 24
    questions_a_picture: int = 6
    matrix_lr: float = 4e-3
    other_lr: float = 2e-3
    warmup_share: float = 0.02
    decay_share: float = 0.4
    weight_decay: float = 0.01
    dense_weight: float = 0.5
    coordinate_spread: float = 6.0
    clip_norm: float = 1.0
    seed: int = 0
    num_threads: int = 2
    save_every: int = 250

    def lr_factor(self, batch: int) -> float:
        """Factor on both steps: linear growth, a plateau, linear decay."""
        progress = (batch + 1) / self.num_batches
        return max(0.0, min(1.0, progress / self.warmup_share, (1 - progress) / self.decay_share))


class DenseHeads(nn.Module):
    """Reads off each image token what it sees: class, colour and box. Only used in training.

    This is what makes the tower and the projector learn fast: every token of every view is told its part, where answers
    alone tell little about single tokens.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shape = nn.Linear(width, len(CELL_CLASSES) + 1)
        self.color = nn.Linear(width, len(COLOR_NAMES))
        self.box = nn.Linear(width, 4)

    def forward(self, tokens: torch.Tensor, batch: NanoBatch) -> dict[str, torch.Tensor]:
        """Losses of image tokens [B*V, G*G, D]."""
        tokens = tokens.flatten(0, 1)
        shape_ids, color_ids = batch.shape_ids.flatten(), batch.color_ids.flatten()
        is_object, has_color = shape_ids >= 0, color_ids >= 0
        shape_targets = shape_ids.where(is_object, len(CELL_CLASSES))
        boxes = batch.cell_boxes.flatten(0, -2)[is_object]
        return {
            "dense_shape": F.cross_entropy(self.shape(tokens).float(), shape_targets),
            "dense_color": F.cross_entropy(self.color(tokens[has_color]).float(), color_ids[has_color]),
            "dense_box": F.smooth_l1_loss(self.box(tokens[is_object]).float(), boxes, beta=0.02) * 4,
        }


class AnswerLoss(nn.Module):
    """Cross entropy of answers, coordinates being allowed to miss a little.

    The target of a coordinate is a narrow bell over the numbers around it, so that a near miss costs less than a far
    one. Other tokens have their usual targets.
    """

    bells: torch.Tensor
    number_ids: torch.Tensor
    number_of_id: torch.Tensor

    def __init__(self, number_ids: list[int], vocab_size: int, spread: float) -> None:
        super().__init__()
        numbers = torch.arange(len(number_ids), dtype=torch.float32)
        bells = torch.exp(-0.5 * ((numbers[:, None] - numbers) / spread) ** 2)
        self.register_buffer("bells", bells / bells.sum(dim=1, keepdim=True))
        self.register_buffer("number_ids", torch.tensor(number_ids))
        number_of_id = torch.full((vocab_size,), -1)
        number_of_id[self.number_ids] = torch.arange(len(number_ids))
        self.register_buffer("number_of_id", number_of_id)

    def forward(self, logits: torch.Tensor, labels: torch.Tensor, is_coordinate: torch.Tensor) -> torch.Tensor:
        """Mean loss of logits [N, vocabulary] for labels [N]."""
        log_probabilities = logits.float().log_softmax(dim=-1)
        exact = -log_probabilities.gather(1, labels[:, None])[:, 0]
        bells = self.bells[self.number_of_id[labels].clamp(min=0)]
        near = -(bells * log_probabilities[:, self.number_ids]).sum(dim=1)
        return torch.where(is_coordinate, near, exact).mean()


class NanoTrainer:
    """State of a training run: model, heads, optimisers, position.

    Args:
        settings: All numbers.
        folder: Where states and the log are kept; a state found there is gone on from.
    """

    def __init__(self, settings: TrainingSettings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.processor: DeepseekVLV2Processor = nano_processor()
        tokenizer = self.processor.tokenizer
        self.model: DeepseekVLV2ForCausalLM = untrained_nano(tokenizer, settings.seed).train()
        # Among 64 patches a view, written-out attention learns a third faster than the CPU's fused kernel.
        self.model.vision.attn_implementation = "eager"
        number_ids = number_token_ids(tokenizer)
        self.answer_loss = AnswerLoss(number_ids, len(tokenizer), settings.coordinate_spread)
        self.is_number: torch.Tensor = self.answer_loss.number_of_id >= 0
        self.heads = DenseHeads(self.model.config.projector_config.n_embed)
        self.det_start, self.det_end = tokenizer.convert_tokens_to_ids(["<|det|>", "<|/det|>"])
        self.optimizers = self._build_optimizers()
        self.image_tokens: torch.Tensor | None = None
        self.model.projector.register_forward_hook(self._keep_image_tokens)
        self.next_batch = 0

    def _keep_image_tokens(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self.image_tokens = output

    def _build_optimizers(self) -> list[torch.optim.Optimizer]:
        matrices: list[nn.Parameter] = []
        others = list(self.heads.parameters())
        for name, parameter in self.model.named_parameters():
            is_matrix = parameter.dim() in (2, 3) and min(parameter.shape[-2:]) > 8
            is_table = "embed" in name or "lm_head" in name
            (matrices if is_matrix and not is_table else others).append(parameter)
        settings = self.settings
        return [
            Muon(matrices, lr=settings.matrix_lr, weight_decay=settings.weight_decay),
            torch.optim.AdamW(others, lr=settings.other_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def losses(self, batch: NanoBatch) -> dict[str, torch.Tensor]:
        """Losses of a batch by name; `answer` and the dense ones add up to the training loss."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embeds = self.model.prepare_inputs_embeds(
                batch.input_ids, batch.images, batch.images_seq_mask, batch.images_spatial_crop
            )
            hidden = self.model.language.model(
                inputs_embeds=embeds,
                attention_mask=batch.attention_mask(),
                position_ids=batch.position_ids,
                use_cache=False,
            ).last_hidden_state
            is_answer = batch.labels[:, 1:] != IGNORE_ID
            labels = batch.labels[:, 1:][is_answer]
            logits = self.model.language.lm_head(hidden[:, :-1][is_answer])
            dense = self.heads(self.image_tokens, batch)
        opened = (batch.input_ids == self.det_start).cumsum(1) - (batch.input_ids == self.det_end).cumsum(1)
        is_coordinate = (opened[:, 1:][is_answer] > 0) & self.is_number[labels]
        return {"answer": self.answer_loss(logits, labels, is_coordinate), **dense}

    def step(self, batch: NanoBatch) -> dict[str, float]:
        """Learns from one batch; returns its losses and the norm of the gradients."""
        factor = self.settings.lr_factor(self.next_batch)
        for optimizer, lr in zip(self.optimizers, (self.settings.matrix_lr, self.settings.other_lr), strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
        losses = self.losses(batch)
        dense = sum(loss for name, loss in losses.items() if name.startswith("dense"))
        (losses["answer"] + self.settings.dense_weight * dense).backward()
        parameters = [*self.model.parameters(), *self.heads.parameters()]
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.next_batch += 1
        return {name: loss.item() for name, loss in losses.items()} | {"grad_norm": norm.item()}

    def save_state(self) -> None:
        """Writes everything that going on needs; the file is complete or not there at all."""
        state = {
            "settings": asdict(self.settings),
            "next_batch": self.next_batch,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        unfinished = self.folder / "state.pt.unfinished"
        torch.save(state, unfinished)
        unfinished.replace(self.folder / "state.pt")

    def load_state(self) -> bool:
        """Goes on from a saved state, if there is one.

        Raises:
            ValueError: If the state belongs to other settings.
        """
        path = self.folder / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        if state["settings"] != asdict(self.settings):
            raise ValueError(
                f"{path} was written with other settings: {state['settings']}. Choose another folder, or remove it."
            )
        self.next_batch = state["next_batch"]
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        return True

    def save_checkpoint(self, folder: Path) -> None:
        """Writes the model in bfloat16 and its processor, as `from_pretrained` loads them."""
        model = untrained_nano(self.processor.tokenizer, self.settings.seed)
        model.load_state_dict(self.model.state_dict())
        model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
        self.processor.save_pretrained(folder)

    def batches(self) -> Iterator[NanoBatch]:
        """The batches from the present one on, drawn by a second process ahead of need."""
        dataset = TrainingBatches(
            self.processor,
            Curriculum(self.settings.num_batches),
            self.settings.batch_size,
            self.settings.questions_a_picture,
        )
        order = range(self.next_batch, len(dataset))
        return iter(DataLoader(dataset, batch_size=None, sampler=order, num_workers=1, prefetch_factor=8))

    def run(self, stop_at: int | None = None) -> None:
        """Trains to the end, or to batch `stop_at`; writes `log.jsonl` and states on the way."""
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(self.settings.num_threads)
        if self.load_state():
            logger.info("going on from batch %d", self.next_batch)
        last = min(stop_at or self.settings.num_batches, self.settings.num_batches)
        start = time.monotonic()
        with (
            (self.folder / "log.jsonl").open("a") as log,
            tqdm(total=last, initial=self.next_batch, unit="batch") as bar,
        ):
            for batch in self.batches():
                if self.next_batch >= last:
                    break
                metrics = self.step(batch)
                bar.update()
                if self.next_batch % 20 == 0:
                    line = {"batch": self.next_batch, "seconds": round(time.monotonic() - start, 1), **metrics}
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    bar.set_postfix(answer=f"{metrics['answer']:.3f}")
                if self.next_batch % self.settings.save_every == 0:
                    self.save_state()
        self.save_state()
