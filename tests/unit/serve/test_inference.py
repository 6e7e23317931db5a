"""Streaming answers, on nano's architecture with random weights."""

import gc
import random
import threading
import time

import pytest
import torch
from PIL import Image

from deepseek_vl2.models.conversation import get_conv_template
from deepseek_vl2.nano.architecture import nano_processor, untrained_nano
from deepseek_vl2.serve.inference import (
    convert_conversation_to_prompts,
    deepseek_generate,
    generate,
    load_model,
    sampling_options,
)
from deepseek_vl2.serve.streaming import AnswerStream
from deepseek_vl2.serve.text_pieces import until_stop_word
from deepseek_vl2.utils.hardware import choose_dtype
from deepseek_vl2.utils.io import load_pil_images

RED, BLUE = Image.new("RGB", (100, 80), "red"), Image.new("RGB", (250, 100), "blue")
THREADS = "deepseek_vl2-answer"
GREEDY = {"temperature": 0, "repetition_penalty": 1.2}


def question(text="Where?", images=(RED,)):
    return [
        {"role": "<|User|>", "content": "<image>\n" * len(images) + text, "images": list(images)},
        {"role": "<|Assistant|>", "content": ""},
    ]


@pytest.fixture(scope="module")
def parts():
    """Model, processor and tokenizer, in the order of `deepseek_generate`."""
    processor = nano_processor()
    model = untrained_nano(processor.tokenizer, seed=3).eval()
    torch.nn.init.normal_(model.language.lm_head.weight, std=0.3, generator=torch.Generator().manual_seed(5))
    return model, processor, processor.tokenizer


def plain_ids(parts, conversation, **options):
    """New ids of a plain `model.generate`."""
    model, processor, _ = parts
    inputs = processor(conversations=conversation, images=load_pil_images(conversation)).to("cpu", dtype=model.dtype)
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, repetition_penalty=1.2, **options)
    return ids[0, inputs.input_ids.shape[1] :].tolist()


def num_running():
    return sum(thread.name.startswith(THREADS) for thread in threading.enumerate())


def saying(monkeypatch, parts, ids, delay=0.0):
    """Makes the model say certain ids, whatever it is asked, as slowly as wanted; returns a list of its steps."""
    model, _, tokenizer = parts
    inner = model.language.forward
    remaining = iter(ids)
    steps = []

    def forward(*args, **kwargs):
        outputs = inner(*args, **kwargs)
        steps.append(outputs.logits.shape)
        time.sleep(delay)
        outputs.logits = torch.full_like(outputs.logits, -100.0)
        outputs.logits[:, -1, next(remaining, tokenizer.eos_token_id)] = 100.0
        return outputs

    monkeypatch.setattr(model.language, "forward", forward)
    return steps


@pytest.mark.parametrize("images", [(), (RED,), (RED, BLUE), (RED, BLUE, RED)], ids=len)
@pytest.mark.parametrize("chunk_size", [-1, 1, 7, 512])
def test_pieces_join_to_the_text_of_a_plain_generate(parts, images, chunk_size):
    ids = plain_ids(parts, question(images=images), max_new_tokens=20)
    pieces = list(deepseek_generate(question(images=images), *parts, (), 20, 0, 1.0, 1.2, chunk_size))
    assert "".join(pieces) == parts[2].decode(ids).removesuffix(parts[2].eos_token)
    assert len(pieces) > 5
    assert num_running() == 0


def test_positional_and_keyword_forms_agree(parts):
    model, processor, tokenizer = parts
    positional = deepseek_generate(question(), model, processor, tokenizer, ["zzz"], 12, 0.0, 0.9, 1.1, 64)
    named = deepseek_generate(
        conversations=question(),
        vl_gpt=model,
        vl_chat_processor=processor,
        tokenizer=tokenizer,
        stop_words=["zzz"],
        max_length=12,
        temperature=0.0,
        top_p=0.9,
        repetition_penalty=1.1,
        chunk_size=64,
    )
    inputs = processor(conversations=question(), images=[RED]).to("cpu", dtype=model.dtype)
    prepared = generate(model, tokenizer, inputs, 12, 0.0, 1.1, 0.9, ["zzz"], 64)
    text = "".join(positional)
    assert text and text == "".join(named) == "".join(prepared)


def test_a_temperature_near_zero_is_greedy(parts):
    options = {"max_length": 6, "repetition_penalty": 1.0}
    texts = ["".join(deepseek_generate(question(), *parts, temperature=value, **options)) for value in (0, 1e-40)]
    assert texts[0] == texts[1] != ""


def test_several_turns(parts):
    turns = [*question("One?")[:1], {"role": "<|Assistant|>", "content": "red"}, *question("Two?", (BLUE,))]
    ids = plain_ids(parts, turns, max_new_tokens=8)
    assert "".join(deepseek_generate(turns, *parts, max_length=8, **GREEDY)) == parts[2].decode(ids)


def test_grounding_tokens_stay_and_eos_goes(parts, monkeypatch):
    text = "<|ref|>the red star<|/ref|><|det|>[[12, 34, 567, 890]]<|/det|>"
    ids = parts[2].encode(text, add_special_tokens=False)
    saying(monkeypatch, parts, ids)
    stream = deepseek_generate(question(), *parts, max_length=100, temperature=0, repetition_penalty=1.0)
    assert "".join(stream) == text
    assert stream.num_new_tokens == len(ids) + 1  # and eos
    assert not stream.is_cut_off


def test_letters_of_several_tokens_come_whole(parts, monkeypatch):
    text = "中文 ein Stern ★\n🙂 ok"
    ids = parts[2].encode(text, add_special_tokens=False)
    assert len(ids) > len(text)  # so that some letters are several tokens
    saying(monkeypatch, parts, ids)
    pieces = list(deepseek_generate(question(), *parts, max_length=100, temperature=0, repetition_penalty=1.0))
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)


def test_half_a_letter_at_the_end_is_shown_as_such(parts, monkeypatch):
    ids = parts[2].encode("a★", add_special_tokens=False)[:-1]
    saying(monkeypatch, parts, ids)
    pieces = list(deepseek_generate(question(), *parts, max_length=len(ids), temperature=0, repetition_penalty=1.0))
    assert "".join(pieces) == parts[2].decode(ids)
    assert pieces[-1].endswith("�")


def test_stop_words_end_the_answer(parts, monkeypatch):
    ids = parts[2].encode("one two User:" + " three" * 50, add_special_tokens=False)
    saying(monkeypatch, parts, ids, delay=0.01)
    stream = deepseek_generate(
        question(), *parts, stop_words=["User:"], max_length=99, temperature=0, repetition_penalty=1.0
    )
    assert "".join(stream) == "one two "
    assert stream.num_new_tokens < len(ids)
    assert not stream.is_cut_off
    assert num_running() == 0


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("abcUser:def", ["User:"], "abc"),
        ("User:def", ["User:"], ""),
        ("abcUser", ["User:"], "abcUser"),
        ("abc", [], "abc"),
        ("abc", [""], "abc"),
        ("xabcdy", ["abcd", "bc"], "xa"),  # bc is complete first
        ("xabcdy", ["abcd", "cd"], "x"),  # complete together: the longer one
        ("aab aaab", ["aaab"], "aab "),
        ("UserUser: UserUser:", ["User:"], "User"),
        ("", ["a"], ""),
    ],
)
def test_stop_words_do_not_depend_on_the_pieces(text, words, expected):
    draw = random.Random(0)
    for _ in range(30):
        cuts = sorted(draw.choices(range(len(text) + 1), k=draw.randrange(6)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        found = list(until_stop_word(pieces, words))
        assert "".join(found) == expected
        assert "" not in found


def test_text_is_not_held_back_without_need():
    assert list(until_stop_word(["ab", "U", "nd ", "Us", "er"], ["User:"])) == ["ab", "Und ", "User"]


@pytest.mark.parametrize("how", ["close", "stop", "drop"])
def test_an_abandoned_answer_ends_soon(parts, monkeypatch, how):
    steps = saying(monkeypatch, parts, parts[2].encode("red " * 400, add_special_tokens=False), delay=0.01)
    stream = deepseek_generate(question(), *parts, max_length=400, temperature=0, repetition_penalty=1.0)
    for _ in range(3):
        next(stream)
    if how == "close":
        stream.close()
        assert list(stream) == []
    elif how == "stop":
        stream.stop()
        assert len(list(stream)) < 200  # what was said in the meantime
        assert not stream.is_cut_off
    else:
        del stream
        gc.collect()
    assert num_running() == 0
    assert len(steps) < 200


def test_leaving_a_loop_ends_the_answer(parts, monkeypatch):
    steps = saying(monkeypatch, parts, parts[2].encode("red " * 400, add_special_tokens=False), delay=0.01)
    for _ in deepseek_generate(question(), *parts, max_length=400, temperature=0, repetition_penalty=1.0):
        assert num_running() == 1
        break
    assert num_running() == 0
    assert len(steps) < 200


def test_nothing_runs_before_the_first_piece_is_asked_for(parts):
    stream = deepseek_generate(question(), *parts)
    assert num_running() == 0
    stream.close()
    assert list(stream) == []


def test_errors_of_the_model_reach_the_reader(parts, monkeypatch):
    def failing(*args, **kwargs):
        raise RuntimeError("out of order")

    monkeypatch.setattr(parts[0], "prepare_inputs_embeds", failing)
    with pytest.raises(RuntimeError, match="out of order"):
        list(deepseek_generate(question(), *parts))
    assert num_running() == 0


def test_an_error_in_mid_answer_comes_after_the_text_before_it(parts, monkeypatch):
    model = parts[0]
    inner, num_calls = model.language.forward, 0

    def forward(*args, **kwargs):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 4:
            raise RuntimeError("worn out")
        return inner(*args, **kwargs)

    whole = list(deepseek_generate(question(), *parts, max_length=3, **GREEDY))
    monkeypatch.setattr(model.language, "forward", forward)
    stream = deepseek_generate(question(), *parts, max_length=10, **GREEDY)
    pieces = []
    with pytest.raises(RuntimeError, match="worn out"):
        for piece in stream:
            pieces.append(piece)
    assert "".join(pieces) == "".join(whole)


def test_the_same_seed_gives_the_same_sample(parts):
    def sample(seed):
        torch.manual_seed(seed)
        return "".join(deepseek_generate(question(), *parts, (), 16, 1.5, 0.95, 1.0))

    assert sample(1) == sample(1) != sample(2)


def test_a_narrow_sample_is_greedy(parts):
    greedy = "".join(deepseek_generate(question(), *parts, (), 10, 0, 1.0, 1.2))
    assert "".join(deepseek_generate(question(), *parts, (), 10, 1e-6, 1.0, 1.2)) == greedy
    assert "".join(deepseek_generate(question(), *parts, (), 10, 1.0, 1e-6, 1.2)) == greedy


def test_two_answers_at_a_time_do_not_mix(parts):
    conversations = [question("Where?", (RED,)), question("How many?", (BLUE, RED))]
    alone = ["".join(deepseek_generate(item, *parts, max_length=25, **GREEDY)) for item in conversations]
    streams = [deepseek_generate(item, *parts, max_length=25, **GREEDY) for item in conversations]
    together = ["", ""]
    for _ in range(30):
        for number, stream in enumerate(streams):
            together[number] += next(stream, "")
    assert together == alone and alone[0] != alone[1]


def test_counts(parts):
    processor = parts[1]
    stream = deepseek_generate(question(images=(RED, BLUE)), *parts, max_length=6, **GREEDY)
    inputs = processor(conversations=question(images=(RED, BLUE)), images=[RED, BLUE])
    assert stream.num_prompt_tokens == inputs.input_ids.shape[1]
    assert stream.num_image_tokens == int(inputs.images_seq_mask.sum()) > 80
    assert stream.num_new_tokens == 0
    list(stream)
    assert stream.num_new_tokens == 6
    assert stream.is_cut_off


def test_an_answer_ends_where_the_positions_do(parts, monkeypatch):
    inputs = parts[1](conversations=question(), images=[RED])
    length = inputs.input_ids.shape[1]
    monkeypatch.setattr(parts[0].config.language_config, "max_position_embeddings", length + 3)
    stream = deepseek_generate(question(), *parts, max_length=50, **GREEDY)
    list(stream)
    assert stream.num_new_tokens == 4  # the fourth is not read any more
    assert stream.is_cut_off


def test_a_prompt_longer_than_the_positions(parts):
    with pytest.raises(ValueError, match=r"prompt has 5\d\d\d tokens, the model has 4096 positions.*fewer pictures"):
        deepseek_generate(question("red " * 5000), *parts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_new_tokens 0 must"),
        ({"max_length": 2.5}, r"max_new_tokens 2\.5 must be a whole number"),
        ({"temperature": -1}, "temperature -1 must be 0 .greedy. or above"),
        ({"temperature": float("nan")}, "temperature nan must"),
        ({"temperature": float("inf")}, "temperature inf must"),
        ({"top_p": 0}, "top_p 0 must be above 0"),
        ({"top_p": 1.1}, r"top_p 1\.1 must"),
        ({"top_p": float("nan")}, "top_p nan must"),
        ({"repetition_penalty": 0}, "repetition_penalty 0 must be above 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty nan must"),
        ({"chunk_size": 0}, "chunk_size 0 must be at least 1, or -1"),
        ({"chunk_size": -2}, "chunk_size -2 must"),
        ({"stop_words": "User:"}, r"list of texts; give \['User:'\]"),
    ],
)
def test_numbers_out_of_range(parts, options, message):
    with pytest.raises(ValueError, match=message):
        deepseek_generate(question(), *parts, **options)


def test_several_prompts_are_refused(parts):
    model, processor, tokenizer = parts
    sample = processor(conversations=question(), images=[RED], force_batchify=False)
    with pytest.raises(ValueError, match="one prompt at a time, here are 2"):
        generate(model, tokenizer, processor.batchify([sample, sample]))


def test_a_wrong_conversation_is_refused_at_once(parts):
    with pytest.raises(ValueError, match="empty"):
        deepseek_generate([], *parts)
    with pytest.raises(ValueError, match=r"2 picture\(s\) given for 1 <image> mark"):
        deepseek_generate([{**question()[0], "images": [RED, BLUE]}, question()[1]], *parts)


def test_no_stop_words_may_be_none(parts):
    model, _, tokenizer = parts
    inputs = parts[1](conversations=question(), images=[RED])
    assert "".join(AnswerStream(model, tokenizer, inputs, sampling_options(4, 0, 1, 1), None))


def test_options_without_sampling_leave_out_what_only_sampling_has():
    assert sampling_options(5, 0, 0.9, 1.0) == {"max_new_tokens": 5, "repetition_penalty": 1.0, "do_sample": False}
    assert sampling_options(5, 0.4, 0.9, 1.1)["temperature"] == 0.4


def test_turns_of_a_page_become_messages():
    conversation = get_conv_template("deepseek")
    user, assistant = conversation.roles
    conversation.append_message(user, ("<image>\nWhere?", [RED]))
    conversation.append_message(assistant, "There.")
    conversation.append_message(user, "And now?")
    conversation.append_message(assistant, "No.")
    conversation.append_message(user, ("<image> <image> or here?", [BLUE, RED]))
    conversation.append_message(assistant, None)
    prompts, last = convert_conversation_to_prompts(conversation)
    assert last is RED
    assert [prompt["role"] for prompt in prompts] == [user, assistant] * 3
    assert [prompt["content"] for prompt in prompts] == [
        "<image>\nWhere?",
        "There.",
        "And now?",
        "No.",
        "<image> <image> or here?",
        "",
    ]
    assert [prompt["images"] for prompt in prompts[::2]] == [[RED], [], [BLUE, RED]]


def test_the_last_picture_may_be_turns_ago():
    conversation = get_conv_template("deepseek")
    assert convert_conversation_to_prompts(conversation) == ([], None)
    for text in (("<image>", [BLUE]), "b", "c", ""):
        conversation.append_message("<|User|>", text)
    assert convert_conversation_to_prompts(conversation)[1] is BLUE


def test_turns_that_make_no_sense():
    conversation = get_conv_template("deepseek")
    conversation.append_message("<|User|>", "a")
    with pytest.raises(ValueError, match="has 1 messages; every question needs an answer"):
        convert_conversation_to_prompts(conversation)
    conversation.append_message("<|Assistant|>", "")
    conversation.messages[0][1] = ("a", RED, "Default")
    with pytest.raises(ValueError, match=r"pair \(text, list of pictures\)"):
        convert_conversation_to_prompts(conversation)


def test_a_conversation_of_the_page_is_answered(parts):
    conversation = get_conv_template("deepseek")
    conversation.append_message(conversation.roles[0], ("<image>\nWhere?", [RED]))
    conversation.append_message(conversation.roles[1], None)
    prompts, _ = convert_conversation_to_prompts(conversation)
    expected = "".join(deepseek_generate(question(), *parts, max_length=8, **GREEDY))
    assert "".join(deepseek_generate(prompts, *parts, max_length=8, **GREEDY)) == expected


def test_load_model_gives_the_order_of_the_reference(parts, tmp_path):
    model, processor, _ = parts
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    tokenizer, loaded, loaded_processor = load_model(str(tmp_path), device="cpu")
    assert loaded.dtype == choose_dtype(torch.device("cpu")).value and not loaded.training
    assert loaded_processor.tokenizer is tokenizer
    assert "".join(deepseek_generate(question(), loaded, loaded_processor, tokenizer, max_length=5, temperature=0))
    assert load_model(str(tmp_path), torch.float32, device="cpu")[1].dtype == torch.float32
