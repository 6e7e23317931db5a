"""Small models of each kind with their processor, and conversations for them; sizes pairwise different."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from small_models import MHA, ROUTERS, SIDE, VISION, vl_config

from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.nano.tokenizer import build_tokenizer
from deepseek_vl2.train import TrainConfig, train

NOAUX = ROUTERS["noaux_tc"]
# As in the published models tiny, small, base, and the router of groups that none of them uses.
VARIANTS: dict[str, dict[str, Any]] = {
    "mha_greedy": MHA,
    "mla_greedy": {},
    "mla_noaux": NOAUX,
    "mla_groups": ROUTERS["group_limited_greedy"],
}
# All conversations have the same number of tokens, so that batches of any size hold no padding.
COLORS = ("red", "blue", "green", "black", "cyan", "orange", "purple", "yellow")


def build_processor() -> DeepseekVLV2Processor:
    """nano's tokenizer, views of 70 pixels a side."""
    return DeepseekVLV2Processor(
        tokenizer=build_tokenizer(),
        candidate_resolutions=[[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]],
        patch_size=14,
        downsample_ratio=2,
    )


def build_config(processor: DeepseekVLV2Processor, **language: Any) -> DeepseekVLV2Config:
    """The small model's configuration, MLA and a greedy router unless told otherwise."""
    ids = {name: getattr(processor.tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    sizes = {"vocab_size": len(processor.tokenizer), "num_hidden_layers": 2, "n_shared_experts": 1}
    vision = {**VISION, "layers": 1, "global_pool": "map"}
    return vl_config({**sizes, **ids, **language}, vision_config=vision, **ids)


def save_model(folder: Path, processor: DeepseekVLV2Processor, seed: int = 0, **language: Any) -> Path:
    """Writes a checkpoint with random weights that are the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = DeepseekVLV2ForCausalLM(build_config(processor, **language))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_conversations(folder: Path, name: str = "train.jsonl") -> Path:
    """Writes pictures of one colour and questions about them."""
    lines = []
    for color in COLORS:
        Image.new("RGB", (SIDE, SIDE), color).save(folder / f"{color}.png")
        question = {"role": "<|User|>", "content": "<image>\nWhat color?", "images": [f"{color}.png"]}
        lines.append(json.dumps({"conversations": [question, {"role": "<|Assistant|>", "content": color}]}))
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


FULL = {"vision": "full", "projector": "full", "language": "full", "learning_rate": 1e-2}
LORA_ALL = {"language": "lora", "lora_rank": 4, "learning_rate": 2e-2}


def settings(train_file: Path, model_path: Path, output_dir: Path, **changes: Any) -> TrainConfig:
    """A short run."""
    basis: dict[str, Any] = {
        "train_file": str(train_file),
        "model_path": str(model_path),
        "output_dir": str(output_dir),
        "device": "cpu",
        "max_steps": 6,
        "batch_size": 4,
        "log_every": 1,
        "schedule": "constant",
        "warmup_share": 0.0,
    }
    return TrainConfig(**{**basis, **changes})


def losses(output_dir: Path) -> list[float]:
    """Recorded losses of a finished run, one a step."""
    newest = max(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((newest / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [record["loss"] for record in history if "loss" in record]


def run(config: TrainConfig) -> list[float]:
    """Trains and gives the losses."""
    train(config)
    return losses(Path(config.output_dir))
