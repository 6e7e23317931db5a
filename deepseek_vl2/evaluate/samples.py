"""One question of a benchmark, whatever file it came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

# A path, or the encoded bytes of a picture.
PictureSource: TypeAlias = str | bytes
PixelBox: TypeAlias = tuple[float, float, float, float]


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        id: unique in its file.
        where: line or entry of the file, for messages.
        question: text of the user; of a referring expression, the expression.
        pictures: in order.
        sizes: width and height of each picture in pixels.
        answers: all that count as right; of multiple choice, the letter.
        boxes: expected boxes in pixels of the last picture; `None` where the file gives none.
        options: text by letter.
        hint: shown before the question.
        category: for results by category; empty if there is none.
        split: part of the benchmark, such as "validation", for results by part; empty if the file does not say it.
        messages: a whole conversation, asked word for word; empty where the task makes the prompt from `question`.
    """

    id: str
    where: str
    question: str
    pictures: tuple[PictureSource, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    answers: tuple[str, ...] = ()
    boxes: tuple[PixelBox, ...] | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    hint: str = ""
    category: str = ""
    split: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class BadEntry:
    """A part of a file that cannot be used.

    Attributes:
        where: line or entry.
        reason: what is wrong with it.
    """

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"
