"""The whole benchmark, on a random checkpoint of a few layers."""

import json
import sys

import pytest
from small_models import SIDE, vl_config

from benchmarks import __main__ as script
from benchmarks.checkpoints import write_checkpoint

pytestmark = pytest.mark.e2e
QUICK = ["--repeats", "1", "--new_tokens", "4", "--buffer_mib", "2", "--product_side", "64", "--threads", "1"]
LANGUAGE = {"vocab_size": 420, "bos_token_id": 400, "eos_token_id": 401, "pad_token_id": 402}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = vl_config(
        LANGUAGE | {"max_position_embeddings": 300}, candidate_resolutions=[[SIDE, SIDE], [2 * SIDE, SIDE]]
    )
    return str(write_checkpoint(config, tmp_path_factory.mktemp("random")))


def test_every_part_gives_its_figures_and_the_last_line_is_json(checkpoint, capsys, tmp_path):
    left_out = {"prefill_memory"} if sys.platform != "linux" else set()
    parts = [part for part in script.ALL_PARTS if part not in left_out]
    arguments = ["--model_path", checkpoint, "--parts", ",".join(parts), "--dtype", "bfloat16", "--profile"]
    assert script.main([*arguments, "--plots", str(tmp_path), *QUICK]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["layers"] == 3 and result["weights"] == "bfloat16"
    assert result["machine"]["threads"] == 1 and result["machine"]["OMP_NUM_THREADS"] == "1"
    figures = result["figures"]
    assert {"load", "load_peak", "vision_views", "vision_gflop", "prefill_tokens", "first_token", "decode_tokens"} <= (
        figures.keys()
    )
    assert {f"batch_{size}_tokens" for size in (1, 2, 4, 8)} <= figures.keys()
    assert figures["memory_cache_token_layer"]["value"] == 2 * (40 + 8)  # a latent and a rotated key in bfloat16
    assert figures["limit_decode_int8"]["value"] > figures["limit_decode_bfloat16"]["value"]
    for name in ("vision_views", "prefill_tokens", "decode_tokens"):
        figure = figures[name]
        assert 0 < figure["share"] < 1.5 and figure["limit"] > 0, name
    assert figures["prompt"]["value"] < 300
    if sys.platform == "linux":
        assert figures["prefill_memory_prompt"]["value"] == 300
        assert figures["load_peak"]["value"] > figures["load_libraries"]["value"] > 0.05
    assert [line for line in lines if line.startswith("decode_tokens ")]
    check_profile(result["profile"])
    assert [point["num_tokens"] for point in result["curves"]] == [64, 128, 256]
    assert {file.name for file in tmp_path.iterdir()} == {"latency.png", "memory.png"}


def check_profile(profile):
    assert {"vision_attention", "vision_mlp", "projector", "other"} == set(profile["vision"])
    language = {"attention", "router", "experts", "shared_experts", "dense_mlp", "lm_head", "other"}
    assert set(profile["prefill"]) == language
    assert set(profile["decode"]) == language | {"sampling"}
    assert all(seconds >= 0 for stage in profile.values() for seconds in stage.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "load,sleep"], "unknown part 'sleep': take some of load,vision"),
        (["--repeats", "0"], "--repeats 0 must be at least 1"),
        (["--layers", "3"], "--layers and --folder go with --size"),
        (["--size", "tiny", "--model_path", "x"], "give --size or --model_path, not both"),
        (["--size", "tiny", "--model_path", "nano"], "give --size or --model_path, not both"),
    ],
)
def test_bad_options_end_the_program(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_path", "./gone"], "there is no model folder './gone'"),
        (["--dtype", "int3"], "unknown dtype 'int3'"),
        (["--device", "cuda:99"], "'cuda:99' is not available here"),
        (["--size", "tiny", "--layers", "99"], "--layers 99 must be 1 to 12 for tiny"),
        (["--plots", __file__], "test_benchmarks.py"),
    ],
)
def test_errors_are_one_line(capsys, arguments, message):
    assert script.main([*arguments, *QUICK]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""


def test_more_new_tokens_than_positions(checkpoint, capsys):
    arguments = ["--model_path", checkpoint, "--parts", "decode", *QUICK, "--new_tokens", "299"]
    assert script.main(arguments) == 2
    assert "give fewer --new_tokens" in capsys.readouterr().err
