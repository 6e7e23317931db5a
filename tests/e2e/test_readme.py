"""The README's code: every ```python block is run, in order, in one program."""

import importlib.util
import re
import subprocess
import sys

import pytest
from programs import Program, run_file

pytestmark = pytest.mark.e2e

FENCE = re.compile(r"^```(.*)$")
# "python no-test" is for what needs a GPU or a download.
KNOWN_INFOS = {"python", "python no-test", "shell", "text", "bibtex"}


def _blocks(readme: str) -> list[tuple[str, int, list[str]]]:
    """The fenced blocks: info, number of the first line, lines."""
    blocks: list[tuple[str, int, list[str]]] = []
    is_open = False
    for number, line in enumerate(readme.splitlines(), start=1):
        fence = FENCE.match(line)
        if fence and not is_open:
            blocks.append((fence[1], number + 1, []))
        elif not fence and is_open:
            blocks[-1][2].append(line)
        is_open = is_open != bool(fence)
    assert not is_open
    return blocks


@pytest.fixture(scope="module")
def blocks(repository):
    return _blocks((repository / "README.md").read_text(encoding="utf-8"))


def test_every_block_is_of_a_known_kind(blocks):
    """So that no block slips by untested under a misspelt name."""
    assert {info for info, _, _ in blocks} <= KNOWN_INFOS
    for info, number, lines in blocks:
        if info.startswith("python"):
            compile("\n" * (number - 1) + "\n".join(lines), "README.md", "exec")


def test_python_blocks_run(blocks, repository, tmp_path):
    """Runs beside the example pictures, so that what the blocks write does not land in the repository."""
    python = [(number, lines) for info, number, lines in blocks if info == "python"]
    assert len(python) >= 5
    program: list[str] = []
    for number, lines in python:
        program += [""] * (number - 1 - len(program)) + lines  # line numbers of errors are the README's
    (tmp_path / "README.py").write_text("\n".join(program), encoding="utf-8")
    (tmp_path / "images").symlink_to(repository / "images")
    done = subprocess.run(
        [sys.executable, "README.py"], capture_output=True, text=True, cwd=tmp_path, timeout=300, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    star = r"<\|ref\|>red star<\|/ref\|><\|det\|>\[\[\d+, \d+, \d+, \d+\]\]<\|/det\|>"
    assert re.search(star, done.stdout), done.stdout
    assert "\nred\n" in done.stdout  # its colour


def test_pictures_and_links_exist(repository):
    readme = (repository / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#:]+)\)", readme) + re.findall(r"images/\w+\.\w+", readme)
    assert targets
    assert not [target for target in targets if not (repository / target).exists()]


def test_commands_exist(blocks, repository):
    """Every option of `inference.py` and every module that a shell block names."""
    lines = (
        "\n".join("\n".join(lines) for info, _, lines in blocks if info == "shell").replace("\\\n", " ").splitlines()
    )
    options = {
        option
        for line in lines
        if "inference.py" in line
        for option in re.findall(r" (--[\w-]+)", line.partition("inference.py")[2])
    }
    shown = Program(run_file, repository / "inference.py", "--help").finish()
    assert shown.returncode == 0, shown.stderr
    assert options
    assert not [option for option in sorted(options) if option not in shown.stdout]
    modules = {module for line in lines for module in re.findall(r"python -m (deepseek_vl2[\w.]*)", line)}
    assert modules
    assert not [module for module in sorted(modules) if not importlib.util.find_spec(module)]
