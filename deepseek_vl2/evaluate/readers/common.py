"""What the readers of all formats share: pictures, boxes, lists in cells and answers to a choice."""

import ast
import codecs
import re
import string
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from deepseek_vl2.evaluate.samples import PictureSource, PixelBox
from deepseek_vl2.utils.io import load_image

BoxFormat = Literal["xyxy", "xywh"]
BOX_FORMATS: tuple[BoxFormat, ...] = ("xyxy", "xywh")
# Boxes of published files end a fraction of a pixel outside their picture now and then.
MAX_OVERHANG = 1.0
# Stricter than what is understood of a model: "A+" and "A'" are options' texts, blood groups and names of points.
_WRITTEN_LETTER = re.compile(r"\(([A-Za-z])\)|([A-Za-z])[.)]?")


@dataclass
class ReadOptions:
    """How a file is to be read.

    Attributes:
        picture_root: what paths of pictures are relative to.
        box_format: of files that do not say so themselves.
        sizes: of the pictures seen so far; each is opened once.
    """

    picture_root: Path
    box_format: BoxFormat | None = None
    sizes: dict[PictureSource, tuple[int, int]] = field(default_factory=dict)

    def sizes_of(self, pictures: Iterable[PictureSource]) -> tuple[tuple[int, int], ...]:
        """Width and height of pictures; loads each to be sure that it can be.

        Raises:
            ValueError: it is no picture, or broken.
        """
        pictures = tuple(pictures)
        for picture in pictures:
            if picture not in self.sizes:
                self.sizes[picture] = load_image(picture).size
        return tuple(self.sizes[picture] for picture in pictures)


def json_lines(path: Path) -> Iterable[tuple[str, bytes]]:
    """Yields "line N" and the line; empty lines count for nothing."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.removeprefix(codecs.BOM_UTF8).strip():
                yield f"line {number}", line.rstrip()


def as_mapping(value: Any, what: str) -> Mapping[str, Any]:
    """The value, if it is an object.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must be an object, it is {value!r:.80}")
    return value


def listed(cell: Any, reads_text: bool = True) -> list[Any]:
    """The entries of a cell: a list, or one value; none if it is empty.

    Args:
        cell: what the file holds.
        reads_text: whether a text may be a list, as Python or JSON writes it; where files have lists it is a text.
    """
    if isinstance(cell, (list, tuple)):
        return list(cell)
    if cell is None or cell == "":
        return []
    if reads_text and isinstance(cell, str) and cell.startswith("[") and cell.endswith("]"):
        try:
            value = ast.literal_eval(cell)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            return [cell]  # a text in brackets
        if isinstance(value, list):
            return value
    return [cell]


def texts(cell: Any, reads_text: bool = True) -> tuple[str, ...]:
    """The entries of a cell as texts, see `listed`; of objects, as VQA has them, the field `answer`.

    Raises:
        ValueError: an entry is neither text nor number.
    """
    entries = [entry.get("answer") if isinstance(entry, Mapping) else entry for entry in listed(cell, reads_text)]
    wrong = [entry for entry in entries if not isinstance(entry, (str, int, float))]
    if wrong:
        raise ValueError(f"an answer must be a text or number, not {wrong[0]!r:.80}")
    return tuple(str(entry) for entry in entries)


def lettered(value: Any) -> dict[str, Any]:
    """Options by capital letter: a list, or an object whose keys are letters.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, Mapping):
        return dict(zip(string.ascii_uppercase, listed(value), strict=False))
    options = {str(key).strip().upper(): option for key, option in value.items()}
    wrong = [key for key in options if len(key) != 1 or key not in string.ascii_uppercase]
    if wrong:
        raise ValueError(f"options must be named by letters, A, B, ..., not {wrong[0]!r}")
    return options


def written_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of an option that an answer is: "B", "b ", "(B)", "B." or "B)"; `None` of any other."""
    match = _WRITTEN_LETTER.fullmatch(answer.strip())
    letter = (match[1] or match[2]).upper() if match else None
    return letter if letter in options else None


def letter_of(answer: str, options: Mapping[str, str]) -> str:
    """The letter of the option that an answer names, by its letter or by its exact text; any other answer stays.

    A capital letter alone is the letter, even where it is another option's text, as in AI2D.

    Args:
        answer: as the file has it.
        options: text by letter.

    Raises:
        ValueError: it names several options.
    """
    text = answer.strip()
    if text in options:
        return text
    written = written_letter(text, options)
    named = [letter for letter, option in options.items() if letter == written or option.strip() == text]
    if len(named) > 1:
        raise ValueError(
            f"the answer {answer!r} may be option {' or '.join(named)} of {', '.join(options)}; "
            "write its capital letter alone"
        )
    return named[0] if named else answer


def read_box(values: Any, box_format: str, size: tuple[int, int]) -> PixelBox:
    """Reads a box in pixels.

    Args:
        values: four numbers.
        box_format: "xyxy" (two corners) or "xywh" (a corner, width, height).
        size: width and height of the picture.

    Returns:
        x1, y1, x2, y2.

    Raises:
        ValueError: no such format, not four numbers, no area, or not within the picture.
    """
    if box_format not in BOX_FORMATS:
        raise ValueError(f"unknown form of boxes {box_format!r}: take one of {', '.join(BOX_FORMATS)}")
    is_sequence = isinstance(values, Sequence) and not isinstance(values, str)
    if not is_sequence or len(values) != 4 or not all(is_number(value) for value in values):
        raise ValueError(f"a box must be four numbers, not {values!r:.80}")
    x1, y1, x2, y2 = map(float, values)
    if box_format == "xywh":
        x2, y2 = x1 + x2, y1 + y2
    if x2 <= x1 or y2 <= y1:
        raise ValueError(f"the box {list(values)} ({box_format}) has no area")
    width, height = size
    if min(x1, y1) < -MAX_OVERHANG or x2 > width + MAX_OVERHANG or y2 > height + MAX_OVERHANG:
        raise ValueError(f"the box {list(values)} ({box_format}) is not within the picture of {width}x{height} pixels")
    return x1, y1, x2, y2


def is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold."""
    # JSON has whole numbers that no float can hold; NaN and Infinity are in Python's dialect of it.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


def first_of(fields: Mapping[str, Any], *names: str) -> Any:
    """The first of some fields that is there and not empty, else `None`."""
    return next((fields[name] for name in names if fields.get(name) not in (None, "", [])), None)


def id_of(fields: Mapping[str, Any], where: str) -> str:
    """The field `id`, or the place in the file where there is none."""
    return where if fields.get("id") is None else str(fields["id"])


def question_of(fields: Mapping[str, Any], *names: str) -> str:
    """The question.

    Raises:
        ValueError: there is none.
    """
    question = first_of(fields, *names)
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"no question: {' or '.join(names)} is missing or empty")
    return question
