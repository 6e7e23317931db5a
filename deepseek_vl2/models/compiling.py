"""torch.compile for the vision tower and the language model."""

import os
import shutil
from typing import Any

_COMPILERS = ("g++", "clang++", "c++")


def check_compiler(device_type: str) -> None:
    """Refuses to compile where that would fail at the first answer.

    Raises:
        ValueError: If the code would run on the CPU and there is no C++ compiler.
    """
    candidates = (os.environ.get("CXX"), *_COMPILERS)
    if device_type == "cpu" and not any(name and shutil.which(name) for name in candidates):
        raise ValueError(
            f"torch.compile needs a C++ compiler on the CPU, and there is none of {', '.join(_COMPILERS)}: "
            "install one, or do not compile"
        )


def compile_towers(model: Any, backend: str = "inductor") -> None:
    """Has the vision tower and the decoder compiled at their next use, in place; results stay the same up to rounding.

    Sizes are compiled as variables, so other pictures and prompts reuse the code; the first answers still take minutes.

    Args:
        model: A `DeepseekVLV2ForCausalLM`.
        backend: Of torch.compile; `"inductor"` makes code, `"eager"` only traces.

    Raises:
        ValueError: See `check_compiler`.
    """
    if backend == "inductor":
        check_compiler(model.device.type)
    for tower in (model.vision, model.language.model):
        tower.compile(dynamic=True, backend=backend)
