"""The wheel: what it holds, and that it works on its own in another folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

SOURCES = ("pyproject.toml", "README.md", "LICENSE-CODE", "LICENSE-MODEL", "deepseek_vl2")
MAX_BYTES = 16e6
ANSWER = """
import sys, pathlib, torch
from PIL import Image
import deepseek_vl2, deepseek_vl2.nano
from deepseek_vl2.utils.io import load_pretrained_model

site = pathlib.Path(sys.argv[1])
if site not in pathlib.Path(deepseek_vl2.__file__).parents:
    sys.exit(f"imported {deepseek_vl2.__file__}, not the wheel")
tokenizer, processor, model = load_pretrained_model("nano", device="cpu")
conversation = [
    {"role": "<|User|>", "content": "<image>\\nHow many objects are there?"},
    {"role": "<|Assistant|>", "content": ""},
]
inputs = processor(conversations=conversation, images=[Image.new("RGB", (150, 90), "white")])
ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
print(ids.shape[1] - inputs.input_ids.shape[1])
"""


def _run(*command: str | Path, **options) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(repository, tmp_path_factory) -> Path:
    """The wheel, built from a copy: building leaves files behind, and would take up old ones."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        source = repository / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    folder = tmp_path_factory.mktemp("wheel")
    # setuptools comes with the test extra: no network, no build environment.
    _run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, copy)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_all_files_of_the_package(wheel, repository):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = repository / "deepseek_vl2"
    expected = {
        path.relative_to(repository).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names >= expected
    checkpoint = "deepseek_vl2/nano/checkpoint"
    needed = ("config.json", "processor_config.json", "tokenizer.json", "model.safetensors", "README.md")
    assert names >= {f"{checkpoint}/{name}" for name in needed}
    assert "deepseek_vl2/py.typed" in names
    assert {name.rpartition("/")[2] for name in names if "licenses/" in name} == {"LICENSE-CODE", "LICENSE-MODEL"}
    assert not [name for name in names if name.startswith(("tests/", "examples/", "images/"))]
    assert wheel.stat().st_size < MAX_BYTES


def test_wheel_answers_from_another_folder(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    _run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel)
    done = _run(sys.executable, "-c", ANSWER, site, cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(site)})
    assert 1 <= int(done.stdout) <= 3
