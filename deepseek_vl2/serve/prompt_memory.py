"""Keys and values of the prompt and answer before, so that the next prompt is read only from where it differs."""

import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.models.growing_cache import GrowingCache
from deepseek_vl2.models.tiling import num_image_tokens
from deepseek_vl2.serve.picture_features import Picture, PictureFeatures, find_pictures


class Reuse(NamedTuple):
    """What of a prompt was known, and what had to be computed.

    Attributes:
        num_reused_tokens: Tokens at the beginning of the prompt whose keys and values were there.
        num_computed_tokens: Tokens of the prompt that the model reads. At least the last one, which the answer's first
            token comes from.
        num_encoded_views: Views of the pictures that went through the vision tower.
    """

    num_reused_tokens: int
    num_computed_tokens: int
    num_encoded_views: int


class PictureToken(NamedTuple):
    """One of the tokens of a picture; those of another picture, or of the same in other tiles, are not equal to it."""

    picture: bytes
    place: int


class PromptMemory:
    """The cache of one conversation, and what each of its positions was computed from.

    A prompt may change in any way from one answer to the next: the cache is cut back to the part that both have in
    common. Answers are those of an empty cache, up to the rounding of sums that are shared out differently.

    Args:
        model: The model; whoever changes its weights calls `clear`.
        features: Where features of pictures are kept; a memory of its own if None.

    Attributes:
        model: The model.
        last_reuse: What was known of the last prompt; None before the first.
    """

    def __init__(self, model: DeepseekVLV2ForCausalLM, features: PictureFeatures | None = None) -> None:
        self.last_reuse: Reuse | None = None
        self.model = model
        self._kept: list[Hashable] = []
        self._features = PictureFeatures(model) if features is None else features
        self._lock = threading.Lock()
        self._forget()

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values are there."""
        return self._cache.get_seq_length()

    @property
    def num_bytes(self) -> int:
        """Memory that the cache takes, that of cut off ends included as long as it is not given back."""
        tensors = [tensor for layer in self._cache.layers for tensor in (layer.keys, layer.values)]
        storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def clear(self) -> None:
        """Forgets everything, the features of pictures too, also where other sessions share them.

        Raises:
            RuntimeError: If an answer is under way.
        """
        with self.in_use(()):
            self._forget()
            self._features.clear()
            self.last_reuse = None

    @contextmanager
    def in_use(self, new_ids: Sequence[int]) -> Iterator[None]:
        """Keeps other answers out, and afterwards what the model has read in the block, which calls `prefill` once.

        If the block fails, nothing is kept: layers may then be in any state.

        Args:
            new_ids: The answer's tokens; read at the end of the block.

        Raises:
            RuntimeError: If an answer is under way.
        """
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("this conversation has an answer under way: read it to its end, or close it, first")
        is_sound = False
        try:
            yield
            is_sound = True
        finally:
            if is_sound:
                self._settle(new_ids)
            else:
                self._forget()
            self._lock.release()

    def prefill(self, prompt: Mapping[str, torch.Tensor], chunk_size: int) -> tuple[torch.Tensor, Cache]:
        """Embeds a prompt and reads what is not known of it, all but the last token of it in chunks.

        Args:
            prompt: The processor's outputs for one prompt without padding, on the model's device.
            chunk_size: Tokens to read at once; with -1 nothing is read here but all by `generate`.

        Returns:
            Embeddings [1, T, D], those of known pictures' places being zeros, and the cache, both for `generate`. The
            cache is extended in place and must not be used outside `in_use`.

        Raises:
            ValueError: If placeholders and pictures do not match, or the prompt is longer than the model's positions.
        """
        images, grids = prompt["images"], prompt["images_spatial_crop"]
        pictures = find_pictures(images, grids)
        sources = self._sources(prompt, pictures)
        num_reused = self._cut_to_common_start(sources)
        needed = {source.picture for source in sources[num_reused:] if isinstance(source, PictureToken)}
        inputs_embeds, num_encoded = self._features.embed_some(
            prompt["input_ids"], images, prompt["images_seq_mask"], grids, pictures, needed
        )
        self.last_reuse = Reuse(num_reused, len(sources) - num_reused, num_encoded)
        if chunk_size != -1:
            self.model.incremental_prefilling(
                inputs_embeds=inputs_embeds,
                attention_mask=prompt["attention_mask"],
                chunk_size=chunk_size,
                past_key_values=self._cache,
            )
        return inputs_embeds, self._cache

    def _sources(self, prompt: Mapping[str, torch.Tensor], pictures: Sequence[Picture]) -> list[Hashable]:
        """What each position of a prompt is computed from: the id of its token, or its place in a picture."""
        sources: list[Hashable] = prompt["input_ids"][0].tolist()
        tokens = [
            PictureToken(picture.key, place)
            for picture in pictures
            for place in range(num_image_tokens(picture.grid, self.model.tokens_per_side))
        ]
        places = prompt["images_seq_mask"][0].nonzero().flatten().tolist()
        # If they are not as many, `prepare_inputs_embeds` says so.
        for place, token in zip(places, tokens, strict=False):
            sources[place] = token
        return sources

    def _cut_to_common_start(self, sources: list[Hashable]) -> int:
        """Leaves in the cache what it has in common with a prompt, and returns how many tokens that are."""
        # The last token is always read, for it gives the first logits.
        num_common = min(len(self._kept), len(sources) - 1)
        pairs = zip(self._kept[:num_common], sources[:num_common], strict=True)
        num_reused = next((place for place, (old, new) in enumerate(pairs) if old != new), num_common)
        self._cut(num_reused)
        self._kept = sources
        return num_reused

    def _cut(self, num_tokens: int) -> None:
        if not num_tokens:
            self._forget()
            return
        for layer in self._cache.layers:
            num_surplus = layer.get_seq_length() - num_tokens
            if num_surplus > 0:
                layer.crop(-num_surplus)

    def _settle(self, new_ids: Sequence[int]) -> None:
        # An answer that was stopped between layers has left the first ones longer.
        num_tokens = min((layer.get_seq_length() for layer in self._cache.layers), default=0)
        self._cut(num_tokens)
        self._kept = [*self._kept, *new_ids][:num_tokens]

    def _forget(self) -> None:
        self._cache: Any = GrowingCache(
            self.model.config.language_config.num_hidden_layers
        )  # transformers' layers of other kinds have other attributes
        self._kept = []
