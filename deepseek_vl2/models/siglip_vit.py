"""The SigLIP vision tower (arXiv:2303.15343) on timm's vision transformer."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .many_tokens import attend_many_tokens

SigLIP_MODEL_CONFIG: dict[str, dict[str, Any]] = {
    "siglip_so400m_patch14_384": {"image_size": 384, "patch_size": 14, "width": 1152, "layers": 27, "heads": 16},
    "siglip_so400m_patch14_224": {"image_size": 224, "patch_size": 14, "width": 1152, "layers": 27, "heads": 16},
    "siglip_large_patch16_384": {"image_size": 384, "patch_size": 16, "width": 1024, "layers": 24, "heads": 16},
}
for _name, _values in SigLIP_MODEL_CONFIG.items():
    _values |= {"mlp_ratio": 3.7362 if "so400m" in _name else 4, "global_pool": "map", "use_checkpoint": False}

VISION_ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager", "flash_attention_2", "xformers")


def sdpa_vision_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention by a compiled kernel where that is faster, else by torch's fused kernels."""
    output = None if dropout else attend_many_tokens(query, key, value, scaling, is_causal=False)
    if output is not None:
        return output, None
    by_torch = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return by_torch(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


def eager_vision_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention between all patches written out; shapes as in transformers' attention interface."""
    weights = (query @ key.transpose(-1, -2) * scaling).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (F.dropout(weights, dropout, module.training) @ value).transpose(1, 2), weights


def xformers_vision_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention by xformers' kernels, which take heads of any width; CUDA only."""
    from xformers.ops import memory_efficient_attention

    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return memory_efficient_attention(query, key, value, p=dropout, scale=scaling), None


def flash_vision_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention by flash-attn's kernels; CUDA and half precision only."""
    from flash_attn import flash_attn_func

    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return flash_attn_func(query, key, value, dropout_p=dropout, softmax_scale=scaling), None


# transformers' own flash attention asks for a configuration on every attention layer.
_KERNELS: dict[str, Callable] = {
    "sdpa": sdpa_vision_attention,
    "eager": eager_vision_attention,
    "flash_attention_2": flash_vision_attention,
    "xformers": xformers_vision_attention,
}


def check_vision_attention(implementation: str) -> None:
    """Refuses an attention implementation that is unknown or cannot run here.

    Raises:
        ValueError: If `implementation` is not one of `VISION_ATTENTION_IMPLEMENTATIONS`.
        ImportError: If it needs a package that is not installed, or CUDA where there is none.
    """
    if implementation not in VISION_ATTENTION_IMPLEMENTATIONS:
        raise ValueError(
            f"Vision attention {implementation!r} is unknown. "
            f"Choose one of {', '.join(VISION_ATTENTION_IMPLEMENTATIONS)}."
        )
    package = {"flash_attention_2": "flash_attn", "xformers": "xformers"}.get(implementation)
    if package is None:
        return
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"Vision attention {implementation!r} needs the package {package}. Install it or use 'sdpa'.")
    if not torch.cuda.is_available():
        raise ImportError(f"Vision attention {implementation!r} needs CUDA, and there is none. Use 'sdpa'.")


class VisionAttention(Attention):
    """timm's attention with its kernel chosen through transformers' attention interface."""

    is_causal = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.implementation = "sdpa"

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """Patches [V, P*P, C] -> [V, P*P, C]; every patch sees every other of its view."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # [V, heads, P*P, C / heads]
        attend = _KERNELS[self.implementation]
        dropout = self.attn_drop.p if self.training else 0.0
        output, _ = attend(self, query, key, value, None, scaling=self.scale, dropout=dropout, is_causal=False)
        return self.proj_drop(self.proj(output.flatten(2)))


class VisionTransformer(TimmVisionTransformer):
    """Encodes views to patches: no class token, final norm applied, attention pool carried along but never run.

    Args:
        img_size: Side S of a view in pixels.
        patch_size: Side of a patch in pixels; a rest too small for a patch is cut off.
        embed_dim: Vision width C.
        depth: Number of blocks.
        num_heads: Number of attention heads.
        mlp_ratio: Width of the feed-forward layers as a multiple of C, rounded down.
        global_pool: `map` to hold the weights of the attention pool, empty not to.
        ignore_head: Whether `forward` returns patches (True) or the pooled vector.
        num_recomputing_layers: Any number above 0 recomputes activations in training to save memory.
        attn_implementation: One of `VISION_ATTENTION_IMPLEMENTATIONS`.
        deterministic: Without effect; published configurations have it.
    """

    def __init__(
        self,
        img_size: int = 384,
        patch_size: int = 14,
        embed_dim: int = 1152,
        depth: int = 27,
        num_heads: int = 16,
        mlp_ratio: float = 3.7362,
        global_pool: str = "map",
        ignore_head: bool = True,
        num_recomputing_layers: int = 0,
        attn_implementation: str = "sdpa",
        deterministic: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs = {"class_token": False, "num_classes": 0, "weight_init": "skip", **kwargs}
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            global_pool=global_pool,  # type: ignore[arg-type]
            act_layer="gelu_tanh",  # timm's own towers of this name use the exact GELU, the trained weights do not
            fc_norm=False,
            attn_layer=VisionAttention,
            **kwargs,
        )
        self.ignore_head = ignore_head
        if self.attn_pool is not None and ignore_head:
            self.attn_pool.requires_grad_(False)
        self.set_grad_checkpointing(num_recomputing_layers > 0)
        self.attn_implementation = attn_implementation

    @property
    def attn_implementation(self) -> str:
        """Kernel that attention runs on; setting it checks that it can run here."""
        return self._attn_implementation

    @attn_implementation.setter
    def attn_implementation(self, implementation: str) -> None:
        check_vision_attention(implementation)
        self._attn_implementation = implementation
        for block in self.blocks:
            block.attn.implementation = implementation  # type: ignore[union-attr]

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Views [V, 3, S, S] -> patches [V, P*P, C]."""
        features = self.forward_features(x)
        return features if self.ignore_head else self.forward_head(features)


def create_siglip_vit(
    model_name: str = "siglip_so400m_patch14_384",
    image_size: int = 384,
    select_layer: int = -1,
    ckpt_path: str = "",
    **kwargs: Any,
) -> VisionTransformer:
    """Builds a published SigLIP tower.

    Args:
        model_name: A key of `SigLIP_MODEL_CONFIG`.
        image_size: Side S of a view in pixels.
        select_layer: Last block to keep: from -1 down counted from the end, from 1 up the number of blocks that are
            kept; -1 and 0 keep all.
        ckpt_path: Checkpoint of the tower alone (`.safetensors` or torch), or empty for untrained weights.
        **kwargs: Passed on to `VisionTransformer`.

    Raises:
        ValueError: If the name or the layer is unknown.
    """
    if model_name not in SigLIP_MODEL_CONFIG:
        raise ValueError(f"model_name {model_name!r} is unknown. Choose one of {', '.join(SigLIP_MODEL_CONFIG)}.")
    tower = SigLIP_MODEL_CONFIG[model_name]
    num_layers = tower["layers"]
    depth = min(num_layers, select_layer if select_layer > 0 else num_layers + select_layer + 1)
    if depth < 1:
        raise ValueError(
            f"select_layer {select_layer} leaves no block of {num_layers}: it must be at least -{num_layers}."
        )
    model = VisionTransformer(
        **{
            "img_size": image_size,
            "patch_size": tower["patch_size"],
            "embed_dim": tower["width"],
            "depth": depth,
            "num_heads": tower["heads"],
            "mlp_ratio": tower["mlp_ratio"],
            "global_pool": tower["global_pool"],
            "num_recomputing_layers": int(tower["use_checkpoint"]),
            **kwargs,
        }
    )
    if ckpt_path:
        is_safetensors = str(ckpt_path).endswith(".safetensors")
        state = load_file(ckpt_path) if is_safetensors else torch.load(ckpt_path, map_location="cpu", weights_only=True)
        kept = {key: value for key, value in state.items() if not _is_dropped_block(key, len(model.blocks))}
        model.load_state_dict(kept)
    return model


def _is_dropped_block(key: str, num_blocks: int) -> bool:
    parts = key.split(".")
    return parts[0] == "blocks" and int(parts[1]) >= num_blocks
