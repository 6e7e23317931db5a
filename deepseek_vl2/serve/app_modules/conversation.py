"""What users ask and what they get: plain data, without the model's libraries, so that the page comes up at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Question:
    """What a user asks.

    Attributes:
        text: as it was written.
        pictures: paths of the uploaded pictures, in order.
    """

    text: str
    pictures: tuple[str, ...] = ()


@dataclass(frozen=True)
class FoundBox:
    """A box of an answer.

    Attributes:
        picture: which picture of the question it belongs to, counted from 1.
        label: what is there.
        box: x1, y1, x2, y2 in 0..999.
        pixels: the same in pixels of the picture.
    """

    picture: int
    label: str
    box: tuple[int, int, int, int]
    pixels: tuple[int, int, int, int]

    def to_dict(self) -> dict[str, Any]:
        """Give it in a form for JSON."""
        return {
            "picture": self.picture,
            "label": self.label,
            "box": list(self.box),
            "pixels": list(self.pixels),
        }


@dataclass(frozen=True)
class Statistics:
    """What an answer cost: tokens, and seconds from the start of the work.

    Attributes:
        num_prompt_tokens: all tokens of the prompt.
        num_image_tokens: those of pictures among them.
        num_new_tokens: tokens of the answer.
        seconds_to_first_token: until the answer began.
        seconds: until it ended.
        num_reused_tokens: tokens of the prompt that the model had read for the turn before.
    """

    num_prompt_tokens: int
    num_image_tokens: int
    num_new_tokens: int
    seconds_to_first_token: float
    seconds: float
    num_reused_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token."""
        return max(0, self.num_new_tokens - 1) / max(self.seconds - self.seconds_to_first_token, 1e-6)

    def to_dict(self) -> dict[str, Any]:
        """Give it in a form for JSON."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "image_tokens": self.num_image_tokens,
            "reused_tokens": self.num_reused_tokens,
            "new_tokens": self.num_new_tokens,
            "seconds_to_first_token": round(self.seconds_to_first_token, 3),
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens_per_second, 1),
        }


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: as it came, special tokens of grounding kept.
        words: without them.
        boxes: the boxes in it.
        marked_pictures: for each picture with boxes its number, and the path of a copy with the boxes drawn.
        problems: a sentence on everything in it that is malformed.
        statistics: what it cost.
        num_left_out: earlier turns that had no room in the prompt.
        was_stopped: whether the user ended it.
        is_cut_off: whether it ended only because of its length.
    """

    text: str
    words: str
    boxes: tuple[FoundBox, ...]
    marked_pictures: tuple[tuple[int, str], ...]
    problems: tuple[str, ...]
    statistics: Statistics
    num_left_out: int = 0
    was_stopped: bool = False
    is_cut_off: bool = False

    @property
    def has_begun(self) -> bool:
        """Whether the user did not end it before its first word."""
        return bool(self.text) or not self.was_stopped

    def delete_files(self) -> None:
        """Delete the pictures with boxes, and the folders that each of them has for itself."""
        for _, path in self.marked_pictures:
            Path(path).unlink(missing_ok=True)
            if Path(path).parent.is_dir():
                Path(path).parent.rmdir()

    def to_dict(self) -> dict[str, Any]:
        """Give it in a form for JSON."""
        return {
            "answer": self.words,
            "text": self.text,
            "boxes": [box.to_dict() for box in self.boxes],
            "problems": list(self.problems),
            "is_cut_off": self.is_cut_off,
            "was_stopped": self.was_stopped,
            "turns_left_out": self.num_left_out,
            "statistics": self.statistics.to_dict(),
        }


@dataclass(eq=False)
class Turn:
    """A question and its answer, which is open while the model works."""

    question: Question
    answer: Answer | None = None

    def delete_files(self) -> None:
        """Delete what was made for its answer."""
        if self.answer is not None:
            self.answer.delete_files()
