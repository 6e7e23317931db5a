"""Metrics against answers worked out by hand, from the papers, or from the standard programs; each test says which."""

import pytest

from deepseek_vl2.evaluate.metrics import (
    BoxCounts,
    anls,
    count_boxes,
    edit_distance,
    exact_match,
    intersection_over_union,
    match_boxes,
    ocrbench_score,
    parse_number,
    relaxed_accuracy,
    vqa_accuracy,
)
from deepseek_vl2.evaluate.text_normalization import normalize_vqa


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0.0),  # they touch
        ((0, 0, 10, 10), (30, 30, 40, 40), 0.0),
        ((0, 0, 10, 10), (5, 0, 15, 10), 50 / 150),
        ((0, 0, 10, 10), (2, 3, 7, 8), 25 / 100),  # one in the other
        ((0, 0, 4, 2), (2, 1, 6, 3), 2 / 14),
        ((3, 3, 3, 3), (3, 3, 3, 3), 0.0),  # no area at all
        ((8, 8, 2, 2), (0, 0, 10, 10), 0.0),  # corners the wrong way round
    ],
)
def test_intersection_over_union(first, second, expected):
    assert intersection_over_union(first, second) == pytest.approx(expected)
    assert intersection_over_union(second, first) == pytest.approx(expected)


A, B, C = (0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0), (0.0, 5.0, 10.0, 15.0)


@pytest.mark.parametrize(
    ("found", "expected", "scores"),
    [
        ([A, B], [A, B], [1, 1]),
        ([B, A], [A, B], [1, 1]),  # the order does not matter
        ([A], [A, B], [1, 0]),
        ([A, B], [B], [1]),
        ([A, A], [A, A], [1, 1]),
        ([A], [C, A], [0, 1]),  # one found box meets one expected box, the best
        ([C, A], [A], [1]),
        ([], [A], [0]),
    ],
)
def test_boxes_are_matched_best_pairs_first(found, expected, scores):
    assert match_boxes(found, expected) == pytest.approx(scores)


@pytest.mark.parametrize(
    ("found", "expected", "counts", "f1"),
    [  # by hand: F1 = 2 matched / (found + expected)
        ([A, B], [A, B], (2, 2, 2), 1.0),
        ([A], [A, B], (1, 1, 2), 2 / 3),
        ([A, B, C], [A], (1, 3, 1), 0.5),
        ([A, A], [A], (1, 2, 1), 2 / 3),  # a box said twice counts once
        ([C], [A], (0, 1, 1), 0.0),  # IoU 1/3
        ([(0, 0, 10, 5)], [A], (1, 1, 1), 1.0),  # IoU of exactly 0.5 counts
        ([], [A], (0, 0, 1), 0.0),
        ([A], [], (0, 1, 0), 0.0),
        ([], [], (0, 0, 0), 1.0),
    ],
)
def test_f1_of_boxes(found, expected, counts, f1):
    result = count_boxes(found, expected)
    assert result == counts
    assert result.f1 == pytest.approx(f1)


def test_precision_and_recall():
    counts = BoxCounts(matched=3, found=4, expected=6)
    assert (counts.precision, counts.recall, counts.f1) == pytest.approx((0.75, 0.5, 0.6))
    assert (BoxCounts(0, 0, 2).precision, BoxCounts(0, 2, 0).recall) == (1, 1)


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [  # textbook examples of the Levenshtein distance
        ("kitten", "sitting", 3),
        ("saturday", "sunday", 3),
        ("flaw", "lawn", 2),
        ("", "abc", 3),
        ("abc", "", 3),
        ("same", "same", 0),
    ],
)
def test_edit_distance(first, second, distance):
    assert edit_distance(first, second) == edit_distance(second, first) == distance


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("Coca Cola", ["Coca Cola", "Coca-Cola Company"], 1.0),
        ("coca  cola", ["COCA COLA"], 1.0),  # neither case nor the amount of space
        ("coca cole", ["Coca Cola"], 8 / 9),  # by hand: 1 letter of 9
        ("kitten", ["sitting"], 4 / 7),  # by hand: distance 3 of 7
        ("ab", ["ax"], 0.5),  # right at the threshold: counts in the program of DocVQA
        ("ab", ["axy"], 0.0),  # 1/3 similar
        ("the dog", ["cat", "the dogs"], 7 / 8),  # the best of several
        ("", ["dog"], 0.0),
        ("42", ["42"], 1.0),
        ("ab  xx", ["ab cd"], 4 / 6),  # space counts in the length alone, as in the program of DocVQA
        ("", [""], 1.0),
    ],
)
def test_anls(answer, expected, score):
    assert anls(answer, expected) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12.0),
        ("-3.5", -3.5),
        (".5", 0.5),
        ("12.5%", 0.125),
        ("1,234", 1234.0),
        ("1,234,567.8", 1234567.8),
        ("2e3", 2000.0),
        ("12,34", None),  # no thousands
        ("1,2345", None),
        ("nan", None),
        ("1_000", None),
        ("12 %", 0.12),  # so do pix2struct's program and VLMEvalKit, by float("12 ")
        ("%", None),
        ("$5", None),
        ("", None),
    ],
)
def test_numbers(text, value):
    assert parse_number(text) == (None if value is None else pytest.approx(value))


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [  # ChartQA, section 5.1: 5 % for numbers, exact for text; the cases are those of pix2struct's program
        ("100", "100", 1),
        ("105", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("94.9", "100", 0),
        ("-100", "100", 0),
        ("-97", "-100", 1),
        ("50%", "0.5", 1),  # a percentage is a hundredth
        ("50", "50%", 0),
        ("1,030", "1000", 1),
        ("0", "0", 1),
        ("0.0", "0", 0),  # no relative change of 0: text
        ("0.01", "0", 0),
        ("Yes", "yes", 1),
        ("Yes ", "Yes", 1),
        ("Yellow", "Yellows", 0),
        ("100", "a hundred", 0),
    ],
)
def test_relaxed_accuracy(answer, expected, score):
    assert relaxed_accuracy(answer, [expected]) == score


def test_relaxed_accuracy_takes_the_best_of_several():
    assert relaxed_accuracy("7", ["9", "7.2"]) == 1
    assert relaxed_accuracy("7", ["9", "8"]) == 0


@pytest.mark.parametrize(
    ("text", "normalized"),
    [  # the rules of the VQA challenge's evaluation program, worked through by hand
        ("The Dog", "dog"),
        ("a cat, an owl", "cat owl"),
        ("two", "2"),
        ("none", "0"),
        ("Ten apples", "10 apples"),
        ("twenty", "twenty"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # both apostrophes forgotten: not in the table
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("yalld've", "yalld've"),
        ("y'alld've", "y'all'd've"),
        ("twas", "'twas"),
        ("Im", "im"),  # the table's "Im" has a capital and never fits
        ("somebody'd", "somebodyd"),  # so in the table
        ("yes.", "yes"),
        ("3.5", "3.5"),
        ("U.S.", "us"),
        (".5", ".5"),
        ("stop!", "stop"),  # at the end there is no space beside it: a space takes its place and is stripped
        ("red/white", "red white"),
        ("red / white", "red white"),
        ("well-known", "well known"),
        ("1,000", "1000"),
        ("1,000 km/h", "1000 kmh"),  # a comma in a number makes all marks go
        ("new\nyork\tcity", "new york city"),
        ("  ", ""),
    ],
)
def test_vqa_normalisation(text, normalized):
    assert normalize_vqa(text) == normalized


@pytest.mark.parametrize(
    ("num_agreeing", "score"),
    # By hand: with k of 10 people agreeing, k times min(1, (k-1)/3) and 10-k times min(1, k/3), divided by 10.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_leaves_one_out(num_agreeing, score):
    people = ["red"] * num_agreeing + [f"other {number}" for number in range(10 - num_agreeing)]
    assert vqa_accuracy("The RED.", people) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "expected", "is_formula", "score"),
    [
        ("The word is CENTRE.", ["centre"], False, 1),
        ("cent re", ["centre"], False, 0),  # spaces count in text
        ("new\nyork", ["New York"], False, 1),
        ("york", ["New York"], False, 0),
        ("b", ["a", "B"], False, 1),
        ("b", ["", " "], False, 0),  # nothing is in everything
        ("x ^ 2 + y", ["x^2+y"], True, 1),
        ("X^2", ["x^2"], True, 0),  # case counts in formulas
        ("a\n+ b = c", ["a + b"], True, 1),
    ],
)
def test_ocrbench_score(answer, expected, is_formula, score):
    assert ocrbench_score(answer, expected, is_formula=is_formula) == score


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [("3", ["3"], 1), (" Red\n", ["red"], 1), ("red circle", ["red"], 0), ("b", ["a", "B"], 1), ("", ["a"], 0)],
)
def test_exact_match(answer, expected, score):
    assert exact_match(answer, expected) == score
