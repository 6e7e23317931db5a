"""Imports go one way, from the data to the scripts, and importing the package does nothing."""

import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "deepseek_vl2"
SCRIPTS = [path for path in (ROOT / "inference.py", ROOT / "web_demo.py") if path.exists()]
# A module may import those of its own rank and above. The first match counts, and the longest names stand first.
RANKS = {
    "deepseek_vl2.models.special_tokens": 0,
    "deepseek_vl2.models.tiling": 0,
    "deepseek_vl2.models.conversation": 0,
    "deepseek_vl2.models.parallel": 0,
    "deepseek_vl2.models.configuration_deepseek_vl_v2": 0,
    "deepseek_vl2.models.configuration_deepseek": 0,
    "deepseek_vl2.models.modeling_deepseek_vl_v2": 2,
    "deepseek_vl2.models.": 1,
    "deepseek_vl2.models": 2,
    "deepseek_vl2.utils": 3,
    "deepseek_vl2.serve.inference": 4,
    "deepseek_vl2.serve.chat_session": 4,
    "deepseek_vl2.serve.app_modules": 5,
    "deepseek_vl2.serve.api": 5,
    "deepseek_vl2.serve.compare": 5,
    "deepseek_vl2.serve": 3,
    "deepseek_vl2.nano.": 5,
    "deepseek_vl2.nano": 0,  # where the checkpoint lies, and nothing else
    "deepseek_vl2.batch": 5,
    "deepseek_vl2.doctor": 5,
    "deepseek_vl2.evaluate": 5,
    "deepseek_vl2.train": 5,
    "deepseek_vl2": 0,
    "inference": 6,
    "web_demo": 6,
}


def rank(module: str) -> int:
    for prefix, value in RANKS.items():
        if module == prefix or module.startswith(prefix if prefix.endswith(".") else prefix + "."):
            return value
    raise AssertionError(f"{module} has no rank")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in [*PACKAGE.rglob("*.py"), *SCRIPTS]}


def imports(module: str, path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            submodules = {f"{base}.{alias.name}" for alias in node.names} & MODULES.keys()
            has_others = any(f"{base}.{alias.name}" not in MODULES for alias in node.names)
            found |= submodules | ({base} if has_others or not submodules else set())
    return found


IMPORTS = {module: imports(module, path) for module, path in MODULES.items()}


def test_the_reader_of_imports_sees_every_form():
    assert "deepseek_vl2.models.configuration_deepseek" in IMPORTS["deepseek_vl2.models"]
    assert "deepseek_vl2.models.tiling" in IMPORTS["deepseek_vl2.models.modeling_deepseek_vl_v2"]
    assert "torch" in IMPORTS["deepseek_vl2.models.modeling_deepseek"]
    assert len(MODULES) > 25


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module):
    own = {name for name in IMPORTS[module] if name.split(".")[0] in {"deepseek_vl2", "inference", "web_demo"}}
    wrong = {name for name in own if rank(name) > rank(module)}
    assert not wrong, f"{module} imports {sorted(wrong)}, which build on it"


def test_no_circles():
    graph = {
        module: {name for name in names if name in MODULES and name != module} for module, names in IMPORTS.items()
    }
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("deepseek_vl2.models")))
def test_models_know_neither_serve_nor_utils(module):
    others = ("deepseek_vl2.serve", "deepseek_vl2.utils", "deepseek_vl2.nano", "deepseek_vl2.train")
    assert not [name for name in IMPORTS[module] if name.startswith(others)]


def test_only_the_web_page_needs_gradio():
    users = {module for module, names in IMPORTS.items() if any(name.split(".")[0] == "gradio" for name in names)}
    assert not {name for name in users if name != "web_demo" and not name.startswith("deepseek_vl2.serve.app_modules")}


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)


def test_importing_the_package_has_no_side_effect():
    heavy = "{'torch', 'transformers', 'timm', 'PIL', 'gradio', 'numpy'}"
    result = run(
        "import sys, logging, warnings; before = (list(logging.root.handlers), list(warnings.filters))\n"
        "import deepseek_vl2; assert deepseek_vl2.__version__\n"
        f"print(sorted({heavy} & set(sys.modules)), [n for n in sys.modules if n.startswith('deepseek_vl2.')])\n"
        "assert before == (list(logging.root.handlers), list(warnings.filters))"
    )
    assert result.stdout.strip() == "[] ['deepseek_vl2.nano']"  # which only says where the checkpoint lies
    assert result.stderr == ""


# Imported one after the other in one process, and what must not be loaded after it.
STEPS = {
    "deepseek_vl2": {"torch", "transformers", "numpy"},
    "deepseek_vl2.models": {
        "numba",
        "gradio",
        "deepseek_vl2.serve",
        "deepseek_vl2.utils",
        "deepseek_vl2.nano.tokenizer",
    },
    "deepseek_vl2.utils.io": {"numba", "gradio", "deepseek_vl2.serve"},
    "deepseek_vl2.serve.app_modules.utils": {"gradio"},
    "deepseek_vl2.train": {"gradio"},
}


def test_importing_prints_nothing_and_needs_nothing_that_builds_on_it():
    result = run(
        "import importlib, json, sys\n"
        "sys.modules['peft'] = sys.modules['tensorboard'] = None\n"  # as where they are not installed
        "loaded = {}\n"
        f"for name in {list(STEPS)}:\n"
        "    importlib.import_module(name)\n"
        "    loaded[name] = list(sys.modules)\n"
        "from deepseek_vl2.train import TrainConfig, read_config, train\n"
        "TrainConfig(train_file='a', output_dir='b')\n"
        "print(json.dumps(loaded))"
    )
    assert result.stderr == ""
    loaded = json.loads(result.stdout)  # one line and nothing else
    assert "torch" in loaded["deepseek_vl2.models"]
    assert {name: unwanted & set(loaded[name]) for name, unwanted in STEPS.items()} == {name: set() for name in STEPS}
