"""Settings of a run: every key explained, every wrong value refused in one line."""

import json
from dataclasses import fields

import pytest

from deepseek_vl2.train import TrainConfig, read_config
from deepseek_vl2.train.__main__ import main
from deepseek_vl2.train.config import explain_keys

PATHS = {"train_file": "a.jsonl", "output_dir": "out"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_rnak": 3}, "unknown key 'lora_rnak' (value 3); allowed are train_file, output_dir, "),
        ({"lora_rank": 0}, "lora_rank: 0 is not allowed; allowed is a whole number at least 1"),
        ({"lora_rank": 2.5}, "lora_rank: 2.5 is not allowed; allowed is a whole number at least 1"),
        ({"lora_rank": True}, "lora_rank: True is not allowed; allowed is a whole number at least 1"),
        ({"lora_rank": None}, "lora_rank: None is not allowed; allowed is a whole number at least 1"),
        ({"learning_rate": "fast"}, "learning_rate: 'fast' is not allowed; allowed is a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate: nan is not allowed; allowed is a number above 0"),
        ({"max_steps": 0}, "max_steps: 0 is not allowed; allowed is a whole number at least 1 or null"),
        ({"eval_share": 1}, "eval_share: 1 is not allowed; allowed is a number at least 0 and below 1"),
        ({"skip_bad": "yes"}, "skip_bad: 'yes' is not allowed; allowed is true or false"),
        ({"projector": "lora"}, "projector: 'lora' is not allowed; allowed is one of frozen, full"),
        (
            {"lora_targets": ["router"]},
            "lora_targets: ['router'] is not allowed; allowed is a list of attention, mlp, experts, all",
        ),
        ({"lora_targets": []}, "lora_targets: [] is not allowed"),
        ({"train_file": ""}, "train_file: '' is not allowed; allowed is it is required: a path"),
        ({"language": "frozen"}, "language: 'frozen' is not allowed; allowed is lora or full"),
        ({"language": "full", "vision": "lora"}, "vision: 'lora' is not allowed; allowed is frozen or full"),
        ({"lora_dropout": 0.1}, "lora_dropout: 0.1 is not allowed; allowed is 0 while lora_targets include the"),
        ({"new_words": []}, "new_words: [] is not allowed; allowed is a list of texts, at least one or null"),
        ({"new_words": ["a", " "]}, "new_words: ['a', ' '] is not allowed; allowed is a list of words without empty"),
        ({"new_words": ["a"], "language": "full"}, "new_words: ['a'] is not allowed; allowed is null with language: f"),
        (
            {"new_words": ["a"], "language": "frozen", "vision": "full"},
            "new_words: ['a'] is not allowed; allowed is null with language: frozen, which trains no row",
        ),
        ({"router_bias_update_speed": 0.1}, "router_bias_update_speed: 0.1 is not allowed; allowed is 0 or null with"),
        ({"eval_file": "b", "eval_share": 0.1}, "eval_share: 0.1 is not allowed; allowed is 0 with an eval_file"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(ValueError) as caught:
        TrainConfig.from_mapping(PATHS | values)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_values_are_read_in_their_own_type():
    config = TrainConfig(**PATHS, learning_rate="1e-4", lora_alpha=8, lora_targets="attention")
    assert (config.learning_rate, config.lora_targets) == (1e-4, ["attention"])
    assert type(config.lora_alpha) is float


def test_bias_speed_follows_what_is_trained():
    assert TrainConfig(**PATHS, language="full").bias_update_speed == 0.001  # arXiv:2408.15664
    assert TrainConfig(**PATHS, language="full", router_bias_update_speed=0).bias_update_speed == 0
    assert TrainConfig(**PATHS).bias_update_speed == 0


def test_yaml_json_and_overrides(tmp_path):
    (tmp_path / "a.yaml").write_text("train_file: a.jsonl\noutput_dir: out\nlearning_rate: 1e-3\nlora_targets: [mlp]\n")
    (tmp_path / "a.json").write_text(json.dumps(PATHS | {"learning_rate": 1e-3, "lora_targets": ["mlp"]}))
    values = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "tabs.json").write_text(json.dumps(values, indent="\t"))
    first, second, third = (read_config(tmp_path / name) for name in ("a.yaml", "a.json", "tabs.json"))
    assert first == second == third == TrainConfig(**PATHS, learning_rate=1e-3, lora_targets=["mlp"])
    changed = read_config(tmp_path / "a.yaml", ["seed=7", "lora_targets=[attention, mlp]", "eval_file=null"])
    assert (changed.seed, changed.lora_targets, changed.eval_file) == (7, ["attention", "mlp"], None)


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        ("a: [1", [], "is neither YAML nor JSON"),
        ("train_file: 2020-13-45", [], "is neither YAML nor JSON: month must be"),
        ("a: " + "[" * 5000, [], "is neither YAML nor JSON"),
        ("max_steps: 1" + "0" * 400, [], "train_file"),
        ("learning_rate: 1" + "0" * 400, [], "learning_rate"),
        ("just text", [], "holds str; it must hold keys and values"),
        ("seed: 1", ["seed"], "--set 'seed' is no key=value"),
        ("seed: 1", ["sede=2"], "unknown key 'sede' (value 2)"),
    ],
)
def test_a_wrong_file_is_one_line_on_the_command_line(tmp_path, capsys, content, overrides, message):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    code = main(["--config", str(path), *(["--set", *overrides] if overrides else [])])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_a_missing_file_is_named(tmp_path, capsys):
    assert main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "skips"), [("--skip-bad", True), ("--skip_bad", True), (None, False)])
def test_skipping_is_an_option_in_both_spellings(tmp_path, monkeypatch, option, skips):
    seen = []

    def train(config):
        seen.append(config.skip_bad)
        raise ValueError("enough")

    monkeypatch.setattr("deepseek_vl2.train.__main__.train", train)
    path = tmp_path / "c.json"
    path.write_text(json.dumps(PATHS))
    assert main(["--config", str(path), *([option] if option else [])]) == 2
    assert seen == [skips]


def test_every_key_is_explained():
    lines = explain_keys().splitlines()
    assert [line.partition(":")[0] for line in lines] == [field.name for field in fields(TrainConfig)]
    assert all(len(line.partition("  # ")[2]) > 10 for line in lines)


def test_help_shows_the_keys(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "lora_rank: 16  # rank of LoRA's matrices" in capsys.readouterr().out
