"""Whole runs on small models of every kind: what learns, what stays, and going on after a kill."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from programs import Program
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_models import COLORS, FULL, LORA_ALL, VARIANTS, losses, run, settings

from deepseek_vl2.models import DeepseekVLV2ForCausalLM
from deepseek_vl2.train import TrainConfig, train, trainer
from deepseek_vl2.train.__main__ import main
from deepseek_vl2.train.collator import TrainingCollator
from deepseek_vl2.train.data import ConversationEncoder, read_samples
from deepseek_vl2.utils.io import load_pretrained_model

EXPERTS = "language.model.layers.1.mlp.experts."


def weights(folder, adapter=None):
    model = load_pretrained_model(folder, torch.float32, "cpu", adapter=adapter).model
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def experts_in_use(folder, train_file):
    """Experts that the untrained model chooses where it predicts answers.

    Elsewhere the last layer, which is the one with experts, has no part in the loss. A first step on all conversations
    reaches them all; later ones need not, as training moves the choice.
    """
    _, processor, model = load_pretrained_model(folder, torch.float32, "cpu")
    encoder = ConversationEncoder(processor, model.language.config)
    rows = [encoder(sample.messages) for sample in read_samples(train_file, encoder)]
    chosen = []
    router = model.language.model.layers[1].mlp.gate
    router.register_forward_hook(lambda module, arguments, outputs: chosen.append(outputs[2]))
    batch = TrainingCollator(processor)(rows)
    with torch.no_grad():
        model(**batch)
    experts = chosen[0][:, :-1][batch["labels"][:, 1:] != -100].unique()
    assert len(experts) >= 6
    return experts


@pytest.mark.parametrize("variant", VARIANTS)
def test_full_training_learns_and_reaches_every_expert(checkpoint, train_file, tmp_path, variant):
    found = run(settings(train_file, checkpoint(variant), tmp_path, batch_size=len(COLORS), **FULL))
    assert found[-1] < 0.7 * found[0]
    old, new = weights(checkpoint(variant)), weights(tmp_path)
    touched = changed(old, new)
    for name in ("gate_up_proj", "down_proj"):
        moved = (old[EXPERTS + name] != new[EXPERTS + name]).flatten(1).any(dim=1)
        assert bool(moved[experts_in_use(checkpoint(variant), train_file)].all())
    assert {"language.model.layers.1.mlp.gate.weight", "image_newline", "view_seperator"} <= touched
    # The attention pool of published checkpoints is never run.
    assert {name for name in old if name not in touched} <= {name for name in old if "attn_pool" in name}


@pytest.mark.parametrize("variant", VARIANTS)
def test_lora_learns_and_reaches_every_expert(checkpoint, train_file, tmp_path, variant):
    found = run(settings(train_file, checkpoint(variant), tmp_path, batch_size=len(COLORS), **LORA_ALL))
    assert found[-1] < 0.7 * found[0]
    old, new = weights(checkpoint(variant)), weights(checkpoint(variant), tmp_path)
    touched = changed(old, new)
    moved = (old[EXPERTS + "down_proj"] != new[EXPERTS + "down_proj"]).flatten(1).any(dim=1)
    assert bool(moved[experts_in_use(checkpoint(variant), train_file)].all())
    layers = ("self_attn.", "mlp.")
    assert touched == {
        name
        for name in old
        if name.startswith("language.model.layers.")
        and any(layer in name for layer in layers)
        and not name.endswith(("norm.weight", "mlp.gate.weight", "e_score_correction_bias"))
    }


@pytest.mark.parametrize(
    ("modes", "prefixes"),
    [
        ({"vision": "full", "language": "frozen"}, ("vision.",)),
        ({"projector": "full", "language": "frozen"}, ("projector.", "image_newline", "view_seperator")),
        ({"language": "full"}, ("language.",)),
        ({"language": "lora", "lora_targets": ["attention"], "projector": "full"}, (".self_attn.", "projector.")),
        ({"language": "lora", "lora_targets": ["experts"]}, (".mlp.experts.",)),
        ({"language": "lora", "lora_targets": ["mlp"]}, (".layers.0.mlp.", ".mlp.shared_experts.")),
        ({"language": "frozen", "vision": "lora"}, (".blocks.0.attn.", ".blocks.0.mlp.")),
        ({"language": "lora", "lora_targets": ["attention"], "vision": "full"}, (".self_attn.", "vision.")),
    ],
)
def test_frozen_parts_stay_bit_for_bit(checkpoint, train_file, tmp_path, modes, prefixes):
    config = settings(train_file, checkpoint("mla_greedy"), tmp_path, max_steps=2, learning_rate=0.01, **modes)
    config.weight_decay = 0.1  # would move what is frozen but handed to the optimizer
    run(config)
    old = weights(checkpoint("mla_greedy"))
    new = weights(checkpoint("mla_greedy"), tmp_path) if config.uses_lora else weights(tmp_path)
    touched = changed(old, new)
    for prefix in prefixes:
        assert any(prefix in name for name in touched), f"nothing in {prefix} has changed"
    assert not {name for name in touched if not any(prefix in name for prefix in prefixes)}


@pytest.mark.parametrize("variant", ["mla_greedy", "mla_noaux"])
def test_accumulated_batches_equal_one_large_batch(checkpoint, train_file, tmp_path, variant):
    """Also the balancing loss and the routers' bias, which have ways of their own into the step."""
    options = {**FULL, "aux_loss_alpha": 0.5, "max_steps": 3}
    large = run(settings(train_file, checkpoint(variant), tmp_path / "a", batch_size=4, **options))
    small = run(
        settings(train_file, checkpoint(variant), tmp_path / "b", batch_size=1, gradient_accumulation=4, **options)
    )
    assert small == pytest.approx(large, abs=2e-4)
    bias = "language.model.layers.1.mlp.gate.e_score_correction_bias"
    if variant == "mla_noaux":
        assert torch.equal(weights(tmp_path / "a")[bias], weights(tmp_path / "b")[bias])
    else:
        without = run(settings(train_file, checkpoint(variant), tmp_path / "c", **options | {"aux_loss_alpha": 0.0}))
        assert abs(without[-1] - large[-1]) > 1e-3  # the weight of the balancing loss is felt


@pytest.mark.parametrize(("variant", "is_said"), [("mla_greedy", False), ("mla_noaux", True)])
def test_a_balancing_loss_that_routers_do_not_have_is_said(checkpoint, train_file, tmp_path, caplog, variant, is_said):
    train(settings(train_file, checkpoint(variant), tmp_path, **FULL, aux_loss_alpha=0.5, max_steps=1))
    assert ("aux_loss_alpha 0.5 has no effect" in caplog.text) is is_said


def test_recomputed_activations_change_nothing(checkpoint, train_file, tmp_path):
    options = {**FULL, "max_steps": 3}
    kept = run(settings(train_file, checkpoint("mla_noaux"), tmp_path / "a", **options))
    again = run(settings(train_file, checkpoint("mla_noaux"), tmp_path / "b", gradient_checkpointing=True, **options))
    assert again == pytest.approx(kept, abs=1e-5)
    lora = run(settings(train_file, checkpoint("mla_noaux"), tmp_path / "c", gradient_checkpointing=True, **LORA_ALL))
    assert lora[-1] < 0.7 * lora[0]


@pytest.mark.parametrize("precision", ["bf16_autocast", "bf16_weights"])
@pytest.mark.parametrize("kind", [FULL, LORA_ALL], ids=["full", "lora"])
def test_bfloat16(checkpoint, train_file, tmp_path, precision, kind):
    found = run(settings(train_file, checkpoint("mla_noaux"), tmp_path, precision=precision, max_steps=8, **kind))
    assert found[-1] < 0.7 * found[0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", [FULL, {**LORA_ALL, "vision": "lora", "projector": "full"}], ids=["full", "lora"])
def test_all_ways_to_save_memory_go_together(checkpoint, train_file, tmp_path, variant, kind):
    saving = {"precision": "bf16_weights", "gradient_checkpointing": True, "batch_size": 2, "gradient_accumulation": 4}
    found = run(settings(train_file, checkpoint(variant), tmp_path, **saving, **kind))
    assert found[-1] < 0.8 * found[0]


def test_a_single_step_learns(checkpoint, train_file, tmp_path):
    """With the default share of steps over which the learning rate rises from 0."""
    share = TrainConfig(train_file="a", output_dir="b").warmup_share
    assert share > 0
    run(settings(train_file, checkpoint("mla_greedy"), tmp_path, max_steps=1, warmup_share=share, **FULL))
    assert changed(weights(checkpoint("mla_greedy")), weights(tmp_path))


@pytest.mark.parametrize("vision", ["frozen", "full"])
def test_text_alone_goes_where_only_seeing_is_trained(checkpoint, train_file, tmp_path, vision):
    """One in two batches has no picture, and nothing that is trained has a part in it."""
    lines = train_file.read_text(encoding="utf-8").splitlines()
    text = [{"role": "<|User|>", "content": "How many is two?"}, {"role": "<|Assistant|>", "content": "2"}]
    mixed = train_file.with_name("mixed.jsonl")
    mixed.write_text("".join(f"{line}\n{json.dumps({'conversations': text})}\n" for line in lines), encoding="utf-8")
    parts = {"language": "frozen", "vision": vision, "projector": "full", "learning_rate": 1e-2}
    found = run(settings(mixed, checkpoint("mla_greedy"), tmp_path, max_steps=8, batch_size=1, **parts))
    assert len(found) == 8
    touched = {name.partition(".")[0] for name in changed(weights(checkpoint("mla_greedy")), weights(tmp_path))}
    assert touched == {"projector", "image_newline", "view_seperator"} | ({"vision"} if vision == "full" else set())


def test_parts_have_their_own_learning_rates(checkpoint, train_file, tmp_path):
    rates = {"learning_rate": 1e-3, "vision_learning_rate": 1e-4, "projector_learning_rate": 1e-5}
    run(settings(train_file, checkpoint("mla_greedy"), tmp_path, max_steps=1, **{**FULL, **rates}))
    old, new = weights(checkpoint("mla_greedy")), weights(tmp_path)

    def step(prefix):
        """AdamW's first step moves a weight by the learning rate, whatever its gradient."""
        return max(float((new[name] - old[name]).abs().max()) for name in old if name.startswith(prefix))

    assert step("language.") == pytest.approx(1e-3, rel=0.01)
    assert step("vision.") == pytest.approx(1e-4, rel=0.01)
    assert step("projector.") == pytest.approx(1e-5, rel=0.02)


def test_the_result_is_whole_and_measured(checkpoint, train_file, tmp_path):
    config = settings(
        train_file, checkpoint("mla_noaux"), tmp_path, **FULL, eval_share=0.25, eval_every=4, tensorboard=True
    )
    result = train(config)
    assert (result.num_steps, result.output_dir) == (6, tmp_path)
    model, info = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    assert result.num_trained == sum(
        value.numel() for name, value in model.named_parameters() if "attn_pool" not in name
    )
    history = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert [record["step"] for record in history if "eval_loss" in record] == [4, 6]
    assert 0 < result.eval_loss < history[0]["loss"]
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in curves.Scalars("eval/loss")] == [4, 6]
    assert [event.value for event in curves.Scalars("train/loss")] == pytest.approx(losses(tmp_path))
    assert {"train/learning_rate", "train/grad_norm"} <= set(curves.Tags()["scalars"])


def test_records_of_steps_that_are_done_again_do_not_count_twice(train_file, tmp_path):
    config = settings(train_file, "nano", tmp_path)
    for done, steps in ((0, (1, 2, 3, 4)), (2, (3, 4, 5))):
        writer = trainer._tensorboard(config, done).tb_writer
        for step in steps:
            writer.add_scalar("train/loss", 1 / step, step)
        writer.close()
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in curves.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_a_diverging_run_ends_with_a_reason(checkpoint, train_file, tmp_path):
    options = {**FULL, "learning_rate": 1e30}
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step \d: lower learning_rate"):
        train(settings(train_file, checkpoint("mla_greedy"), tmp_path, **options))


def train_and_be_killed(config):
    """Runs in a process of its own, which the kernel kills after the fifth step."""

    def die(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.StopAtInvalidLoss.on_step_end = die
    main(["--config", config])


@pytest.mark.parametrize(
    "kind",
    [
        # The bias of the routers, every expert and AdamW's state have to come back.
        {**FULL, "variant": "mla_noaux"},
        # Dropout draws from the state of chance, the data from its place in the second epoch.
        {
            **LORA_ALL,
            "variant": "mha_greedy",
            "lora_targets": ["attention", "mlp"],
            "lora_dropout": 0.2,
            "new_words": ["red"],
        },
    ],
    ids=["full", "lora"],
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(checkpoint, train_file, tmp_path, kind):
    kind = dict(kind)
    options = {"max_steps": 7, "save_every": 2, "schedule": "cosine", **kind}
    model_path = checkpoint(options.pop("variant"))
    undisturbed = run(settings(train_file, model_path, tmp_path / "a", **options))
    config = settings(train_file, model_path, tmp_path / "b", **options)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(vars(config)))
    killed = Program(train_and_be_killed, str(path)).finish()
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(folder.name for folder in (tmp_path / "b").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    # Checkpoints that were cut off while they were written are passed over.
    (tmp_path / "b" / "checkpoint-5").mkdir()
    state = (tmp_path / "b" / "checkpoint-4" / "trainer_state.json").read_text()
    (tmp_path / "b" / "checkpoint-6").mkdir()
    (tmp_path / "b" / "checkpoint-6" / "trainer_state.json").write_text(state[:100])
    assert main(["--config", str(path)]) == 0
    assert losses(tmp_path / "b") == undisturbed
    assert len(undisturbed) == 7
    files = [folder / ("adapter_model" if config.uses_lora else "model") for folder in (tmp_path / "a", tmp_path / "b")]
    first, second = (Path(f"{file}.safetensors").read_bytes() for file in files)
    assert first == second


@pytest.mark.parametrize("kind", [LORA_ALL, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("max_steps", [2, 3], ids=["epoch's end", "within an epoch"])
def test_a_finished_run_is_not_run_again(checkpoint, train_file, tmp_path, kind, max_steps):
    config = settings(train_file, checkpoint("mla_greedy"), tmp_path, **kind | {"max_steps": max_steps})
    first = train(config)
    (result,) = tmp_path.glob("*model.safetensors")
    saved = result.read_bytes()
    result.unlink()  # as after a kill between the last checkpoint and the result
    assert train(config) == first
    assert result.read_bytes() == saved


def test_a_run_that_began_before_a_key_came_goes_on_with_its_default(checkpoint, train_file, tmp_path):
    options = LORA_ALL | {"max_steps": 1}
    first = train(settings(train_file, checkpoint("mla_greedy"), tmp_path, **options))
    noted = json.loads((tmp_path / "train_config.json").read_text())
    del noted["new_words"]
    (tmp_path / "train_config.json").write_text(json.dumps(noted))
    with pytest.raises(ValueError, match=r"new_words: \['red'\] is not allowed; the run in .* began with None"):
        train(settings(train_file, checkpoint("mla_greedy"), tmp_path, **options, new_words=["red"]))
    assert train(settings(train_file, checkpoint("mla_greedy"), tmp_path, **options)) == first


def test_going_on_with_other_settings_is_refused(checkpoint, train_file, tmp_path):
    options = LORA_ALL | {"max_steps": 1}
    train(settings(train_file, checkpoint("mla_greedy"), tmp_path, **options))
    with pytest.raises(ValueError, match=r"learning_rate: 0\.5 is not allowed; the run in .* began with 0\.02"):
        train(settings(train_file, checkpoint("mla_greedy"), tmp_path, **options | {"learning_rate": 0.5}))
    with pytest.raises(ValueError, match=r"resume: never, but .* holds checkpoint-1; take another output_dir"):
        train(settings(train_file, checkpoint("mla_greedy"), tmp_path, **options, resume="never"))
    (tmp_path / "checkpoint-1").rename(tmp_path / "checkpoint-best")
    with pytest.raises(ValueError, match=r"holds checkpoint-best, which is no checkpoint of this run"):
        train(settings(train_file, checkpoint("mla_greedy"), tmp_path, **options))


@pytest.mark.parametrize("name", ["train_file", "eval_file"])
def test_going_on_with_other_data_is_refused(tmp_path, name):
    for file in ("train_file", "eval_file"):
        (tmp_path / file).write_text("{}")
    config = settings(tmp_path / "train_file", "nano", tmp_path / "out", eval_file=str(tmp_path / "eval_file"))
    assert trainer.find_checkpoint(config) is None
    checkpoint = tmp_path / "out" / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    assert trainer.find_checkpoint(config) == checkpoint
    (tmp_path / name).write_text("[]")
    with pytest.raises(ValueError, match=rf"{name}: .* has changed since .* take another output_dir"):
        trainer.find_checkpoint(config)
    # A run of an earlier version did not note what its data was.
    noted = tmp_path / "out" / trainer.CONFIG_FILE
    noted.write_text(json.dumps(vars(config)))
    assert trainer.find_checkpoint(config) == checkpoint


def test_text_without_pictures_and_skipping_on_the_command_line(checkpoint, tmp_path, capsys):
    lines = [
        json.dumps({"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": word}]})
        for word in COLORS
    ]
    (tmp_path / "text.jsonl").write_text("\n".join([*lines, "no JSON"]) + "\n")
    config = settings(tmp_path / "text.jsonl", checkpoint("mla_greedy"), tmp_path / "out", **LORA_ALL)
    (tmp_path / "config.json").write_text(json.dumps(vars(config)))
    command = ["--config", str(tmp_path / "config.json")]
    assert main(command) == 2
    message = capsys.readouterr().err.strip().split("\n")[-2:]
    assert f"{tmp_path / 'text.jsonl'}:9: not JSON" in message[0]
    assert message[1].startswith("1 of 9 lines of ")
    assert main([*command, "--skip-bad", "--set", "max_steps=2", "log_every=1"]) == 0
    said = capsys.readouterr().out.strip().split("\n")[-1]
    assert said.startswith("2 steps, loss ")
    assert said.endswith(f"inference.py --model_path {config.model_path} --adapter {config.output_dir}")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_picture_that_breaks_in_training_ends_it_with_one_line(checkpoint, tmp_path, capsys, num_workers):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    question = {"role": "user", "content": "<image>\nWhat?", "images": ["broken.png"]}
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [question, {"role": "assistant", "content": "a"}]}))
    config = settings(tmp_path / "a.jsonl", checkpoint("mla_greedy"), tmp_path / "out", **LORA_ALL)
    config.check_samples, config.num_workers = False, num_workers
    (tmp_path / "config.json").write_text(json.dumps(vars(config)))
    assert main(["--config", str(tmp_path / "config.json")]) == 2
    line = capsys.readouterr().err.strip().split("\n")[-1]
    assert line.startswith(f"python -m deepseek_vl2.train: error: {tmp_path / 'a.jsonl'}:1: ")
    assert "broken.png" in line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("17 GiB"), "there is not enough memory; try a smaller batch_size"),
        (RuntimeError("can't allocate memory"), "there is not enough memory; try a smaller batch_size"),
        (FileNotFoundError(2, "No such file or directory", "a.jsonl"), "No such file or directory: a.jsonl"),
    ],
)
def test_errors_of_the_machine_take_one_line(train_file, tmp_path, monkeypatch, capsys, error, said):
    def fail(config):
        raise error

    monkeypatch.setattr("deepseek_vl2.train.__main__.train", fail)
    (tmp_path / "config.json").write_text(json.dumps(vars(settings(train_file, "nano", tmp_path))))
    assert main(["--config", str(tmp_path / "config.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m deepseek_vl2.train: error: {said}")
