"""The parameters of an answer, their ranges and their defaults: one table for the page, the API and the checks."""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from deepseek_vl2.serve.app_modules.texts import UserError


class Range(NamedTuple):
    """Smallest value, largest value and step of a number."""

    low: float
    high: float
    step: float


RANGES = {
    "temperature": Range(0, 1, 0.05),
    "top_p": Range(0.05, 1, 0.05),
    "repetition_penalty": Range(1, 2, 0.05),
    "max_new_tokens": Range(1, 2048, 1),
    "history_tokens": Range(0, 4096, 64),
    "chunk_size": Range(-1, 4096, 1),
    "seed": Range(-1, 2**53 - 1, 1),  # whole numbers that JSON and browsers keep
}
_WHOLE = ("max_new_tokens", "history_tokens", "chunk_size", "seed")
ALL_AT_ONCE = -1
BY_CHANCE = -1


@dataclass(frozen=True)
class Settings:
    """How an answer is made.

    Attributes:
        temperature: 0 takes the likeliest token each time.
        top_p: share of the likeliest tokens to draw from, with a temperature.
        repetition_penalty: above 1 for fewer repetitions.
        max_new_tokens: length of the answer.
        history_tokens: earlier turns are left out, the oldest first, until the prompt has at most so many tokens.
        use_tiling: whether one or two pictures are also looked at in tiles.
        chunk_size: tokens of the prompt to read at once, -1 for all.
        seed: for repeatable sampling, -1 for chance.
    """

    temperature: float = 0.0
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    history_tokens: int = 3072
    use_tiling: bool = True
    chunk_size: int = ALL_AT_ONCE
    seed: int = BY_CHANCE

    @classmethod
    def checked(cls, **values: Any) -> "Settings":
        """Build settings from what a user has given.

        Raises:
            UserError: a value is no number, no whole number where one is due, or out of its range.
        """
        return cls(**{name: _checked(name, value) for name, value in values.items()})


NAMES = tuple(field.name for field in fields(Settings))


def _checked(name: str, value: Any) -> Any:
    if name == "use_tiling":
        if not isinstance(value, bool):
            raise UserError("not_a_switch", name=name, value=repr(value)[:60])
        return value
    low, high, _ = RANGES[name]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and name == "chunk_size" and value == 0:
        raise UserError("chunk_of_nothing", name=name, value=value, high=high)
    if not is_number or not low <= value <= high:
        raise UserError("out_of_range", name=name, value=repr(value)[:60], low=low, high=high)
    if name not in _WHOLE:
        return float(value)
    if value != int(value):
        raise UserError("not_whole", name=name, value=value)
    return int(value)
