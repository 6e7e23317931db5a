"""The turns that a session is asked, and the ratios within a round."""

import types

import pytest
import torch
from PIL import Image

from benchmarks import turns
from benchmarks.turns import measure_turns


class Session:
    """Notes what it is asked; it has to be used up, as a stream does."""

    def __init__(self, asked):
        self.asked = asked

    def answer(self, conversation, max_new_tokens):
        self.asked.append((self, len(conversation)))
        assert max_new_tokens == 1
        yield "a"


def test_ratios_are_formed_within_each_round(monkeypatch):
    seconds = iter([9, 9, 9, 10, 1, 2, 100, 20, 10])  # warm-up, then a quick and a slow round

    def take(work, device):
        assert work() == ["a"]
        return float(next(seconds))

    monkeypatch.setattr(turns, "seconds_of", take)
    picture = Image.new("RGB", (4, 4))
    bench = types.SimpleNamespace(repeats=2, device=torch.device("cpu"), picture=lambda: picture)
    asked = []
    figures = {figure.name: figure.value for figure in measure_turns(bench, lambda bench: Session(asked))}
    assert [length for _, length in asked] == [2, 2, 4] * 3
    assert len({id(session) for session, _ in asked}) == 3  # a new one each round
    assert figures == pytest.approx(
        {
            "turns_first": 55,
            "turns_regenerate": 10.5,
            "turns_second": 6,
            "turns_regenerate_over_first": 0.15,
            "turns_second_over_first": 0.15,
        }
    )
