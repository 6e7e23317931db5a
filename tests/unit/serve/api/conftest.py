"""Servers for tests: nano, and a model that never stops talking, each behind a real uvicorn where that matters."""

import base64
import io
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

import openai
import pytest
import torch
import uvicorn
from PIL import Image

from deepseek_vl2.nano.architecture import nano_processor, untrained_nano
from deepseek_vl2.serve.api.app import create_app
from deepseek_vl2.serve.api.service import ChatService
from deepseek_vl2.serve.api.settings import ServerSettings
from deepseek_vl2.utils.io import LoadedModel, load_pretrained_model


@dataclass
class Running:
    """A server that runs, and its address."""

    service: ChatService
    url: str

    @property
    def client(self):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=120)

    def wait_until(self, condition, seconds):
        """Seconds that it took; fails if it takes longer than that."""
        start = time.monotonic()
        while not condition():
            assert time.monotonic() - start < seconds, "it took too long"
            time.sleep(0.005)
        return time.monotonic() - start


@contextmanager
def serving(loaded, **settings):
    fetcher = settings.pop("fetcher", None)
    service = ChatService(loaded, ServerSettings(**settings), fetcher)
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(service), log_config=None, access_log=False, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Running(service, f"http://127.0.0.1:{listening.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def nano():
    """In float32, where equal answers do not hang on the rounding of bfloat16."""
    return load_pretrained_model("nano", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def endless():
    """A model with random weights, which goes on until its positions end."""
    processor = nano_processor()
    model = untrained_nano(processor.tokenizer, seed=3).eval()
    torch.nn.init.normal_(model.language.lm_head.weight, std=0.3, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        model.language.lm_head.weight[processor.eos_id] = 0
    return LoadedModel(processor.tokenizer, processor, model)


@pytest.fixture(scope="session")
def nano_server(nano):
    with serving(nano, max_batch=4) as running:
        yield running


@pytest.fixture(scope="session")
def serve():
    """`serving`, for servers of one test or one file."""
    return serving


@pytest.fixture(scope="session")
def star(repository):
    """The bundled scene with a red star, and its data URI."""
    path = repository / "images" / "visual_grounding_1.jpeg"
    return Image.open(path), f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"


@pytest.fixture(scope="session")
def small():
    """A picture that costs little."""
    packed = io.BytesIO()
    Image.new("RGB", (60, 40), "red").save(packed, "PNG")
    return f"data:image/png;base64,{base64.b64encode(packed.getvalue()).decode()}"


@pytest.fixture(scope="session")
def ask():
    """Builds messages: text, with pictures before it."""

    def build(text, *pictures):
        parts = [{"type": "image_url", "image_url": {"url": picture}} for picture in pictures]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}]

    return build
