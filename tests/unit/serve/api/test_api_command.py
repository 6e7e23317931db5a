"""The command: what it refuses at once, its defaults, and its log."""

import logging
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from deepseek_vl2.serve.api.__main__ import (
    KEY_VARIABLE,
    WithoutContent,
    api_keys,
    check_arguments,
    main,
    model_name,
    parse_arguments,
)


def test_defaults_serve_this_machine_only_and_fetch_nothing():
    options = parse_arguments([])
    assert (options.host, options.port, options.allow_url_fetch) == ("127.0.0.1", 8000, False)
    check_arguments(options)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--port", "70000"],
        ["--max_batch", "0"],
        ["--max_waiting", "-1"],
        ["--max_per_client", "0"],
        ["--timeout", "0"],
        ["--timeout", "nan"],
        ["--max_body_mb", "-1"],
        ["--max_pictures", "0"],
        ["--chunk_size", "0"],
        ["--api_key", " "],
        ["--api_key", "Schlüssel"],
    ],
    ids=" ".join,
)
def test_numbers_and_keys_that_cannot_be(arguments, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "error:" in err


def test_a_port_in_use_is_told_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["--port", str(taken.getsockname()[1]), "--model_path", "/no/such/model"]) == 2
    assert "in use" in capsys.readouterr().err


def test_a_model_that_is_not_there(capsys):
    assert main(["--port", "0", "--model_path", "./no-such-model"]) == 2
    assert "there is no model folder" in capsys.readouterr().err


def test_weights_can_be_held_in_fewer_bits(monkeypatch, capsys):
    chosen = []

    def load(*arguments, **options):
        chosen.append((*arguments, options["quantize"]))
        raise ValueError("not now")

    monkeypatch.setattr("deepseek_vl2.utils.io.load_pretrained_model", load)
    assert main(["--port", "0", "--device", "cpu", "--quantize", "int4"]) == 2
    assert chosen == [("nano", None, "cpu", "int4")]
    assert "not now" in capsys.readouterr().err


def test_keys_come_from_the_command_line_or_the_environment(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "a, b ")
    assert api_keys(parse_arguments([])) == ("a", "b")
    assert api_keys(parse_arguments(["--api_key", "c"])) == ("c",)
    monkeypatch.delenv(KEY_VARIABLE)
    assert api_keys(parse_arguments([])) == ()


def test_names_of_models(tmp_path):
    (tmp_path / "merged").mkdir()
    assert model_name(str(tmp_path / "merged")) == "merged"
    assert model_name("nano") == "nano"
    assert model_name("deepseek-ai/deepseek-vl2-tiny") == "deepseek-ai/deepseek-vl2-tiny"


def test_unexpected_errors_are_logged_without_their_words():
    try:
        raise KeyError("what a user wrote")
    except KeyError:
        record = logging.LogRecord("uvicorn.error", logging.ERROR, "f", 1, "Exception", (), sys.exc_info())
    assert WithoutContent().filter(record)
    text = logging.Formatter().format(record)
    assert text.startswith("unexpected error: KeyError in test_api_command.py, line ")
    assert "user" not in text


def test_it_serves_and_ends_when_it_is_told_to(repository):
    command = [sys.executable, "-m", "deepseek_vl2.serve.api", "--port", "0", "--dtype", "float32"]
    server = subprocess.Popen(
        command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    try:
        line = server.stdout.readline()
        assert line.startswith("nano at http://127.0.0.1:"), server.stderr.read()
        with urllib.request.urlopen(line.split()[-1] + "/models", timeout=60) as response:
            assert b'"nano"' in response.read()
        server.send_signal(signal.SIGTERM)
        _, err = server.communicate(timeout=60)
    finally:
        server.kill()
    assert "GET /v1/models 200 in" in err
    assert "Traceback" not in err
