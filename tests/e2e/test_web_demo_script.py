"""web_demo.py's command line: mistakes cost one line, before anything is loaded."""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def script(repository):
    spec = importlib.util.spec_from_file_location("web_demo", repository / "web_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--port", "99999"], "--port 99999 must be 0 to 65535"),
        (["--concurrency", "0"], "--concurrency 0"),
        (["--max-image-mb", "-1"], "--max-image-mb -1"),
        (["--max-image-mb", "nan"], "--max-image-mb nan"),
        (["--max-cache-mb", "-1"], "--max-cache-mb -1"),
        (["--chunk_size", "0"], "--chunk_size 0"),
        (["--local_path", "no/such/folder"], "no/such/folder is not a model folder"),
        (["--auth", "nobody"], "--auth must be USER:PASSWORD"),
        (["--auth", ":secret"], "--auth must be USER:PASSWORD"),
        (["--dtype", "int3"], "invalid choice: 'int3'"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_mistakes_cost_one_line(script, capsys, monkeypatch, arguments, complaint):
    monkeypatch.setattr(script, "serve", lambda *_: pytest.fail("it was served"))
    try:
        code = script.main(arguments)
    except SystemExit as end:
        code = end.code
    assert code == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert complaint in captured.err
    assert captured.out == ""


def test_without_options_it_serves_nano_on_this_machine_only(script):
    options = script.parse_arguments([])
    assert (options.model_name, options.local_path, options.ip) == ("nano", None, "127.0.0.1")
    assert not options.share
    assert not options.lazy_load


def test_an_open_page_without_login_is_warned_of(script, capsys, monkeypatch):
    served = []
    monkeypatch.setattr(script, "serve", lambda options, folder: served.append(folder.is_dir()))
    assert script.main(["--ip", "0.0.0.0"]) == 0
    assert "--auth" in capsys.readouterr().err
    assert script.main(["--ip", "0.0.0.0", "--auth", "me:secret"]) == 0
    assert script.main([]) == 0
    assert capsys.readouterr().err == ""
    assert served == [True, True, True]


def test_an_address_that_cannot_be_had_costs_one_line_before_anything_is_imported(script, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepseek_vl2.serve.app_modules.server", None)  # importing it fails
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for ip in ("127.0.0.1", "0.0.0.0"):
            assert script.main(["--ip", ip, "--auth", "me:secret", "--port", str(port)]) == 2
            complaint = f"web_demo.py: error: --port {port} is in use; take another, or 0 for any that is free\n"
            assert capsys.readouterr().err == complaint
    assert script.main(["--ip", "203.0.113.9", "--auth", "me:secret"]) == 2  # an address for documents, nobody's
    assert "--ip 203.0.113.9 --port 7860 cannot be served: Cannot assign" in capsys.readouterr().err


def has_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_it_ends_at_once_in_the_middle_of_a_load_and_leaves_no_uploads(repository, tmp_path):
    """One start for several promises: IPv6, the page before the model, SIGTERM as Ctrl-C."""
    ip = "::1" if has_ipv6() else "127.0.0.1"
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, repository / "web_demo.py", "--ip", ip, "--port", "0"],
            cwd=repository,
            env={**os.environ, "TMPDIR": str(tmp_path)},
            stdout=output,
            stderr=output,
        )
    try:
        end = time.monotonic() + 120
        while not (found := re.search(r"the page is at (http\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        assert httpx.get(found[1], timeout=60).status_code == 200
        assert list(tmp_path.glob("deepseek_vl2-web-*"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    assert "the model is loaded" not in log.read_text()
    assert not list(tmp_path.glob("deepseek_vl2-web-*"))


def test_the_reference_s_options_are_all_there_and_in_the_readme(repository):
    shown = subprocess.run(
        [sys.executable, repository / "web_demo.py", "--help"], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    readme = (repository / "README.md").read_text(encoding="utf-8")
    options = set(re.findall(r"--[\w-]+", shown)) - {"--help"}
    reference = {"--model_name", "--local_path", "--chunk_size", "--ip", "--port", "--root_path", "--lazy_load"}
    assert options >= reference | {"--device", "--dtype", "--share", "--auth", "--max-image-mb", "--concurrency"}
    assert not [option for option in sorted(options) if f"`{option}" not in readme]


def test_the_page_needs_no_heavy_library(repository):
    """With --lazy_load the first page does not wait for torch."""
    code = (
        "import sys, deepseek_vl2.serve.app_modules.server\n"
        "sys.exit(str({'torch', 'transformers', 'timm', 'torchvision'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=300)
    assert done.stderr.strip() == ""
