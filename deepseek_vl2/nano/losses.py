"""What nano learns from: answers, and what each image token sees."""

import torch
import torch.nn.functional as F
from torch import nn

from deepseek_vl2.models.special_tokens import DET_END, DET_START
from deepseek_vl2.nano.batches import IGNORE_ID, AnswerBatch, Cells
from deepseek_vl2.nano.questions import CELL_CLASSES
from deepseek_vl2.nano.scenes import COLOR_NAMES
from deepseek_vl2.serve.grounding import COORDINATE_MAX

# Coordinates say which object is meant; the label and the marks around them are soon known.
COORDINATE_WEIGHT = 4.0


class NumberTargets(nn.Module):
    """Targets of coordinates: a narrow bell over the numbers 0 to 999, so that a near miss costs less than a far one.

    Args:
        number_ids: Ids of the numbers 0 to 999.
        vocab_size: Number of token ids.
        spread: Standard deviation of the bell.
    """

    bells: torch.Tensor
    entropies: torch.Tensor
    number_ids: torch.Tensor
    number_of_id: torch.Tensor

    def __init__(self, number_ids: list[int], vocab_size: int, spread: float) -> None:
        super().__init__()
        numbers = torch.arange(len(number_ids), dtype=torch.float32)
        bells = torch.exp(-0.5 * ((numbers[:, None] - numbers) / spread) ** 2)
        bells = bells / bells.sum(dim=1, keepdim=True)
        number_of_id = torch.full((vocab_size,), -1)
        number_of_id[number_ids] = torch.arange(len(number_ids))
        self.register_buffer("bells", bells)
        self.register_buffer("entropies", -torch.special.xlogy(bells, bells).sum(dim=1))
        self.register_buffer("number_ids", torch.tensor(number_ids))
        self.register_buffer("number_of_id", number_of_id)

    def divergence(self, log_probabilities: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Divergence from the bells around numbers [N] to log probabilities of all numbers [N, 1000]; 0 at best."""
        return -(self.bells[numbers] * log_probabilities).sum(dim=1) - self.entropies[numbers]


def _mean(values: torch.Tensor) -> torch.Tensor:
    """Mean; 0 where a batch holds none of a kind, where torch would say NaN and spoil all weights."""
    return values.mean() if len(values) else values.sum()


class AnswerLoss(nn.Module):
    """Cross entropy of answers; coordinates of boxes have the targets of `NumberTargets`.

    Every question counts the same, however long its answer is: a count or a colour is one token among the dozens of a
    description and would hardly be learned otherwise.
    """

    def __init__(self, targets: NumberTargets, det_start: int, det_end: int) -> None:
        super().__init__()
        self.targets = targets
        self.det_start, self.det_end = det_start, det_end

    @classmethod
    def for_tokenizer(cls, targets: NumberTargets, tokenizer: "object") -> "AnswerLoss":
        """Looks the marks of boxes up in a tokenizer."""
        det_start, det_end = tokenizer.convert_tokens_to_ids([DET_START, DET_END])  # type: ignore[attr-defined]
        return cls(targets, det_start, det_end)

    def forward(self, hidden: torch.Tensor, output_layer: nn.Linear, batch: AnswerBatch) -> dict[str, torch.Tensor]:
        """Losses from hidden states [B, T, D]: that of answers, and for the log those of words and of coordinates."""
        is_answer = batch.labels[:, 1:] != IGNORE_ID
        labels = batch.labels[:, 1:][is_answer]
        log_probabilities = output_layer(hidden[:, :-1][is_answer]).float().log_softmax(dim=-1)
        is_in_box = (batch.input_ids == self.det_start).cumsum(1) > (batch.input_ids == self.det_end).cumsum(1)
        numbers = self.targets.number_of_id[labels]
        is_coordinate = is_in_box[:, 1:][is_answer] & (numbers >= 0)
        losses = F.nll_loss(log_probabilities, labels, reduction="none")
        near = self.targets.divergence(
            log_probabilities[is_coordinate][:, self.targets.number_ids], numbers[is_coordinate]
        )
        losses = losses.masked_scatter(is_coordinate, near)
        rows = torch.arange(len(batch.segments))[:, None]
        questions = (rows * (int(batch.segments.max()) + 1) + batch.segments)[:, 1:][is_answer]
        weights = question_weights(questions, is_coordinate)
        words = _mean(losses[~is_coordinate].detach())
        return {"answer": (losses * weights).sum(), "words": words, "coordinates": _mean(near.detach())}


def question_weights(questions: torch.Tensor, is_coordinate: torch.Tensor) -> torch.Tensor:
    """Weights [N] of tokens of answers: the same sum for every question, 1 in all, more for coordinates than for words.

    Args:
        questions: Number of each token's question, [N].
        is_coordinate: Which tokens are coordinates, [N].
    """
    weights = torch.where(is_coordinate, COORDINATE_WEIGHT, 1.0)
    sums = torch.bincount(questions, weights)
    return weights / (sums[questions] * (sums > 0).sum())


class DenseHeads(nn.Module):
    """Reads off each image token what it sees: class, colour and box. Only used in training.

    Every token of every view is told its part this way, where answers alone tell little about single tokens. Boxes are
    read through the language model's own rows for numbers, in which it will have to write them.
    """

    def __init__(self, width: int, targets: NumberTargets) -> None:
        super().__init__()
        self.targets = targets
        self.shape = nn.Linear(width, len(CELL_CLASSES) + 1)
        self.color = nn.Linear(width, len(COLOR_NAMES))
        self.box = nn.Linear(width, 4 * width)

    def forward(self, tokens: torch.Tensor, cells: Cells, output_layer: nn.Linear) -> dict[str, torch.Tensor]:
        """Losses of image tokens [V, G*G, D]; 0 for colours and boxes where no token sees an object."""
        tokens = tokens.flatten(0, 1)
        shape_ids, color_ids = cells.shape_ids.flatten(), cells.color_ids.flatten()
        is_object, has_color = shape_ids >= 0, color_ids >= 0
        shape_targets = shape_ids.where(is_object, len(CELL_CLASSES))
        numbers = (cells.boxes.flatten(0, -2)[is_object].clamp(0, 1) * COORDINATE_MAX).round().long().flatten()
        rows = F.normalize(output_layer.weight[self.targets.number_ids].float(), dim=-1)
        read = self.box(tokens[is_object]).unflatten(-1, (4, -1)).flatten(0, 1)
        log_probabilities = (read.float() @ rows.T).log_softmax(dim=-1)
        # As in `_mean`: the sum over none is 0.
        reduction = "mean" if has_color.any() else "sum"
        return {
            "dense_shape": F.cross_entropy(self.shape(tokens).float(), shape_targets),
            "dense_color": F.cross_entropy(
                self.color(tokens[has_color]).float(), color_ids[has_color], reduction=reduction
            ),
            "dense_box": _mean(self.targets.divergence(log_probabilities, numbers)),
        }
