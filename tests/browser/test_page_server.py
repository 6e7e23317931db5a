"""The server behind the page: the endpoint for programs, what it gives away, logins, a model that cannot be loaded."""

import subprocess
import sys
import time

import httpx
import pytest
from browsing import TIMEOUT, Visitor, wait_until
from gradio_client import Client, handle_file

WHERE = "<|ref|>The red star.<|/ref|>."


@pytest.fixture(scope="module")
def client(demo):
    client = Client(demo.address, verbose=False, httpx_kwargs={"timeout": TIMEOUT})
    yield client
    client.close()


def message(text, *pictures):
    return {"text": text, "files": [handle_file(str(picture)) for picture in pictures]}


def test_the_endpoint_gives_text_and_boxes(client, images):
    result = client.predict(message(WHERE, images / "visual_grounding_1.jpeg"), api_name="/chat")
    assert result["is_final"]
    assert result["answer"] == "red star"
    assert result["text"].startswith("<|ref|>red star<|/ref|><|det|>[[")
    (box,) = result["boxes"]
    assert box["label"] == "red star"
    assert box["picture"] == 1
    x1, y1, x2, y2 = box["pixels"]
    assert 0 <= x1 < x2
    assert 0 <= y1 < y2
    assert result["statistics"]["image_tokens"] > 0
    follow_up = client.predict(message("What color is the star?"), api_name="/chat")
    assert follow_up["answer"] == "red"
    assert follow_up["statistics"]["image_tokens"] > 0
    anew = client.predict(message("What color is the star?"), True, api_name="/chat")
    assert anew["statistics"]["image_tokens"] == 0


def test_the_endpoint_streams_and_can_be_cancelled(client, demo, slow_model, images):
    slow_model(token=0.5)
    job = client.submit(message(WHERE, images / "visual_grounding_1.jpeg"), True, api_name="/chat")
    wait_until(lambda: any(output["answer"] for output in job.outputs()))
    assert not job.done()
    job.cancel()
    wait_until(lambda: demo.engine.num_running == 0)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"temperature": 5}, r"temperature is 5; it must be 0 to 1\."),
        ({"top_p": 0}, r"top_p is 0; it must be 0\.05 to 1\."),
        ({"max_new_tokens": 10**6}, r"max_new_tokens is 1000000; it must be 1 to 2048\."),
        ({"max_new_tokens": 2.5}, r"max_new_tokens is 2\.5; it must be a whole number\."),
        ({"chunk_size": -7}, r"chunk_size is -7"),
        ({"seed": -5}, r"seed is -5"),
    ],
)
def test_parameters_out_of_range_are_refused(client, options, complaint):
    with pytest.raises(Exception, match=complaint):
        client.predict(message("How many objects are there?"), True, api_name="/chat", **options)
    assert client.predict(message("How many objects are there?"), True, api_name="/chat")["is_final"]


def test_bad_messages_are_refused(client, tmp_path):
    (tmp_path / "note.png").write_text("no picture")
    for bad, complaint in (
        (message(" "), "Write a question"),
        (message("Hi", tmp_path / "note.png"), "note.png cannot"),
    ):
        with pytest.raises(Exception, match=complaint):
            client.predict(bad, True, api_name="/chat")


def test_no_file_of_the_server_can_be_read(demo, repository):
    for path in ("/etc/passwd", repository / "README.md", repository / "images" / "scenes.json", "../../etc/passwd"):
        response = httpx.get(f"{demo.address}gradio_api/file={path}")
        assert response.status_code in (403, 404), path
    data = {
        "text": "What is it?",
        "files": [
            {"path": str(repository / "images" / "visual_grounding_1.jpeg"), "meta": {"_type": "gradio.FileData"}}
        ],
    }
    body = {"data": [data, True, 0, 0.9, 1, 8, 3072, True, -1, -1]}
    call = httpx.post(f"{demo.address}gradio_api/call/chat", json=body)
    events = httpx.get(f"{demo.address}gradio_api/call/chat/{call.json()['event_id']}", timeout=TIMEOUT).text
    assert "event: error" in events
    assert "is_final" not in events


def test_uploads_are_limited_by_the_server_too(demo):
    files = {"files": ("big.png", b"\x89PNG" + bytes(3 * 2**20), "image/png")}
    assert httpx.post(f"{demo.address}gradio_api/upload", files=files, timeout=TIMEOUT).status_code == 413


def test_other_events_are_not_for_programs(client):
    info = client.view_api(return_format="dict")
    assert set(info["named_endpoints"]) == {"/chat"}


def start(repository, *arguments, log):
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, "web_demo.py", "--port", "0", *arguments], cwd=repository, stdout=output, stderr=output
        )


def address_in(log, process):
    found = []

    def look():
        assert process.poll() is None, log.read_text()
        found[:] = [line.split()[-1] for line in log.read_text().splitlines() if "http://" in line]
        return found

    wait_until(look)
    return found[0].rstrip("/") + "/"


@pytest.fixture
def served(repository, tmp_path):
    """Starts the script as users do."""
    processes = []

    def serve(*arguments):
        log = tmp_path / f"{len(processes)}.log"
        processes.append(start(repository, *arguments, log=log))
        return address_in(log, processes[-1]), log

    yield serve
    for process in processes:
        process.terminate()
        process.wait(TIMEOUT)


def test_lazy_page_comes_at_once_with_login_and_says_why_a_load_failed(served, chromium, tmp_path, images):
    """One start of the script for several promises: starting takes time."""
    broken = tmp_path / "broken-model"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    address, log = served("--lazy_load", "--local_path", str(broken), "--auth", "me:secret", "--max-image-mb", "1")
    begin = time.monotonic()
    assert httpx.get(address, timeout=TIMEOUT).status_code in (200, 401)
    seconds = time.monotonic() - begin
    print(f"first page after {seconds:.2f} s")
    assert seconds < 2
    assert httpx.get(f"{address}config", timeout=TIMEOUT).status_code == 401
    visitor = Visitor.__new__(Visitor)
    context = chromium.new_context()
    context.set_default_timeout(TIMEOUT * 1000)
    page = context.new_page()
    page.goto(address)
    page.get_by_label("username").fill("me")
    page.get_by_label("password").fill("secret")
    page.get_by_role("button", name="Login").click()
    page.wait_for_selector("#question textarea:enabled")
    visitor.page = page
    assert "it is loaded with the first question" in page.locator("#model-state").inner_text()
    page.locator("#question textarea").fill("How many objects are there?")
    page.locator("#question textarea").press("Enter")
    reason = visitor.message()
    assert "broken-model could not be loaded" in reason
    assert "tokenizer.json" in reason
    assert "could not be loaded" in page.locator("#model-state").inner_text()
    assert "How many objects" not in log.read_text()  # nobody asked for content in the log
    context.close()
