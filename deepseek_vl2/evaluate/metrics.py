"""The field's metrics as pure functions of one answer. Scores are 0 to 1; boxes are x1, y1, x2, y2 in any one unit."""

import re
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from deepseek_vl2.evaluate.text_normalization import normalize_vqa

Box: TypeAlias = Sequence[float]

IOU_THRESHOLD = 0.5
ANLS_THRESHOLD = 0.5
MAX_RELATIVE_CHANGE = 0.05
# So many other people must have given an answer for it to count in full.
VQA_FULL_AGREEMENT = 3

_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+|\d{1,3}(?:,\d{3})+(?:\.\d*)?)(?:[eE][-+]?\d+)?(?:\s*%)?")


def intersection_over_union(first: Box, second: Box) -> float:
    """Area that two boxes share, as a part of the area they cover together."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0) * max(height, 0)
    covered = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)) - shared
    return shared / covered if covered > 0 else 0.0


def match_boxes(found: Sequence[Box], expected: Sequence[Box]) -> list[float]:
    """IoU of each expected box with the found one it is matched to, best pairs first; 0 for those left over."""
    pairs = sorted(
        ((intersection_over_union(f, e), i, j) for i, f in enumerate(found) for j, e in enumerate(expected)),
        reverse=True,
    )
    scores = [0.0] * len(expected)
    free_found, free_expected = set(range(len(found))), set(range(len(expected)))
    for score, i, j in pairs:
        if i in free_found and j in free_expected:
            scores[j] = score
            free_found.remove(i)
            free_expected.remove(j)
    return scores


class BoxCounts(NamedTuple):
    """Boxes of an answer, or of many answers together.

    Attributes:
        matched: expected boxes that a found one meets.
        found: boxes of the answer.
        expected: boxes that should be there.
    """

    matched: int
    found: int
    expected: int

    @property
    def precision(self) -> float:
        """Part of the found boxes that are right; 1 if there are none."""
        return self.matched / self.found if self.found else 1.0

    @property
    def recall(self) -> float:
        """Part of the expected boxes that were found; 1 if there are none."""
        return self.matched / self.expected if self.expected else 1.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 1 if nothing is expected and nothing found."""
        total = self.found + self.expected
        return 2 * self.matched / total if total else 1.0


def count_boxes(found: Sequence[Box], expected: Sequence[Box], threshold: float = IOU_THRESHOLD) -> BoxCounts:
    """Count the expected boxes that are met with an IoU of at least `threshold`, each by a box of its own."""
    matched = sum(score >= threshold for score in match_boxes(found, expected))
    return BoxCounts(matched, len(found), len(expected))


def edit_distance(first: str, second: str) -> int:
    """Fewest letters to insert, delete or replace to make one text the other (Levenshtein)."""
    previous = list(range(len(second) + 1))
    for row, letter in enumerate(first, start=1):
        current = [row]
        for column, other in enumerate(second, start=1):
            replaced = previous[column - 1] + (letter != other)
            current.append(min(previous[column] + 1, current[-1] + 1, replaced))
        previous = current
    return previous[-1]


def anls(answer: str, expected: Sequence[str], threshold: float = ANLS_THRESHOLD) -> float:
    """Average normalised Levenshtein similarity of one question: the best over the expected answers.

    Case does not count, nor how much space there is, except in the length that the distance is divided by. A similarity
    below `threshold` is 0; one right at it counts, as in the evaluation program of DocVQA (Biten et al., arXiv
    1907.00490, section 4, writes "above" it).
    """
    best = max(_similarity(answer, other) for other in expected)
    return best if best >= threshold else 0.0


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(first: str, second: str) -> float:
    longest = max(len(first), len(second))
    return 1 - edit_distance(_folded(first), _folded(second)) / longest if longest else 1.0


def parse_number(text: str) -> float | None:
    """Read a number, `None` if the text is none. `%` is a hundredth, also behind a space; commas may part thousands."""
    stripped = text.strip()
    if _NUMBER.fullmatch(stripped) is None:
        return None
    plain = stripped.replace(",", "")
    return float(plain.removesuffix("%")) / 100 if plain.endswith("%") else float(plain)


def relaxed_accuracy(answer: str, expected: Sequence[str], max_relative_change: float = MAX_RELATIVE_CHANGE) -> float:
    """Relaxed accuracy of ChartQA (arXiv 2203.10244, section 5.1), the best over the expected answers.

    Numbers may be off by 5 %, texts must be equal but for case. An expected 0 has no relative change: it must be met
    as text. As in the usual program "5%" is 0.05, not 5; unlike there, "1,234" is a number.
    """
    return max(_is_relaxed_equal(answer.strip(), other.strip(), max_relative_change) for other in expected)


def _is_relaxed_equal(answer: str, expected: str, max_relative_change: float) -> float:
    value, target = parse_number(answer), parse_number(expected)
    if value is not None and target:
        return float(abs(value - target) / abs(target) <= max_relative_change)
    return float(answer.lower() == expected.lower())


def vqa_accuracy(answer: str, expected: Sequence[str]) -> float:
    """Accuracy of VQA and TextVQA: agreement with people, texts normalised as in `text_normalization`.

    Each person is left out in turn; an answer that three of the others gave counts in full, fewer count a third each;
    the mean over those left out is the score.
    """
    text = normalize_vqa(answer)
    agrees = [normalize_vqa(other) == text for other in expected]
    agreements = (sum(agrees) - own for own in agrees)
    return sum(min(1.0, number / VQA_FULL_AGREEMENT) for number in agreements) / len(expected)


def ocrbench_score(answer: str, expected: Sequence[str], *, is_formula: bool = False) -> float:
    """Score of OCRBench (arXiv 2305.07895): whether one of the expected texts is in the answer.

    Line breaks count as spaces, case does not count. Of formulas (handwritten mathematical expressions) case counts
    and spaces do not. An expected text that is empty would be in every answer: it counts for nothing.
    """

    def prepare(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if is_formula else text.lower()

    return float(any(prepare(other) in prepare(answer) for other in expected if other.strip()))


def exact_match(answer: str, expected: Sequence[str]) -> float:
    """Whether the answer is one of the expected ones; case and the amount of space do not count."""
    return float(_folded(answer) in {_folded(other) for other in expected})
