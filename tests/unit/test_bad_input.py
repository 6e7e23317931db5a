"""Bad input through the calls that users make: each is an error that names the value and the way out.

What a single part refuses is tested beside that part; here it goes the whole way from a conversation or a folder.
"""

import base64
import io
import json
import shutil
import socket

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

from deepseek_vl2.batch.answering import AnswerOptions, BatchAnswerer
from deepseek_vl2.batch.preparing import BatchLimits
from deepseek_vl2.evaluate.runner import Asker
from deepseek_vl2.evaluate.tasks import TASKS
from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.nano.architecture import nano_processor, untrained_nano
from deepseek_vl2.serve.api.engine import BatchEngine
from deepseek_vl2.serve.inference import deepseek_generate
from deepseek_vl2.utils.io import LoadedModel, load_pil_images, load_pretrained_model

RED = Image.new("RGB", (100, 80), "red")
ANSWER = {"role": "<|Assistant|>", "content": ""}


@pytest.fixture(scope="module")
def parts():
    processor = nano_processor()
    return untrained_nano(processor.tokenizer, seed=0).eval(), processor, processor.tokenizer


@pytest.fixture(scope="module")
def checkpoint(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model, processor, _ = parts
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def user(content, *images):
    return [{"role": "<|User|>", "content": content, "images": list(images)}, ANSWER]


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        (user("<image> Where?", RED, RED), r"2 picture\(s\) given for 1 <image> mark\(s\).*every mark needs one"),
        (user("<image> <image> Where?", RED), r"1 picture\(s\) given for 2 <image> mark\(s\)"),
        (user("<image> Where?"), r"0 picture\(s\) given for 1 <image> mark\(s\)"),
        (user("Where?", RED), r"1 picture\(s\) given for 0 <image> mark\(s\)"),
        ([{"role": "tool", "content": "x"}, ANSWER], r"unknown role 'tool': take one of .*'user', .*'assistant'"),
        (
            [*user("Where?"), {"role": "user", "content": "?"}, {"role": "assistant", "content": "<image>"}],
            "0 pic|hold",
        ),
        (
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<image>", "images": [RED]}],
            "cannot hold",
        ),
        ([], "the conversation .* is empty"),
        ([{"role": "user", "content": [{"type": "audio"}]}, ANSWER], "unknown content part .*take type 'text'"),
        (
            user("red " * 4200),
            r"prompt has 42\d\d tokens, the model has 4096 positions\. Use fewer pictures, no tiling",
        ),
        (user("<image> " * 120, *[RED] * 120), r"prompt has \d{4} tokens, the model has 4096 positions"),
        (user("<image>?", "none.png"), r"none\.png"),
        (user("<image>?", b""), "0 bytes is empty"),
        (user("<image>?", b"text"), "4 bytes is not a picture in a format that Pillow reads"),
        (
            user("<image>?", Image.new("1", (9500, 9500))),
            "9500x9500 = 90250000 pixels, and the limit is .*Scale it down",
        ),
        ([{"role": "user", "content": [{"type": "image_url"}]}, ANSWER], "message 0 names no picture"),
    ],
)
def test_conversations(parts, conversation, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        deepseek_generate(conversation, *parts)


def test_a_picture_that_is_cut_off(parts):
    buffer = io.BytesIO()
    Image.effect_noise((90, 90), 60).save(buffer, "JPEG")
    data = base64.b64encode(buffer.getvalue()[:900]).decode()
    parts_of_message = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}},
        {"type": "text", "text": "What?"},
    ]
    with pytest.raises(ValueError, match=r"data:image/jpeg;base64.* is a broken or truncated picture"):
        deepseek_generate([{"role": "user", "content": parts_of_message}, ANSWER], *parts)


def test_an_address_that_does_not_answer_in_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/a.png"
        with pytest.raises(TimeoutError, match=r"a\.png' did not answer within 0\.3 s; raise timeout="):
            load_pil_images(user("<image>", address), timeout=0.3)


@pytest.mark.parametrize("chunk_size", [0, -2, 2.5, "5", True, None])
def test_chunk_sizes(parts, chunk_size):
    model, processor, _ = parts
    message = f"chunk_size {chunk_size!r} must be at least 1, or -1 for the whole prompt"
    with pytest.raises(ValueError, match=message):
        deepseek_generate(user("<image>", RED), *parts, chunk_size=chunk_size)
    inputs = processor(conversations=user("<image>", RED), images=[RED])
    with pytest.raises(ValueError, match=message):
        model.incremental_prefilling(**inputs, chunk_size=chunk_size)


def test_chunks_larger_than_the_context_wherever_questions_are_answered(parts):
    model, processor, tokenizer = parts
    loaded = LoadedModel(tokenizer, processor, model)
    message = "chunk_size 50000 is larger than the context of .* tokens; take -1"
    with pytest.raises(ValueError, match=message):
        deepseek_generate(user("<image>", RED), *parts, chunk_size=50000)
    with pytest.raises(ValueError, match=message):
        Asker(processor, model.config, lambda: model, TASKS["exact_match"], max_new_tokens=4, chunk_size=50000)
    with pytest.raises(ValueError, match=message):
        BatchAnswerer(loaded, AnswerOptions(chunk_size=50000), BatchLimits())
    with pytest.raises(ValueError, match=message):
        BatchEngine(loaded, chunk_size=50000)


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        (
            "language_config",
            "topk_method",
            "best",
            "topk_method 'best' is unknown.* greedy, group_limited_greedy, noaux",
        ),
        (None, "tile_tag", "1D", "tile_tag '1D' is unknown.*'2D'"),
        ("projector_config", "projector_type", "conv", "projector_type 'conv' is unknown.*downsample_mlp_gelu"),
    ],
)
def test_configurations_of_a_folder(copy, part, name, value, message):
    config = json.loads((copy / "config.json").read_text())
    (config[part] if part else config)[name] = value
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_pretrained_model(copy, device="cpu")
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(copy)


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("load", [AutoProcessor.from_pretrained, DeepseekVLV2Processor.from_pretrained])
def test_a_folder_without_a_file_of_the_processor(copy, name, load):
    (copy / name).unlink()
    with pytest.raises((ValueError, OSError)) as caught:
        load(copy)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all"])
def test_a_processor_that_is_nowhere(name):
    with pytest.raises(FileNotFoundError, match=f"there is no processor in '{name}': no such folder"):
        DeepseekVLV2Processor.from_pretrained(name)


def test_a_processor_on_the_hub_without_a_network():
    message = r"cannot load tokenizer\.json of 'someone/some-model': .*deepseek_vl2\.nano\.path\(\)"
    with pytest.raises(OSError, match=message):
        DeepseekVLV2Processor.from_pretrained("someone/some-model")


def test_a_hub_name_without_a_network_names_nano():
    with pytest.raises(ConnectionError, match=r"'deepseek-ai/deepseek-vl2-tiny' is no folder here.*'nano'"):
        load_pretrained_model("deepseek-ai/deepseek-vl2-tiny")


def test_cuda_where_there_is_none(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device 'cuda' is not available here \(there is: cpu.*\); use --device cpu"):
        load_pretrained_model(checkpoint, device="cuda")


def test_a_tokenizer_of_another_model(parts, copy):
    """One whose special tokens the model has no embeddings for."""
    processor = nano_processor()
    processor.tokenizer.add_tokens([f"word{number}" for number in range(8)], special_tokens=True)
    processor.tokenizer.add_special_tokens({"eos_token": "<end>"})
    processor.save_pretrained(copy)
    with pytest.raises(ValueError, match=r"the model has \d+ embeddings.*'eos'.*do not belong together"):
        load_pretrained_model(copy, device="cpu")


def test_inputs_of_another_processor(parts):
    model, processor, _ = parts
    inputs = processor(conversations=user("<image>", RED), images=[RED])
    inputs.images_spatial_crop = torch.tensor([[[2, 1]]])
    inputs.images = inputs.images.repeat(1, 2, 1, 1, 1)
    with pytest.raises(ValueError, match=r"Row 0 has \d+ image placeholders, its pictures make \d+ image tokens\. Let"):
        model.generate(**inputs)
    inputs.images_spatial_crop = torch.tensor([[[9, 1]]])
    with pytest.raises(ValueError, match=r"image tokens|views"):
        model.generate(**inputs)


@pytest.mark.parametrize("given", [{}, {"conversations": []}, {"prompt": ""}, {"images": [RED]}])
def test_a_batch_of_nothing(parts, given):
    with pytest.raises(ValueError, match=r"nothing to encode: the conversation .* is empty"):
        parts[1](**given, force_batchify=True)
    with pytest.raises(ValueError, match="no samples to batch: the list is empty"):
        parts[1].batchify([])


def test_a_used_cache_is_refused(parts):
    model, processor, _ = parts
    inputs = processor(conversations=user("<image>", RED), images=[RED])
    embeds, cache = model.incremental_prefilling(**inputs, chunk_size=16)
    options = {"inputs_embeds": embeds, "past_key_values": cache, "max_new_tokens": 3, "pad_token_id": processor.pad_id}
    model.generate(**inputs, **options)
    with pytest.raises(ValueError, match=r"The cache holds \d+ tokens, the prompt has \d+: it was used before"):
        model.generate(**inputs, **options)


def test_the_class_itself_says_what_is_missing(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        DeepseekVLV2ForCausalLM.from_pretrained(copy)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load_pretrained_model(copy, device="cpu")
