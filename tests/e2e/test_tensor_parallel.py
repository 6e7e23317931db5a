"""One model shared among two processes on the CPU: recorded models, and `inference.py --tp`."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from programs import Program, run_file

from deepseek_vl2.serve.inference import deepseek_generate, load_model
from deepseek_vl2.utils.io import resolve_model_path

# On the worker of the browser's tests: at the same time they are too much for two cores.
pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("browser")]

TIMEOUT = 600
QUESTION = "<|ref|>the red star<|/ref|>."


def torchrun(*arguments, cwd):
    """Runs a script as two processes of one thread each that see no GPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=environment, timeout=TIMEOUT
    )


def run_shared(file, *arguments, folder):
    """Runs a script as two processes with what torchrun gives them, variables and a store, but without its start."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": store.host,
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    programs = [
        Program(run_file, file, *arguments, folder=folder, environment={**shared, "RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    return [program.finish() for program in programs]


@pytest.fixture(scope="module")
def shared(repository, tmp_path_factory):
    """What the recorded models give when they are shared."""
    results = tmp_path_factory.mktemp("shared") / "results.json"
    for done in run_shared(repository / "tests" / "e2e" / "shared_golden_models.py", results, folder=repository):
        assert done.returncode == 0, done.stderr
    return json.loads(results.read_text())


@pytest.mark.parametrize("mode", ["tensor", "expert"])
@pytest.mark.parametrize("variant", ["tiny", "small", "base", "groups"])
def test_shared_models_give_the_logits_and_tokens_of_one_process(shared, variant, mode):
    found = shared[f"{variant} {mode}"]
    assert found["complaints"] == 0
    assert found["difference"] < 1e-4
    assert found["tokens"] == found["expected"]
    assert 2 * found["heads_width"] == found["all_heads_width"]
    num_experts, width, _ = found["all_experts"]
    share = (num_experts // 2, width) if mode == "expert" else (num_experts, width // 2)
    assert tuple(found["experts"][:2]) == share


def test_inference_script_speaks_once_and_draws_once(repository, tmp_path):
    picture = repository / "images" / "visual_grounding_1.jpeg"
    options = ["--tp", "--dtype", "float32", "--max_new_tokens", "24", "--temperature", "0.3", "--chunk_size", "64"]
    done = torchrun(repository / "inference.py", *options, "--image", picture, "--prompt", QUESTION, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
    answer, saved = done.stdout.splitlines()
    assert saved == "The picture with 1 box is saved as vg.jpg."
    assert [path.name for path in tmp_path.iterdir()] == ["vg.jpg"]
    tokenizer, model, processor = load_model("nano", torch.float32, device="cpu")
    conversation = [
        {"role": "<|User|>", "content": f"<image>\n{QUESTION}", "images": [str(picture)]},
        {"role": "<|Assistant|>", "content": ""},
    ]
    alone = "".join(
        deepseek_generate(conversation, model, processor, tokenizer, max_length=24, temperature=0, repetition_penalty=1)
    )
    assert re.sub(r"\d+", "", answer) == re.sub(r"\d+", "", alone)  # the box was sampled
    assert "<|det|>" in alone


def test_heads_that_cannot_be_shared_are_named_once(repository, tmp_path):
    folder = shutil.copytree(resolve_model_path("nano"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["language_config"].update(num_attention_heads=3, num_key_value_heads=3)
    (folder / "config.json").write_text(json.dumps(config))
    options = ["--tp", "--model_path", folder, "--output", "x.jpg"]
    both = run_shared(repository / "inference.py", *options, folder=tmp_path)
    assert [done.returncode for done in both] == [2, 2]
    lines = [line for done in both for line in done.stderr.splitlines()]
    complaints = [line for line in lines if line.startswith("inference.py: error: ")]
    assert complaints == [
        "inference.py: error: num_attention_heads is 3, which 2 processes cannot share evenly; "
        "numbers of processes that fit all sizes of this model: 1."
    ]
    assert [done.stdout for done in both] == ["", ""]
