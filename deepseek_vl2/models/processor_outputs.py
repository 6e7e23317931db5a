"""What the processor returns: one sample, or a batch of samples."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch


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
