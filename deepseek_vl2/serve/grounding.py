"""Grounded answers: read labelled boxes from the model's text, and draw them.

The model writes `<|ref|>label<|/ref|><|det|>[[x1, y1, x2, y2], ...]<|/det|>`, with whole numbers 0..999 over the width
and height of the picture. What does not keep to this form is reported, never guessed.
"""

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from deepseek_vl2.models.image_transform import to_rgb
from deepseek_vl2.models.special_tokens import DET_END, DET_START, GROUNDING_TOKENS, REF_END, REF_START
from deepseek_vl2.serve.labels import LabelPlacer, contrast_to, palette_colour

logger = logging.getLogger(__name__)

COORDINATE_MAX = 999
JPEG_ENDINGS = (".jpg", ".jpeg")
# Of libjpeg; the format itself ends a little above.
MAX_JPEG_SIDE = 65_500
_TAG = re.compile("|".join(map(re.escape, GROUNDING_TOKENS)))
_BOX = re.compile(r"\s*\[([^\[\]]*)\]\s*")
_CLOSING = {REF_START: REF_END, DET_START: DET_END}


@dataclass(frozen=True)
class GroundedBox:
    """A labelled box.

    Attributes:
        label: what the model says is there; empty if it names nothing.
        box: x1, y1, x2, y2 in 0..999 of the picture's width and height.
    """

    label: str
    box: tuple[int, int, int, int]

    def to_pixels(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Scale the box to a picture's whole pixels, rounding down as the reference does to draw it."""
        x1, y1, x2, y2 = self.scale_to(width, height)
        return int(x1), int(y1), int(x2), int(y2)

    def scale_to(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Scale the box to a picture without rounding: x1, y1, x2, y2 in pixels."""
        x1, y1, x2, y2 = self.box
        return (
            x1 / COORDINATE_MAX * width,
            y1 / COORDINATE_MAX * height,
            x2 / COORDINATE_MAX * width,
            y2 / COORDINATE_MAX * height,
        )

    def to_dict(self, image_size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Give the box in a form for JSON.

        Args:
            image_size: width and height; with it the box in `pixels` is added.
        """
        found: dict[str, Any] = {"label": self.label, "box": list(self.box)}
        if image_size is not None:
            found["pixels"] = list(self.to_pixels(*image_size))
        return found


@dataclass
class GroundingResult:
    """What an answer grounds.

    Attributes:
        boxes: the well-formed boxes, in the order of the text.
        problems: one sentence for everything that is not well-formed.
    """

    boxes: list[GroundedBox] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class _Span(NamedTuple):
    """A closed (or broken) ref or det: where it starts and ends in the text, and its body (`None`: not closed)."""

    kind: str
    start: int
    end: int
    body: str | None


def parse_grounding(text: str, *, strict: bool = False) -> list[GroundedBox]:
    """Read the boxes of an answer. Malformed ones are left out and logged as warnings; see `read_grounding`.

    Args:
        text: the answer, special tokens kept.
        strict: raise instead of logging.

    Raises:
        ValueError: something is malformed, and `strict` is set.
    """
    result = read_grounding(text)
    if strict and result.problems:
        raise ValueError("malformed grounding: " + "; ".join(result.problems))
    for problem in result.problems:
        logger.warning("malformed grounding: %s", problem)
    return result.boxes


def read_grounding(text: str) -> GroundingResult:
    """Read the boxes of an answer, and what is wrong with the others. Takes time linear in the text's length.

    The i-th ref belongs to the i-th det. If their numbers differ, a det belongs to the ref right before it, and what
    remains is paired in order: a label that is only mentioned does not shift the others.

    Args:
        text: the answer, special tokens kept.
    """
    result = GroundingResult()
    spans = list(_spans(text, result.problems))
    refs = [span for span in spans if span.kind == REF_START]
    dets = [span for span in spans if span.kind == DET_START]
    owners = _pair(refs, dets, text)
    for det in dets:
        owner = owners.get(det)
        if owner is None and det.body is not None:
            result.problems.append(
                f"{DET_START} at character {det.start} has no label ({REF_START}) that belongs to it"
            )
        label = (owner.body or "").strip() if owner else ""
        result.boxes += [GroundedBox(label, box) for box in _read_boxes(det, result.problems)]
    paired = {ref.start for ref in owners.values()}
    for ref in refs:
        if ref.start not in paired and ref.body is not None:
            result.problems.append(f"{REF_START} at character {ref.start} has no boxes ({DET_START}) that belong to it")
    return result


def _spans(text: str, problems: list[str]) -> Iterator[_Span]:
    """Cut the text at its tags. A tag that is not closed before the next one makes a span without a body."""
    opened: re.Match[str] | None = None
    for tag in _TAG.finditer(text):
        kind = tag[0]
        if opened is not None and kind == _CLOSING[opened[0]]:
            yield _Span(opened[0], opened.start(), tag.end(), text[opened.end() : tag.start()])
            opened = None
            continue
        if opened is not None:
            problems.append(f"{opened[0]} at character {opened.start()} is not closed before {kind}")
            yield _Span(opened[0], opened.start(), tag.start(), None)
            opened = None
        if kind in _CLOSING:
            opened = tag
        elif kind in _CLOSING.values():
            problems.append(f"{kind} at character {tag.start()} closes nothing")
    if opened is not None:
        problems.append(f"{opened[0]} at character {opened.start()} is not closed: the answer may be cut off")
        yield _Span(opened[0], opened.start(), len(text), None)


def _pair(refs: list[_Span], dets: list[_Span], text: str) -> dict[_Span, _Span]:
    """Find the ref that each det belongs to."""
    if len(refs) == len(dets):
        return dict(zip(dets, refs, strict=True))
    by_end = {ref.end: ref for ref in refs}
    pairs: dict[_Span, _Span] = {}
    previous_end = 0
    for det in dets:
        gap_end = det.start
        while gap_end > previous_end and text[gap_end - 1].isspace():
            gap_end -= 1
        if gap_end in by_end:
            pairs[det] = by_end.pop(gap_end)
        previous_end = det.end
    remaining_dets = (det for det in dets if det not in pairs)
    pairs.update(zip(remaining_dets, by_end.values(), strict=False))
    return pairs


def _read_boxes(det: _Span, problems: list[str]) -> list[tuple[int, int, int, int]]:
    """Read `[[x1, y1, x2, y2], ...]`."""
    if det.body is None:
        return []
    where = f"{DET_START} at character {det.start}"
    body = det.body.strip()
    if not (body.startswith("[") and body.endswith("]") and len(body) > 1):
        problems.append(f"{where} holds {_shorten(body)}, not [[x1, y1, x2, y2], ...]")
        return []
    boxes: list[tuple[int, int, int, int]] = []
    position, end = 1, len(body) - 1
    while True:
        entry = _BOX.match(body, position, end)
        if entry is None:
            problems.append(f"{where} holds {_shorten(body[position:end])} where [x1, y1, x2, y2] should stand")
            return boxes
        box = _read_box(entry[1])
        if isinstance(box, str):
            problems.append(f"{where}: the box {_shorten(f'[{entry[1]}]')} {box}")
        else:
            boxes.append(box)
        if entry.end() == end:
            return boxes
        if body[entry.end()] != ",":
            problems.append(f"{where} holds {_shorten(body[entry.end() : end])} after a box")
            return boxes
        position = entry.end() + 1


def _read_box(content: str) -> tuple[int, int, int, int] | str:
    """Return the box, or what is wrong with it."""
    values = [value.strip() for value in content.split(",")]
    if len(values) != 4:
        return f"has {len(values)} values, not 4"
    if not all(value.isascii() and value.isdigit() and len(value) <= 9 for value in values):
        return f"must hold whole numbers 0..{COORDINATE_MAX}"
    x1, y1, x2, y2 = map(int, values)
    if max(x1, y1, x2, y2) > COORDINATE_MAX:
        return f"leaves the range 0..{COORDINATE_MAX}"
    if x2 < x1 or y2 < y1:
        return "ends before it starts"
    return x1, y1, x2, y2


def _shorten(text: str, limit: int = 40) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "...")


def strip_grounding(text: str) -> str:
    """Leave the words of an answer: labels stay, boxes and grounding tokens go, an unfinished box too."""
    kept: list[str] = []
    position, inside_det = 0, False
    for tag in _TAG.finditer(text):
        if not inside_det:
            kept.append(text[position : tag.start()])
        inside_det = tag[0] == DET_START
        position = tag.end()
    if not inside_det:
        kept.append(text[position:])
    return "".join(kept)


def draw_boxes(
    image: Image.Image,
    boxes: Iterable[GroundedBox],
    *,
    show_labels: bool = True,
    font_path: str | PathLike[str] | None = None,
) -> Image.Image:
    """Draw labelled boxes on a copy of a picture.

    Every label has its own colour. Labels are written in the first font of the machine that has their letters; letters
    that no font has become `?`, and a label of which most is missing becomes `#n`, the box's place in `boxes`, counted
    from 1. Labels too long for the picture are shortened, and left out where the picture is too small to read them.

    Args:
        image: the picture the model saw, of any mode and size.
        boxes: what `parse_grounding` gives.
        show_labels: draw the labels, too.
        font_path: a font to take before the machine's own.

    Returns:
        A new RGB picture of the same size.

    Raises:
        OSError: there is no font at `font_path`.
    """
    drawn = to_rgb(image)
    draw = ImageDraw.Draw(drawn)
    shorter_side = min(drawn.size)
    line = max(1, round(shorter_side / 160))
    edge = max(1, line // 4) if shorter_side >= 100 else 0
    boxes = list(boxes)
    labels = dict.fromkeys(box.label for box in boxes)
    colours = {label: palette_colour(index) for index, label in enumerate(labels)}
    outlines = [_outline(box, drawn.size, line) for box in boxes]
    for box, outline in zip(boxes, outlines, strict=True):
        _draw_outline(draw, outline, colours[box.label], line, edge)
    if show_labels:
        placer = LabelPlacer(draw, drawn.size, font_path)
        for number, (box, outline) in enumerate(zip(boxes, outlines, strict=True), start=1):
            placer.write(box.label, number, outline, colours[box.label])
    return drawn


def save_drawing(drawn: Image.Image, path: Path, quality: int) -> Path:
    """Save a picture; as PNG under the same name if it is to be JPEG and too long for that.

    Args:
        drawn: the picture.
        path: where to; the ending says the format.
        quality: of JPEG, up to 95.

    Returns:
        Where it is.

    Raises:
        OSError: it cannot be written.
        ValueError: the ending is no format.
    """
    if path.suffix.lower() in JPEG_ENDINGS and max(drawn.size) > MAX_JPEG_SIDE:
        path = path.with_suffix(".png")
    drawn.save(path, quality=quality)
    return path


def _outline(box: GroundedBox, size: tuple[int, int], line: int) -> tuple[int, int, int, int]:
    """Lay the line around the box, where the picture has room for it."""
    width, height = size
    x1, y1, x2, y2 = box.to_pixels(width, height)
    half = line // 2
    left, top = max(0, min(x1 - half, width - 1)), max(0, min(y1 - half, height - 1))
    return left, top, max(left, min(x2 + half, width - 1)), max(top, min(y2 + half, height - 1))


def _draw_outline(
    draw: ImageDraw.ImageDraw, outline: tuple[int, int, int, int], colour: tuple[int, int, int], line: int, edge: int
) -> None:
    """Draw a rectangle that stands out on any ground: its line has a thin edge of black or white."""
    left, top, right, bottom = outline
    if edge:
        border = (left - edge, top - edge, right + edge, bottom + edge)
        draw.rectangle(border, outline=contrast_to(colour), width=line + 2 * edge)
    draw.rectangle(outline, outline=colour, width=line)
