"""`python -m deepseek_vl2.evaluate` with the bundled model: killed and taken up again; bad files; other settings."""

import json
import shutil
import time

import pytest
from programs import Program, run_module

import deepseek_vl2.evaluate.__main__ as evaluate_command
from deepseek_vl2.evaluate import runner
from deepseek_vl2.evaluate.__main__ import main
from deepseek_vl2.nano.tasks import EVAL_SPLIT, example_at
from deepseek_vl2.utils.run_folder import LOCK_FILE, lock_folder

pytestmark = pytest.mark.e2e

NUM_SAMPLES = 6
TIMEOUT = 300


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of questions for one object each, in the library's own form."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for index in range(NUM_SAMPLES):
        example = example_at(EVAL_SPLIT, index, "locate")
        example.scenes[0].draw().save(folder / f"{index}.png")
        question = {"role": "<|User|>", "content": f"<image>\n{example.question}", "images": [f"{index}.png"]}
        boxes = [list(box) for box in example.boxes]
        lines.append({"id": index, "messages": [question], "boxes": boxes, "category": f"part {index % 2}"})
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def command(data, output, *more, task="refcoco"):
    shared = ["--data", str(data), "--task", task, "--output", str(output), "--device", "cpu"]
    return [*shared, *map(str, more)]


def test_a_killed_run_goes_on_and_ends_like_one_that_was_not(data, tmp_path, capsys):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    predictions = killed / "predictions.jsonl"
    program = Program(run_module, "deepseek_vl2.evaluate", *command(data, killed))
    try:
        limit = time.monotonic() + TIMEOUT
        while not predictions.exists() or predictions.read_bytes().count(b"\n") < 2:
            assert program.is_running or predictions.exists(), "it ended without an answer"
            assert time.monotonic() < limit, "no answers in time"
            time.sleep(0.01)
    finally:
        program.kill()
    lines = predictions.read_bytes().splitlines(keepends=True)
    # Had it been quicker than the signal, it is set back to the moment of its third answer.
    predictions.write_bytes(b"".join(lines[:2]) + lines[0][:20])

    assert main(command(data, killed)) == 0
    resumed = capsys.readouterr().out.splitlines()
    assert main(command(data, whole)) == 0
    assert predictions.read_bytes() == (whole / "predictions.jsonl").read_bytes()
    assert len(predictions.read_text(encoding="utf-8").splitlines()) == NUM_SAMPLES

    summary = json.loads(resumed[-1])
    assert summary["num_samples"] == NUM_SAMPLES
    assert summary["score"] >= 50  # nano finds nearly every one of these objects
    results = json.loads((killed / "results.json").read_text(encoding="utf-8"))
    assert results["overall"]["score"] == summary["score"]
    assert set(results["by_category"]) == {"part 0", "part 1"}
    assert resumed[1].split()[:2] == ["category", "samples"]
    page = (killed / "report.html").read_text(encoding="utf-8")
    assert page.count("<article") == NUM_SAMPLES
    assert page.count('class="expected"') >= NUM_SAMPLES


def test_a_finished_run_is_told_and_reported_anew_without_the_weights(data, tmp_path, capsys, monkeypatch):
    few = command(data, tmp_path, "--limit", 2, "--max_new_tokens", 2)
    assert main(few) == 0
    told = capsys.readouterr().out
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<article") == 2
    monkeypatch.setattr(evaluate_command, "load_pretrained_model", None)
    assert main([*few, "--num_examples", "1"]) == 0
    assert capsys.readouterr().out == told
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<article") == 1


def test_a_second_run_is_kept_out_of_the_folder(data, tmp_path, capsys):
    with lock_folder(tmp_path):
        assert main(command(data, tmp_path)) == 2
    assert "another run is at work in" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


def test_other_settings_are_refused(data, tmp_path, capsys):
    assert main(command(data, tmp_path, "--limit", 1, "--max_new_tokens", 2)) == 0
    capsys.readouterr()
    assert main(command(data, tmp_path, "--limit", 1, "--max_new_tokens", 3)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "max_new_tokens was 2, is 3" in captured.err.splitlines()[-1]
    assert main(command(data, tmp_path, "--limit", 1, "--max_new_tokens", 2, "--no_tiling")) == 2
    assert "no_tiling was False, is True" in capsys.readouterr().err.splitlines()[-1]
    others = tmp_path / "others"
    shutil.copytree(data.parent, others)
    same = command(data, tmp_path, "--limit", 1, "--max_new_tokens", 2)
    assert main([*same, "--picture_root", str(others)]) == 2
    assert f"picture_root was None, is {str(others)!r}" in capsys.readouterr().err.splitlines()[-1]
    assert main([*same, "--picture_root", str(data.parent)]) == 0  # where they were looked for


@pytest.mark.parametrize("spelling", ["--no_tiling", "--no-tiling"])
def test_without_tiling_pictures_are_smaller_for_the_model(data, tmp_path, monkeypatch, spelling):
    seen = []
    answer = runner.answer_batch

    def answer_batch(model, processor, prompts, *rest):
        seen.extend(prompt.images_spatial_crop.tolist() for prompt in prompts)
        return answer(model, processor, prompts, *rest)

    monkeypatch.setattr(runner, "answer_batch", answer_batch)
    few = ("--limit", 2, "--max_new_tokens", 1)
    assert main(command(data, tmp_path / "plain", *few, spelling)) == 0
    assert seen == [[[1, 1]]] * 2
    assert json.loads((tmp_path / "plain" / "results.json").read_text())["settings"]["no_tiling"] is True
    assert main(command(data, tmp_path / "tiled", *few)) == 0
    assert seen[2:] != seen[:2]


@pytest.fixture
def bad(data, tmp_path):
    """The good lines 1 and 3, and three bad ones."""
    good = data.read_text(encoding="utf-8").splitlines()
    outside = {**json.loads(good[1]), "boxes": [[0, 0, 9999, 10]], "id": "outside"}
    missing = json.loads(good[1].replace("1.png", "gone.png"))
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([good[0], "{", good[2], json.dumps(outside), json.dumps(missing)]) + "\n")
    return path


def test_bad_lines_stop_the_command_before_it_computes(data, bad, tmp_path, capsys):
    output = tmp_path / "output"
    assert main(command(bad, output, "--picture_root", data.parent)) == 2
    captured = capsys.readouterr()
    said = [line for line in captured.err.splitlines() if line.startswith("python -m")]
    assert [line.split(": ")[1] for line in said] == ["line 2", "line 4", "line 5", "error"]
    assert "3 bad of 5 entries" in said[-1] and "--skip-bad" in said[-1]
    assert captured.out == ""
    assert not output.exists()


@pytest.mark.parametrize("spelling", ["--skip_bad", "--skip-bad"])
def test_bad_lines_are_left_out_if_that_is_wanted(data, bad, tmp_path, capsys, spelling):
    output = tmp_path / "output"
    assert main(command(bad, output, "--picture_root", data.parent, spelling, "--max_new_tokens", 1)) == 0
    captured = capsys.readouterr()
    assert "line 2: not JSON" in captured.err
    assert "3 bad entries are left out, 2 remain" in captured.err
    summary = json.loads(captured.out.splitlines()[-1])
    assert (summary["num_samples"], summary["num_skipped"], summary["num_unreadable"]) == (2, 3, 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--task", "dance"], "dance"),
        (["--limit", "0"], "--limit 0"),
        (["--batch_size", "0"], "--batch_size 0"),
        (["--num_examples", "-1"], "--num_examples -1"),
    ],
)
def test_options_out_of_range(data, tmp_path, capsys, changes, said):
    with pytest.raises(SystemExit) as stop:
        main([*command(data, tmp_path / "output"), *changes])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--data", "gone.jsonl"], "gone.jsonl"),
        (["--model_path", "./gone"], "./gone"),
        (["--device", "abacus"], "abacus"),
        (["--chunk_size", "0"], "chunk_size 0"),
    ],
)
def test_errors_take_one_line(data, tmp_path, capsys, changes, said):
    assert main([*command(data, tmp_path / "output"), *changes]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m deepseek_vl2.evaluate: error: ")
    assert said in line


def test_an_empty_file(tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    assert main(command(tmp_path / "empty.jsonl", tmp_path / "output")) == 2
    assert "is empty" in capsys.readouterr().err
