"""Drives the web demo in Debian's Chromium: one server with nano and one browser for all tests of this folder."""

import contextlib
import time
from pathlib import Path

import pytest
from browsing import TIMEOUT, Visitor, wait_until

CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
]


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items):
    """Keeps these tests on one worker: they share server and browser, and playwright an event loop."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.xdist_group("browser"))


@pytest.fixture(scope="package")
def served_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        patch.setenv("GRADIO_HEARTBEAT_INTERVAL", "1")  # seconds until an idle page that was closed is noticed
        yield folder


@pytest.fixture(scope="package")
def demo(served_folder):
    """The demo, served in this process: tests look at its engine and sessions, and slow its model down."""
    from deepseek_vl2.serve.app_modules.server import ServerOptions, build_demo, launch

    options = ServerOptions(
        model_path="nano",
        model_name="nano",
        device="cpu",
        dtype=None,  # what suits the CPU: without bfloat16 instructions answers would take minutes
        chunk_size=-1,
        concurrency=1,
        max_image_mb=2,
        max_cache_mb=64,
        pictures=Path(__file__).parents[2] / "images",
        folder=served_folder,
    )
    demo = build_demo(options)
    demo.engine.start_loading().result(TIMEOUT)
    blocks = launch(demo, server_name="127.0.0.1", server_port=None)
    demo.address = blocks.local_url
    yield demo
    demo.engine.close()
    blocks.close()


@pytest.fixture(scope="package")
def chromium():
    """The browser.

    Raises:
        FileNotFoundError: it is not installed; `.ci/run` does that.
    """
    from playwright.sync_api import sync_playwright

    if not CHROMIUM.exists():
        raise FileNotFoundError(f"{CHROMIUM} is missing: apt-get install chromium, or run .ci/run as root")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, demo):
    """Opens the page for as many users as a test needs."""
    visitors = []

    def open_page(**options):
        visitors.append(Visitor(chromium, options.pop("address", demo.address), **options))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.context.close()
    wait_until(lambda: demo.engine.num_running == demo.engine.num_waiting == 0)


@pytest.fixture
def visitor(visit):
    return visit()


@pytest.fixture
def slow_model(demo):
    """Slows the model down: seconds before each layer, or before each token."""
    model = demo.engine.start_loading().result(TIMEOUT)._model
    with contextlib.ExitStack() as hooks:

        def slow_down(layer=0.0, token=0.0):
            def wait(module, inputs, seconds):
                time.sleep(seconds)

            for module in model.language.model.layers if layer else [model.language.model.layers[0]]:
                hook = module.register_forward_pre_hook(lambda m, i: wait(m, i, layer or token))
                hooks.callback(hook.remove)

        slow_down.stop = hooks.close
        yield slow_down


@pytest.fixture(scope="session")
def images(repository):
    return repository / "images"
