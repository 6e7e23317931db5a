"""What a client gets for requests that are not right: always the protocol's form, never a failure of the server."""

import base64
import io
import json
import queue
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from deepseek_vl2.serve.api.app import create_app
from deepseek_vl2.serve.api.engine import BatchEngine, EngineStoppedError, Failed, Question
from deepseek_vl2.serve.api.service import ChatService
from deepseek_vl2.serve.api.settings import ServerSettings
from deepseek_vl2.serve.picture_limits import PictureLimits
from deepseek_vl2.serve.row_sampling import RowSampler, Sampling

CHAT = "/v1/chat/completions"
LIMITS = PictureLimits(max_image_mb=0.01, max_pixels=5000, max_pictures=2)


@pytest.fixture(scope="module")
def http(nano):
    settings = ServerSettings(limits=LIMITS, max_body_mb=0.2, max_waiting=0, max_batch=1)
    service = ChatService(nano, settings)
    app = create_app(service)
    app.state.places = service.places
    with TestClient(app) as client:
        yield client


def check(response, status, code=None, param=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert (code is None or error["code"] == code) and (param is None or error["param"] == param), error
    return error["message"]


def user(*parts):
    return {"role": "user", "content": list(parts)}


def picture(url, **options):
    return {"type": "image_url", "image_url": {"url": url, **options}}


def data_uri(image):
    packed = io.BytesIO()
    image.save(packed, "PNG")
    return f"data:image/png;base64,{base64.b64encode(packed.getvalue()).decode()}"


TEXT = {"type": "text", "text": "What?"}
HELLO = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "Hi"}
SMALL = data_uri(Image.new("RGB", (8, 8)))


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [ANSWER]}, "messages.0.role", "comes after a question"),
        ({"messages": [HELLO, ANSWER]}, "messages.1.role", "must be the user's"),
        ({"messages": [HELLO, ANSWER, ANSWER, HELLO]}, "messages.2.role", "comes after a question"),
        ({"messages": [HELLO, {"role": "system", "content": "x"}, HELLO]}, "messages.1.role", "only the first"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0", "tool"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages.0.content", "empty"),
        ({"messages": [{"role": "user", "content": "half \ud800"}]}, "messages.0.content", "surrogate"),
        ({"messages": [user(TEXT, {"type": "input_audio"})]}, "messages.0.content.1", "input_audio"),
        ({"messages": [{"role": "user", "content": "<image> what?"}]}, "messages.0.content", "1 <image> mark"),
        ({"messages": [user({"type": "text", "text": "<image><image>"}, picture(SMALL))]}, None, "for 1 picture"),
        ({"messages": [{**HELLO, "images": ["x"]}]}, "messages.0.images", "not permitted"),
        ({"messages": [user(TEXT, *[picture(SMALL)] * 3)]}, "messages", "takes 2"),
        ({"messages": [user(TEXT, picture(SMALL, detail="low"), picture(SMALL))]}, "messages", "detail low"),
        ({"messages": [user(TEXT, picture("file:///etc/passwd"))]}, None, "data:image"),
        ({"messages": [user(TEXT, picture("/etc/passwd"))]}, None, "data:image"),
        ({"messages": [user(TEXT, picture("https://example.com/a.png"))]}, None, "--allow_url_fetch"),
        ({"messages": [user(TEXT, picture("data:image/png;base64,!!!"))]}, None, "base64"),
        ({"messages": [user(TEXT, picture("data:image/png;base64,AAAA"))]}, None, "not a picture"),
        ({"messages": [user(TEXT, picture("data:image/png"))]}, None, "no comma"),
        ({"messages": [user(picture(data_uri(Image.new("RGB", (80, 80)))))]}, None, "the limit is 5000"),
        ({"messages": [user(picture(data_uri(Image.effect_noise((200, 200), 99))))]}, None, "larger than 0.01 MB"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, "messages", "4096 positions"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, None, "differ"),
        ({"n": 9}, "n", "less than or equal to 8"),
        ({"seed": 2**64}, "seed", "less than or equal"),
        ({"stop": [""]}, "stop.0", "at least 1 character"),
        ({"stream_options": {"include_usage": True}}, None, "needs stream"),
        ({"repetition_penalty": 1e-30}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"n": 2}, "n", "gives a client 1 answer"),
        ({"moderation": {"model": "m", "policy": {"output": {"mode": "block"}}}}, "moderation", "not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "frequency_penalty is not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias is not supported"),
        ({"logprobs": True}, "logprobs", "logprobs is not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "response_format is not supported"),
        ({"colour": "red"}, "colour", "not permitted"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
    ],
    ids=str,
)
def test_bad_requests(http, change, param, words):
    body = json.dumps({"model": "nano", "messages": [HELLO], **change})
    response = http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    message = check(response, 400, param=param)
    assert words in message


def test_what_does_not_change_an_answer_is_taken(http):
    body = {
        "model": "nano", "messages": [HELLO], "max_tokens": 1, "user": "me", "metadata": {"a": "b"}, "logit_bias": {},
        "frequency_penalty": 0, "presence_penalty": 0.0, "tools": [], "response_format": {"type": "text"}, "n": None,
        "skip_special_tokens": False, "stop": None, "stream": None, "prompt_cache_options": {"mode": "explicit"},
        "moderation": {"model": "m", "policy": {"input": {"mode": "score"}}},
    }  # fmt: skip
    assert http.post(CHAT, json=body).status_code == 200
    mark = {"prompt_cache_breakpoint": {"mode": "explicit"}}
    body["messages"] = [user({**TEXT, **mark}, {**picture(SMALL, detail="original"), **mark})]
    assert http.post(CHAT, json=body).status_code == 200


def test_histories_without_words(http):
    """An answer may have been empty, and so may instructions; these are as if they were not there."""

    def num_tokens(*messages):
        response = http.post(CHAT, json={"model": "nano", "messages": messages, "max_tokens": 1})
        assert response.status_code == 200, response.text
        return response.json()["usage"]["prompt_tokens"]

    assert num_tokens(HELLO, {"role": "assistant", "content": ""}, HELLO) < num_tokens(HELLO, ANSWER, HELLO)
    assert num_tokens({"role": "system", "content": " "}, HELLO) == num_tokens(HELLO)
    assert num_tokens({"role": "developer", "content": []}, HELLO) == num_tokens(HELLO)


@pytest.mark.parametrize("temperature", [1e-300, 6e-38])
def test_temperatures_near_0(http, temperature):
    body = {"model": "nano", "messages": [HELLO], "max_tokens": 2, "temperature": temperature}
    assert http.post(CHAT, json=body).status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"model": NaN}'])
def test_malformed_bodies(http, body):
    check(http.post(CHAT, content=body, headers={"Content-Type": "application/json"}), 400)


def test_bodies_that_are_too_large(http):
    body = {"model": "nano", "messages": [{"role": "user", "content": "x" * 300_000}]}
    check(http.post(CHAT, json=body), 413, "request_too_large")
    pieces = (b"x" * 50_000 for _ in range(6))  # the length is not announced
    check(http.post(CHAT, content=pieces, headers={"Content-Type": "application/json"}), 413, "request_too_large")


def test_unknown_models_and_paths(http):
    check(http.post(CHAT, json={"model": "gpt-4o", "messages": [HELLO]}), 404, "model_not_found", "model")
    check(http.get("/v1/models/gpt%ff%00"), 404)
    check(http.get("/v2"), 404)
    check(http.get(CHAT), 405)


def test_no_place(http):
    with http.app.state.places.taken("another client", 1):
        response = http.post(CHAT, json={"model": "nano", "messages": [HELLO], "max_tokens": 1})
    assert "busy" in check(response, 429, "queue_full")
    assert int(response.headers["Retry-After"]) >= 1
    assert http.post(CHAT, json={"model": "nano", "messages": [HELLO], "max_tokens": 1}).status_code == 200


def test_keys(nano, serve, ask):
    with serve(nano, api_keys=("first", "second")) as running:

        def client(key):
            return openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0)

        for key in ("wrong", "firs", "Schlüssel"):
            with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)):
                client(key).models.list()
        assert client("second").models.list().data[0].id == "nano"
        answer = client("first").chat.completions.create(model="nano", messages=ask("Hello"), max_tokens=1)
        assert answer.usage.completion_tokens == 1
        with pytest.raises(openai.AuthenticationError) as caught:
            client("wrong").chat.completions.create(model="nano", messages=ask("Hello"))
        assert caught.value.code == "invalid_api_key"


def test_time_is_limited(endless, serve, ask):
    with serve(endless, timeout=3) as running:
        running.service.engine._on_step = slow
        with pytest.raises(openai.InternalServerError) as caught:
            running.client.chat.completions.create(model="nano", messages=ask("Hello"), max_tokens=2000)
        assert (caught.value.status_code, caught.value.code) == (504, "timeout")
        # Told before the first word, where the machine is that slow, or after it.
        with pytest.raises(openai.APIError, match="took too long"):
            list(
                running.client.chat.completions.create(
                    model="nano", messages=ask("Hello"), max_tokens=2000, stream=True
                )
            )
        running.wait_until(lambda: running.service.places.num_open == 0, 1)


def slow(num_rows):
    time.sleep(0.1)


def test_a_model_that_fails(endless, serve, ask, monkeypatch):
    """Those whose answer it was are told; the server goes on."""
    with serve(endless, max_batch=2) as running:
        question = {"model": "nano", "messages": ask("Hello"), "max_tokens": 5}
        engine = running.service.engine

        def fail(tokens):
            raise RuntimeError("secret words of a user")

        with monkeypatch.context() as patched:
            patched.setattr(engine._batch, "step", fail)
            with pytest.raises(openai.InternalServerError) as caught:
                running.client.chat.completions.create(**question)
        assert caught.value.code == "model_failed"
        assert "secret" not in str(caught.value)
        assert running.client.chat.completions.create(**question).usage.completion_tokens == 5
        engine.close()
        with pytest.raises(openai.InternalServerError) as caught:
            running.client.chat.completions.create(**question)
        assert caught.value.status_code == 503


def test_memory_that_is_short_on_a_cpu(endless, serve, ask, monkeypatch):
    """PyTorch tells it in a plain RuntimeError."""
    with serve(endless) as running:

        def fail(tokens):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

        monkeypatch.setattr(running.service.engine._batch, "step", fail)
        with pytest.raises(openai.InternalServerError) as caught:
            running.client.chat.completions.create(model="nano", messages=ask("Hello"), max_tokens=5)
        assert (caught.value.status_code, caught.value.code) == (503, "out_of_memory")


def test_a_row_that_fails_ends_alone(endless, serve, ask, monkeypatch):
    real, num_sampled = RowSampler.choose, []

    def choose(sampler, *arguments):
        num_sampled.extend([1] * (not sampler.is_greedy))
        if not sampler.is_greedy and len(num_sampled) > 3:
            raise RuntimeError("probability tensor contains either inf, nan or element < 0")
        return real(sampler, *arguments)

    monkeypatch.setattr(RowSampler, "choose", choose)
    with serve(endless, max_batch=2) as running, ThreadPoolExecutor(1) as executor:

        def answer(**options):
            return running.client.chat.completions.create(model="nano", messages=ask("Hello"), **options)

        running.service.engine._on_step = lambda num_rows: time.sleep(0.01)
        greedy = executor.submit(answer, max_tokens=100)
        running.wait_until(lambda: running.service.engine.num_running == 1, 60)
        with pytest.raises(openai.InternalServerError) as caught:
            answer(max_tokens=100, temperature=1)
        assert caught.value.code == "model_failed"
        assert not greedy.done()
        assert greedy.result(60).usage.completion_tokens == 100


def test_an_engine_survives_rows_that_cannot_leave(endless, serve, ask, monkeypatch):
    with serve(endless) as running:
        batch = running.service.engine._batch
        real, failures = batch.leave, [1]

        def leave(rows):
            if failures:
                failures.clear()
                raise RuntimeError("can't allocate memory")
            real(rows)

        monkeypatch.setattr(batch, "leave", leave)
        for _ in range(2):  # the first is over when it leaves
            answer = running.client.chat.completions.create(model="nano", messages=ask("Hello"), max_tokens=3)
            assert answer.usage.completion_tokens == 3
        assert not failures
        running.wait_until(lambda: len(batch) == 0, 60)


def test_an_engine_that_ends_tells_the_question_that_it_reads(endless, monkeypatch):
    """After an error that nobody thought of."""
    engine = BatchEngine(endless)

    def embed(**inputs):
        raise KeyError("a fault")

    monkeypatch.setattr(engine._features, "embed", embed)
    inputs = endless.processor.process_one(prompt="Hello", images=[])
    events = queue.Queue()
    engine.submit("a", Question(inputs, Sampling(), 3), events.put)
    event = events.get(timeout=60)
    assert isinstance(event, Failed)
    assert isinstance(event.error, EngineStoppedError)
    engine.close()
