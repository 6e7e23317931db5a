"""Recorded models and outputs of the reference implementation, see `data/README.md`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deepseek_vl2.models import DeepseekVLV2ForCausalLM

DATA = Path(__file__).parent / "data"
VARIANTS = ("tiny", "small", "base", "groups")
CASES = ("text", "one_1x1", "one_2x1", "two_1x2_1x1")
IMAGE_TOKEN_ID = 500
PAD_ID = 1


@dataclass
class GoldenCase:
    """One recorded prompt and what the reference made of it."""

    recorded: dict[str, Any]
    embeds: torch.Tensor
    logits: torch.Tensor
    inputs: dict[str, torch.Tensor]

    @property
    def labels(self) -> torch.Tensor:
        ids = self.inputs["input_ids"]
        return ids.masked_fill(self.inputs["images_seq_mask"], -100)


@dataclass
class Golden:
    """One recorded model."""

    variant: str
    folder: Path
    model: DeepseekVLV2ForCausalLM
    cases: dict[str, GoldenCase]

    def batch(self) -> dict[str, torch.Tensor]:
        """All cases in one batch, padded on the left."""
        rows = [case.inputs for case in self.cases.values()]
        length = max(row["input_ids"].shape[1] for row in rows)
        num_views = max(row["images"].shape[1] for row in rows)
        num_pictures = max(row["images_spatial_crop"].shape[1] for row in rows)

        def left(x: torch.Tensor, value: int) -> torch.Tensor:
            return torch.nn.functional.pad(x, (length - x.shape[1], 0), value=value)

        def fill(x: torch.Tensor, size: int) -> torch.Tensor:
            return torch.cat((x, x.new_zeros(1, size - x.shape[1], *x.shape[2:])), dim=1)

        return {
            "input_ids": torch.cat([left(row["input_ids"], PAD_ID) for row in rows]),
            "attention_mask": torch.cat([left(row["attention_mask"], 0) for row in rows]),
            "images_seq_mask": torch.cat([left(row["images_seq_mask"], False) for row in rows]),
            "images": torch.cat([fill(row["images"], num_views) for row in rows]),
            "images_spatial_crop": torch.cat([fill(row["images_spatial_crop"], num_pictures) for row in rows]),
        }


def load_golden(variant: str) -> Golden:
    folder = DATA / variant
    tensors = load_file(folder / "golden.safetensors")
    recorded = json.loads((folder / "golden.json").read_text())["cases"]
    model = DeepseekVLV2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    cases = {}
    for name in CASES:
        input_ids = tensors[f"{name}.input_ids"].long()[None]
        images = torch.nn.functional.interpolate(tensors[f"{name}.images_24"], size=384, mode="nearest")
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "images": images[None],
            "images_seq_mask": input_ids == IMAGE_TOKEN_ID,
            "images_spatial_crop": tensors[f"{name}.images_spatial_crop"].long()[None],
        }
        cases[name] = GoldenCase(recorded[name], tensors[f"{name}.embeds"], tensors[f"{name}.logits"], inputs)
    return Golden(variant, folder, model, cases)


@pytest.fixture(scope="session", params=VARIANTS)
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param)


@pytest.fixture(params=CASES)
def case(golden: Golden, request: pytest.FixtureRequest) -> GoldenCase:
    return golden.cases[request.param]
