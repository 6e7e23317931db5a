import ctypes
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.memory import peak_resident_bytes, reset_peak, resident_bytes
from deepseek_vl2 import nano
from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM, narrower_stored_dtype
from deepseek_vl2.utils.io import load_pretrained_model

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def test_weights_and_configurations_are_those_of_a_direct_load(tmp_path):
    widened = load_pretrained_model("nano", "float32", "cpu").model
    direct = DeepseekVLV2ForCausalLM.from_pretrained(nano.path(), dtype=torch.float32)
    expected = direct.state_dict()
    assert widened.state_dict().keys() == expected.keys()
    for name, tensor in widened.state_dict().items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(tensor, expected[name]), name
    assert widened.config.to_dict() == direct.config.to_dict()
    widened.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("stored", "wanted", "narrower"),
    [
        ({BF16}, F32, BF16),
        ({F16}, F32, F16),
        ({BF16}, BF16, None),
        ({BF16}, F16, None),  # rounded, not widened
        ({F32}, BF16, None),
        ({F32, BF16}, F32, None),
        ({BF16, torch.int8}, F32, None),
    ],
)
def test_what_is_widened(tmp_path, stored, wanted, narrower):
    weights = {str(dtype): torch.zeros(2, dtype=dtype) for dtype in stored}
    save_file(weights, tmp_path / "model.safetensors")
    assert narrower_stored_dtype(tmp_path, wanted) == narrower


@pytest.fixture
def freed_weights_go_back_to_the_system():
    """glibc keeps freed blocks for itself, of up to 32 MB in a process that has freed such: not held by our code."""
    mmap_threshold, trim_threshold = -3, -1  # parameters of mallopt, in malloc.h
    glibc = ctypes.CDLL("libc.so.6")
    assert glibc.mallopt(mmap_threshold, 1 << 20) == 1
    yield
    glibc.mallopt(mmap_threshold, 32 << 20)  # the most that glibc comes to by itself
    glibc.mallopt(trim_threshold, 64 << 20)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory can be reset on Linux only")
@pytest.mark.usefixtures("freed_weights_go_back_to_the_system")
def test_weights_are_in_memory_once(tmp_path):
    shutil.copytree(nano.path(), tmp_path, dirs_exist_ok=True)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["language_config"] |= {"n_routed_experts": 16, "moe_intermediate_size": 2048}
    large = DeepseekVLV2ForCausalLM(DeepseekVLV2Config(**fields)).bfloat16()
    large.save_pretrained(tmp_path)
    del large
    assert reset_peak()
    before = resident_bytes()
    model = load_pretrained_model(tmp_path, "float32", "cpu").model
    num_bytes = sum(weight.nbytes for weight in model.parameters())
    largest = max(weight.nbytes for weight in model.parameters())
    assert num_bytes > 350e6 > 5 * largest
    assert peak_resident_bytes() - before < num_bytes + 2 * largest  # more than twice, if transformers casts them
