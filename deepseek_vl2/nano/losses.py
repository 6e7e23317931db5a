"""What nano learns from: answers, and what each image token sees."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from deepseek_vl2.models.special_tokens import DET_END, DET_START
from deepseek_vl2.nano.batches import IGNORE_ID, AnswerBatch
from deepseek_vl2.nano.layouts import COLUMN_NAMES, MAX_BAR, ROW_NAMES
from deepseek_vl2.nano.scenes import COLOR_NAMES
from deepseek_vl2.nano.several import NUM_COMPARED
from deepseek_vl2.nano.targets import CELL_CLASSES, MAX_LETTERS_A_CELL, MAX_TEXT_LENGTH, SIGNS, Cells
from deepseek_vl2.serve.grounding import COORDINATE_MAX

# Coordinates say which object is meant; the label and the marks around them are soon known.
COORDINATE_WEIGHT = 4.0
# After this layer image tokens should know their whole object; later ones look for what is asked for.
READING_LAYER = 2
# After this layer a token that has attended to an object should know what it is.
ATTENDED_LAYER = 4
# Layers whose first heads are told where to look, and how many of them. Two heads of one layer find the object, too,
# but carry too little of it for four coordinates.
POINTING_HEADS = {3: 4, 4: 4}
ATTENTION_NAME = "nano_pointing"


class NumberTargets(nn.Module):
    """Targets of coordinates: a narrow bell over the numbers 0 to 999, so that a near miss costs less than a far one.

    Args:
        number_ids: Ids of the numbers 0 to 999.
        vocab_size: Number of token ids.
        spread: Standard deviation of the bell.
    """

    bell: torch.Tensor
    offsets: torch.Tensor
    number_ids: torch.Tensor
    number_of_id: torch.Tensor

    def __init__(self, number_ids: list[int], vocab_size: int, spread: float) -> None:
        super().__init__()
        # Beyond four deviations nothing is left of a bell.
        offsets = torch.arange(-math.ceil(4 * spread), math.ceil(4 * spread) + 1)
        number_of_id = torch.full((vocab_size,), -1)
        number_of_id[number_ids] = torch.arange(len(number_ids))
        self.register_buffer("bell", torch.exp(-0.5 * (offsets / spread) ** 2))
        self.register_buffer("offsets", offsets)
        self.register_buffer("number_ids", torch.tensor(number_ids))
        self.register_buffer("number_of_id", number_of_id)

    def divergence(self, log_probabilities: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Divergence from the bells around numbers [N] to log probabilities of all numbers [N, 1000]; 0 at best."""
        near = numbers[:, None] + self.offsets
        last = log_probabilities.shape[1] - 1
        bells = self.bell * ((near >= 0) & (near <= last))
        bells = bells / bells.sum(dim=1, keepdim=True)
        found = log_probabilities.gather(1, near.clamp(0, last))
        return (torch.special.xlogy(bells, bells) - bells * found).sum(dim=1)


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
        rows = torch.arange(len(batch.question_ids))[:, None]
        questions = (rows * (int(batch.question_ids.max()) + 1) + batch.question_ids)[:, 1:][is_answer]
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


# What heads can read off a token, by the name in `Cells`, and how many values it has.
CATEGORY_SIZES = {
    "class_ids": len(CELL_CLASSES) + 1,
    "color_ids": len(COLOR_NAMES),
    "bar_values": MAX_BAR + 1,
    "row_ids": len(ROW_NAMES),
    "column_ids": len(COLUMN_NAMES),
    "first_places": MAX_TEXT_LENGTH,
}
PRINT_CLASSES = [CELL_CLASSES.index("word"), CELL_CLASSES.index("number")]


class DenseHeads(nn.Module):
    """Reads off tokens of the model what they see, see `Cells`. Only for training.

    Every image token is told its part this way, where answers alone tell little about single tokens; and so are tokens
    of answers that have just attended to an object. Boxes are read through the language model's own rows for numbers,
    in which it will have to write them.

    Args:
        width: D.
        targets: Targets of coordinates.
        categories: Which of `CATEGORY_SIZES` are read.
        reads_letters: Whether letters are read.
        flags: Which flags of `Cells` are read.
        names_pictures: Whether tokens can say which of several pictures they belong to.
    """

    def __init__(
        self,
        width: int,
        targets: NumberTargets,
        categories: Sequence[str],
        reads_letters: bool = False,
        flags: Sequence[str] = (),
        names_pictures: bool = False,
    ) -> None:
        super().__init__()
        self.targets = targets
        self.categories = nn.ModuleDict({name: nn.Linear(width, CATEGORY_SIZES[name]) for name in categories})
        self.letters = nn.Linear(width, MAX_LETTERS_A_CELL * (len(SIGNS) + 1)) if reads_letters else None
        self.flags = nn.ModuleDict({name: nn.Linear(width, 1) for name in flags})
        self.box = nn.Linear(width, 4 * width)
        self.picture = nn.Linear(width, NUM_COMPARED) if names_pictures else None

    def forward(
        self,
        tokens: torch.Tensor,
        cells: Cells,
        output_layer: nn.Linear,
        picture_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Losses of image tokens [N, D], N cells in all, by what is read; 0 where no token sees any.

        Args:
            tokens: The image tokens.
            cells: What they should see.
            output_layer: Of the language model.
            picture_ids: Which of several pictures each token belongs to, [N]; not asked if None.
        """
        is_object = (cells.object_ids >= 0).flatten()
        of_objects = tokens[is_object]
        losses: dict[str, torch.Tensor] = {}
        for name, head in self.categories.items():
            ids = getattr(cells, name).flatten()
            if name == "class_ids":
                ids = ids.where(ids >= 0, len(CELL_CLASSES))
            is_asked = ids >= 0
            losses[name] = _mean(F.cross_entropy(head(tokens[is_asked]).float(), ids[is_asked], reduction="none"))
        if self.letters is not None:
            ids = cells.letters.flatten(0, -2)
            has_letters = (ids >= 0).any(dim=1)
            wanted = ids[has_letters]
            read_letters = self.letters(tokens[has_letters]).float().unflatten(-1, (-1, len(SIGNS) + 1)).flatten(0, 1)
            wanted = wanted.where(wanted >= 0, len(SIGNS)).flatten()
            losses["letters"] = _mean(F.cross_entropy(read_letters, wanted, reduction="none"))
        for name, head in self.flags.items():
            flags = getattr(cells, name).flatten()[is_object].float()
            found = F.binary_cross_entropy_with_logits(head(of_objects)[:, 0].float(), flags, reduction="none")
            # Flags are rare: those that are set and those that are not weigh the same.
            losses[name] = (_mean(found[flags == 1]) + _mean(found[flags == 0])) / 2
        numbers = (cells.boxes.flatten(0, -2)[is_object].clamp(0, 1) * COORDINATE_MAX).round().long().flatten()
        rows = F.normalize(output_layer.weight[self.targets.number_ids].float(), dim=-1)
        read = self.box(of_objects).unflatten(-1, (4, -1)).flatten(0, 1)
        log_probabilities = (read.float() @ rows.T).log_softmax(dim=-1)
        losses["boxes"] = _mean(self.targets.divergence(log_probabilities, numbers))
        if self.picture is not None and picture_ids is not None:
            losses["pictures"] = F.cross_entropy(self.picture(tokens).float(), picture_ids)
        return losses


class LetterHead(nn.Module):
    """Reads off a patch of the tower which letter it shows, if any, and its place in its view's part of the text.

    Only for training.

    Letters are smaller than image tokens: told of single patches, they are learnt several times faster. And the tower
    sees a text from both ends, where the language model only looks back.

    Args:
        width: C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.letter = nn.Linear(width, len(SIGNS) + 1)
        self.place = nn.Linear(width, MAX_TEXT_LENGTH)

    def forward(self, patches: torch.Tensor, letters: torch.Tensor, places: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses of patches [N, C], N of all `ViewBatch.patch_letters`; those with and without letters weigh the same.

        Args:
            patches: Of the tower.
            letters: See `ViewBatch.patch_letters`.
            places: See `ViewBatch.patch_places`.
        """
        wanted = letters.flatten()
        is_letter = wanted >= 0
        losses = F.cross_entropy(self.letter(patches).float(), wanted.where(is_letter, len(SIGNS)), reduction="none")
        is_placed = places.flatten() >= 0
        of_places = F.cross_entropy(
            self.place(patches[is_placed]).float(), places.flatten()[is_placed], reduction="none"
        )
        return {"letters": _mean(losses[is_letter]) + _mean(losses[~is_letter]), "places": _mean(of_places)}


def views_beside_print(cells: Cells) -> list[int]:
    """Views that show other things than print."""
    is_other = (cells.class_ids >= 0) & ~_is_print(cells)
    return is_other.flatten(1).any(dim=1).nonzero()[:, 0].tolist()


def keeping_loss(tokens: torch.Tensor, earlier: torch.Tensor, cells: Cells) -> torch.Tensor:
    """How far image tokens [V, G * G, D] went from those of an earlier tower, where nothing is printed.

    Returns:
        Mean squared distance, 1 where it is that of the earlier tokens from 0; 0 if there is nothing but print.
    """
    is_kept = ~_is_print(cells).flatten(1)
    kept = earlier[is_kept].float()
    return _mean((tokens[is_kept].float() - kept).square()) / _mean(kept.square()).clamp(min=1e-6)


def _is_print(cells: Cells) -> torch.Tensor:
    return torch.isin(cells.class_ids, torch.tensor(PRINT_CLASSES))


class PointingLoss:
    """Tells attention which objects the next token is about: the way from a label to its object is hardly found else.

    Without it the model learns what boxes there are long before it learns whose box was asked for. An instance belongs
    to one batch; pass it as keyword `pointing` to the language model, whose attention is `ATTENTION_NAME`.

    Args:
        batch: The batch.
        heads: How many heads of which layers point, the first ones of each; an even number, see `Pointing.aims`.
    """

    def __init__(self, batch: AnswerBatch, heads: Mapping[int, int] = POINTING_HEADS) -> None:
        self.batch = batch
        self.heads = heads
        self._of_layers: list[torch.Tensor] = []

    @property
    def value(self) -> torch.Tensor:
        """The loss, a mean over the layers that were read."""
        return torch.stack(self._of_layers).mean()

    def read(self, layer: int, attention: torch.Tensor) -> None:
        """Takes the attention [B, H, T, T] of a layer and computes the loss of its first heads, if they point."""
        num_heads = self.heads.get(layer, 0)
        if not num_heads:
            return
        pointings = self.batch.pointings
        attention = attention[:, :num_heads][pointings.rows, :, pointings.positions].float()  # [P, h, T]
        weights = pointings.weights / pointings.weights.sum().clamp(min=1e-6)
        halves = zip(attention.chunk(2, dim=1), pointings.group_ids, pointings.shares, strict=True)
        losses = [self._divergence(own, group_ids, shares) for own, group_ids, shares in halves]
        self._of_layers.append((torch.cat(losses, dim=1).mean(dim=1) * weights).sum())

    def _divergence(self, attention: torch.Tensor, group_ids: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Divergence [P, h] of attention [P, h, T] from shares [P, 1 + K] of the first token and of groups [P, C]."""

        def as_heads(values: torch.Tensor) -> torch.Tensor:
            return values[:, None].expand(-1, attention.shape[1], -1)

        of_cells = attention.gather(2, as_heads(self.batch.cell_table[self.batch.pointings.rows]))
        # Column 0 takes cells of no group first, then the share of the first token.
        masses = torch.zeros(*attention.shape[:2], shares.shape[1])
        masses = masses.scatter_add(2, as_heads(group_ids + 1), of_cells)
        masses = torch.cat((attention[..., :1], masses[..., 1:]), dim=-1)
        return torch.special.xlogy(shares, shares).sum(-1)[:, None] - (shares[:, None] * (masses + 1e-6).log()).sum(-1)


def pointing_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    pointing: PointingLoss | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention written out, which lets a `PointingLoss` see the weights.

    On a CPU it learns several times faster than the fused kernel, whose way back is slow with a mask.
    """
    scores = (query * module.scaling) @ key.mT
    weights = scores.masked_fill(~attention_mask, -torch.inf).softmax(dim=-1)
    if pointing is not None:
        pointing.read(module.layer_idx, weights)
    return (weights.to(value.dtype) @ value).transpose(1, 2), None


AttentionInterface.register(ATTENTION_NAME, pointing_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
