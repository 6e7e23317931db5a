"""Several turns about one picture: how soon the first token of the next answer comes when the cache is kept."""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

from benchmarks.bench import QUESTION, Bench
from benchmarks.results import Figure
from benchmarks.timing import seconds_of

FIRST_ANSWER = "There is a lot of noise."
SECOND_QUESTION = "And what color is it?"


def chat_session(bench: Bench) -> Any:
    """A conversation that keeps the cache between its turns."""
    from deepseek_vl2.serve.chat_session import ChatSession

    return ChatSession(bench.loaded.model, bench.loaded.processor)


def _first_token(session: Any, conversation: list[dict[str, Any]]) -> list[str]:
    return list(session.answer(conversation, max_new_tokens=1))


def measure_turns(bench: Bench, new_session: Callable[[Bench], Any] = chat_session) -> list[Figure]:
    """Seconds to one token of the first answer, of the same again, and of the answer to a second question.

    Args:
        bench: The model.
        new_session: Makes an object whose `answer(conversation, max_new_tokens=...)` streams an answer.
    """
    picture = bench.picture()
    first: list[dict[str, Any]] = [
        {"role": "<|User|>", "content": QUESTION, "images": [picture]},
        {"role": "<|Assistant|>", "content": ""},
    ]
    second = [
        first[0],
        {"role": "<|Assistant|>", "content": FIRST_ANSWER},
        {"role": "<|User|>", "content": SECOND_QUESTION},
        first[1],
    ]
    times: dict[str, list[float]] = {"first": [], "regenerate": [], "second": []}
    for round_number in range(bench.repeats + 1):
        session = new_session(bench)
        for name, conversation in (("first", first), ("regenerate", first), ("second", second)):
            seconds = seconds_of(partial(_first_token, session, conversation), bench.device)
            if round_number:  # the first round warms up
                times[name].append(seconds)
    figures = [Figure(f"turns_{name}", median(seconds), "s") for name, seconds in times.items()]
    for name in ("regenerate", "second"):
        ratio = median(later / first for later, first in zip(times[name], times["first"], strict=True))
        figures.append(Figure(f"turns_{name}_over_first", ratio, "x"))
    return figures
