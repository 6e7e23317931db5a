"""The demo with a model that answers when it is told to: what becomes of questions, and what its server takes."""

import asyncio
import contextlib
import json
import threading
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import gradio as gr
import httpx
import pytest
from gradio.exceptions import Error
from gradio.route_utils import delete_files_created_by_app
from gradio_client import Client
from page_answers import said
from PIL import Image

from deepseek_vl2.serve.app_modules.conversation import Question, Turn
from deepseek_vl2.serve.app_modules.engine import LIBRARIES, Engine, Request
from deepseek_vl2.serve.app_modules.incoming import as_message
from deepseek_vl2.serve.app_modules.limits import UploadLimits
from deepseek_vl2.serve.app_modules.page import Demo
from deepseek_vl2.serve.app_modules.server import _served_copies, launch
from deepseek_vl2.serve.app_modules.settings import Settings

TIMEOUT = 60
VALUES = asdict(Settings())
A = SimpleNamespace(session_hash="a")


class Parrot:
    """Answers with the question, and holds what is called so until it is told to go on."""

    device = "cpu"

    def __init__(self):
        self.go_on = threading.Event()
        self.requests = []

    def forget(self, user):
        pass

    def answer(self, request, job):
        self.requests.append(request)
        assert request.question.text != "hold" or self.go_on.wait(TIMEOUT)
        if request.question.text == "bad":
            raise ValueError("no such thing")
        return said(request.question.text)


@pytest.fixture
def parrot():
    return Parrot()


@pytest.fixture
def demo(parrot, repository, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    pictures = _served_copies(repository / "images", tmp_path)
    demo = Demo(Engine(lambda set_state: parrot), "parrot", UploadLimits(), pictures)
    yield demo
    parrot.go_on.set()
    demo.engine.close()


@pytest.fixture
def session(demo, tmp_path):
    """A conversation of one turn, whose answer has a picture with boxes."""
    path = tmp_path / "marked" / "boxes_1.jpg"
    path.parent.mkdir()
    path.touch()
    session = demo.sessions.get("a")
    session.turns.append(Turn(Question("first"), replace(said("one"), marked_pictures=((1, str(path)),))))
    session.marked = path
    return session


@pytest.fixture
def queue(demo):
    """Somebody else's question keeps the model busy."""
    demo.engine.submit("other", Request((), Question("hold"), Settings()))


@pytest.fixture
def outputs_of(run_async):
    """Gives all that is shown; something may happen while the question waits."""

    async def collect(outputs, meanwhile):
        shown, tasks = [], []
        async for output in outputs:
            shown.append(output)
            if len(shown) == 1 and meanwhile is not None:
                doing = meanwhile()
                tasks += [asyncio.ensure_future(doing)] if asyncio.iscoroutine(doing) else []
        assert shown.pop() == (gr.skip(),) * 4  # gradio sends the last again
        await asyncio.gather(*tasks)
        return shown

    return lambda outputs, meanwhile=None: run_async(collect(outputs, meanwhile))


def box_values(shown):
    """What was put into the text box, each time that anything was."""
    return [box["value"] for _, _, box, _ in shown if "value" in box]


def test_a_setting_that_cannot_be_removes_no_turn(demo, session, outputs_of):
    before = list(session.turns)
    values = {**VALUES, "chunk_size": 0}.values()
    for outputs in (demo.regenerate(A, *values), demo.ask_edited(A, SimpleNamespace(index=0, value="new"), *values)):
        ((_, status, _, _),) = outputs_of(outputs)
        assert "chunk_size is 0; it must be 1 to 4096, or -1 for all at once" in status
    ((_, status, _, _),) = outputs_of(demo.ask_edited(A, SimpleNamespace(index=0, value=" "), *VALUES.values()))
    assert "Write a question first." in status
    assert session.turns == before
    assert session.marked.exists()


def test_repeated_and_edited_questions_take_the_place_of_the_turns_from_there_on(demo, session, parrot, outputs_of):
    shown = outputs_of(demo.regenerate(A, *VALUES.values()))
    assert [turn.answer.text for turn in session.turns] == ["first"]
    assert not session.marked.exists()
    assert box_values(shown) == []  # nor is a draft touched
    outputs_of(demo.ask(A, {"text": "second"}, *VALUES.values()))
    outputs_of(demo.ask_edited(A, SimpleNamespace(index=0, value="other"), *VALUES.values()))
    assert [turn.answer.text for turn in session.turns] == ["other"]
    assert [len(request.turns) for request in parrot.requests] == [0, 1, 0]


def test_a_question_that_is_stopped_in_the_queue_comes_back_with_its_pictures(demo, queue, tmp_path, outputs_of):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    message = {"text": "what?", "files": [str(tmp_path / "a.png")]}
    shown = outputs_of(demo.ask(A, message, *VALUES.values()), meanwhile=lambda: demo.stop(A))
    assert box_values(shown) == [None]
    assert demo.give_back(A, None) == message
    assert demo.give_back(A, None) == gr.skip()  # once
    assert demo.sessions.get("a").turns == []


def test_a_question_comes_back_above_what_was_written_meanwhile(demo, session, queue, outputs_of, run_async, tmp_path):
    paths = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for path in paths:
        Image.new("RGB", (8, 8)).save(path)
    draft = {"text": "and then?", "files": paths[1:]}
    both = {"text": "what?\nand then?", "files": paths}
    message = {"text": "what?", "files": paths[:1]}
    outputs_of(demo.ask(A, message, *VALUES.values()), meanwhile=lambda: demo.stop(A))
    assert demo.give_back(A, draft) == both
    session.turns.append(Turn(Question("what?", (paths[0],)), said("two")))
    *_, box = run_async(demo.take_back(A, draft))
    assert box["value"] == both
    *_, box = run_async(demo.take_back(A, {"text": "", "files": []}))
    assert box["value"] == {"text": "first", "files": []}
    *_, box = run_async(demo.take_back(A, draft))  # nothing is left to take back
    assert "value" not in box


def test_what_was_there_comes_back_when_its_repetition_is_stopped(demo, session, queue, outputs_of):
    session.turns.append(Turn(Question("second"), said("two", num_left_out=1)))
    session.num_left_out = 1
    before = list(session.turns)
    shown = outputs_of(demo.regenerate(A, *VALUES.values()), meanwhile=lambda: demo.stop(A))
    assert (session.turns, session.num_left_out, box_values(shown)) == (before, 1, [])
    assert demo.give_back(A, None) == gr.skip()
    edited = demo.ask_edited(A, SimpleNamespace(index=0, value="other"), *VALUES.values())
    shown = outputs_of(edited, meanwhile=lambda: demo.stop(A))
    assert (session.turns, session.num_left_out) == (before, 1)
    assert box_values(shown) == []
    assert demo.give_back(A, None) == {"text": "other", "files": []}
    assert session.marked.exists()


def test_a_new_conversation_in_the_meantime_stays_empty(demo, session, queue, outputs_of):
    shown = outputs_of(demo.regenerate(A, *VALUES.values()), meanwhile=lambda: demo.start_anew(A))
    assert (session.turns, box_values(shown), session.marked.exists()) == ([], [], False)
    shown = outputs_of(demo.ask(A, {"text": "what?"}, *VALUES.values()), meanwhile=lambda: demo.start_anew(A))
    assert box_values(shown) == [None]
    assert demo.give_back(A, None) == gr.skip()


def test_a_question_that_fails_comes_back_but_an_example_leaves_a_draft_alone(demo, monkeypatch, outputs_of):
    shown = outputs_of(demo.ask(A, {"text": "bad"}, *VALUES.values()))
    assert box_values(shown) == [None]
    assert demo.give_back(A, None) == {"text": "bad", "files": []}
    assert "no such thing" in shown[-1][1]
    for text in ("good", "bad"):
        monkeypatch.setattr(demo, "_examples", [demo._examples[0]._replace(prompt=text)])
        assert box_values(outputs_of(demo.ask_example(A, SimpleNamespace(index=0), *VALUES.values()))) == []
        assert demo.give_back(A, {"text": "draft"}) == gr.skip()


def test_the_end_does_not_wait_for_a_load_under_way(parrot):
    may_end = threading.Event()

    def load(set_state):
        assert may_end.wait(TIMEOUT)
        return parrot

    engine = Engine(load)
    job = engine.submit("a", Request((), Question("what?"), Settings()))
    begin = time.monotonic()
    engine.close()
    assert time.monotonic() - begin < TIMEOUT / 2
    assert engine.load_state.phase == LIBRARIES
    with pytest.raises(InterruptedError):
        job.future.result(TIMEOUT)
    may_end.set()


def test_gradio_s_cleaning_leaves_the_pictures_of_the_examples(demo, tmp_path):
    blocks = demo.build()
    upload = tmp_path / "upload.png"
    upload.touch()
    blocks.upload_file_set.add(str(upload))
    delete_files_created_by_app(blocks, 0)
    assert not upload.exists()
    pictures = [tmp_path / "examples" / name for example in demo._examples for name in example.pictures]
    assert pictures
    assert all(path.exists() for path in pictures)


def file_at(path):
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize("place", [0, 2], ids=["message", "number"])
def test_nothing_is_fetched_for_those_who_ask(demo, place, monkeypatch, run_async):
    blocks = demo.build()
    monkeypatch.setattr(
        "gradio.processing_utils.async_ssrf_protected_download", lambda *_, **__: pytest.fail("fetched")
    )
    address = file_at("http://127.0.0.1:9/a.png")
    inputs = [{"text": "what?", "files": [] if place else [address]}, False, *VALUES.values()]
    if place:
        inputs[place] = address
    (chat,) = [fn for fn in blocks.fns.values() if fn.api_name == "chat"]
    with pytest.raises(Error, match=r"http://127\.0\.0\.1:9/a\.png is an address"):
        run_async(blocks.preprocess_data(chat, inputs, None))


def test_messages_are_texts_or_have_texts_and_files():
    upload = file_at("/uploads/a.png")
    assert as_message(None) is None
    assert as_message("hello") == {"text": "hello", "files": []}
    assert as_message({"text": None, "files": [upload]}) == {"text": "", "files": [upload]}
    bad_files = ("a.png", ["a.png"], [{"path": "a.png"}], [upload | {"size": "large"}], [upload | {"path": 5}])
    for bad in (5, ["hello"], {"text": 5}, *({"files": files} for files in bad_files)):
        with pytest.raises(ValueError, match=r"message is .*; it must be a text, or an object with text and files\."):
            as_message(bad)


@pytest.fixture
def address(demo):
    blocks = launch(demo, server_name="127.0.0.1", server_port=None)
    yield f"{blocks.local_url}gradio_api"
    blocks.close()


def call(address, *data):
    """Asks as without gradio's client; returns the last event."""
    event = httpx.post(f"{address}/call/chat", json={"data": [*data, *VALUES.values()]}).json()["event_id"]
    lines = httpx.get(f"{address}/call/chat/{event}", timeout=TIMEOUT).text.strip().splitlines()
    return lines[-2].removeprefix("event: "), json.loads(lines[-1].removeprefix("data: "))


def test_nobody_without_a_session_shares_a_conversation(demo, address, parrot, run_async):
    body = {"data": ["secret", False, *VALUES.values()]}
    assert httpx.post(f"{address}/run/chat", json=body, timeout=TIMEOUT).status_code == 404
    for text in ("secret", "other"):
        event, (result,) = call(address, text, False)
        assert (event, result["answer"]) == ("complete", text)
    with contextlib.closing(Client(address.removesuffix("gradio_api"), verbose=False)) as client:
        for text in ("third", "fourth"):
            assert client.predict(text, api_name="/chat")["answer"] == text
    assert [len(request.turns) for request in parrot.requests] == [0, 0, 0, 1]
    for key in (None, ""):
        with pytest.raises(Error, match="no session_hash"):
            run_async(demo.take_back(SimpleNamespace(session_hash=key), None))


def test_what_is_no_message_is_not_logged(address, capfd):
    event, error = call(address, ["my secret"], False)
    assert event == "error"
    assert "message is ['my secret']; it must be a text" in error["error"]
    assert "my secret" not in "".join(capfd.readouterr())
