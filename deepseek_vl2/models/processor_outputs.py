"""What the processor returns: one sample, or a batch of samples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence


class FieldAccess:
    """Lets a dataclass be read like a dictionary too, so that `model(**inputs)` works."""

    def keys(self) -> list[str]:
        """Names of the fields, in order."""
        return [item.name for item in fields(self)]  # type: ignore[arg-type]

    def items(self) -> Iterator[tuple[str, Any]]:
        """Names and values of the fields, in order."""
        return ((name, getattr(self, name)) for name in self.keys())

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(f"{name!r} is not one of {self.keys()}")
        return getattr(self, name)

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self.keys():
            raise KeyError(f"{name!r} is not one of {self.keys()}")
        setattr(self, name, value)


@dataclass
class VLChatProcessorOutput(FieldAccess):
    """One sample, not padded. `len()` is its number of tokens.

    `sft_format` is the conversation in print, for logs: roles as the caller wrote them, not what was encoded.
    Shapes: `input_ids`, `target_ids`, `images_seq_mask` [T]; `images` [V, 3, S, S]; `images_spatial_crop` [I, 2] with
    (columns, rows). Without a picture `images` is one view of zeros and `images_spatial_crop` one row of zeros.
    """

    sft_format: str
    input_ids: torch.Tensor
    target_ids: torch.Tensor
    images: torch.Tensor
    images_seq_mask: torch.Tensor
    images_spatial_crop: torch.Tensor
    num_image_tokens: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class BatchCollateOutput(FieldAccess):
    """Samples padded to one length. `len()` is their number.

    Shapes: `input_ids`, `labels`, `attention_mask`, `images_seq_mask` [B, T]; `images` [B, V, 3, S, S] and
    `images_spatial_crop` [B, I, 2], both filled up with zeros; `seq_lens` holds the lengths before padding.
    """

    sft_format: list[str]
    input_ids: torch.Tensor
    labels: torch.Tensor
    images: torch.Tensor
    attention_mask: torch.Tensor
    images_seq_mask: torch.Tensor
    images_spatial_crop: torch.Tensor
    seq_lens: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(
        self, device: torch.device | str | int | None = None, dtype: torch.dtype | None = torch.bfloat16
    ) -> "BatchCollateOutput":
        """Move every tensor to a device and cast the images. Changes this object and returns it.

        Args:
            device: where to move; `None` leaves the tensors where they are.
            dtype: of the images, by default bfloat16 as the published checkpoints; `None` leaves it.
        """
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                self[name] = value.to(device=device, dtype=dtype if name == "images" else None)
        return self


def collate(
    sample_list: Sequence[VLChatProcessorOutput], pad_id: int, ignore_id: int, padding: str = "left"
) -> BatchCollateOutput:
    """Join samples to a batch.

    With left padding a label equal to the pad id becomes `ignore_id`, as in the reference: where a tokenizer pads with
    eos, the end of an answer is then not learnt. Right padding, which training uses, keeps it.

    Args:
        sample_list: samples of one processor.
        pad_id: fills up the ids.
        ignore_id: fills up the labels.
        padding: `left` to generate, `right` to train.

    Raises:
        ValueError: no samples, or another padding.
    """
    samples = list(sample_list)
    if not samples:
        raise ValueError("no samples to batch: the list is empty")
    if padding not in ("left", "right"):
        raise ValueError(f"unknown padding {padding!r}: take 'left' or 'right'")

    def join(rows: list[torch.Tensor], value: float, side: str = padding) -> torch.Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

    labels = join([sample.target_ids for sample in samples], ignore_id)
    if padding == "left":
        labels[labels == pad_id] = ignore_id
    return BatchCollateOutput(
        sft_format=[sample.sft_format for sample in samples],
        input_ids=join([sample.input_ids for sample in samples], pad_id),
        labels=labels,
        images=join([sample.images for sample in samples], 0, "right"),
        attention_mask=join([torch.ones(len(sample), dtype=torch.bool) for sample in samples], False),
        images_seq_mask=join([sample.images_seq_mask for sample in samples], False),
        images_spatial_crop=join([sample.images_spatial_crop for sample in samples], 0, "right"),
        seq_lens=[len(sample) for sample in samples],
    )
