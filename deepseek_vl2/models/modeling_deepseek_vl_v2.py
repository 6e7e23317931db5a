"""The vision-language model: vision tower, projector, mosaic of image tokens, language model (arXiv:2412.10302)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import AttentionPoolLatent
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_deepseek_vl_v2 import DeepseekVLV2Config, MlpProjectorConfig, VisionEncoderConfig
from .device_placement import place_view_embeddings
from .generation import DEFAULT_CHUNK_SIZE, PrefilledGenerationMixin, check_cache, check_chunk_size, check_prompt_length
from .growing_cache import GrowingCache
from .memory import check_memory_of_files
from .modeling_deepseek import DeepseekV2ForCausalLM, positions_from_mask
from .parallel import CheckedSharesMixin
from .projector import MlpProjector
from .quantization.choice import read_quantization
from .siglip_vit import VisionTransformer, check_vision_attention
from .tiling import TileGrid, num_image_tokens
from .view_batches import views_at_once

# Tokens of an answer that a prefilled cache has room for before it grows.
ROOM_FOR_ANSWERS = 512

__all__ = [
    "DeepSeekVLV2CausalLMOutputWithPast",
    "DeepseekVLV2Config",
    "DeepseekVLV2ForCausalLM",
    "DeepseekVLV2PreTrainedModel",
    "MlpProjector",
    "MlpProjectorConfig",
    "VisionEncoderConfig",
]


@dataclass
class DeepSeekVLV2CausalLMOutputWithPast(ModelOutput):
    """What the model returns for a prompt.

    Attributes:
        loss: Mean cross entropy of the next token, if labels were given.
        logits: [B, T, vocabulary].
        past_key_values: The cache.
        hidden_states: Hidden states [B, T, D] of every layer, if asked for.
        attentions: Attention weights of every layer, if asked for.
        router_logits: Logits [B, T, E] of every router, if asked for.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


def _check_memory_of_cpu(checkpoint_files: Sequence[str] | None, load_config: Any, dtype: torch.dtype) -> None:
    """Refuses weights that go to the CPU as they are and do not fit; quantised ones are checked by their quantiser."""
    devices = {str(device) for device in (load_config.device_map or {"": "cpu"}).values()}
    is_shared = load_config.device_mesh is not None
    if devices != {"cpu"} or is_shared or load_config.is_quantized or not checkpoint_files:
        return
    check_memory_of_files(checkpoint_files, dtype=dtype)


class DeepseekVLV2PreTrainedModel(CheckedSharesMixin, PreTrainedModel):
    """What transformers has to know about the model to load, place and run it."""

    config_class = DeepseekVLV2Config
    config: DeepseekVLV2Config
    input_modalities = ("image", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    # The tower stays whole, as its positions are a parameter of its own. It is smaller than a layer of small and base.
    _no_split_modules = ("DeepseekV2DecoderLayer", "VisionTransformer", "Block")  # type: ignore[assignment]
    _skip_keys_device_placement = ("past_key_values",)  # type: ignore[assignment]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    # Told outright: transformers would look for the experts in this file and find none.
    _can_set_experts_implementation_cached_value = True
    # Never run, so a checkpoint without it is complete.
    _keys_to_ignore_on_load_missing = (r"vision\.attn_pool\.",)  # type: ignore[assignment]

    @classmethod
    def from_pretrained(cls, *args: Any, quantization_config: Any = None, **kwargs: Any) -> Any:
        """Loads a checkpoint as transformers does.

        Args:
            *args: See transformers.
            quantization_config: A configuration, such as `WeightOnlyConfig`, or its fields.
            **kwargs: See transformers.

        Raises:
            ValueError: If `quantization_config` is no configuration.
        """
        return super().from_pretrained(*args, quantization_config=read_quantization(quantization_config), **kwargs)

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> Any:
        """Loads weights as transformers does, to a map of devices that this model can run on.

        Raises:
            ValueError: If they all go to the CPU and do not fit into memory.
        """
        _check_memory_of_cpu(checkpoint_files, load_config, model.dtype)
        if load_config.device_map is not None:
            parts = [name for name, _ in (*model.named_parameters(recurse=False), *model.named_children())]
            place_view_embeddings(load_config.device_map, parts)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VisionTransformer):
            init.normal_(module.pos_embed, std=module.embed_dim**-0.5)  # type: ignore[arg-type]
        elif isinstance(module, AttentionPoolLatent):
            # By itself: a checkpoint may lack the pool while the rest of the tower is loaded.
            init.normal_(module.latent, std=module.latent.shape[-1] ** -0.5)
        elif isinstance(module, DeepseekVLV2ForCausalLM):
            width = self.config.projector_config.n_embed
            init.normal_(module.image_newline, std=1 / math.sqrt(width))
            init.normal_(module.view_seperator, std=1 / math.sqrt(width))


def arrange_views(
    tokens: torch.Tensor, grid: TileGrid, newline: torch.Tensor, separator: torch.Tensor, is_global_first: bool = True
) -> torch.Tensor:
    """Lays the views of a picture out as the language model reads them.

    Args:
        tokens: Image tokens [1 + columns*rows, G*G, D] of the global view and the tiles.
        grid: The tiles.
        newline: Token [D] at the end of each row.
        separator: Token [D] between the global view and the tiles.
        is_global_first: Whether the global view comes before the tiles.

    Returns:
        [N, D]: the rows of the global view and those of all tiles side by side, each ended by a newline token, with the
        separator between.
    """
    side = math.isqrt(tokens.shape[1])
    mosaic = tokens[1:].unflatten(0, (grid.rows, grid.columns)).unflatten(2, (side, side))
    mosaic = mosaic.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)  # [rows*G, columns*G, D]
    global_view = _end_rows(tokens[0].unflatten(0, (side, side)), newline)
    tiles = _end_rows(mosaic, newline)
    first, last = (global_view, tiles) if is_global_first else (tiles, global_view)
    return torch.cat((first, separator[None], last))


def _sources_of_views(views: torch.Tensor, grids: Sequence[TileGrid]) -> list[int]:
    """For each view [V, 3, S, S] the first one of its picture with the same pixels.

    A picture of one tile has its global view twice, so that half of the work can be left out.
    """
    sources: list[int] = []
    start = 0
    for grid in grids:
        # On the meta device there are no pixels to compare.
        is_twice = grid == TileGrid(1, 1) and not views.is_meta and torch.equal(views[start], views[start + 1])
        sources += [start, start] if is_twice else range(start, start + grid.num_views)
        start += grid.num_views
    return sources


def _end_rows(tokens: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
    """Rows of tokens [h, w, D] -> [h * (w + 1), D] with a newline token after each."""
    return torch.cat((tokens, newline.expand(tokens.shape[0], 1, -1)), dim=1).flatten(0, 1)


class DeepseekVLV2ForCausalLM(  # type: ignore[misc]
    PrefilledGenerationMixin, DeepseekVLV2PreTrainedModel, GenerationMixin
):
    """DeepSeek-VL2: answers prompts of text and pictures."""

    def __init__(self, config: DeepseekVLV2Config) -> None:
        config.check_widths()
        vision = config.vision_config
        vision._attn_implementation = vision._attn_implementation or "sdpa"
        check_vision_attention(vision._attn_implementation)
        super().__init__(config)
        self.vision = VisionTransformer(
            img_size=vision.image_size,
            patch_size=vision.patch_size,
            embed_dim=vision.width,
            depth=vision.layers,
            num_heads=vision.heads,
            mlp_ratio=vision.mlp_ratio,
            global_pool=vision.global_pool,
            num_recomputing_layers=vision.layers if vision.use_checkpoint else vision.num_recomputing_layers,
            attn_implementation=vision._attn_implementation,
        )
        self.projector = MlpProjector(config.projector_config)
        self.image_newline = nn.Parameter(torch.empty(config.projector_config.n_embed))
        self.view_seperator = nn.Parameter(torch.empty(config.projector_config.n_embed))
        self.language = DeepseekV2ForCausalLM(config.language_config)
        self.post_init()

    @property
    def tokens_per_side(self) -> int:
        """G, the image tokens a side of a view."""
        return self.config.projector_config.tokens_per_side(self.config.vision_config.patches_per_side)

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings of the language model."""
        return self.language.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embeddings of the language model."""
        self.language.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The output layer of the language model."""
        return self.language.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces the output layer of the language model."""
        self.language.set_output_embeddings(new_embeddings)

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any) -> None:
        """Chooses the attention kernel of all parts, or of each by `vision_config` and `language_config`.

        Raises:
            ValueError: If a kernel or a part is unknown.
            ImportError: If a kernel needs a package or device that is not there.
        """
        parts = ("vision_config", "language_config")
        if not isinstance(attn_implementation, dict):
            attn_implementation = dict.fromkeys(parts, attn_implementation)
        for part in attn_implementation:
            if part not in parts:
                raise ValueError(f"Part {part!r} has no attention to choose. Parts are {' and '.join(parts)}.")
        vision = attn_implementation.get("vision_config", self.vision.attn_implementation)
        check_vision_attention(vision)
        if "language_config" in attn_implementation:
            self.language.set_attn_implementation(attn_implementation["language_config"], *args, **kwargs)
        self.vision.attn_implementation = vision
        language = self.config.language_config._attn_implementation
        self.config._attn_implementation = {"": language, "vision_config": vision}

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        """Includes the vision tower in what transformers switches for `activation_checkpointing_enable`."""
        super()._set_gradient_checkpointing(enable, *args, **kwargs)
        self.vision.set_grad_checkpointing(enable)

    def get_image_features(self, images: torch.Tensor, images_spatial_crop: torch.Tensor) -> list[torch.Tensor]:
        """Encodes pictures.

        Args:
            images: [B, V, 3, S, S], for each picture of a row its global view, then its tiles row by row; the rest of
                the V places is not looked at.
            images_spatial_crop: Grids (columns, rows) [B, I, 2] of the pictures, (0, 0) for none.

        Returns:
            For each picture of all rows its image tokens [N, D] in the order of the text.

        Raises:
            ValueError: If a row has fewer views than its grids ask for.
        """
        grids = [[TileGrid(*grid) for grid in row if grid[0] and grid[1]] for row in images_spatial_crop.tolist()]
        num_views = [sum(grid.num_views for grid in row) for row in grids]
        if max(num_views, default=0) > images.shape[1]:
            raise ValueError(
                f"images_spatial_crop asks for {max(num_views)} views in a row, images hold {images.shape[1]}."
            )
        if not any(num_views):
            return []
        views = torch.cat([row[:count] for row, count in zip(images, num_views, strict=True)])
        all_grids = [grid for row in grids for grid in row]
        sources = _sources_of_views(views, all_grids)
        places = {source: place for place, source in enumerate(sorted(set(sources)))}
        is_any_twice = len(places) < len(sources)
        if is_any_twice:
            views = views[list(places)]
        dtype, device = self.vision.pos_embed.dtype, self.vision.pos_embed.device  # type: ignore[union-attr]
        batches = views.to(dtype).split(views_at_once(self.config.vision_config, len(views), dtype, device))
        tokens = torch.cat([self.projector(self.vision(batch)) for batch in batches])  # [distinct views, G*G, D]
        if is_any_twice:
            tokens = tokens[[places[source] for source in sources]]  # [V, G*G, D]
        tokens_of_pictures = tokens.split([grid.num_views for grid in all_grids])
        return [self._arrange_views(picture, grid) for picture, grid in zip(tokens_of_pictures, all_grids, strict=True)]

    def _arrange_views(self, tokens: torch.Tensor, grid: TileGrid) -> torch.Tensor:
        is_global_first = self.config.global_view_pos == "head"
        # With several devices these two need not be where the projector is.
        tokens = tokens.to(self.image_newline.device)
        return arrange_views(tokens, grid, self.image_newline, self.view_seperator, is_global_first)

    def _with_unused_parts(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Adds 0 times what is trained of the parts that see.

        A batch without pictures gives them a gradient of 0 then, and not none: processes that train together wait for
        each other's gradient of every weight, and where nothing else is trained there would be nothing to go back to.
        """
        seeing = [*self.vision.parameters(), *self.projector.parameters(), self.image_newline, self.view_seperator]
        trained = [weight.sum().to(inputs_embeds) for weight in seeing if weight.requires_grad]
        return inputs_embeds + 0 * torch.stack(trained).sum() if trained else inputs_embeds

    def prepare_inputs_embeds(
        self,
        input_ids: torch.Tensor,
        images: torch.Tensor | None = None,
        images_seq_mask: torch.Tensor | None = None,
        images_spatial_crop: torch.Tensor | None = None,
        image_features: list[torch.Tensor] | None = None,
        **ignored: Any,
    ) -> torch.Tensor:
        """Embeds a prompt, with image tokens in the places of the placeholders.

        Args:
            input_ids: [B, T].
            images: [B, V, 3, S, S], see `get_image_features`; None for text only.
            images_seq_mask: Which tokens are placeholders, [B, T].
            images_spatial_crop: [B, I, 2], see `get_image_features`.
            image_features: What `get_image_features` has given for these pictures, if that is known already.
            **ignored: Other outputs of the processor, so that `**inputs` can be passed.

        Returns:
            Embeddings [B, T, D].

        Raises:
            ValueError: If placeholders and pictures do not match, or the prompt is longer than the model's positions.
        """
        check_prompt_length(input_ids.shape[1], self.config.language_config)
        inputs_embeds = self.get_input_embeddings()(input_ids)
        if images is None:
            features: list[torch.Tensor] = []
        elif images_spatial_crop is None or images_seq_mask is None:
            raise ValueError("images need images_seq_mask and images_spatial_crop; pass all outputs of the processor.")
        else:
            self._check_placeholders(images_seq_mask, images_spatial_crop)
            if image_features is None:
                image_features = self.get_image_features(images, images_spatial_crop)
            features = image_features
        if not features:
            if images_seq_mask is not None and images_seq_mask.any():
                raise ValueError(
                    f"The prompt has {int(images_seq_mask.sum())} image tokens, but no pictures are given."
                )
            return self._with_unused_parts(inputs_embeds) if self.training else inputs_embeds
        image_tokens = torch.cat(features).to(inputs_embeds)
        is_image: Any = images_seq_mask
        return inputs_embeds.masked_scatter(is_image[..., None].to(inputs_embeds.device), image_tokens)

    def _check_placeholders(self, images_seq_mask: torch.Tensor, images_spatial_crop: torch.Tensor) -> None:
        placeholders = images_seq_mask.sum(dim=1).tolist()
        for row, (num_placeholders, grids) in enumerate(zip(placeholders, images_spatial_crop.tolist(), strict=True)):
            num_tokens = sum(num_image_tokens(TileGrid(*grid), self.tokens_per_side) for grid in grids if all(grid))
            if num_placeholders != num_tokens:
                raise ValueError(
                    f"Row {row} has {num_placeholders} image placeholders, its pictures make {num_tokens} image "
                    "tokens. Let the processor of the same checkpoint prepare text and pictures together."
                )

    @torch.no_grad()
    def incremental_prefilling(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        images: torch.Tensor | None = None,
        images_seq_mask: torch.Tensor | None = None,
        images_spatial_crop: torch.Tensor | None = None,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
        past_key_values: Cache | None = None,
        **ignored: Any,
    ) -> tuple[torch.Tensor, Cache]:
        """Reads a prompt in chunks, so that memory depends on the chunk and not on the prompt.

        Args:
            input_ids: [B, T], or None with `inputs_embeds`.
            attention_mask: [B, T], 0 at the padding on the left; all real if None.
            inputs_embeds: [B, T, D], instead of ids and pictures.
            images: See `prepare_inputs_embeds`.
            images_seq_mask: See `prepare_inputs_embeds`.
            images_spatial_crop: See `prepare_inputs_embeds`.
            chunk_size: Tokens to read at once; -1 for all.
            past_key_values: Cache of the prompt's first tokens, which are not read again; it is extended in place.
            **ignored: Other outputs of the processor, so that `**inputs` can be passed.

        Returns:
            Embeddings [B, T, D] of the whole prompt and a cache of its first T - 1 tokens, both to be passed on to
            `generate`, which reads the last token.

        Raises:
            ValueError: If `chunk_size` is 0, below -1 or larger than the context, the prompt does not fit, see
                `prepare_inputs_embeds`, or the cache does not belong to it.
        """
        check_chunk_size(chunk_size, self.config.language_config.max_position_embeddings)
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("Give input_ids (with the pictures' tensors) or inputs_embeds.")
            inputs_embeds = self.prepare_inputs_embeds(input_ids, images, images_seq_mask, images_spatial_crop)
        num_tokens = inputs_embeds.shape[1]
        check_prompt_length(num_tokens, self.config.language_config)
        if attention_mask is None:
            attention_mask = inputs_embeds.new_ones(inputs_embeds.shape[:2], dtype=torch.long)
        position_ids = positions_from_mask(attention_mask)
        cache = past_key_values
        if cache is None:
            cache = GrowingCache(self.config.language_config.num_hidden_layers, num_tokens + ROOM_FOR_ANSWERS)
        check_cache(cache, inputs_embeds)
        num_cached = num_tokens - 1
        step = num_cached if chunk_size == -1 else chunk_size
        starts = range(cache.get_seq_length(), num_cached, max(step, 1))
        for start in tqdm(starts, desc="Prefill", unit="chunk", leave=False, disable=None if len(starts) > 1 else True):
            end = min(start + step, num_cached)
            self.language.model(
                inputs_embeds=inputs_embeds[:, start:end],
                attention_mask=attention_mask[:, :end],
                position_ids=position_ids[:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
        return inputs_embeds, cache

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        images: torch.Tensor | None = None,
        images_seq_mask: torch.Tensor | None = None,
        images_spatial_crop: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        sft_format: Any = None,
        seq_lens: Any = None,
        **kwargs: Any,
    ) -> DeepSeekVLV2CausalLMOutputWithPast:
        """Predicts the next token at every position of a prompt with pictures.

        Args:
            input_ids: [B, T].
            attention_mask: [B, K], 1 for real tokens and 0 for padding; all real if None.
            position_ids: [B, T]; counted over real tokens if None.
            past_key_values: Cache of the K - T tokens before.
            inputs_embeds: [B, T, D] instead of ids and pictures.
            images: See `prepare_inputs_embeds`.
            images_seq_mask: See `prepare_inputs_embeds`.
            images_spatial_crop: See `prepare_inputs_embeds`.
            labels: Ids [B, T] to predict, -100 where there is nothing to learn; position t is predicted from t - 1.
            use_cache: Whether to return a cache.
            logits_to_keep: How many of the last positions to compute logits for; all if 0. The loss is of these, too.
            sft_format: Ignored, so that all outputs of the processor can be passed.
            seq_lens: Ignored, as `sft_format`.

        Raises:
            ValueError: If placeholders and pictures do not match, or there are more tokens than positions.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("Give input_ids or inputs_embeds.")
            inputs_embeds = self.prepare_inputs_embeds(input_ids, images, images_seq_mask, images_spatial_crop)
        outputs = self.language(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        return DeepSeekVLV2CausalLMOutputWithPast(
            loss=outputs.loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def generate(  # type: ignore[override]
        self, inputs: torch.Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Generates as transformers' `generate` does, with the processor's outputs as further keywords.

        Pictures are encoded once, not once for each beam or answer.

        Raises:
            ValueError: See `prepare_inputs_embeds`, which takes the pictures.
        """
        images = kwargs.pop("images", None)
        image_inputs = {name: kwargs.pop(name, None) for name in ("images_seq_mask", "images_spatial_crop")}
        for name in ("sft_format", "seq_lens"):
            kwargs.pop(name, None)
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        mask = image_inputs["images_seq_mask"]
        has_pictures = images is not None or (mask is not None and bool(mask.any()))
        if has_pictures and kwargs.get("inputs_embeds") is None and input_ids is not None:
            with torch.no_grad():
                kwargs["inputs_embeds"] = self.prepare_inputs_embeds(input_ids, images, **image_inputs)
            inputs, kwargs["input_ids"] = None, input_ids
        return super().generate(inputs, generation_config, *args, **kwargs)
