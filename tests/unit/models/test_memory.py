"""What a checkpoint will take, what there is, and what is said when it does not fit."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepseek_vl2 import nano
from deepseek_vl2.models import DeepseekVLV2ForCausalLM, WeightOnlyConfig, memory
from deepseek_vl2.models.memory import check_memory, checkpoint_bytes


def test_bytes_of_nano():
    model = DeepseekVLV2ForCausalLM.from_pretrained(nano.path())
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert checkpoint_bytes(nano.path()) == checkpoint_bytes(nano.path(), dtype="auto") == held
    assert checkpoint_bytes(nano.path(), dtype=torch.float32) == 2 * held
    assert 0.5 * held < checkpoint_bytes(nano.path(), "int8") < 0.6 * held
    assert 0.28 * held < checkpoint_bytes(nano.path(), "int4") < 0.45 * held


def megabytes(size):
    return f"{size / 1e6:.1f} MB"


def test_too_little_memory_is_said_with_what_would_fit(monkeypatch):
    whole, int8, int4 = (checkpoint_bytes(nano.path(), kind) for kind in (None, "int8", "int4"))
    fits_int8 = f"int8 ({megabytes(int8)})"
    fits_int4 = f"int4 ({megabytes(int4)})"
    for available, way_out in (
        (whole - 1, f"would fit: {fits_int8}, {fits_int4}"),
        (int8 - 1, f"would fit: {fits_int4}"),
        (int4 - 1, "no quantisation would fit; take a smaller model"),
    ):
        monkeypatch.setattr(memory, "available_bytes", lambda available=available: available)
        with pytest.raises(ValueError, match="not enough memory") as caught:
            check_memory(nano.path())
        assert str(caught.value).endswith(
            f"they take {megabytes(whole)} as bfloat16, {megabytes(available)} are available; {way_out}"
        )


def test_too_little_memory_for_float32_is_said_with_bfloat16(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: checkpoint_bytes(nano.path()))
    with pytest.raises(ValueError, match=r"as float32, .* would fit: bfloat16 \(.*\), int8 \(.*\), int4 \("):
        check_memory(nano.path(), dtype=torch.float32)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_checkpoint_is_called_what_it_is(monkeypatch, tmp_path, bits):
    config = WeightOnlyConfig(bits=bits)
    DeepseekVLV2ForCausalLM.from_pretrained(nano.path(), quantization_config=config).save_pretrained(tmp_path)
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**6)
    with pytest.raises(ValueError, match=f"as {config.name}, 1.0 MB are available") as caught:
        check_memory(tmp_path)
    assert str(caught.value).endswith("no quantisation would fit; take a smaller model")


def test_int4_is_advised_for_an_int8_checkpoint_where_it_would_fit(monkeypatch, tmp_path):
    config = WeightOnlyConfig(bits=8)
    DeepseekVLV2ForCausalLM.from_pretrained(nano.path(), quantization_config=config).save_pretrained(tmp_path)
    int4 = checkpoint_bytes(nano.path(), "int4")
    monkeypatch.setattr(memory, "available_bytes", lambda: int4 + 10**5)
    with pytest.raises(ValueError, match="not enough memory") as caught:
        check_memory(tmp_path)
    told = re.search(r"its original quantised to int4 would fit \(([\d.]+) MB\)$", str(caught.value))
    # Experts are fused in it, which fills up fewer rows.
    assert told and float(told[1]) == pytest.approx(int4 / 1e6, rel=0.01)


def test_from_pretrained_refuses_quantised_weights_that_do_not_fit(monkeypatch):
    config = WeightOnlyConfig(bits=4, group_size=32)
    needed = checkpoint_bytes(nano.path(), config)
    assert needed > 1.05 * checkpoint_bytes(nano.path(), WeightOnlyConfig(bits=4, group_size=128))
    monkeypatch.setattr(memory, "available_bytes", lambda: needed)
    model = DeepseekVLV2ForCausalLM.from_pretrained(nano.path(), quantization_config=config)
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) <= needed
    monkeypatch.setattr(memory, "available_bytes", lambda: needed - 1)
    with pytest.raises(ValueError, match=r"not enough memory for the weights in .* as int4"):
        DeepseekVLV2ForCausalLM.from_pretrained(nano.path(), quantization_config=config, device_map="auto")


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"device_map": {"": torch.device("cpu")}}], ids=str)
def test_from_pretrained_refuses_weights_that_do_not_fit(monkeypatch, options):
    needed = checkpoint_bytes(nano.path())
    monkeypatch.setattr(memory, "available_bytes", lambda: needed)
    DeepseekVLV2ForCausalLM.from_pretrained(nano.path(), **options)
    with pytest.raises(ValueError, match=r"as float32, .* would fit: bfloat16"):
        DeepseekVLV2ForCausalLM.from_pretrained(nano.path(), dtype=torch.float32, **options)
    monkeypatch.setattr(memory, "available_bytes", lambda: needed - 1)
    with pytest.raises(ValueError, match=r"not enough memory .* would fit: int8"):
        AutoModelForCausalLM.from_pretrained(nano.path(), **options)


def test_what_does_not_fit_may_go_to_the_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    model = DeepseekVLV2ForCausalLM.from_pretrained(nano.path(), device_map={"": "disk"}, offload_folder=tmp_path)
    assert model.language.lm_head.weight.device.type == "meta"


def test_weights_of_another_kind_of_file_load(monkeypatch, tmp_path):
    """Their files say nothing of what they take."""
    shutil.copy(Path(nano.path()) / "config.json", tmp_path)
    model = DeepseekVLV2ForCausalLM.from_pretrained(nano.path())
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    again = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.language.lm_head.weight, model.language.lm_head.weight)


def test_enough_memory_passes(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: checkpoint_bytes(nano.path(), "int8"))
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
