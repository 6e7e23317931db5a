"""Whoever goes away frees the place within a second, wherever the request is."""

import asyncio
import http.client
import json
import re
import threading
import time
import urllib.parse

import pytest

from deepseek_vl2.serve.api import connections

LIMIT = 1.0  # seconds


@pytest.fixture(scope="module")
def server(endless, serve):
    with serve(endless, max_batch=1, max_waiting=2) as running:
        running.service.engine._on_step = lambda num_rows: time.sleep(0.01)
        yield running


def begin(server, **options):
    """Sends a question and does not wait for the answer."""
    address = urllib.parse.urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    body = {"model": "nano", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3000, **options}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


def is_idle(server):
    engine = server.service.engine
    return (server.service.places.num_open, engine.num_running, engine.num_waiting) == (0, 0, 0)


def num_cancelled(server):
    (figure,) = re.findall(
        r"^deepseek_vl2_cancelled_requests_total (.+)$", server.service.metrics.text().decode(), re.M
    )
    return float(figure)


@pytest.mark.parametrize("stream", [True, False])
def test_in_the_midst_of_an_answer(server, stream):
    before = num_cancelled(server)
    connection = begin(server, stream=stream)
    server.wait_until(lambda: server.service.engine.num_running == 1, 60)
    if stream:
        assert connection.getresponse().read1(40).startswith(b"data: {")
    connection.close()
    server.wait_until(lambda: is_idle(server), LIMIT)
    server.wait_until(lambda: num_cancelled(server) == before + 1, LIMIT)


@pytest.mark.parametrize("stream", [True, False])
def test_while_it_waits(server, stream):
    first = begin(server)
    server.wait_until(lambda: server.service.engine.num_running == 1, 60)
    second = begin(server, stream=stream)
    server.wait_until(lambda: server.service.engine.num_waiting == 1, 60)
    second.close()
    server.wait_until(lambda: server.service.places.num_open == 1, LIMIT)
    assert server.service.engine.num_waiting == 0
    assert server.service.engine.num_running == 1
    first.close()
    server.wait_until(lambda: is_idle(server), LIMIT)


def test_while_the_prompt_is_read(server):
    """A long prompt is let go of before the next layer."""
    reached = threading.Event()
    layers = server.service.engine._model.language.model.layers
    later = []

    def wait(*ignored):
        reached.set()
        time.sleep(0.2)

    hooks = [layers[0].register_forward_hook(wait), layers[2].register_forward_hook(lambda *args: later.append(1))]
    try:
        connection = begin(server)
        assert reached.wait(60)
        connection.close()
        server.wait_until(lambda: is_idle(server), LIMIT)
        assert not later
    finally:
        for hook in hooks:
            hook.remove()


def test_a_client_that_reads_no_more(monkeypatch, run_async):
    """Its time is that of the request, although sending waits for it."""
    monkeypatch.setattr(connections, "SEND_GRACE", 0)
    ends = []

    async def events():
        yield b"data: {}"

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def answer():
        deadline = asyncio.get_running_loop().time() + 0.1
        stream = connections.EventStream(events(), deadline, ends.append)
        await asyncio.wait_for(stream({"type": "http"}, asyncio.Event().wait, send), 10)

    run_async(answer())
    assert ends == [True]


def test_the_next_client_gets_the_place(server):
    gone = begin(server, stream=True)
    gone.getresponse().read1(10)
    gone.close()
    connection = begin(server, max_tokens=2)
    answer = json.load(connection.getresponse())
    assert answer["usage"]["completion_tokens"] == 2


def test_a_closing_server_ends_its_answers(endless, serve):
    with serve(endless, max_batch=1) as running:
        running.service.engine._on_step = lambda num_rows: time.sleep(0.01)
        one, other = begin(running), begin(running)
        running.wait_until(lambda: running.service.engine.num_waiting == 1, 60)
        running.service.engine.close()
        for connection in (one, other):
            response = connection.getresponse()
            assert response.status == 503
            assert json.load(response)["error"]["code"] == "shutting_down"
