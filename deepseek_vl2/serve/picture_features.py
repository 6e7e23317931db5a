"""Features of pictures that were seen before, so that a conversation does not encode them again at every turn."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.models.tiling import TileGrid, num_image_tokens

DEFAULT_MAX_BYTES = 256 * 2**20


class Picture(NamedTuple):
    """A picture of a prompt.

    Attributes:
        key: The same for pictures with the same pixels and the same grid, and for no others.
        grid: Its tiles.
        first_view: Place of its global view among the views of the prompt.
    """

    key: bytes
    grid: TileGrid
    first_view: int

    @property
    def view_slice(self) -> slice:
        """Places of its views among those of the prompt."""
        return slice(self.first_view, self.first_view + self.grid.num_views)


class Embedded(NamedTuple):
    """An embedded prompt [1, T, D], and how many views its pictures had that were not known."""

    inputs_embeds: torch.Tensor
    num_encoded_views: int


def find_pictures(images: torch.Tensor, images_spatial_crop: torch.Tensor) -> list[Picture]:
    """Tells which pictures a prompt has.

    Args:
        images: Views [1, V, 3, S, S] of one prompt.
        images_spatial_crop: Grids (columns, rows) [1, I, 2].
    """
    found: list[Picture] = []
    first_view = 0
    for columns, rows in images_spatial_crop[0].tolist():
        grid = TileGrid(columns, rows)
        if grid.num_tiles:  # (0, 0) stands for no picture
            views = images[0, first_view : first_view + grid.num_views]
            found.append(Picture(_digest(views, grid), grid, first_view))
            first_view += grid.num_views
    return found


class PictureFeatures:
    """Remembers the image tokens of the pictures that were used last.

    Pictures are told apart by the pixels that the model sees, so the same picture sent by several users is encoded
    once, and nothing about who sent it is kept.

    Args:
        model: The model.
        max_bytes: Memory for features; a picture of the published models takes 1 to 5 MB. The last one
            stays, however large it is.

    Raises:
        ValueError: If `max_bytes` is negative.
    """

    def __init__(self, model: DeepseekVLV2ForCausalLM, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._model = model
        if max_bytes < 0:
            raise ValueError(f"max_bytes {max_bytes} must be at least 0.")
        self._max_bytes = max_bytes
        self._known: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Memory that the remembered features take."""
        with self._lock:
            return sum(features.nbytes for features in self._known.values())

    def clear(self) -> None:
        """Forgets all features. Whoever changes the weights of the tower or of the projector calls it."""
        with self._lock:
            self._known.clear()

    def embed(
        self,
        input_ids: torch.Tensor,
        images: torch.Tensor,
        images_seq_mask: torch.Tensor,
        images_spatial_crop: torch.Tensor,
        **ignored: Any,
    ) -> torch.Tensor:
        """Embeds one prompt as `prepare_inputs_embeds` does, with the features that are known."""
        pictures = find_pictures(images, images_spatial_crop)
        needed = {picture.key for picture in pictures}
        return self.embed_some(input_ids, images, images_seq_mask, images_spatial_crop, pictures, needed).inputs_embeds

    def embed_some(
        self,
        input_ids: torch.Tensor,
        images: torch.Tensor,
        images_seq_mask: torch.Tensor,
        images_spatial_crop: torch.Tensor,
        pictures: Sequence[Picture],
        needed: set[bytes],
    ) -> Embedded:
        """Embeds one prompt with zeros in the places of the pictures that nobody will read.

        Args:
            input_ids: [1, T].
            images: See `find_pictures`.
            images_seq_mask: Which tokens are placeholders, [1, T].
            images_spatial_crop: See `find_pictures`.
            pictures: What `find_pictures` has found.
            needed: Keys of the pictures that will be read.

        Raises:
            ValueError: If placeholders and pictures do not match, or the prompt is longer than the model's positions.
        """
        features, num_encoded = self._find(images, [picture for picture in pictures if picture.key in needed])
        like = next(iter(features.values()), images)
        for picture in pictures:
            if picture.key not in features:
                num_tokens = num_image_tokens(picture.grid, self._model.tokens_per_side)
                features[picture.key] = like.new_zeros(num_tokens, self._model.config.projector_config.n_embed)
        inputs_embeds = self._model.prepare_inputs_embeds(
            input_ids,
            images,
            images_seq_mask,
            images_spatial_crop,
            image_features=[features[picture.key] for picture in pictures],
        )
        return Embedded(inputs_embeds, num_encoded)

    def _find(self, images: torch.Tensor, pictures: Sequence[Picture]) -> tuple[dict[bytes, torch.Tensor], int]:
        """Features of pictures by key, and how many views had to be encoded for them."""
        found: dict[bytes, torch.Tensor] = {}
        with self._lock:
            for picture in pictures:
                if picture.key in self._known:
                    self._known.move_to_end(picture.key)
                    found[picture.key] = self._known[picture.key]
        missing = {picture.key: picture for picture in pictures if picture.key not in found}
        if not missing:
            return found, 0
        # One batch for all of them, as without this memory.
        views = torch.cat([images[:, picture.view_slice] for picture in missing.values()], dim=1)
        grids = torch.tensor([[picture.grid for picture in missing.values()]])
        encoded = dict(zip(missing, self._model.get_image_features(views, grids), strict=True))
        self._remember(encoded)
        return found | encoded, views.shape[1]

    def _remember(self, features: dict[bytes, torch.Tensor]) -> None:
        with self._lock:
            self._known |= {key: item.detach() for key, item in features.items()}
            size = sum(item.nbytes for item in self._known.values())
            while size > self._max_bytes and len(self._known) > 1:
                size -= self._known.popitem(last=False)[1].nbytes


def _digest(views: torch.Tensor, grid: TileGrid) -> bytes:
    """Tells pictures apart by pixels and grid."""
    digest = hashlib.blake2b(repr(tuple(grid)).encode(), digest_size=16)
    digest.update(views.contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.digest()
