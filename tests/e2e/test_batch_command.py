"""`python -m deepseek_vl2.batch` with the bundled model: killed and taken up again; bad items; a full disk."""

import errno
import json
import shutil
import sys
import time

import pytest
from batch_inputs import save_pdf, save_pictures
from programs import Program, run_module
from pyarrow import parquet

from deepseek_vl2.batch import __main__ as batch_command
from deepseek_vl2.batch import answering
from deepseek_vl2.batch.__main__ import main
from deepseek_vl2.batch.answering import ModelOptions
from deepseek_vl2.batch.engines import Job
from deepseek_vl2.batch.ray_engine import WindowWorker
from deepseek_vl2.utils import run_folder
from deepseek_vl2.utils.io import dtype_name, load_pretrained_model
from deepseek_vl2.utils.run_folder import lock_folder

pytestmark = pytest.mark.e2e

TIMEOUT = 300
NUM_ITEMS = 12
SHARED = ["--device", "cpu", "--dtype", "float32", "--max_new_tokens", "3", "--prompt", "What is {name}?"]


def command(source, output, *more):
    return [str(source), "--output", str(output), *SHARED, *map(str, more)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight pictures of which one is cut off, a PDF of three pages, and a broken one."""
    path = tmp_path_factory.mktemp("pictures")
    pictures = save_pictures(path, 8)
    pictures[3].write_bytes(pictures[3].read_bytes()[:300])
    save_pdf(path / "doc.pdf", 3)
    (path / "broken.pdf").write_bytes(b"%PDF-1.4 nothing more")
    return path


def read(path):
    """The records without what differs between runs."""
    if path.suffix == ".parquet":
        records = parquet.read_table(path).to_pylist()
    else:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The output of a run that nothing disturbs."""
    path = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert main(command(folder, path, "--window", 5, "--batch_size", 2)) == 1
    return path


def test_a_killed_run_goes_on_and_ends_like_one_that_was_not(folder, whole, tmp_path):
    output = tmp_path / "out.jsonl"
    records = tmp_path / "out.jsonl.run" / "records.jsonl"
    options = command(folder, output, "--window", 5, "--batch_size", 2)
    program = Program(run_module, "deepseek_vl2.batch", *options)
    try:
        limit = time.monotonic() + TIMEOUT
        while not records.exists() or records.read_bytes().count(b"\n") < 3:
            assert program.is_running, "it ended without an answer"
            assert time.monotonic() < limit, "no answers in time"
            time.sleep(0.01)
    finally:
        program.kill()
    lines = records.read_bytes().splitlines(keepends=True)
    # Had it been quicker than the signal, it is set back to the moment of its sixth answer.
    records.write_bytes(b"".join(lines[:5]) + lines[5 % len(lines)][:20])
    output.unlink(missing_ok=True)
    assert main(options) == 1
    assert read(output) == read(whole)
    assert records.read_bytes().count(b"\n") == NUM_ITEMS
    assert records.read_bytes().startswith(b"".join(lines[: min(5, len(lines))]))  # nothing is done twice


def test_the_output_is_in_order_and_bad_items_have_their_error(whole):
    records = read(whole)
    pages = [f"doc.pdf#page={page}" for page in (1, 2, 3)]
    pictures = [f"{number:02}.png" for number in range(8)]
    assert [record["id"] for record in records] == [*pictures, "broken.pdf", *pages]
    assert [record["index"] for record in records] == list(range(NUM_ITEMS))
    errors = {record["id"]: record["error"] for record in records if record["error"]}
    assert errors.keys() == {"03.png", "broken.pdf"}
    assert "broken or truncated" in errors["03.png"]
    assert "no PDF that can be read" in errors["broken.pdf"]
    assert all((record["text"] is None) == (record["id"] in errors) for record in records)
    assert all(record["prompt_tokens"] > record["image_tokens"] > 0 for record in records if not record["error"])


def test_a_finished_run_is_not_computed_again(folder, whole, monkeypatch, capsys):
    def load(self):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(ModelOptions, "load", load)
    before = whole.read_bytes()
    assert main(command(folder, whole)) == 1
    captured = capsys.readouterr()
    assert whole.read_bytes() == before
    summary = json.loads(captured.out)
    assert (summary["num_items"], summary["num_failed"], summary["num_done_before"]) == (NUM_ITEMS, 2, NUM_ITEMS)
    assert "2 of 12 items failed" in captured.err.splitlines()[-1]


def test_answers_depend_neither_on_the_batch_nor_on_the_kind_of_output(folder, whole, tmp_path):
    output = tmp_path / "out.parquet"
    assert main(command(folder, output, "--batch_size", 5, "--window", 100, "--chunk_size", 50)) == 1
    assert read(output) == read(whole)


def test_a_worker_of_ray_gives_the_same_records(folder, whole, monkeypatch):
    """Without a cluster: what runs in its processes. benchmarks/batch_ray.py shows the rest."""
    jobs = []
    monkeypatch.setattr("deepseek_vl2.batch.__main__.run_on_ray", lambda job, file, cluster: jobs.append(job))
    other = whole.with_name("ray.jsonl")
    assert main(command(folder, other, "--engine", "ray", "--window", 5, "--batch_size", 2)) == 2  # nothing is done
    (job,) = jobs
    assert isinstance(job, Job)
    worker = WindowWorker(job)
    rows = [json.dumps({"start": start, "stop": min(start + 5, 12), "done": [6]}) for start in (5, 0, 10)]
    (first, second, third) = worker({"window": rows})["records"]
    records = sorted(json.loads(first) + json.loads(second) + json.loads(third), key=lambda record: record["index"])
    expected = [record for record in read(whole) if record["index"] != 6]
    assert [{name: value for name, value in record.items() if name != "seconds"} for record in records] == expected


def test_sampled_answers_are_those_of_the_seed(folder, tmp_path):
    outputs = [tmp_path / f"{number}.jsonl" for number in range(3)]
    for output, seed, size in zip(outputs, (1, 1, 2), (1, 4, 4), strict=True):
        main(command(folder, output, "--temperature", 1.5, "--seed", seed, "--batch_size", size, "--limit", 4))
    assert read(outputs[0]) == read(outputs[1]) != read(outputs[2])


def test_a_mended_picture_is_asked_again_if_that_is_wanted(tmp_path):
    pictures = save_pictures(tmp_path / "in", 3)
    good = pictures[1].read_bytes()
    pictures[1].write_bytes(b"broken")
    output = tmp_path / "out.jsonl"
    assert main(command(tmp_path / "in", output)) == 1
    broken = read(output)
    pictures[1].write_bytes(good)
    assert main(command(tmp_path / "in", output)) == 1
    assert read(output) == broken
    assert main(command(tmp_path / "in", output, "--retry_failed")) == 0
    assert [record["error"] for record in read(output)] == [None] * 3
    assert [read(output)[index] for index in (0, 2)] == [broken[index] for index in (0, 2)]


def test_a_full_disk_stops_the_run_which_then_goes_on(folder, whole, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.jsonl"
    options = command(folder, output, "--window", 5, "--batch_size", 2)
    with monkeypatch.context() as patch:
        synced = []

        def fsync(descriptor):
            synced.append(descriptor)
            if len(synced) == 4:
                raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(run_folder.os, "fsync", fsync)
        assert main(options) == 2
    assert "No space left on device: " in capsys.readouterr().err.splitlines()[-1]
    assert not output.exists()
    assert main(options) == 1
    assert read(output) == read(whole)


def test_two_runs_on_one_output_are_refused(folder, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    with lock_folder(tmp_path / "out.jsonl.run"):
        assert main(command(folder, output)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("python -m")]
    assert "another run is at work in" in line


def test_a_file_that_is_no_runs_output_is_not_replaced(folder, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    output.write_text("mine")
    assert main(command(folder, output)) == 2
    assert "is there already" in capsys.readouterr().err.splitlines()[-1]
    assert output.read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--prompt", "Which?"], "prompt was 'What is {name}?', is 'Which?'"),
        (["--max_new_tokens", "4"], "max_new_tokens was 3, is 4"),
        (["--no_tiling"], "no_tiling was False, is True"),
        (["--dtype", "bfloat16"], "dtype was 'float32', is 'bfloat16'"),
        (["--limit", "3"], "limit was None, is 3"),
    ],
)
def test_other_settings_are_refused(folder, whole, capsys, changes, said):
    assert main([*command(folder, whole), *changes]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_weights_can_be_held_in_fewer_bits(folder, tmp_path, monkeypatch, capsys):
    models = []

    def load(*arguments, **options):
        models.append(load_pretrained_model(*arguments, **options))
        return models[-1]

    monkeypatch.setattr(answering, "load_pretrained_model", load)
    options = command(folder, tmp_path / "out.jsonl", "--limit", 1, "--quantize", "int8")
    assert main(options) == 0
    assert models[0].model.config.quantization_config.name == "int8"
    assert read(tmp_path / "out.jsonl")[0]["text"]
    assert main(options[:-2]) == 2
    assert "quantize was 'int8', is None" in capsys.readouterr().err.splitlines()[-1]


def test_the_same_names_in_another_folder_are_another_input(folder, whole, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    assert main(command(other, whole, "--window", 5, "--batch_size", 2)) == 2
    assert f"input was '{folder}', is '{other}'" in capsys.readouterr().err.splitlines()[-1]


def test_a_run_goes_on_with_the_other_engine(folder, tmp_path, monkeypatch):
    """The type of the weights is that of the run, which only a process beside the model can choose."""
    dtypes = []
    monkeypatch.setattr("deepseek_vl2.batch.__main__.run_on_ray", lambda job, *others: dtypes.append(job.model.dtype))
    monkeypatch.setattr("deepseek_vl2.batch.__main__.run_here", lambda job, *others: dtypes.append(job.model.dtype))
    suiting = dtype_name("nano", "cpu")
    for engines, expected in ((("local", "ray"), [suiting] * 2), (("ray", "local"), [None] * 2)):
        dtypes.clear()
        for engine in engines:
            options = [str(folder), "--output", str(tmp_path / f"{engines[0]}.jsonl"), "--device", "cpu"]
            assert main([*options, "--engine", engine]) == 2  # records are missing: nothing has answered
        assert dtypes == expected


def run_with_a_fault(*arguments):
    sys.argv = ["batch", *arguments]
    batch_command.run = None
    batch_command.command()


def test_a_fault_of_the_program_does_not_end_like_a_finished_run(folder, tmp_path):
    done = Program(run_with_a_fault, *command(folder, tmp_path / "out.jsonl")).finish()
    assert done.returncode == 70
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--model_path", "./gone"], "./gone"),
        (["--device", "abacus"], "abacus"),
        (["--temperature", "-1"], "temperature -1"),
        (["--chunk_size", "0"], "chunk_size 0"),
        (["--output", "out.txt"], "out.txt"),
        (["--prompt", "{gone}"], "{gone}"),
        (["--adapter", "gone"], "gone"),
        (["--quantize", "int8", "--dtype", "float16"], "float16"),
    ],
)
def test_errors_take_one_line(folder, tmp_path, capsys, changes, said):
    assert main([*command(folder, tmp_path / "out.jsonl"), *changes]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("python -m deepseek_vl2.batch: error: ")
    assert said in line


@pytest.mark.parametrize("changes", [["--batch_size", "0"], ["--window", "-1"], ["--engine", "steam"]])
def test_options_out_of_range(folder, tmp_path, capsys, changes):
    with pytest.raises(SystemExit) as stop:
        main([*command(folder, tmp_path / "out.jsonl"), *changes])
    assert stop.value.code == 2
    assert changes[1] in capsys.readouterr().err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_batch_without_enough_memory_says_what_to_do(folder, tmp_path, monkeypatch, capsys, error):
    def answer_batch(*arguments):
        raise error

    monkeypatch.setattr(answering, "answer_batch", answer_batch)
    assert main(command(folder, tmp_path / "out.jsonl")) == 2
    assert "a smaller --batch_size or --token_budget" in capsys.readouterr().err.splitlines()[-1]
