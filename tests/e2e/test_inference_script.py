"""`inference.py`: run as users run it with the bundled model, and in process with random weights."""

import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from programs import Program, run_file

from deepseek_vl2.evaluate.metrics import intersection_over_union
from deepseek_vl2.nano.architecture import nano_processor, untrained_nano
from deepseek_vl2.serve.inference import deepseek_generate, load_model

pytestmark = pytest.mark.e2e

TIMEOUT = 300
EXAMPLE = "visual_grounding_1.jpeg"
FOUND = "<|ref|>red star<|/ref|><|det|>[[100, 200, 500, 600]]<|/det|>"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with nano's architecture and random weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    processor = nano_processor()
    processor.save_pretrained(folder)
    untrained_nano(processor.tokenizer, seed=3).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def script(repository):
    spec = importlib.util.spec_from_file_location("inference_script", repository / "inference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script, checkpoint, capsys, tmp_path, monkeypatch):
    """Runs the script in process, in a folder of its own; gives exit code, standard output and error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, model=checkpoint):
        try:
            code = script.main(["--model_path", str(model), "--device", "cpu", *map(str, arguments)])
        except SystemExit as exit_:
            code = exit_.code
        captured = capsys.readouterr()
        # Progress bars are switched off where the script is run as a program.
        lines = [line for line in captured.err.splitlines() if "Loading weights" not in line and line.strip()]
        return SimpleNamespace(code=code, out=captured.out, err=lines)

    return call


@pytest.fixture
def says(script, monkeypatch):
    """Makes the model answer a given text, and keeps what it was asked."""

    class Said:
        num_prompt_tokens, num_image_tokens, num_new_tokens, is_cut_off = 50, 40, 12, False

        def __init__(self, text):
            self._pieces = iter([text[:5], text[5:]])

        def __iter__(self):
            return self._pieces

    asked = SimpleNamespace(text=FOUND, calls=[])

    def generate(conversation, *parts, **options):
        asked.calls.append((conversation, options))
        return Said(asked.text)

    monkeypatch.setattr(script, "deepseek_generate", generate)
    return asked


# -- as users run it --------------------------------------------------------------------------------------------------


def star_of(repository):
    scene = json.loads((repository / "images" / "scenes.json").read_text(encoding="utf-8"))[EXAMPLE]
    return next(item["box"] for item in scene if item["label"] == "red star")


def test_without_arguments_it_finds_the_red_star(repository, tmp_path):
    done = subprocess.run(
        [sys.executable, repository / "inference.py"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=TIMEOUT,
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    answer, saved = done.stdout.splitlines()
    assert answer.startswith("<|ref|>") and answer.endswith("]]<|/det|>")
    assert saved == "The picture with 1 box is saved as vg.jpg."
    before = Image.open(repository / "images" / EXAMPLE).convert("RGB")
    after = Image.open(tmp_path / "vg.jpg")
    assert after.size == before.size
    x1, y1, x2, y2 = map(int, star_of(repository))
    changed = np.asarray(ImageChops.difference(before, after)).max(axis=2) > 60
    around = np.zeros_like(changed)
    around[max(y1 - 40, 0) : y2 + 40, max(x1 - 40, 0) : x2 + 40] = True
    assert changed[around].mean() > 0.01
    assert changed[~around].mean() < 0.001


def test_standard_output_holds_the_answer_and_nothing_else(repository, checkpoint, tmp_path):
    picture = tmp_path / "a.png"
    Image.new("RGB", (90, 60), "red").save(picture)
    question = ["--image", picture, "--prompt", "<image>\nWhat is this?", "--max_new_tokens", 12]
    options = ["--model_path", checkpoint, "--device", "cpu", *question]
    done = Program(run_file, repository / "inference.py", *options, folder=tmp_path).finish()
    assert done.returncode == 0, done.stderr
    tokenizer, model, processor = load_model(str(checkpoint), device="cpu")
    conversation = [
        {"role": "user", "content": "<image>\nWhat is this?", "images": [str(picture)]},
        {"role": "assistant", "content": ""},
    ]
    answer = "".join(
        deepseek_generate(
            conversation, model, processor, tokenizer, max_length=12, temperature=0, repetition_penalty=1.0
        )
    )
    assert done.stdout == answer + "\n"
    assert done.stderr.splitlines() == [
        "inference.py: warning: the answer is cut off after 12 tokens; --max_new_tokens sets the limit"
    ]


def test_an_interrupt_ends_it_quietly(repository, checkpoint, tmp_path):
    options = ["--model_path", checkpoint, "--device", "cpu", "--max_new_tokens", 3900]
    speaking = Program(run_file, repository / "inference.py", *options, folder=tmp_path)
    while not speaking.stdout:
        assert speaking.is_running
        time.sleep(0.01)
    speaking.send_signal(signal.SIGINT)
    done = speaking.finish()
    assert done.returncode == 130
    assert done.stderr.split("\n") == ["", "inference.py: interrupted", ""]


# -- in process -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    names = ["a.png", "b.png"]
    for name, size, color in zip(names, [(90, 60), (200, 100)], ["red", "blue"], strict=True):
        Image.new("RGB", size, color).save(tmp_path / name)
    return names


def test_json_of_the_bundled_example(run, repository):
    result = run("--json", "--output", "star.png", model="nano")
    assert (result.code, result.err) == (0, [])
    document = json.loads(result.out)
    (box,) = document["boxes"]
    assert intersection_over_union(box["pixels"], star_of(repository)) >= 0.5
    assert "star" in box["label"]
    assert document["model"] == "nano" and document["problems"] == [] and not document["is_cut_off"]
    assert document["output"] == "star.png" and Path("star.png").is_file()


def test_it_streams(run, checkpoint, monkeypatch, script):
    printed = []
    monkeypatch.setattr(script, "print", lambda *values, **options: printed.append((*values, options)), raising=False)
    assert run("--max_new_tokens", 5, "--prompt", "Hello").code == 0
    pieces = [item for item in printed if item[-1].get("end") == ""]
    assert len(pieces) > 2 and all(item[-1]["flush"] for item in pieces)


def test_boxes_are_drawn_on_the_last_picture(run, says, pictures, tmp_path):
    done = run("--image", *pictures, "--prompt", "Where?")
    assert done.code == 0 and done.err == []
    assert done.out == f"{FOUND}\nThe picture with 1 box is saved as vg.jpg.\n"
    drawn = Image.open(tmp_path / "vg.jpg")
    assert drawn.size == (200, 100)
    assert drawn.getpixel((150, 80))[2] > 200  # blue
    assert drawn.getpixel((60, 20)) != drawn.getpixel((150, 80))  # the box's edge


def test_pictures_in_one_list_or_several(run, says, pictures):
    assert run("--image", *pictures, "--prompt", "<image> or <image>?").code == 0
    assert run("--image", pictures[0], "--image", pictures[1], "--prompt", "<image> or <image>?").code == 0
    assert run("--image", *pictures, "--prompt", "Which?").code == 0
    (one, _), (several, _), (unmarked, options) = says.calls
    for conversation in (one, several, unmarked):
        assert [picture.size for picture in conversation[0]["images"]] == [(90, 60), (200, 100)]
    assert one[0]["content"] == several[0]["content"] == "<image> or <image>?"
    assert unmarked[0]["content"] == "<image>\n<image>\nWhich?"
    assert options == {
        "max_length": 512,
        "temperature": 0.0,
        "top_p": 0.9,
        "repetition_penalty": 1.0,
        "chunk_size": -1,
    }


def test_options_reach_the_model(run, says):
    given = {"max_new_tokens": 7, "temperature": 0.5, "top_p": 0.8, "repetition_penalty": 1.2, "chunk_size": 64}
    assert run("--prompt", "Hi", *(item for name, value in given.items() for item in (f"--{name}", value))).code == 0
    given["max_length"] = given.pop("max_new_tokens")
    assert says.calls[0][1] == given


def test_a_picture_without_a_question_is_described(run, says, pictures):
    assert run("--image", pictures[0]).code == 0
    assert says.calls[0][0][0]["content"] == "<image>\n<|grounding|>Describe the picture."


def test_text_alone(run, says):
    done = run("--prompt", "Hello")
    assert done.code == 0 and done.err == []
    assert says.calls[0][0][0] == {"role": "<|User|>", "content": "Hello", "images": []}
    assert done.out == FOUND + "\n"  # boxes, but no picture to draw them on


def test_json_document(run, says, pictures):
    says.text = f"{FOUND} and <|det|>[[5]]<|/det|>"
    done = run("--image", *pictures, "--prompt", "Where?", "--json", "--output", "out.webp")
    document = json.loads(done.out)
    assert document.pop("seconds") >= 0
    assert len(document.pop("problems")) >= 1
    assert document.pop("model").endswith("checkpoint0")
    assert document == {
        "answer": says.text,
        "boxes": [{"label": "red star", "box": [100, 200, 500, 600], "pixels": [20, 20, 100, 60]}],
        "is_cut_off": False,
        "output": "out.webp",
        "prompt_tokens": 50,
        "image_tokens": 40,
        "new_tokens": 12,
    }
    assert done.err == []


def test_json_of_an_answer_without_boxes(run, says, pictures, tmp_path):
    says.text = "红色 ★"
    done = run("--image", pictures[0], "--prompt", "What?", "--json")
    assert "红色 ★" in done.out
    document = json.loads(done.out)
    assert document["boxes"] == [] and document["output"] is None
    assert not (tmp_path / "vg.jpg").exists()


def test_malformed_boxes_are_told(run, says, pictures):
    says.text = "<|ref|>x<|/ref|><|det|>[[5, 5]]<|/det|>"
    done = run("--image", pictures[0], "--prompt", "Where?")
    assert done.code == 0
    assert len(done.err) == 1 and "has 2 values, not 4" in done.err[0]


def test_counts_of_a_real_answer(run, pictures):
    done = run("--image", *pictures, "--prompt", "Which?", "--max_new_tokens", 4, "--json", "--chunk_size", 32)
    document = json.loads(done.out)
    assert document["new_tokens"] == 4 and document["is_cut_off"]
    assert 80 < document["image_tokens"] < document["prompt_tokens"]


def test_seeds(run):
    def sample(seed):
        return run("--prompt", "Hello", "--temperature", 0.7, "--seed", seed, "--max_new_tokens", 12).out

    assert sample(1) == sample(1) != sample(2)


def test_a_high_temperature_is_warned_of(run, says):
    done = run("--prompt", "Hi", "--temperature", 1.2)
    assert done.code == 0
    assert len(done.err) == 1 and "temperature 1.2 is above 0.7" in done.err[0]
    assert run("--prompt", "Hi", "--temperature", 0.7).err == []


def test_no_positions_left(run, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    config["language_config"]["max_position_embeddings"] = 100
    (folder / "config.json").write_text(json.dumps(config))
    done = run("--prompt", "red " * 80, "--max_new_tokens", 400, model=folder)
    assert done.code == 0
    # What a model that has learnt nothing says may also be cut off within a box, which has a warning of its own.
    about_length = [line for line in done.err if "is not closed" not in line]
    assert len(about_length) == 1
    assert "of the prompt the model has no positions left; ask with less" in about_length[0]


def huge_png():
    """A small file of many pixels."""
    buffer = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.png", None, "no such picture file: none.png"),
        ("text.png", b"hello", "'text.png' is not a picture"),
        ("empty.png", b"", "'empty.png' is an empty file"),
        ("cut.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0", "'cut.png'"),
        ("huge.png", huge_png, "'huge.png' is too large"),
        (".", None, "'.' is a folder"),
        ("ftp://example.org/a.png", None, "addresses must start with http:"),
    ],
)
def test_pictures_that_are_none(run, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content())
    failed(run("--image", name), message)


def failed(done, *messages):
    assert done.code == 2
    assert done.out == ""
    (line,) = done.err
    assert line.startswith("inference.py: error: ")
    for message in messages:
        assert message in line


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--chunk_size", 0], ["chunk_size 0 must be at least 1, or -1"]),
        (["--chunk_size", "many"], ["--chunk_size", "'many'"]),
        (["--temperature", -1], ["temperature -1.0 must be 0"]),
        (["--temperature", "nan"], ["temperature nan"]),
        (["--top_p", 2], ["top_p 2.0 must be above 0"]),
        (["--repetition_penalty", 0], ["repetition_penalty 0.0 must be above 0"]),
        (["--max_new_tokens", 0], ["max_new_tokens 0 must"]),
        (["--seed", -3], ["--seed -3 must be 0 to"]),
        (["--seed", 2**70], ["--seed", "must be 0 to"]),
        (["--dtype", "int4"], ["--dtype", "'int4'", "bfloat16"]),
        (["--device", "tpu"], ["unknown device 'tpu'"]),
        (["--colour", "red"], ["unrecognized arguments: --colour red"]),
        (["--image"], ["--image", "expected at least one argument"]),
        (["--output", "vg.txt"], ["--output vg.txt", ".jpg"]),
        (["--output", "vg"], ["--output vg", ".jpg"]),
        (["--output", "no/such/folder/vg.jpg"], ["the folder no/such/folder does not exist"]),
        (["--output", "folder.png"], ["folder.png is a folder"]),
        (["--prompt", " "], ["--prompt is empty"]),
        (["--prompt", "<image>"], ["--prompt is empty"]),
        (["--prompt", "<image> Where?"], ["1 <image> mark(s) for 0 picture(s)", "leave all marks out"]),
        (["--prompt", "<image> <image> Where?", "--image", "a.png"], ["2 <image> mark(s) for 1 picture(s)"]),
        (["--prompt", "<image> Where?", "--image", "a.png", "b.png"], ["1 <image> mark(s) for 2 picture(s)"]),
        (["--image", "a.png", "--output", "./a.png"], ["would replace the picture"]),
    ],
)
def test_mistakes_cost_one_line_and_nothing_else(run, script, monkeypatch, pictures, tmp_path, arguments, messages):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(script, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    failed(run(*arguments), *messages)


def test_a_prompt_longer_than_the_positions(run):
    failed(run("--prompt", "red " * 5000), "The prompt has 50", "the model has 4096 positions", "shorter text")


def test_cuda_where_there_is_none(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    failed(run("--device", "cuda"), "device 'cuda' is not available here", "--device cpu")


def test_model_folders(run, tmp_path, checkpoint):
    failed(run(model=tmp_path / "nowhere"), "there is no model folder", "nowhere")
    failed(run(model=tmp_path), "has no config.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    failed(run(model=tmp_path), "holds an adapter and no model", "--adapter")
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    failed(run(model=tmp_path), "the model's processor is missing")


def test_a_hub_name_without_a_network(run):
    start = time.monotonic()
    failed(run(model="deepseek-ai/deepseek-vl2-tiny"), "the Hugging Face hub cannot be reached", "'nano'")
    assert time.monotonic() - start < 60


def test_questions_that_follow_are_answered_in_the_same_conversation(repository, tmp_path):
    questions = ("--follow_up", "What color is it?", "How many stars are there?")
    done = Program(run_file, repository / "inference.py", "--json", *questions, folder=tmp_path).finish()
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    color, count = document["follow_ups"]
    assert intersection_over_union(document["boxes"][0]["pixels"], star_of(repository)) >= 0.5
    assert "red" in color["answer"].lower() and color["boxes"] == []
    assert re.search(r"\d", count["answer"])
    assert document["prompt_tokens"] < color["prompt_tokens"] < count["prompt_tokens"]
    assert color["image_tokens"] == document["image_tokens"]


def test_questions_that_follow_share_what_was_read(run, says, repository):
    picture = repository / "images" / EXAMPLE
    done = run("--image", str(picture), "--prompt", "Where?", "--follow_up", "And then?", "Why?")
    assert done.code == 0
    assert done.out.splitlines()[:-1] == [says.text] * 3
    memories = {id(options["memory"]) for _, options in says.calls}
    assert (len(says.calls), len(memories)) == (3, 1)
    contents = [message["content"] for message in says.calls[-1][0]]
    assert contents == ["<image>\nWhere?", says.text, "And then?", says.text, "Why?", ""]
    assert "with 3 boxes" in done.out.splitlines()[-1]


@pytest.mark.parametrize(
    ("question", "message"), [(" ", "--follow_up is empty"), ("<image> Why?", "1 <image> mark(s) for 0")]
)
def test_bad_questions_that_follow(run, question, message):
    failed(run("--follow_up", question), message)


def test_an_address_where_nobody_listens(run):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/a.png"
        failed(run("--image", address), "cannot reach", address)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory.\nTried"), MemoryError(), RuntimeError("can't allocate memory")],
)
def test_too_little_memory(run, script, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(script, "deepseek_generate", fail)
    failed(run("--prompt", "Hi"), "not enough memory; try --chunk_size 512")


def test_bugs_are_not_hidden(run, script, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(script, "deepseek_generate", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run("--prompt", "Hi")


def test_an_interrupt_has_its_own_exit_code(run, script, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "deepseek_generate", fail)
    done = run("--prompt", "Hi")
    assert (done.code, done.out, done.err) == (130, "", ["inference.py: interrupted"])


def test_help_names_every_option(run):
    done = run("--help")
    assert done.code == 0
    for name in ("model_path", "chunk_size", "image", "prompt", "max_new_tokens", "temperature", "seed", "device"):
        assert f"--{name}" in done.out


def test_a_reader_that_leaves_ends_it_quietly(repository, checkpoint, tmp_path):
    command = [sys.executable, str(repository / "inference.py"), "--model_path", str(checkpoint), "--device", "cpu"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*command, "--prompt", "Hi"], cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, timeout=TIMEOUT
    )
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == b""
