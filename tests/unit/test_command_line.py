"""Every command says in one line what is wrong with its arguments."""

import importlib

import pytest

COMMANDS = {
    "inference": "parse_arguments",
    "web_demo": "parse_arguments",
    "deepseek_vl2.batch.__main__": "parse_arguments",
    "deepseek_vl2.doctor": "main",
    "deepseek_vl2.evaluate.__main__": "parse_arguments",
    "deepseek_vl2.nano.__main__": "main",
    "deepseek_vl2.nano.curves": "main",
    "deepseek_vl2.nano.evaluate": "parse_arguments",
    "deepseek_vl2.nano.examples": "main",
    "deepseek_vl2.serve.api.__main__": "parse_arguments",
    "deepseek_vl2.serve.compare": "parse_arguments",
    "deepseek_vl2.train.__main__": "main",
    "deepseek_vl2.train.merge": "main",
    "benchmarks.__main__": "parse_arguments",
    "benchmarks.checkpoints": "main",
}


@pytest.mark.parametrize("module", COMMANDS)
def test_an_unknown_option_is_one_line(module, capsys, monkeypatch, repository):
    monkeypatch.syspath_prepend(repository)
    with pytest.raises(SystemExit, match="2"):
        getattr(importlib.import_module(module), COMMANDS[module])(["--no-such-option"])
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert "error: " in line and "(--help lists all options)" in line
