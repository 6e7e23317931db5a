"""Adapters: which layers get LoRA (arXiv:2106.09685), through peft."""

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.models.modeling_deepseek import DeepseekV2Experts
from deepseek_vl2.train.config import ALL, ATTENTION, FULL, LORA, MLP, TrainConfig
from deepseek_vl2.utils.adapter import require_peft, without_peft_warnings

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

_LANGUAGE_LAYERS = {
    ATTENTION: r"language\.model\.layers\.\d+\.self_attn\."
    r"(q_proj|q_a_proj|q_b_proj|k_proj|v_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)",
    MLP: r"language\.model\.layers\.\d+\.mlp\.(shared_experts\.)?(gate|up|down)_proj",
}
_VISION_LAYERS = {
    ATTENTION: r"vision\.blocks\.\d+\.attn\.(qkv|proj)",
    MLP: r"vision\.blocks\.\d+\.mlp\.(fc1|fc2)",
}
# Fused tensors and no layers: peft adapts them as parameters.
_EXPERT_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# Rows of tokens: what a token means on its way in, and how it is told from others on its way out.
_TOKEN_TABLES = ("embed_tokens", "lm_head")


def lora_config(
    model: DeepseekVLV2ForCausalLM, tokenizer: PreTrainedTokenizerBase, config: TrainConfig
) -> "LoraConfig":
    """The adapter's settings for a model.

    Raises:
        ValueError: the model has no layer of the chosen kinds, or new words but no output layer of its own.
        ImportError: peft is not installed.
    """
    peft = require_peft()
    patterns = [
        pattern
        for mode, layers in ((config.language, _LANGUAGE_LAYERS), (config.vision, _VISION_LAYERS))
        for target, pattern in layers.items()
        if mode == LORA and {target, ALL} & set(config.lora_targets)
    ]
    has_experts = config.uses_expert_lora and any(isinstance(module, DeepseekV2Experts) for module in model.modules())
    if not patterns and not has_experts:
        raise ValueError(f"lora_targets: {config.lora_targets!r} name no layer of the parts that get LoRA")
    token_ids = token_ids_of(tokenizer, config.new_words or [])
    if token_ids and model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        raise ValueError(
            f"new_words: {config.new_words!r} is not allowed for {config.model_path}, whose output layer is its "
            "embeddings; allowed is null, or language: full"
        )
    return peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="|".join(patterns) or [],
        target_parameters=_EXPERT_PARAMETERS if has_experts else None,
        trainable_token_indices=dict.fromkeys(_TOKEN_TABLES, token_ids) if token_ids else None,
        modules_to_save=[part for part in ("vision", "projector") if getattr(config, part) == FULL] or None,
    )


def token_ids_of(tokenizer: PreTrainedTokenizerBase, words: Iterable[str]) -> list[int]:
    """Ids of the tokens that spell words, at the start of a text and after a blank; ascending, without the blank's."""

    def encode(text: str) -> set[int]:
        return set(tokenizer.encode(text, add_special_tokens=False))

    return sorted(set().union(*(encode(word) | encode(f" {word}") for word in words)) - encode(" "))


def add_adapter(model: DeepseekVLV2ForCausalLM, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> "PeftModel":
    """Freezes the model but for the parts that are trained in full, and puts LoRA beside its layers.

    Raises:
        ValueError: see `lora_config`.
        ImportError: peft is not installed.
    """
    with without_peft_warnings():
        adapted: Any = require_peft().get_peft_model(model, lora_config(model, tokenizer, config))
    adapted.peft_config["default"].base_model_name_or_path = config.model_path
    # peft would look for the model on the hub to learn whether the vocabulary has grown, which it never does here.
    adapted.save_pretrained = functools.partial(adapted.save_pretrained, save_embedding_layers=False)
    return adapted
