"""Configuration of the whole vision-language model and of its vision tower and projector (arXiv:2412.10302)."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from .configuration_deepseek import DeepseekV2Config

PROJECTOR_TYPES = ("identity", "linear", "mlp_gelu", "downsample_mlp_gelu")
GLOBAL_VIEW_POSITIONS = ("head", "tail")
TILE_TAG = "2D"


class VisionEncoderConfig(PreTrainedConfig):
    """Configuration of the SigLIP vision tower.

    Attributes:
        model_name: Name of the published tower, for the record.
        image_size: Side S of a view in pixels.
        patch_size: Side of a patch in pixels.
        width: Vision width C.
        layers: Number of transformer blocks.
        heads: Number of attention heads.
        mlp_ratio: Width of the feed-forward layers as a multiple of C, rounded down.
        global_pool: `map` if the checkpoint holds the attention pool (carried along, never run), empty if not.
        ignore_head: Kept for the published configs: patches are returned, never the pooled vector.
        use_checkpoint: Whether training recomputes activations to save memory.
        num_recomputing_layers: Any number above 0 has the effect of `use_checkpoint`.
    """

    model_type = "vision"

    model_name: str = "siglip_large_patch16_384"
    image_size: int = 384
    patch_size: int = 16
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: float = 4.0
    global_pool: str = "map"
    ignore_head: bool = True
    class_token: bool = False
    num_classes: int = 0
    use_checkpoint: bool = False
    weight_init: str = "skip"
    deterministic: bool = False
    num_recomputing_layers: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.class_token or self.num_classes:
            raise ValueError(
                f"class_token={self.class_token}, num_classes={self.num_classes}: the vision tower has patches only. "
                "Use class_token=False and num_classes=0."
            )

    @property
    def patches_per_side(self) -> int:
        """P, the patches a side; a rest of pixels too small for a patch is cut off."""
        return self.image_size // self.patch_size


class MlpProjectorConfig(PreTrainedConfig):
    """Configuration of the projector from vision width C to text width D.

    Attributes:
        projector_type: `downsample_mlp_gelu` (all published checkpoints: blocks of patches become one image token),
            `mlp_gelu`, `linear` or `identity`.
        input_dim: Vision width C.
        n_embed: Text width D.
        depth: Number of linear layers of the two MLP types.
        mlp_ratio: Width of the hidden layer of `downsample_mlp_gelu` as a multiple of D.
        downsample_ratio: Patches a side that make one image token in `downsample_mlp_gelu`.

    Raises:
        ValueError: If `projector_type` is unknown.
    """

    model_type = "mlp_projector"

    projector_type: str = "downsample_mlp_gelu"
    input_dim: int = 1152
    n_embed: int = 2048
    depth: int = 2
    mlp_ratio: int = 1
    downsample_ratio: int = 2
    token_pooling: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.projector_type not in PROJECTOR_TYPES:
            raise ValueError(
                f"projector_type {self.projector_type!r} is unknown. Choose one of {', '.join(PROJECTOR_TYPES)}."
            )
        if self.token_pooling:
            raise ValueError("token_pooling=True is not supported: no published checkpoint uses it. Set it to false.")

    def tokens_per_side(self, patches_per_side: int) -> int:
        """G, the image tokens a side of a view of P patches a side."""
        if self.projector_type != "downsample_mlp_gelu":
            return patches_per_side
        return -(-patches_per_side // self.downsample_ratio)


class DeepseekVLV2Config(PreTrainedConfig):
    """Configuration of `DeepseekVLV2ForCausalLM`.

    Attributes:
        vision_config: The vision tower.
        projector_config: The projector.
        language_config: The language model.
        tile_tag: How tiles are marked in the text; `2D`: a newline token ends each row of image tokens.
        global_view_pos: Whether the global view stands before (`head`) or after (`tail`) the tiles.
        candidate_resolutions: Sizes (width, height) in pixels that a picture may be tiled to.

    Raises:
        ValueError: If `tile_tag` or `global_view_pos` is unknown.
    """

    model_type = "deepseek_vl_v2"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": VisionEncoderConfig,
        "projector_config": MlpProjectorConfig,
        "language_config": DeepseekV2Config,
    }

    # Given as configs, dicts or None; transformers turns them into configs of the classes above.
    vision_config: Any = None
    projector_config: Any = None
    language_config: Any = None
    tile_tag: str = TILE_TAG
    global_view_pos: str = "head"
    candidate_resolutions: tuple[tuple[int, int], ...] | list[list[int]] = ((384, 384),)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.tile_tag != TILE_TAG:
            raise ValueError(f"tile_tag {self.tile_tag!r} is unknown. All published checkpoints use {TILE_TAG!r}.")
        if self.global_view_pos not in GLOBAL_VIEW_POSITIONS:
            raise ValueError(
                f"global_view_pos {self.global_view_pos!r} is unknown. Choose one of "
                f"{', '.join(GLOBAL_VIEW_POSITIONS)}."
            )

    def check_widths(self) -> None:
        """Checks that the parts fit each other; the model calls it, since a config of defaults alone need not fit.

        Raises:
            ValueError: If the projector takes another width than the vision tower gives, or gives another than the
                language model takes.
        """
        vision, projector, language = self.vision_config, self.projector_config, self.language_config
        if projector.input_dim != vision.width:
            raise ValueError(
                f"projector input_dim {projector.input_dim} is not the vision tower's width {vision.width}."
            )
        if projector.n_embed != language.hidden_size:
            raise ValueError(
                f"projector n_embed {projector.n_embed} is not the language model's hidden_size {language.hidden_size}."
            )
        if projector.projector_type == "identity" and projector.input_dim != projector.n_embed:
            raise ValueError(
                f"projector_type 'identity' keeps the width {projector.input_dim}, but n_embed is {projector.n_embed}."
            )

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The language model's configuration, where transformers looks for heads, layers and vocabulary."""
        return self.language_config
