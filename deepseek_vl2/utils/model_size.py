"""How many weights a model has and how many bytes they and its cache take, from its configuration alone."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deepseek_vl2 import models
from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM, WeightOnlyConfig
from deepseek_vl2.models.memory import is_quantized, quantized_bytes
from deepseek_vl2.models.quantization import QUANTIZATIONS

PUBLISHED_SIZES = ("tiny", "small", "base")
PUBLISHED_CONFIGS = Path(models.__file__).parent / "published_configs"
# How weights may be held, largest first.
WEIGHT_KINDS = ("float32", "bfloat16", *QUANTIZATIONS)
# Parts by what their checkpoint keys hold; the first that matches counts.
_PARTS = (
    ("vision", r"^vision\."),
    ("projector", r"^(projector\.|image_newline$|view_seperator$)"),
    ("embeddings", r"\.embed_tokens\."),
    ("lm_head", r"\.lm_head\."),
    ("shared_experts", r"\.mlp\.shared_experts\."),
    ("experts", r"\.mlp\.experts\."),
    ("router", r"\.mlp\.gate\."),
    ("dense_mlp", r"\.mlp\."),
    ("attention", r"\.self_attn\."),
)
OTHER_PART = "norms"
PARTS = (*(part for part, _ in _PARTS), OTHER_PART)
_FUSED_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$")


def published_config(size: str) -> DeepseekVLV2Config:
    """The configuration of a published checkpoint.

    Args:
        size: One of `PUBLISHED_SIZES`.

    Raises:
        ValueError: There is no such size.
    """
    if size not in PUBLISHED_SIZES:
        raise ValueError(f"unknown size {size!r}: take one of {', '.join(PUBLISHED_SIZES)}")
    content = json.loads((PUBLISHED_CONFIGS / f"{size}.json").read_text(encoding="utf-8"))
    return DeepseekVLV2Config.from_dict(content)  # type: ignore[return-value]


def checkpoint_shapes(config: DeepseekVLV2Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a checkpoint, in the published layout: experts stand one by one.

    An output layer that shares its weight with the embeddings is not among them.
    """
    with torch.device("meta"):
        model = DeepseekVLV2ForCausalLM(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        shape = tuple(tensor.shape)
        fused = _FUSED_EXPERTS.match(name)
        if fused is None:
            shapes[name] = shape
            continue
        num_experts, rows, columns = shape
        layers = {"down_proj": rows} if fused[2] == "down_proj" else {"gate_proj": rows // 2, "up_proj": rows // 2}
        for expert in range(num_experts):
            shapes |= {f"{fused[1]}.{expert}.{layer}.weight": (height, columns) for layer, height in layers.items()}
    return shapes


def part_of(name: str) -> str:
    """The part of the model, one of `PARTS`, that a parameter belongs to, by its name."""
    return next((part for part, pattern in _PARTS if re.search(pattern, name)), OTHER_PART)


def parameters_by_part(config: DeepseekVLV2Config) -> dict[str, int]:
    """Weights of each part in `PARTS`; the vision tower's attention pool, which never runs, is among them."""
    counts = Counter(dict.fromkeys(PARTS, 0))
    for name, shape in checkpoint_shapes(config).items():
        counts[part_of(name)] += 0 if name.endswith(".e_score_correction_bias") else math.prod(shape)
    return dict(counts)


def active_weights_by_part(config: DeepseekVLV2Config) -> dict[str, int]:
    """Weights of each part of the language model that one decoded token is multiplied with."""
    return active_of(parameters_by_part(config), config)


def active_of(amounts: Mapping[str, int], config: DeepseekVLV2Config, num_rows: int = 1) -> dict[str, int]:
    """What one decoding step needs of each part of the language model.

    Args:
        amounts: Weights or bytes of each part in `PARTS`.
        config: The model's.
        num_rows: Rows decoded together, each of which chooses its experts by chance.
    """
    language = config.language_config
    active = {part: amounts[part] for part in ("attention", "dense_mlp", "router", "shared_experts")}
    active["lm_head"] = amounts["embeddings" if language.tie_word_embeddings else "lm_head"]
    chosen_share = language.num_experts_per_tok / language.n_routed_experts if language.n_routed_experts else 1.0
    active["experts"] = round(amounts["experts"] * (1 - (1 - chosen_share) ** num_rows))
    return active


def weight_bytes(config: DeepseekVLV2Config, weights: str) -> int:
    """Bytes of all weights; see `bytes_by_part`."""
    return sum(bytes_by_part(config, weights).values())


def bytes_by_part(config: DeepseekVLV2Config, weights: str) -> dict[str, int]:
    """Bytes of the weights of each part in `PARTS`, their scales included.

    Args:
        config: The model's.
        weights: One of `WEIGHT_KINDS`. What stays exact under int8 and int4 counts as bfloat16.
    """
    quantization = WeightOnlyConfig(QUANTIZATIONS[weights]) if weights in QUANTIZATIONS else None
    exact = 4 if weights == "float32" else 2
    sizes = Counter(dict.fromkeys(PARTS, 0))
    for name, shape in checkpoint_shapes(config).items():
        if quantization and is_quantized(name, shape):
            sizes[part_of(name)] += quantized_bytes(name, shape, quantization)
        else:
            sizes[part_of(name)] += math.prod(shape) * exact
    return dict(sizes)


def cache_bytes_per_token(config: DeepseekVLV2Config, bytes_per_number: int = 2) -> int:
    """Bytes that the cache of all layers takes for one token: MLA's latent and rotated key, or keys and values."""
    language: Any = config.language_config
    if language.use_mla:
        numbers = language.kv_lora_rank + language.qk_rope_head_dim
    else:
        numbers = 2 * language.num_key_value_heads * language.head_dim
    return language.num_hidden_layers * numbers * bytes_per_number
