"""nano's training: its stages, and an end that does not depend on how often it was stopped on the way."""

import json
import os
import signal
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from programs import Program

import deepseek_vl2.nano.__main__ as command
from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.nano import architecture, train
from deepseek_vl2.nano.train import STAGES, NanoTrainer, StageSettings, TrainingSettings

# The undisturbed training that most tests look at takes a while: one worker of pytest-xdist does it once.
pytestmark = pytest.mark.xdist_group("nano_train")

NUM_BATCHES = 3
OF_CELLS = {"class_ids", "color_ids", "bar_values", "is_center", "is_marked", "boxes"}
LOSSES = {
    "views": {f"dense_{name}" for name in OF_CELLS | {"letters"}} | {"patch_letters", "patch_places"},
    "answers": {f"dense_{name}" for name in OF_CELLS | {"letters", "first_places", "row_ids", "column_ids"}},
}
LOSSES["answers"] |= {"answer", "words", "coordinates", "pointing"}
LOSSES["answers"] |= {"dense_pictures"}
LOSSES["answers"] |= {f"attended_{name}" for name in ("class_ids", "color_ids", "boxes")}
LOSSES["letters"] = LOSSES["views"]
LOSSES["together"] = LOSSES["counting"] = LOSSES["reading"] = LOSSES["answers"]
LOSSES["finish"] = LOSSES["counts"] = LOSSES["answers"]
LOSSES["print"] = LOSSES["views"] | {"keeping"}


class StoppedError(Exception):
    """Stands for a kill."""


def make_nano_narrow(patch):
    """Gives nano a quarter of its width and half of its experts: its stages and states are the same, and quicker."""
    whole = architecture.nano_config

    def narrow(tokenizer):
        config = whole(tokenizer)
        vision, language = config.vision_config, config.language_config
        vision.layers, vision.heads = 2, 2
        language.intermediate_size, language.moe_intermediate_size, language.n_routed_experts = 64, 16, 4
        language.num_attention_heads = language.num_key_value_heads = 2
        language.kv_lora_rank = 24
        return config

    patch.setattr(architecture, "WIDTH", 48)
    patch.setattr(architecture, "nano_config", narrow)


@pytest.fixture(scope="module", autouse=True)
def narrow_nano():
    with pytest.MonkeyPatch.context() as patch:
        make_nano_narrow(patch)
        yield


def small_settings(**changes):
    settings = TrainingSettings().scaled(0.0001)
    stages = {name: replace(getattr(settings, name), num_batches=NUM_BATCHES, batch_size=2) for name in STAGES}
    small = {**stages, "tokens_a_row": 60, "num_threads": 1, "save_every": 2}
    return replace(settings, **(small | changes))


def settings_of(*stages, **changes):
    """Small settings in which all other stages are left out."""
    none = {name: replace(getattr(small_settings(), name), num_batches=0) for name in STAGES if name not in stages}
    return small_settings(**none, **changes)


def weights(trainer):
    return {**trainer.model.state_dict(), **{f"heads.{k}": v for k, v in trainer.heads.state_dict().items()}}


def is_same(first, second):
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def run(folder, monkeypatch, most_steps=None, settings=None, num_rounds=1):
    """Trains until the end, or until `most_steps` batches are learnt; returns trainer and the stage of each step."""
    trainer = NanoTrainer(settings or small_settings(), folder, num_rounds)
    step, stages, snapshots = trainer.step, [], []

    def counted_step(batch):
        if len(stages) == most_steps:
            raise StoppedError
        stages.append(trainer.stage)
        snapshots.append({name: t.clone() for name, t in weights(trainer).items() if name.startswith("vision.")})
        return step(batch)

    monkeypatch.setattr(trainer, "step", counted_step)
    if most_steps is None:
        trainer.run()
    else:
        with pytest.raises(StoppedError):
            trainer.run()
    return trainer, stages, snapshots


@pytest.fixture(scope="module")
def undisturbed(narrow_nano, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "LOG_EVERY", 1)
        trainer, stages, snapshots = run(folder, patch)
    return folder, trainer, stages, snapshots


def test_all_stages_run_and_log(undisturbed):
    folder, trainer, stages, _ = undisturbed
    assert stages == [name for name in STAGES for _ in range(NUM_BATCHES)]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["batch"]) for line in lines] == [
        (name, batch) for name in STAGES for batch in range(1, NUM_BATCHES + 1)
    ]
    for line in lines:
        assert set(line) == {"round", "stage", "batch", "seconds", "grad_norm"} | LOSSES[line["stage"]]
        assert all(torch.tensor(line[name]).isfinite() for name in LOSSES[line["stage"]] | {"grad_norm"})
        assert line["grad_norm"] > 0
    assert sorted(path.name for path in folder.iterdir()) == ["log.jsonl", "state.pt"]
    state = torch.load(folder / "state.pt", weights_only=True)
    assert state["settings"] == asdict(small_settings())
    assert (state["round"], state["stage_index"], state["next_batch"]) == (1, len(STAGES) - 1, NUM_BATCHES)
    assert is_same(state["model"], trainer.model.state_dict())


def test_the_tower_is_fixed_while_answers_begin_and_while_counting_and_reading_are_practised(undisturbed):
    _, trainer, _, snapshots = undisturbed
    end = {name: tensor for name, tensor in weights(trainer).items() if name.startswith("vision.")}
    before_step = [*snapshots, end]
    moved = [not is_same(before, after) for before, after in pairwise(before_step)]
    # The last step of a stage has the size 0: by design it moves nothing where `last_factor` is 0.
    learns, rests = [True, True, False], [False] * 3
    assert moved == learns * 2 + rests + learns + rests + learns + rests + learns + rests


def test_everything_else_learns(undisturbed):
    folder, trainer, _, _ = undisturbed
    fresh = weights(NanoTrainer(small_settings(), folder))
    unmoved = {name for name, tensor in weights(trainer).items() if torch.equal(tensor, fresh[name])}
    # Tables of the number targets stay; so may experts that so few tokens never came to.
    assert {name for name in unmoved if ".experts." not in name and "targets" not in name} == set()


def test_stopped_after_any_batch_and_gone_on_ends_at_the_same_bits(undisturbed, tmp_path, monkeypatch):
    """Started anew after every batch once. A stage's first batch is not kept: it is learnt again."""
    learnt = []
    for most_steps in (*(1, 2, 1) * (len(STAGES) - 1), 1, 2):
        learnt += run(tmp_path, monkeypatch, most_steps)[1]
    trainer, stages, _ = run(tmp_path, monkeypatch)
    assert learnt + stages == [name for name in STAGES for _ in range(NUM_BATCHES + 1)]
    assert is_same(weights(trainer), weights(undisturbed[1]))
    assert is_same(trainer.final_weights(), undisturbed[1].final_weights())


def test_the_end_is_the_mean_of_the_last_two_stages(tmp_path, monkeypatch):
    settings = settings_of("finish", "counts", save_every=100)
    early, stages, _ = run(tmp_path, monkeypatch, NUM_BATCHES, settings)
    assert stages == ["finish"] * NUM_BATCHES
    assert is_same(early.final_weights(), early.averaged["model"])
    late, stages, _ = run(tmp_path, monkeypatch, None, settings)
    assert stages == ["counts"] * NUM_BATCHES
    first, last = early.averaged["model"], late.model.state_dict()
    assert not is_same(first, last)
    assert is_same(late.final_weights(), {name: (first[name] + last[name]) / 2 for name in last})


def test_further_rounds_begin_with_the_mean_and_end_the_same_after_stops(tmp_path, monkeypatch):
    lengths = {"print": 0, "reading": 0, "finish": 2, "counts": 2}
    stages = {name: replace(getattr(small_settings(), name), num_batches=lengths.get(name, 0)) for name in STAGES}
    settings = small_settings(**stages, later_batches=lengths, save_every=1)
    splits = []
    original = train.AnswerBatches

    def batches(*args, split, **more):
        splits.append(split)
        return original(*args, split=split, **more)

    monkeypatch.setattr(train, "AnswerBatches", batches)
    whole, stages, snapshots = run(tmp_path / "whole", monkeypatch, None, settings, num_rounds=2)
    assert stages == ["finish", "finish", "counts", "counts"] * 2
    assert splits == ["train-finish", "train-counts", "train-finish-2", "train-counts-2"]
    # The tower learns in the first round's finish; it is the mean that the second begins with, and stays that.
    assert not is_same(snapshots[0], snapshots[1])
    assert all(is_same(snapshot, snapshots[4]) for snapshot in snapshots[4:])
    first, _, _ = run(tmp_path / "stopped", monkeypatch, None, settings)
    mean = {**first.final_weights(), **{f"heads.{k}": v for k, v in first._mean_weights()["heads"].items()}}
    assert not is_same(mean, weights(first))
    second, _, _ = run(tmp_path / "stopped", monkeypatch, 1, settings, num_rounds=2)
    assert (second.round, second.stage, second.next_batch) == (2, "finish", 1)
    again, stages, _ = run(tmp_path / "stopped", monkeypatch, None, settings, num_rounds=2)
    assert stages == ["finish", "counts", "counts"]
    assert is_same(weights(again), weights(whole))
    assert is_same(again.final_weights(), whole.final_weights())
    assert all(torch.equal(tensor, mean[name]) for name, tensor in snapshots[4].items())


def test_a_finished_run_stays_as_it_is(undisturbed, monkeypatch):
    folder, trainer, _, _ = undisturbed
    again, stages, _ = run(folder, monkeypatch)
    assert stages == []
    assert is_same(weights(again), weights(trainer))


def train_and_be_killed(folder):
    """Runs in a process of its own: killed where the stage of answers has learnt two batches and saved them."""
    make_nano_narrow(pytest.MonkeyPatch())
    trainer = NanoTrainer(settings_of("answers", "together"), folder)
    step = trainer.step

    def step_or_die(batch):
        if (trainer.stage, trainer.next_batch) == ("answers", 2):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(batch)

    trainer.step = step_or_die
    trainer.run()


def test_a_killed_process_goes_on_at_the_same_bits(tmp_path, monkeypatch):
    done = Program(train_and_be_killed, tmp_path / "run").finish()
    assert done.returncode == -signal.SIGKILL, done.stderr
    settings = settings_of("answers", "together")
    trainer, stages, _ = run(tmp_path / "run", monkeypatch, settings=settings)
    assert stages == ["answers"] + ["together"] * NUM_BATCHES
    whole, stages, _ = run(tmp_path / "whole", monkeypatch, settings=settings)
    assert len(stages) == 2 * NUM_BATCHES
    assert is_same(weights(trainer), weights(whole))


def test_a_half_written_state_is_never_seen(tmp_path, monkeypatch):
    trainer = NanoTrainer(small_settings(), tmp_path)
    trainer.load_state()
    trainer.next_batch = 1
    trainer.save_state()
    complete = (tmp_path / "state.pt").read_bytes()

    def cut_off(state, path):
        Path(path).write_bytes(complete[: len(complete) // 2])
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", cut_off)
        trainer.next_batch = 2
        with pytest.raises(StoppedError):
            trainer.save_state()
    assert (tmp_path / "state.pt").read_bytes() == complete
    later = NanoTrainer(small_settings(), tmp_path)
    later.load_state()
    assert later.next_batch == 1
    later.save_state()  # over what was left lying about
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_a_state_of_other_settings_is_refused(undisturbed):
    folder = undisturbed[0]
    before = (folder / "state.pt").read_bytes()
    for other in (small_settings(seed=1), small_settings(coordinate_spread=5.0)):
        with pytest.raises(ValueError, match=r"state\.pt was written with other settings.*another folder"):
            NanoTrainer(other, folder).load_state()
    assert (folder / "state.pt").read_bytes() == before


def test_checkpoint_is_the_final_model_in_bfloat16(undisturbed, tmp_path):
    trainer = undisturbed[1]
    trainer.save_checkpoint(tmp_path)
    assert next(trainer.model.parameters()).dtype == torch.float32  # the run itself goes on in float32
    loaded, info = DeepseekVLV2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.dtype == torch.bfloat16 and loaded.config.dtype == torch.bfloat16
    for name, tensor in trainer.final_weights().items():
        found = loaded.state_dict()[name]
        assert torch.equal(found, tensor.to(found.dtype)), name
    assert DeepseekVLV2Processor.from_pretrained(tmp_path).image_size == 112


@pytest.mark.parametrize("name", ["dense_letters", "dense_first_places"])
def test_letters_and_places_weigh_more_where_reading_is_practised(tmp_path, name):
    trainer = NanoTrainer(small_settings(), tmp_path)
    losses = {name: torch.tensor(0.0) for name in LOSSES["reading"]}
    totals = {}
    for trainer.stage_index, stage in enumerate(STAGES):
        if stage in ("answers", "reading"):
            totals[stage] = trainer._total(losses | {name: torch.tensor(1.0)}).item()
    assert totals["answers"] == pytest.approx(trainer.settings.dense_weight)
    assert totals["reading"] == pytest.approx(trainer.settings.dense_weight * trainer.settings.reading.text_weight)
    assert trainer.settings.reading.text_weight > 1


def test_steps_grow_stay_and_shrink():
    stage = StageSettings(100, 8, 1.0, 1.0, warmup_batches=10, decay_share=0.4, last_factor=0.2)
    factors = [stage.lr_factor(batch) for batch in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[4] == pytest.approx(0.5)
    assert factors[9:60] == [pytest.approx(1.0)] * 51
    assert factors[79] == pytest.approx(0.6) and factors[99] == pytest.approx(0.2)
    assert factors[59:] == sorted(factors[59:], reverse=True)


def test_scaled_settings_keep_everything_but_the_length():
    whole = TrainingSettings()
    part = whole.scaled(0.1)
    for name in STAGES:
        stage = getattr(whole, name)
        shorter = {count: round(getattr(stage, count) / 10) for count in ("num_batches", "warmup_batches")}
        assert getattr(part, name) == replace(stage, **shorter)
    assert part.later_batches == {"print": 65, "reading": 42, "finish": 38, "counts": 26}
    same = {name: getattr(whole, name) for name in (*STAGES, "later_batches")}
    assert replace(part, **same) == whole
    assert whole.scaled(1.0) == whole
    lengths = [getattr(whole.scaled(1e-9), name).num_batches for name in STAGES]
    assert lengths == [min(1, getattr(whole, name).num_batches) for name in STAGES]
    assert sum(lengths) == 9


class FakeTrainer:
    """Takes the command's settings and does nothing."""

    made: ClassVar[list[Any]] = []

    def __init__(self, settings, folder, num_rounds):
        self.settings, self.folder, self.num_rounds = settings, folder, num_rounds
        self.made.append(self)

    def run(self):
        self.is_run = True

    def save_checkpoint(self, folder):
        self.checkpoint = folder


def test_command_trains_and_saves(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "NanoTrainer", FakeTrainer)
    monkeypatch.setattr(FakeTrainer, "made", [])
    assert command.main(["--folder", str(tmp_path), "--share", "0.1", "--num_threads", "1", "--seed", "7"]) == 0
    (trainer,) = FakeTrainer.made
    assert trainer.settings == TrainingSettings(num_threads=1, seed=7).scaled(0.1)
    assert trainer.folder == tmp_path and trainer.num_rounds == 1 and trainer.is_run
    assert trainer.checkpoint == tmp_path / "checkpoint"
    assert f"evaluate --model_path {tmp_path / 'checkpoint'}" in capsys.readouterr().out
    assert command.main(["--folder", str(tmp_path), "--rounds", "3"]) == 0
    assert FakeTrainer.made[1].num_rounds == 3


@pytest.mark.parametrize("arguments", [["--share", "0"], ["--share", "1.5"], ["--num_threads", "0"], ["--rounds", "0"]])
def test_command_refuses_numbers_out_of_range(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert "--share must be above 0 and at most 1, --num_threads and --rounds at least 1" in capsys.readouterr().err


def test_command_says_in_one_line_that_a_state_does_not_fit(undisturbed, capsys):
    assert command.main(["--folder", str(undisturbed[0])]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "error:" in lines[0] and "other settings" in lines[0]


def test_growing_starts_from_an_earlier_edition_and_takes_the_shorter_way(tmp_path, monkeypatch):
    earlier = NanoTrainer(small_settings(seed=5), tmp_path / "earlier")
    earlier.save_checkpoint(tmp_path / "checkpoint")
    settings = TrainingSettings.of_growth(tmp_path / "checkpoint", num_threads=1, tokens_a_row=60)
    stages = {name: replace(getattr(settings.scaled(1e-9), name), batch_size=4) for name in STAGES}
    _, learnt, snapshots = run(tmp_path / "run", monkeypatch, settings=replace(settings, **stages))
    assert learnt == ["letters", "together", "counting", "print", "reading", "finish", "counts"]
    for name, tensor in snapshots[0].items():
        torch.testing.assert_close(tensor, weights(earlier)[name].bfloat16().float())


def test_the_tower_that_print_is_learnt_beside_stays_the_same_when_going_on(tmp_path, monkeypatch):
    settings = settings_of("print", save_every=1)
    trainer, stages, _ = run(tmp_path, monkeypatch, 2, settings)
    assert stages == ["print"] * 2
    before = {name: tensor.clone() for name, tensor in trainer.earlier.state_dict().items()}
    again = NanoTrainer(settings, tmp_path)
    again.load_state()
    assert again.next_batch == 2 and is_same(again.earlier.state_dict(), before)
    assert not is_same(before, {name: weights(again)[name] for name in before})
    fresh = NanoTrainer(settings, tmp_path / "fresh")
    assert is_same(before, {name: weights(fresh)[name] for name in before})


@pytest.mark.parametrize(("is_fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_products_are_of_the_type_that_the_cpu_is_fast_in(tmp_path, monkeypatch, is_fast, dtype):
    monkeypatch.setattr(train, "has_fast_bfloat16", lambda: is_fast)
    trainer, seen = NanoTrainer(small_settings(num_threads=1), tmp_path), []
    trainer.load_state()
    trainer.model.projector.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer.step(next(trainer._batches()))
    assert seen == [dtype] and trainer.optimizers[0].dtype == dtype
