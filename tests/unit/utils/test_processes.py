"""Commands that torchrun starts several times; `tests/e2e/test_tensor_parallel.py` has two real processes."""

import sys

import pytest
import torch

from deepseek_vl2.utils.io import load_pretrained_model
from deepseek_vl2.utils.processes import (
    common_seed,
    is_first_process,
    is_first_to_fail,
    only_first_process_speaks,
    sharing_options,
)


@pytest.fixture
def second_of_two(monkeypatch):
    """As torchrun starts the second process."""
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)


def test_one_process_shares_nothing():
    assert sharing_options(False) == {}
    assert is_first_process() and is_first_to_fail()
    assert common_seed(5, torch.device("cpu")) == 5
    assert common_seed(None, torch.device("cpu")) is None
    with pytest.raises(ValueError, match=r"torchrun --nproc-per-node 2 inference.py --tp"):
        sharing_options(True)


@pytest.mark.parametrize(("has_whole_experts", "ep_size"), [(False, 1), (True, 2)])
def test_two_processes_share_one_model(second_of_two, has_whole_experts, ep_size):
    config = sharing_options(True, has_whole_experts)["distributed_config"]
    assert (config.tp_size, config.ep_size) == (2, ep_size)


def test_two_processes_do_not_load_two_models(second_of_two):
    with pytest.raises(ValueError, match=r"torchrun started 2 processes.*--tp"):
        sharing_options(False)


def test_one_process_of_torchrun_is_like_any_other(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert sharing_options(True) == sharing_options(False) == {}


def test_the_second_process_is_silent(second_of_two, capsys):
    assert not is_first_process()
    with only_first_process_speaks():
        print("answer")
        print("warning", file=sys.stderr)
    print("after")
    assert capsys.readouterr() == ("after\n", "")


def test_shared_models_take_neither_device_nor_adapter(second_of_two, tmp_path):
    with pytest.raises(ValueError, match="leave device at auto"):
        load_pretrained_model("nano", device="cpu", **sharing_options(True))
    with pytest.raises(ValueError, match="merge it first"):
        load_pretrained_model("nano", adapter=tmp_path, **sharing_options(True))
