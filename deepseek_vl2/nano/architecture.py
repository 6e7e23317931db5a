"""nano's configuration, processor and untrained model."""

import math
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from deepseek_vl2.models import DeepseekV2Config, DeepseekVLV2Config, DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.configuration_deepseek_vl_v2 import MlpProjectorConfig, VisionEncoderConfig
from deepseek_vl2.nano.tokenizer import build_tokenizer, number_token_ids
from deepseek_vl2.nano.views import CANDIDATE_RESOLUTIONS, PATCH_SIDE, VIEW_SIDE

WIDTH = 192
# Beside 0.02 elsewhere: rows of number tokens start as waves over the number, so that near numbers are alike.
NUMBER_WAVES_STD = 0.02


def nano_config(tokenizer: PreTrainedTokenizerFast) -> DeepseekVLV2Config:
    """nano's configuration: the kinds of layers of small (MLA, shared and routed experts) in a small size."""
    return DeepseekVLV2Config(  # type: ignore[call-arg]  # the ids are options of every configuration
        vision_config=VisionEncoderConfig(
            model_name="nano",
            image_size=VIEW_SIDE,
            patch_size=PATCH_SIDE,
            width=WIDTH,
            layers=6,
            heads=6,
            mlp_ratio=4.0,
            global_pool="",
        ),
        # Four patches with a letter each have to pass through its hidden layer.
        projector_config=MlpProjectorConfig(input_dim=WIDTH, n_embed=WIDTH, mlp_ratio=4),
        language_config=DeepseekV2Config(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=512,
            moe_intermediate_size=64,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=6,
            n_shared_experts=1,
            n_routed_experts=8,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            norm_topk_prob=True,
            kv_lora_rank=96,
            q_lora_rank=None,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            max_position_embeddings=4096,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        candidate_resolutions=[list(size) for size in CANDIDATE_RESOLUTIONS],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def nano_processor() -> DeepseekVLV2Processor:
    """nano's processor, with its own tokenizer."""
    return DeepseekVLV2Processor(
        tokenizer=build_tokenizer(),
        candidate_resolutions=CANDIDATE_RESOLUTIONS,
        patch_size=PATCH_SIDE,
        downsample_ratio=2,
    )


def untrained_nano(tokenizer: PreTrainedTokenizerFast, seed: int) -> DeepseekVLV2ForCausalLM:
    """Builds nano in float32 with starting weights drawn from a seed."""
    torch.manual_seed(seed)
    model = DeepseekVLV2ForCausalLM(nano_config(tokenizer))
    _start_positions(model)
    _start_numbers(model, number_token_ids(tokenizer))
    return model


@torch.no_grad()
def _start_positions(model: DeepseekVLV2ForCausalLM) -> None:
    """Starts the learned patch positions as waves across and down, which the tower would have to find otherwise."""
    side, width = VIEW_SIDE // PATCH_SIDE, WIDTH
    # At most a quarter of a wave a patch: the farther two patches are, the less they are alike.
    frequencies = torch.pi * torch.linspace(1 / 4 / side, 1 / 2, width // 4)
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)  # [side, width / 2]
    down = waves[:, None].expand(-1, side, -1)
    across = waves[None].expand(side, -1, -1)
    positions: Any = model.vision.pos_embed
    positions.copy_(0.5 * torch.cat((down, across), dim=-1).flatten(0, 1)[None])


@torch.no_grad()
def _start_numbers(model: DeepseekVLV2ForCausalLM, number_ids: list[int]) -> None:
    periods = torch.logspace(math.log10(4000), math.log10(20), WIDTH // 2)
    angles = 2 * torch.pi * torch.arange(len(number_ids))[:, None] / periods
    waves = torch.cat((angles.sin(), angles.cos()), dim=1) * NUMBER_WAVES_STD * math.sqrt(2)
    tables: tuple[Any, Any] = (model.get_input_embeddings(), model.get_output_embeddings())
    for table in tables:
        table.weight[number_ids] = waves
