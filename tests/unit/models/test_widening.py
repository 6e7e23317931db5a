import argparse
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.load_once import load_in_a_process
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


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much memory a process held at most")
def test_weights_are_in_memory_once(tmp_path):
    """In a process of its own: in one that ran for long the allocator keeps freed memory for itself."""
    shutil.copytree(nano.path(), tmp_path, dirs_exist_ok=True)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["language_config"] |= {"n_routed_experts": 16, "moe_intermediate_size": 2048}
    large = DeepseekVLV2ForCausalLM(DeepseekVLV2Config(**fields)).bfloat16()
    large.save_pretrained(tmp_path)
    num_bytes = sum(2 * weight.nbytes for weight in large.parameters())
    largest = max(2 * weight.nbytes for weight in large.parameters())
    assert num_bytes > 350e6 > 5 * largest
    options = argparse.Namespace(model_path=str(tmp_path), dtype="float32", device="cpu", quantize=None, pack=False)
    load = load_in_a_process(options, num_threads=2)
    assert load["weight_bytes"] == num_bytes
    # More than twice, if transformers casts them.
    assert load["peak_bytes"] - load["import_bytes"] < num_bytes + 2 * largest
