"""The official client against a real server with nano: what it gets is what the library gives."""

import json
import urllib.request

import openai
import pytest

from deepseek_vl2.serve.api.prompts import AskedPictures, _asked_pictures, _joined
from deepseek_vl2.serve.api.schemas import ChatRequest
from deepseek_vl2.serve.grounding import parse_grounding
from deepseek_vl2.serve.inference import deepseek_generate

WHERE = "<|ref|>The red star.<|/ref|>."


@pytest.fixture(scope="module")
def client(nano_server):
    return nano_server.client


@pytest.fixture(scope="module")
def library(nano, star):
    """The library's greedy answer to a question about the star."""

    def answer(text, **options):
        messages = [
            {"role": "user", "content": f"<image>\n{text}", "images": [star[0]]},
            {"role": "assistant", "content": ""},
        ]
        parts = (nano.model, nano.processor, nano.tokenizer)
        return "".join(deepseek_generate(messages, *parts, temperature=0, repetition_penalty=1.0, **options))

    return answer


def test_a_picture_with_boxes_beside_the_text(client, library, star, ask):
    answer = client.chat.completions.create(model="nano", messages=ask(WHERE, star[1]))
    (choice,) = answer.choices
    assert choice.message.content == library(WHERE)
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    (box,) = parse_grounding(choice.message.content)
    assert choice.message.boxes == [{"picture": 1, **box.to_dict(star[0].size)}]
    assert choice.message.boxes[0]["label"] == "red star"
    assert not hasattr(choice.message, "box_problems")
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.prompt_tokens_details.image_tokens < usage.prompt_tokens
    assert answer.object == "chat.completion"
    assert answer.model == "nano"


def test_a_stream_is_the_whole_answer_in_pieces(client, library, star, ask):
    question = {"model": "nano", "messages": ask(WHERE, star[1])}
    chunks = list(client.chat.completions.create(**question, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks[:-1]]
    assert len(pieces) > 5
    assert "".join(filter(None, pieces)) == library(WHERE)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-2]] == [None] * (len(chunks) - 2)
    last = chunks[-2].choices[0]
    assert last.finish_reason == "stop"
    assert last.delta.boxes[0]["label"] == "red star"
    assert chunks[-1].choices == []
    whole = client.chat.completions.create(**question)
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_ends_with_done(nano_server, star, ask):
    body = json.dumps({"model": "nano", "messages": ask("How many objects are there?", star[1]), "stream": True})
    request = urllib.request.Request(
        f"{nano_server.url}/v1/chat/completions", body.encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        lines = response.read().decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: {") for line in lines[:-2])
    assert all('"usage"' not in line for line in lines)


@pytest.mark.parametrize("stop", ["star", ["zzz", "star"], ["r<|/ref|>", "star"]])
def test_stop(client, library, star, ask, stop):
    words = [stop] if isinstance(stop, str) else stop
    answer = client.chat.completions.create(model="nano", messages=ask(WHERE, star[1]), stop=stop)
    assert answer.choices[0].message.content == library(WHERE, stop_words=words)
    assert answer.choices[0].message.content == "<|ref|>red "
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.boxes == []
    assert answer.choices[0].message.box_problems


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens(client, library, star, ask, name):
    answer = client.chat.completions.create(model="nano", messages=ask(WHERE, star[1]), **{name: 3})
    assert answer.choices[0].message.content == library(WHERE, max_length=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3


def test_a_conversation_with_several_pictures(nano, client, star, small, ask):
    conversation = [
        {"role": "system", "content": "You look at pictures."},
        *ask("What color is the star?", star[1]),
        {"role": "assistant", "content": "red"},
        *ask("And <image>\nbeside <image>\n?", small, star[1]),
    ]
    answer = client.chat.completions.create(model="nano", messages=conversation, max_tokens=8)
    messages = [
        {"role": "system", "content": "You look at pictures."},
        {"role": "user", "content": "<image>\nWhat color is the star?", "images": [star[0]]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "And <image>\nbeside <image>\n?", "images": [small, star[0]]},
        {"role": "assistant", "content": ""},
    ]
    parts = (nano.model, nano.processor, nano.tokenizer)
    text = "".join(deepseek_generate(messages, *parts, max_length=8, temperature=0, repetition_penalty=1.0))
    assert answer.choices[0].message.content == text


def test_an_answer_goes_back_as_it_came(client, star, ask):
    question = ask(WHERE, star[1])
    message = client.chat.completions.create(model="nano", messages=question).choices[0].message
    for sent in (message, message.model_dump()):
        answer = client.chat.completions.create(
            model="nano", messages=[*question, sent, *ask("What color is it?")], max_tokens=2
        )
        assert answer.usage.completion_tokens == 2


def test_low_detail_is_one_view(client, star):
    def image_tokens(detail):
        part = {"type": "image_url", "image_url": {"url": star[1], "detail": detail}}
        answer = client.chat.completions.create(
            model="nano", messages=[{"role": "user", "content": [part]}], max_tokens=1
        )
        return answer.usage.prompt_tokens_details.image_tokens

    assert image_tokens("low") < image_tokens("high") == image_tokens("auto")


def test_boxes_name_the_picture_of_the_request():
    """Counted from 1 over the request; they lie in the pictures of the last question that has some."""
    asked = AskedPictures("In image 1?", ((100, 50), (999, 999)), first=2)
    box = "<|ref|>a<|/ref|><|det|>[[0, 0, 999, 999]]<|/det|>"
    (found,), problems = asked.find_boxes(box)
    assert (found["picture"], found["pixels"], problems) == (3, [0, 0, 100, 50], [])
    (found,), _ = asked.find_boxes(f"In the second image {box}")
    assert (found["picture"], found["pixels"]) == (4, [0, 0, 999, 999])
    assert AskedPictures("Hello", (), 0).find_boxes(box) == ([], [])


def test_pictures_are_those_of_the_last_question_that_has_some(small, ask):
    history = [*ask("One?", small), {"role": "assistant", "content": "1"}, *ask("Two?", small, small)]
    later = [{"role": "assistant", "content": "2"}, *ask("And?"), *ask("again")]
    sizes = [(1, 1), (2, 2), (3, 3)]
    for messages, question in ((history, "Two?"), ([*history, *later], "And?\nagain")):
        parsed = ChatRequest.model_validate({"model": "nano", "messages": messages}).messages
        assert _asked_pictures(parsed, sizes) == AskedPictures(question, ((2, 2), (3, 3)), 1)
        joined = _joined(parsed)
        assert [message["role"] for message in joined] == ["user", "assistant"] * (len(joined) // 2) + ["user"]
        assert joined[2]["content"] == "<image>\n<image>\nTwo?"


def test_seeds(client, star, ask):
    question = {"model": "nano", "messages": ask("Describe the picture.", star[1]), "temperature": 2, "max_tokens": 12}

    def texts(**options):
        answer = client.chat.completions.create(**question, **options)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.message.content for choice in answer.choices]

    both = texts(seed=1, n=2)
    assert both == [*texts(seed=1), *texts(seed=2)]
    assert both[0] != both[1]
    assert texts(n=6) != texts(n=6)  # one answer alone may be the same by chance


def test_models(client):
    assert [model.id for model in client.models.list()] == ["nano"]
    assert client.models.retrieve("nano").id == "nano"
    with pytest.raises(openai.NotFoundError, match="does not exist here"):
        client.models.retrieve("other/model")


def test_health_and_metrics(nano_server, client, ask):
    client.chat.completions.create(model="nano", messages=ask("Hello"), max_tokens=2)
    with urllib.request.urlopen(f"{nano_server.url}/health") as response:
        assert json.load(response) == {"status": "ok"}
    with urllib.request.urlopen(f"{nano_server.url}/metrics") as response:
        figures = dict(line.rsplit(" ", 1) for line in response.read().decode().splitlines() if line[0] != "#")
    assert float(figures['deepseek_vl2_requests_total{path="/v1/chat/completions",status="200"}']) >= 1
    assert float(figures["deepseek_vl2_completion_tokens_total"]) >= 2
    assert float(figures["deepseek_vl2_running_answers"]) == 0
    assert float(figures["deepseek_vl2_open_answers"]) == 0
