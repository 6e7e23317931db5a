"""Rules that the whole project keeps: CONTRIBUTING.md says why."""

import ast
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "deepseek_vl2"
CODE_FOLDERS = ("deepseek_vl2", "tests", "benchmarks", "examples", "docs", ".ci")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".ipynb", ".css", ".js", ".html", ""}
MAX_LINES = 700
# Folders of someone's own machine, and options that name a package index: neither works anywhere else.
PRIVATE = re.compile(r"/(?:home|Users|root|work)/\w|--(?:extra-)?index-url|--find-links")
SET_UP_AND_ANSWER = (
    "python3.11 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/python inference.py",
    ".ci/run",
)
TEST_COMMAND = ".venv/bin/python -m pytest -n 2"


def _python_files(*folders: str) -> list[Path]:
    return [*ROOT.glob("*.py"), *(path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))]


def _texts() -> Iterator[tuple[Path, str]]:
    own = [path for path in ROOT.iterdir() if path.is_file()]
    nested = [path for folder in CODE_FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    for path in (*own, *nested):
        parts = path.relative_to(ROOT).parts
        if path.suffix in TEXT_SUFFIXES and "__pycache__" not in parts and parts[:3] != ("tests", "parity", "data"):
            yield path.relative_to(ROOT), path.read_text(encoding="utf-8")


def _forbidden(source: str) -> list[str]:
    """What no file of the package may do, as "line: what"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
                found.append(f"{node.lineno}: {name}()")
            case ast.ExceptHandler(type=None):
                found.append(f"{node.lineno}: bare except")
            case ast.ExceptHandler(type=ast.Name(id="Exception" | "BaseException" as name)):
                found.append(f"{node.lineno}: except {name}")
            case ast.Assert():
                found.append(f"{node.lineno}: assert")
    return found


def _imports(path: Path) -> set[str]:
    """Names of the modules that a file imports, relative ones in full."""
    package = path.relative_to(ROOT).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*start, *([node.module] if node.module else ())))
            found.update({module, *(f"{module}.{alias.name}" for alias in node.names)})
    return found


def _is_within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def test_the_rules_find_what_they_look_for():
    source = "try:\n    eval('1')\nexcept:\n    assert x\ntry:\n    exec('')\nexcept Exception:\n    pass\n"
    found = {line.split(": ")[1] for line in _forbidden(source)}
    assert found == {"eval()", "exec()", "bare except", "assert", "except Exception"}
    assert _imports(PACKAGE / "models" / "__init__.py") >= {"transformers", "deepseek_vl2.models.conversion_mapping"}


def test_no_eval_no_broad_except_no_assert():
    files = _python_files("deepseek_vl2")
    assert len(files) > 20
    found = {str(path.relative_to(ROOT)): _forbidden(path.read_text(encoding="utf-8")) for path in files}
    assert not {path: lines for path, lines in found.items() if lines}


def test_no_file_is_too_long_to_hold_in_the_head():
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in _python_files(*CODE_FOLDERS)}
    assert not {str(path): lines for path, lines in lengths.items() if lines > MAX_LINES}


def test_nothing_points_to_someones_own_machine():
    own = Path(__file__).relative_to(ROOT)
    texts = dict(_texts())
    assert len(texts) > 40
    found = {str(path): PRIVATE.findall(text) for path, text in texts.items() if path != own}
    assert not {path: hits for path, hits in found.items() if hits}


def test_imports_go_one_way():
    """`models` knows neither `serve` nor `utils`; gradio belongs to the demo alone."""
    wrong = []
    for path in _python_files("deepseek_vl2"):
        place = path.relative_to(ROOT).as_posix()
        for module in _imports(path):
            upwards = place.startswith("deepseek_vl2/models/") and _is_within(
                module, "deepseek_vl2.serve", "deepseek_vl2.utils", "deepseek_vl2.nano", "deepseek_vl2.train"
            )
            is_demo = place == "web_demo.py" or place.startswith("deepseek_vl2/serve/app_modules/")
            if upwards or (_is_within(module, "gradio") and not is_demo):
                wrong.append(f"{place} imports {module}")
    assert not wrong


def test_test_files_have_names_of_their_own():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) > 10
    assert len(names) == len(set(names))


@pytest.mark.parametrize("command", [*SET_UP_AND_ANSWER, TEST_COMMAND])
def test_readme_names_the_commands(command):
    shell = re.findall(
        r"^```shell\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert command in "".join(shell).splitlines()


def test_ci_runs_the_commands_of_readme_and_pre_commit():
    script = ROOT / ".ci" / "run"
    lines = script.read_text(encoding="utf-8").splitlines()
    assert os.access(script, os.X_OK)
    assert lines[-1] == TEST_COMMAND
    hooks = re.findall(r"^ +entry: (.+)$", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(hooks) == 4
    assert [line for line in lines if line in hooks] == hooks


def test_pyproject_ships_what_the_code_reads():
    """Every file of the package that is not Python is covered by package-data, or the wheel would lack it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["deepseek_vl2"]
    covered = {path for pattern in patterns for path in PACKAGE.glob(pattern) if path.is_file()}
    others = {
        path
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and "__pycache__" not in path.parts
    }
    assert others >= {PACKAGE / "py.typed"}
    assert others == covered
    for name in settings["project"]["license-files"]:
        assert (ROOT / name).is_file()
