"""Checks of weight files: whole ones, and every way to be broken."""

import json

import pytest
import torch
from safetensors.torch import save_file

from deepseek_vl2.models.weight_headers import read_header, stored_tensors
from deepseek_vl2.utils.checkpoint_files import INDEX_FILE, WEIGHTS_FILE, check_weight_files, compare_shapes

FIRST, SECOND = "model-1.safetensors", "model-2.safetensors"


@pytest.fixture
def sharded(tmp_path):
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16)}, tmp_path / FIRST)
    save_file({"c": torch.zeros(2)}, tmp_path / SECOND, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {"a": FIRST, "b": FIRST, "c": SECOND}}
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    return tmp_path


def test_one_file_goes_before_the_index_of_an_earlier_checkpoint(sharded):
    """As transformers reads a folder that was saved into twice."""
    (sharded / SECOND).unlink()
    save_file({"a": torch.zeros(3, 4)}, sharded / WEIGHTS_FILE)
    assert check_weight_files(sharded) == ([sharded / WEIGHTS_FILE], 48, [], {"a": (3, 4)})
    assert list(stored_tensors(sharded)) == [("a", [3, 4], "F32")]


def test_a_whole_checkpoint_of_shards(sharded):
    found = check_weight_files(sharded)
    assert found.problems == []
    assert [file.name for file in found.files] == [FIRST, SECOND]
    assert found.num_bytes == 12 * 4 + 5 * 2 + 2 * 4
    assert found.shapes == {"a": (3, 4), "b": (5,), "c": (2,)}


def test_a_whole_checkpoint_in_one_file(tmp_path):
    save_file({"a": torch.zeros(3, 4)}, tmp_path / WEIGHTS_FILE)
    assert check_weight_files(tmp_path) == ([tmp_path / WEIGHTS_FILE], 48, [], {"a": (3, 4)})
    assert read_header(tmp_path / WEIGHTS_FILE)["a"]["shape"] == [3, 4]


def test_a_missing_shard_is_named(sharded):
    (sharded / SECOND).unlink()
    assert check_weight_files(sharded).problems == [f"{SECOND} is missing"]


@pytest.mark.parametrize("kept", [0, 5, 30, -1])
def test_a_shard_that_is_cut_off_is_named(sharded, kept):
    content = (sharded / FIRST).read_bytes()
    (sharded / FIRST).write_bytes(content[:kept])
    (problem,) = check_weight_files(sharded).problems
    assert FIRST in problem
    assert ("cut off" in problem) or f"has {len(content) - 1} bytes, its header asks for {len(content)}" in problem


def test_a_file_of_another_kind_is_named(sharded):
    (sharded / FIRST).write_bytes((3).to_bytes(8, "little") + b"xyz")
    (problem,) = check_weight_files(sharded).problems
    assert problem.startswith(f"{FIRST} is no safetensors file")


def test_a_tensor_that_only_the_index_knows_is_named(sharded):
    save_file({"a": torch.zeros(3, 4)}, sharded / FIRST)
    assert check_weight_files(sharded).problems == [f"{FIRST} lacks 1 tensors that the index names, such as b"]


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "f"}}'])
def test_a_broken_index_is_named(sharded, content):
    (sharded / INDEX_FILE).write_text(content)
    (problem,) = check_weight_files(sharded).problems
    assert f"{INDEX_FILE} is broken" in problem


def test_shards_without_an_index_are_no_checkpoint(sharded):
    (sharded / INDEX_FILE).unlink()
    (problem,) = check_weight_files(sharded).problems
    assert problem.endswith(f"has neither {WEIGHTS_FILE} nor {INDEX_FILE}, only {FIRST}, {SECOND}")
    assert check_weight_files(sharded / "nowhere").num_bytes == 0


def test_shapes_are_compared_with_those_of_a_model():
    expected = {"a": (3, 4), "b": (5,), "pool.c": (2,)}
    assert compare_shapes(expected | {"more": (1,)}, expected) == []
    missing, other = compare_shapes({"b": (6,)}, expected)
    assert missing == "2 tensors of its config.json's model are missing, such as a"
    assert other == "1 tensors do not fit its config.json, such as b of shape [6] instead of [5]"
    (missing,) = compare_shapes({"b": (5,)}, expected, (r"^pool\.",))
    assert missing.startswith("1 tensors")
