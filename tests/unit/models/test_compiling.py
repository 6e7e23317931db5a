"""torch.compile: traced towers answer the same, and a missing compiler is said before it is missed."""

import pytest
import torch
from small_models import VARIANTS, make_inputs, seeded, vl_config

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, compiling
from deepseek_vl2.models.compiling import check_compiler, compile_towers


@pytest.fixture(autouse=True)
def fresh_traces():
    yield
    torch.compiler.reset()


@torch.no_grad()
def test_traced_towers_give_the_same_logits():
    config = vl_config(VARIANTS["small"])
    plain = seeded(DeepseekVLV2ForCausalLM, config)
    traced = seeded(DeepseekVLV2ForCausalLM, config)
    compile_towers(traced, backend="eager")
    for grids in ([(2, 1)], [(1, 1)]):
        inputs = make_inputs(grids)
        torch.testing.assert_close(traced(**inputs).logits, plain(**inputs).logits)
    assert traced.state_dict().keys() == plain.state_dict().keys()


def test_without_a_compiler_the_cpu_is_refused(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    check_compiler("cuda")
    with pytest.raises(ValueError, match=r"none of g\+\+, clang\+\+, c\+\+: install one, or do not compile"):
        check_compiler("cpu")
    monkeypatch.setattr(compiling.shutil, "which", lambda name: f"/bin/{name}" if name == "my-g++" else None)
    monkeypatch.setenv("CXX", "my-g++")
    check_compiler("cpu")
