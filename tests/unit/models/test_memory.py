"""What a checkpoint will take, what there is, and what is said when it does not fit."""

import pytest
import torch

from deepseek_vl2 import nano
from deepseek_vl2.models import DeepseekVLV2ForCausalLM, memory
from deepseek_vl2.models.memory import check_memory, checkpoint_bytes


def test_bytes_of_nano():
    model = DeepseekVLV2ForCausalLM.from_pretrained(nano.path())
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert checkpoint_bytes(nano.path()) == checkpoint_bytes(nano.path(), dtype="auto") == held
    assert checkpoint_bytes(nano.path(), dtype=torch.float32) == 2 * held
    assert 0.5 * held < checkpoint_bytes(nano.path(), "int8") < 0.6 * held
    assert 0.28 * held < checkpoint_bytes(nano.path(), "int4") < 0.45 * held


@pytest.mark.parametrize(
    ("available", "message"),
    [
        (7_000_000, r"they take 11\.\d MB as bfloat16, 7\.0 MB are available; would fit: int8 \(6\.\d MB\), int4 \("),
        (5_500_000, r"would fit: int4 \(4\.\d MB\)$"),
        (1_000_000, "no quantisation would fit; take a smaller model"),
    ],
)
def test_too_little_memory_is_said_with_what_would_fit(monkeypatch, available, message):
    monkeypatch.setattr(memory, "available_bytes", lambda: available)
    with pytest.raises(ValueError, match=message):
        check_memory(nano.path())


def test_enough_memory_passes(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 7_000_000)
    check_memory(nano.path(), "int8")


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="unknown quantisation 'int3': take int8 or int4"):
        checkpoint_bytes(nano.path(), "int3")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"lacks a file.*model\.safetensors"):
        checkpoint_bytes(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="broken or cut off"):
        checkpoint_bytes(tmp_path)
