"""transformers' Auto classes find model and processor, and the two fit together."""

import json

import pytest
import torch
from PIL import Image
from small_models import SIDE, num_tokens, seeded, vl_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoProcessor, PreTrainedTokenizerFast

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.special_tokens import BOS, EOS, PAD

PICTURES = {
    "square": (Image.new("RGB", (50, 50), (200, 30, 30)), (1, 1)),
    "wide": (Image.new("RGB", (120, 50)), (2, 1)),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(letters, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole checkpoint: model, tokenizer and processor."""
    path = tmp_path_factory.mktemp("checkpoint")
    resolutions = [[SIDE, SIDE], [2 * SIDE, SIDE], [SIDE, 2 * SIDE]]
    processor = DeepseekVLV2Processor(
        byte_tokenizer(), candidate_resolutions=resolutions, patch_size=14, downsample_ratio=2
    )
    processor.save_pretrained(path)
    vocabulary = {"vocab_size": len(processor.tokenizer)}
    seeded(DeepseekVLV2ForCausalLM, vl_config(vocabulary)).save_pretrained(path)
    return path


def test_processor_by_its_name(folder):
    assert type(AutoProcessor.from_pretrained(folder)) is DeepseekVLV2Processor


def test_processor_by_the_model(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    del settings["processor_class"]
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    tokenizer.pop("processor_class", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert type(AutoProcessor.from_pretrained(tmp_path)) is DeepseekVLV2Processor


@pytest.mark.parametrize("names", [["square"], ["wide"], ["wide", "square"]])
@torch.no_grad()
def test_pictures_through_both(folder, names):
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    pictures, grids = zip(*(PICTURES[name] for name in names), strict=True)
    question = [
        {"role": "<|User|>", "content": "<image>\n" * len(names) + "What?", "images": []},
        {"role": "<|Assistant|>", "content": ""},
    ]
    inputs = processor(conversations=question, images=list(pictures), force_batchify=True).to("cpu", dtype=model.dtype)
    assert inputs.images_spatial_crop[0].tolist() == [list(grid) for grid in grids]
    assert inputs.images_seq_mask.sum() == sum(num_tokens(*grid) for grid in grids)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": processor.pad_id}
    whole = model.generate(**inputs, **settings)
    embeds, cache = model.incremental_prefilling(**inputs, chunk_size=10)
    chunked = model.generate(**inputs, inputs_embeds=embeds, past_key_values=cache, **settings)
    assert torch.equal(whole, chunked)
    assert torch.equal(whole[:, : inputs.input_ids.shape[1]], inputs.input_ids)


@torch.no_grad()
def test_loss_of_an_answer(folder):
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    picture, grid = PICTURES["wide"]
    messages = [
        {"role": "<|User|>", "content": "<image>\nWhat?", "images": []},
        {"role": "<|Assistant|>", "content": "Blue"},
    ]
    inputs = processor(conversations=messages, images=[picture], force_batchify=True, inference_mode=False)
    learnt = inputs.labels != -100
    assert 4 <= learnt.sum() < inputs.labels.shape[1] - num_tokens(*grid)
    logits = model(**inputs).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1][learnt[:, 1:]], inputs.labels[:, 1:][learnt[:, 1:]])
    torch.testing.assert_close(model(**inputs).loss, expected)


@torch.no_grad()
def test_text_through_both(folder):
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    question = [{"role": "<|User|>", "content": "Hi"}, {"role": "<|Assistant|>", "content": ""}]
    inputs = processor(conversations=question, images=None, force_batchify=True)
    logits = model(**inputs).logits
    assert torch.equal(logits, model(input_ids=inputs.input_ids).logits)
