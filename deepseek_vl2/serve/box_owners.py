"""Which of a question's pictures a box belongs to: the model gives coordinates, and the picture only in words."""

import re
from typing import NamedTuple

from deepseek_vl2.serve.grounding import GroundedBox, GroundingResult, read_grounding

_ORDINALS = {
    "first": 1,
    "second": 2,
    "third": 3,
    "fourth": 4,
    "fifth": 5,
    "sixth": 6,
    "seventh": 7,
    "eighth": 8,
    "ninth": 9,
    "tenth": 10,
    "一": 1,
    "二": 2,
    "三": 3,
    "四": 4,
    "五": 5,
    "六": 6,
    "七": 7,
    "八": 8,
    "九": 9,
    "十": 10,
}
_MENTION = re.compile(
    rf"\b(?P<ordinal>{'|'.join(filter(str.isascii, _ORDINALS))}|last)\s+(?:image|picture|photo)\b"
    r"|\b(?P<short_ordinal>\d{1,2})(?:st|nd|rd|th)\s+(?:image|picture|photo)\b"
    r"|\b(?:image|picture|photo)[ _]?(?P<number>\d{1,2})\b"
    r"|第(?P<chinese>[一二三四五六七八九十]|\d{1,2})[张幅个]"
    r"|图片?\s*(?P<chinese_number>\d{1,2})",
    re.IGNORECASE,
)


class OwnedBox(NamedTuple):
    """A box, and the picture of the question that it belongs to, counted from 0."""

    picture: int
    box: GroundedBox


def assign_boxes(answer: str, question: str, num_pictures: int) -> tuple[list[OwnedBox], list[str]]:
    """Reads the boxes of an answer and gives each to a picture.

    A box belongs to the picture that the answer names before it ("in the first image ...", "image_2: ..."). If it
    names none, to the one that the question names last, and else to the last picture, as in the published models'
    training data.

    Args:
        answer: Text of the model, special tokens kept.
        question: Text of the user.
        num_pictures: Pictures of the question, at least 1.

    Returns:
        The boxes in the order of the text, and a sentence on everything that is malformed.
    """
    default = num_pictures - 1
    for mention in _mentions(question, num_pictures):
        default = mention[1]
    parts = _parts(answer, default, num_pictures)
    read = [(owner, read_grounding(part)) for owner, part in parts]
    whole = read_grounding(answer)
    # A label and its boxes may lie on both sides of a mention. What is malformed without the cuts, such as the end of
    # an answer that was stopped, says nothing of them.
    if sum(len(result.problems) for _, result in read) > len(whole.problems):
        read = [(default, whole)]
    return _join(read)


def _join(read: list[tuple[int, GroundingResult]]) -> tuple[list[OwnedBox], list[str]]:
    boxes = [OwnedBox(owner, box) for owner, result in read for box in result.boxes]
    return boxes, [problem for _, result in read for problem in result.problems]


def _parts(answer: str, default: int, num_pictures: int) -> list[tuple[int, str]]:
    """Cuts an answer before each mention of a picture."""
    mentions = _mentions(answer, num_pictures)
    starts = [0, *(start for start, _ in mentions)]
    ends = [*(start for start, _ in mentions), len(answer)]
    owners = [default, *(owner for _, owner in mentions)]
    return [(owner, answer[start:end]) for owner, start, end in zip(owners, starts, ends, strict=True)]


def _mentions(text: str, num_pictures: int) -> list[tuple[int, int]]:
    """Places in a text where a picture is named that there is, and which."""
    found = []
    for mention in _MENTION.finditer(text):
        word = next(group for group in mention.groups() if group is not None).lower()
        number = num_pictures if word == "last" else _ORDINALS.get(word) or int(word)
        if 1 <= number <= num_pictures:
            found.append((mention.start(), number - 1))
    return found
