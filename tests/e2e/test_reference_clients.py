"""Programs written for the reference, call by call, and programs written for transformers, run unchanged.

On nano's architecture with random weights, on the CPU instead of a GPU.
"""

import base64
import io
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.modeling_deepseek_vl_v2 import DeepseekVLV2Config
from deepseek_vl2.nano.architecture import nano_processor, untrained_nano
from deepseek_vl2.serve.app_modules.utils import parse_ref_bbox
from deepseek_vl2.utils.io import load_pil_images, load_pretrained_model

pytestmark = pytest.mark.e2e

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    processor = nano_processor()
    processor.save_pretrained(folder)
    model = untrained_nano(processor.tokenizer, seed=7)
    # Wide enough that the likeliest token is clear, so that flows differ only if they are wrong.
    torch.nn.init.normal_(model.language.lm_head.weight, std=0.3, generator=torch.Generator().manual_seed(5))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Paths of three pictures: square, wide and high."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for name, size in (("one.png", (110, 100)), ("two.png", (230, 110)), ("three.png", (90, 210))):
        image = Image.new("RGB", size, (len(paths) * 90, 120, 200 - len(paths) * 60))
        ImageDraw.Draw(image).ellipse((20, 20, 70, 60), fill="red")
        image.save(folder / name)
        paths.append(str(folder / name))
    return paths


@pytest.fixture(scope="module")
def conversations(pictures):
    """Those of the reference's README: one picture, several, two in context."""
    answer = {"role": "<|Assistant|>", "content": ""}
    one = {
        "role": "<|User|>",
        "content": "<image>\n<|ref|>The red circle.<|/ref|>.",
        "images": [pictures[1]],
    }
    several = {
        "role": "<|User|>",
        "content": "This is image_1: <image>\nThis is image_2: <image>\nThis is image_3: <image>\n"
        " Can you tell me what are in the images?",
        "images": pictures,
    }
    in_context = {
        "role": "<|User|>",
        "content": "<image>\n<image>\n<|grounding|>In the first image, an object within the red rectangle is marked. "
        "Locate the object of the same category in the second image.",
        "images": [pictures[2], pictures[0]],
    }
    return {"one": [one, answer], "several": [several, answer], "in_context": [in_context, answer]}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def client(request, model_path):
    """Set-up of the reference's README."""
    vl_chat_processor: DeepseekVLV2Processor = DeepseekVLV2Processor.from_pretrained(model_path)
    vl_gpt: DeepseekVLV2ForCausalLM = AutoModelForCausalLM.from_pretrained(model_path, trust_remote_code=True)
    vl_gpt = vl_gpt.to(request.param).to("cpu").eval()
    return vl_chat_processor, vl_gpt


def prepare(client, conversation):
    vl_chat_processor, vl_gpt = client
    pil_images = load_pil_images(conversation)
    prepare_inputs = vl_chat_processor(
        conversations=conversation, images=pil_images, force_batchify=True, system_prompt=""
    ).to(vl_gpt.device)
    return prepare_inputs, pil_images


def whole_prompt_flow(client, prepare_inputs, **options):
    """Returns new ids."""
    vl_chat_processor, vl_gpt = client
    tokenizer = vl_chat_processor.tokenizer
    with torch.no_grad():
        # run image encoder to get the image embeddings
        inputs_embeds = vl_gpt.prepare_inputs_embeds(**prepare_inputs)
        return vl_gpt.language.generate(
            inputs_embeds=inputs_embeds,
            attention_mask=prepare_inputs.attention_mask,
            pad_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **{"max_new_tokens": NEW_TOKENS, "do_sample": False, "use_cache": True, **options},
        )


def incremental_flow(client, prepare_inputs, chunk_size=512, **options):
    """Returns ids of the prompt and new ids."""
    vl_chat_processor, vl_gpt = client
    tokenizer = vl_chat_processor.tokenizer
    with torch.no_grad():
        if chunk_size == -1:
            inputs_embeds = vl_gpt.prepare_inputs_embeds(**prepare_inputs)
            past_key_values = None
        else:
            inputs_embeds, past_key_values = vl_gpt.incremental_prefilling(
                input_ids=prepare_inputs.input_ids,
                images=prepare_inputs.images,
                images_seq_mask=prepare_inputs.images_seq_mask,
                images_spatial_crop=prepare_inputs.images_spatial_crop,
                attention_mask=prepare_inputs.attention_mask,
                chunk_size=chunk_size,
            )
        return vl_gpt.generate(
            inputs_embeds=inputs_embeds,
            input_ids=prepare_inputs.input_ids,
            images=prepare_inputs.images,
            images_seq_mask=prepare_inputs.images_seq_mask,
            images_spatial_crop=prepare_inputs.images_spatial_crop,
            attention_mask=prepare_inputs.attention_mask,
            past_key_values=past_key_values,
            pad_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **{"max_new_tokens": NEW_TOKENS, "do_sample": False, "use_cache": True, **options},
        )


@pytest.mark.parametrize("name", ["one", "several", "in_context"])
def test_the_flows_of_the_readme_agree(client, conversations, name):
    vl_chat_processor, _ = client
    tokenizer = vl_chat_processor.tokenizer
    prepare_inputs, pil_images = prepare(client, conversations[name])
    assert prepare_inputs.images.dtype == torch.bfloat16  # as `.to` of the reference does
    assert (prepare_inputs.images_spatial_crop > 1).any() == (name != "several")  # three are not tiled
    num_prompt = len(prepare_inputs.input_ids[0])

    whole = whole_prompt_flow(client, prepare_inputs)
    answer = tokenizer.decode(whole[0].cpu().tolist(), skip_special_tokens=True)
    assert answer
    printed = prepare_inputs["sft_format"][0]
    assert printed.count("<image>") == len(pil_images) and printed.endswith("<|Assistant|>:")

    unchunked = incremental_flow(client, prepare_inputs, chunk_size=-1)
    assert torch.equal(unchunked[0, :num_prompt], prepare_inputs.input_ids[0])
    assert torch.equal(unchunked[0, num_prompt:], whole[0])
    for chunk_size in (512, 10):
        chunked = incremental_flow(client, prepare_inputs, chunk_size=chunk_size)
        assert chunked.shape == unchunked.shape
        if client[1].dtype == torch.float32:  # in bfloat16 sums of other lengths round otherwise
            assert torch.equal(chunked, unchunked)
        answer = tokenizer.decode(
            chunked[0][len(prepare_inputs.input_ids[0]) :].cpu().tolist(), skip_special_tokens=False
        )
        assert answer
        vl_image = parse_ref_bbox(answer, image=pil_images[-1])
        assert vl_image is None or vl_image.size == pil_images[-1].size


def test_sampling_as_the_reference_script_does(client, conversations):
    options = {"do_sample": True, "temperature": 0.4, "top_p": 0.9, "repetition_penalty": 1.1}
    prepare_inputs, _ = prepare(client, conversations["one"])

    def sample(seed):
        torch.manual_seed(seed)
        return incremental_flow(client, prepare_inputs, **options)

    assert torch.equal(sample(1), sample(1))
    assert sample(1).shape[1] > prepare_inputs.input_ids.shape[1]


def test_boxes_of_an_answer_are_drawn(client, conversations, monkeypatch, tmp_path):
    vl_chat_processor, vl_gpt = client
    tokenizer = vl_chat_processor.tokenizer
    spoken = "<|ref|>red circle<|/ref|><|det|>[[100, 200, 300, 500]]<|/det|>"
    remaining = iter(tokenizer.encode(spoken, add_special_tokens=False))
    inner = vl_gpt.language.forward

    def forward(*args, **kwargs):
        outputs = inner(*args, **kwargs)
        outputs.logits = torch.zeros_like(outputs.logits)
        outputs.logits[:, -1, next(remaining, tokenizer.eos_token_id)] = 1.0
        return outputs

    prepare_inputs, pil_images = prepare(client, conversations["in_context"])
    monkeypatch.setattr(vl_gpt.language, "forward", forward)
    outputs = incremental_flow(client, prepare_inputs, max_new_tokens=60)
    answer = tokenizer.decode(outputs[0][len(prepare_inputs.input_ids[0]) :].cpu().tolist(), skip_special_tokens=False)
    assert answer == spoken + tokenizer.eos_token
    vl_image = parse_ref_bbox(answer, image=pil_images[-1])
    vl_image.save(tmp_path / "vg.jpg", quality=100)
    assert vl_image.size == pil_images[-1].size == (110, 100)
    assert vl_image.getpixel((11, 40)) != pil_images[-1].getpixel((11, 40))


@pytest.fixture(scope="module")
def exact(model_path):
    """The set-up in float32."""
    loaded = load_pretrained_model(model_path, dtype=torch.float32, device="cpu")
    return loaded.processor, loaded.model


def test_rows_of_a_batch_get_what_they_get_alone(exact, conversations):
    vl_chat_processor, _ = exact
    samples = []
    for conversation in conversations.values():
        samples.append(
            vl_chat_processor(
                conversations=conversation,
                images=load_pil_images(conversation),
                force_batchify=False,
                inference_mode=True,
            )
        )
    assert len({len(sample) for sample in samples}) == 3
    batch = vl_chat_processor.batchify(samples).to("cpu", dtype=torch.float32)
    num_prompt = batch.input_ids.shape[1]
    whole = whole_prompt_flow(exact, batch)
    chunked = incremental_flow(exact, batch, chunk_size=17)[:, num_prompt:]
    unchunked = incremental_flow(exact, batch, chunk_size=-1)[:, num_prompt:]
    assert torch.equal(whole, chunked) and torch.equal(whole, unchunked)
    for row, sample in zip(whole, samples, strict=True):
        alone = vl_chat_processor.batchify([sample]).to("cpu", dtype=torch.float32)
        (expected,) = whole_prompt_flow(exact, alone)
        assert torch.equal(row[: len(expected)], expected)


def test_beam_search(exact, conversations):
    prepare_inputs, _ = prepare(exact, conversations["one"])
    beams = {"num_beams": 3, "num_return_sequences": 2}
    whole = whole_prompt_flow(exact, prepare_inputs, **beams)
    assert whole.shape[0] == 2
    chunked = incremental_flow(exact, prepare_inputs, chunk_size=20, **beams)
    assert torch.equal(chunked[:, prepare_inputs.input_ids.shape[1] :], whole)


# -- transformers -----------------------------------------------------------------------------------------------------


def test_auto_classes(model_path):
    assert isinstance(AutoConfig.from_pretrained(model_path), DeepseekVLV2Config)
    assert isinstance(AutoProcessor.from_pretrained(model_path, trust_remote_code=True), DeepseekVLV2Processor)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    assert tokenizer.decode(tokenizer.encode("你好 a  b", add_special_tokens=False)) == "你好 a  b"
    for auto, name in ((AutoModelForCausalLM, "torch_dtype"), (AutoModelForImageTextToText, "dtype")):
        model = auto.from_pretrained(model_path, trust_remote_code=True, **{name: torch.bfloat16})
        assert isinstance(model, DeepseekVLV2ForCausalLM) and model.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def answerer(model_path):
    return pipeline(
        "image-text-to-text",
        model=AutoModelForImageTextToText.from_pretrained(model_path, dtype=torch.float32),
        processor=AutoProcessor.from_pretrained(model_path),
        device="cpu",
    )


@pytest.fixture(scope="module")
def expected(exact, pictures):
    """What the reference's calls answer about the wide picture."""

    def ask(picture):
        conversation = [
            {"role": "<|User|>", "content": "<image>\nWhat is this?", "images": [picture]},
            {"role": "<|Assistant|>", "content": ""},
        ]
        prepare_inputs, _ = prepare(exact, conversation)
        (ids,) = whole_prompt_flow(exact, prepare_inputs)
        return exact[0].tokenizer.decode(ids, skip_special_tokens=True)

    answers = [ask(picture) for picture in pictures]
    assert len(set(answers)) == 3  # so that a lost or changed picture shows
    return answers[1]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def address(pictures, monkeypatch):
    """Where a server of this machine offers the wide picture."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder, _, name = pictures[1].rpartition("/")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/{name}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("form", ["path", "url", "pil", "data", "image_url"])
def test_pipeline_with_chat_messages(answerer, expected, pictures, address, form):
    image = Image.open(pictures[1])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    part = {
        "path": {"type": "image", "path": pictures[1]},
        "url": {"type": "image", "url": address},
        "pil": {"type": "image", "image": image},
        "data": {"type": "image", "url": data},
        "image_url": {"type": "image_url", "image_url": {"url": pictures[1]}},
    }[form]
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}]
    (result,) = answerer(
        text=messages, max_new_tokens=NEW_TOKENS, return_full_text=False, generate_kwargs={"do_sample": False}
    )
    assert result["generated_text"] == expected


def test_pipeline_with_text_and_picture(answerer, expected, pictures):
    prompt = answerer.processor.format_prompts("<image>\nWhat is this?")
    (result,) = answerer(images=pictures[1], text=prompt, max_new_tokens=NEW_TOKENS, return_full_text=False)
    assert result["generated_text"] == expected


def test_pipeline_with_several_chats(answerer, expected, pictures):
    def chat(*images):
        parts = [{"type": "image", "path": image} for image in images]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is this?"}]}]

    chats = [chat(pictures[1]), chat(), chat(*pictures)]
    results = answerer(text=chats, max_new_tokens=NEW_TOKENS, return_full_text=False)
    assert results[0][0]["generated_text"] == expected
    assert len(results) == 3


def test_parts_as_other_chat_programs_write_them(exact, expected, pictures):
    conversation = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": pictures[1]}},
                {"type": "text", "text": "What is this?"},
            ],
        },
        {"role": "assistant", "content": ""},
    ]
    prepare_inputs, _ = prepare(exact, conversation)
    (ids,) = whole_prompt_flow(exact, prepare_inputs)
    assert exact[0].tokenizer.decode(ids, skip_special_tokens=True) == expected


def test_generate_with_all_outputs_of_the_processor(exact, expected, pictures):
    processor, model = exact
    messages = [
        {"role": "user", "content": [{"type": "image", "path": pictures[1]}, {"type": "text", "text": "What is this?"}]}
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == expected
