"""The doctor: what it prints, and what it says about whole, broken and too large checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_vl2 import doctor, nano
from deepseek_vl2.doctor import fit_of, main
from deepseek_vl2.models import machine_limits
from deepseek_vl2.utils.hardware import Choice
from deepseek_vl2.utils.io import load_pretrained_model
from deepseek_vl2.utils.model_size import published_config, weight_bytes

GB = 10**9


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine with a CPU and 20 GB of free memory, whatever the tests run on."""
    cpu = Choice(torch.device("cpu"), "no GPU")
    monkeypatch.setattr(doctor, "choose_device", lambda: cpu)
    monkeypatch.setattr(doctor, "choose_dtype", lambda *given: Choice(torch.bfloat16, "it is native"))
    monkeypatch.setattr(doctor, "choose_num_threads", lambda: Choice(7, "seven cores"))
    monkeypatch.setattr(machine_limits, "available_bytes", lambda: 20 * GB)


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(nano.path(), tmp_path / "mine"))


def report(capsys, *arguments):
    code = main(["--json", *map(str, arguments)])
    return code, json.loads(capsys.readouterr().out)


def test_text_names_choices_and_reasons(capsys):
    assert main(["--model_path", "nano"]) == 0
    text = capsys.readouterr().out
    for words in (
        "device           cpu          no GPU",
        "threads          7            seven cores",
        "sdpa",
        "torch 2.",
    ):
        assert words in text
    assert "small            bfloat16       32.42 GB  no" in text
    assert text.endswith("  complete, and it fits\n")


def test_json_says_what_fits_in_20_gb(capsys):
    code, found = report(capsys)
    assert code == 0
    verdicts = {(fit["model"], fit["weights"]): fit["verdict"] for fit in found["fits"]}
    assert verdicts == {
        ("tiny", "bfloat16"): "yes",
        ("tiny", "int8"): "yes",
        ("tiny", "int4"): "yes",
        ("small", "bfloat16"): "no",
        ("small", "int8"): "yes",
        ("small", "int4"): "yes",
        ("base", "bfloat16"): "no",
        ("base", "int8"): "no",
        ("base", "int4"): "yes",
    }
    kernels = ["attention", "vision_attention", "experts", "many_tokens", "decoding"]
    assert list(found["choices"]) == ["device", "dtype", "threads", *kernels]
    assert all(choice["value"] and choice["reason"] for choice in found["choices"].values())
    assert set(found["versions"]) == {"torch", "transformers", "timm"} and all(found["versions"].values())
    assert "model" not in found


@pytest.mark.parametrize(("free", "verdict"), [(8.0, "yes"), (7.5, "tight"), (6.9, "no")])
def test_verdict_on_tiny(free, verdict):
    fit = fit_of(published_config("tiny"), "tiny", "bfloat16", int(free * GB))
    assert fit == {"model": "tiny", "weights": "bfloat16", "needs_gb": 6.99, "verdict": verdict}


def test_a_whole_checkpoint_is_well(capsys, folder):
    code, found = report(capsys, "--model_path", folder)
    assert code == 0
    assert found["model"]["problems"] == []
    assert found["model"]["num_files"] == 1
    assert found["model"]["size_gb"] == pytest.approx((folder / "model.safetensors").stat().st_size / GB, abs=1e-3)
    assert [fit["weights"] for fit in found["model"]["fits"]] == ["bfloat16", "int8", "int4"]


def test_a_broken_checkpoint_is_named(capsys, folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    (folder / "tokenizer.json").unlink()
    code, found = report(capsys, "--model_path", folder)
    assert code == 1
    broken, missing = found["model"]["problems"]
    assert "copy or download it again" in broken
    assert missing == "tokenizer.json is missing: the processor cannot be loaded"


def test_tensors_that_are_not_the_models_are_named(capsys, folder):
    weights = load_file(folder / "model.safetensors")
    norm = "language.model.layers.0.input_layernorm.weight"
    expert = "language.model.layers.1.mlp.experts.3.up_proj.weight"
    weights[norm] = weights[norm][:-1].clone()
    del weights[expert], weights["language.lm_head.weight"]
    save_file(weights, folder / "model.safetensors")
    code, found = report(capsys, "--model_path", folder)
    assert code == 1
    assert found["model"]["problems"] == [
        "2 tensors of its config.json's model are missing, such as language.lm_head.weight",
        f"1 tensors do not fit its config.json, such as {norm} of shape [191] instead of [192]",
    ]


@pytest.mark.parametrize(
    ("config", "message"), [([], "must hold a JSON object"), ({"model_type": "llama"}, "a model of type 'llama'")]
)
def test_another_kind_of_model_is_named_in_one_line(capsys, folder, config, message):
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["--model_path", str(folder)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


def test_a_checkpoint_that_does_not_fit_is_told_what_would(capsys, folder, monkeypatch):
    monkeypatch.setattr(machine_limits, "available_bytes", lambda: int(0.015 * GB))
    code, found = report(capsys, "--model_path", folder)
    assert code == 1
    (problem,) = found["model"]["problems"]
    assert problem.startswith("it needs 0.02 GB in bfloat16, ")
    assert problem.endswith(" GB are free; int8 or int4 would fit")


def test_a_quantised_checkpoint_is_judged_as_it_is(capsys, tmp_path, monkeypatch):
    model = load_pretrained_model("nano", quantize="int8", device="cpu")
    model.model.save_pretrained(tmp_path / "int8")
    model.processor.save_pretrained(tmp_path / "int8")
    monkeypatch.setattr(machine_limits, "available_bytes", lambda: int(0.015 * GB))  # too little for bfloat16
    code, found = report(capsys, "--model_path", tmp_path / "int8")
    assert (code, found["model"]["problems"]) == (0, [])
    assert [fit["weights"] for fit in found["model"]["fits"]] == ["int8"]

    weights = tmp_path / "int8" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["language.model.layers.1.mlp.experts.down_proj_scales"]
    save_file(tensors, weights, metadata={"format": "pt"})
    code, found = report(capsys, "--model_path", tmp_path / "int8")
    assert code == 1
    assert "half written" in found["model"]["problems"][0] and "down_proj_scales" in found["model"]["problems"][0]


def test_what_files_say_of_the_weights_goes_before_their_kind():
    config = published_config("tiny")
    cache = fit_of(config, "tiny", "int4", GB)["needs_gb"] - weight_bytes(config, "int4") / GB
    fit = fit_of(config, "tiny", "int4", 6 * GB, 5 * GB)
    assert (fit["needs_gb"], fit["verdict"]) == (pytest.approx(5 + cache, abs=0.01), "yes")


def test_a_gpu_is_not_promised_what_the_cpu_alone_can(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "choose_device", lambda: Choice(torch.device("mps"), "a test"))
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 16 * GB)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: GB)
    _, found = report(capsys)
    assert {fit["weights"] for fit in found["fits"]} == {"bfloat16"}


def test_a_model_that_is_not_downloaded_yet(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    code, found = report(capsys, "--model_path", "someone/never-downloaded-model")
    assert code == 1
    assert "not in the cache yet" in found["model"]["problems"][0]


@pytest.mark.parametrize(
    ("path", "message"),
    [("./gone", "no model folder './gone'"), ("a b", "possible name on the hub"), (".", "has no config.json")],
)
def test_bad_input_is_named_in_one_line(capsys, monkeypatch, tmp_path, path, message):
    monkeypatch.chdir(tmp_path)
    assert main(["--model_path", path]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err and captured.err.count("\n") == 1


def test_extras_name_what_is_missing(monkeypatch):
    requires = [
        "torch",
        'absent; python_version > "3"',
        'peft>=0.20; extra == "train"',
        'no-such-package; extra == "train"',
        'torch; extra == "demo"',
    ]
    described = type("Metadata", (), {"get_all": lambda self, name: ["train", "demo"]})()
    monkeypatch.setattr(doctor.importlib.metadata, "metadata", lambda name: described)
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: requires)
    assert doctor.missing_packages() == {"train": ["no-such-package"], "demo": []}
