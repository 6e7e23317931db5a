"""Features of pictures that were seen before, so that a conversation does not encode them again at every turn."""

import hashlib
import threading
from collections import OrderedDict
from typing import Any

import torch

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.models.tiling import TileGrid

DEFAULT_MAX_BYTES = 256 * 2**20


class PictureFeatures:
    """Remembers the image tokens of the pictures that were used last.

    Pictures are told apart by the pixels that the model sees, so the same picture sent by several users is encoded
    once, and nothing about who sent it is kept.

    Args:
        model: The model.
        max_bytes: Memory for features; a picture of the published models takes 1 to 5 MB.
    """

    def __init__(self, model: DeepseekVLV2ForCausalLM, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._model = model
        self._max_bytes = max_bytes
        self._known: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Memory that the remembered features take."""
        with self._lock:
            return sum(features.nbytes for features in self._known.values())

    def embed(
        self,
        input_ids: torch.Tensor,
        images: torch.Tensor,
        images_seq_mask: torch.Tensor,
        images_spatial_crop: torch.Tensor,
        **ignored: Any,
    ) -> torch.Tensor:
        """Embeds one prompt as `prepare_inputs_embeds` does, with the features that are known."""
        return self._model.prepare_inputs_embeds(
            input_ids,
            images,
            images_seq_mask,
            images_spatial_crop,
            image_features=self._features(images, images_spatial_crop),
        )

    def _features(self, images: torch.Tensor, images_spatial_crop: torch.Tensor) -> list[torch.Tensor]:
        found, start = [], 0
        for index, (columns, rows) in enumerate(images_spatial_crop[0].tolist()):
            grid = TileGrid(columns, rows)
            if not grid.num_tiles:  # (0, 0) stands for no picture
                continue
            views = images[:, start : start + grid.num_views]  # [1, V, 3, S, S]
            found.append(self._encode(views, images_spatial_crop[:, index : index + 1]))
            start += grid.num_views
        return found

    def _encode(self, views: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        key = _digest(views, grid)
        with self._lock:
            features = self._known.get(key)
            if features is not None:
                self._known.move_to_end(key)
                return features
        (features,) = self._model.get_image_features(views, grid)
        with self._lock:
            self._known[key] = features
            size = sum(item.nbytes for item in self._known.values())
            while size > self._max_bytes and len(self._known) > 1:
                size -= self._known.popitem(last=False)[1].nbytes
        return features


def _digest(views: torch.Tensor, grid: torch.Tensor) -> bytes:
    """Tells pictures apart by pixels and grid."""
    digest = hashlib.blake2b(str(grid.tolist()).encode(), digest_size=16)
    digest.update(views.contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.digest()
