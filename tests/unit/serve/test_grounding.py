"""Boxes from answers, and what is reported about malformed ones."""

import json
import logging
import time

import pytest

from deepseek_vl2.serve.grounding import GroundedBox, parse_grounding, read_grounding, strip_grounding


def ref(label):
    return f"<|ref|>{label}<|/ref|>"


def det(body):
    return f"<|det|>{body}<|/det|>"


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("", []),
        ("no boxes here", []),
        (ref("cat") + det("[[1, 2, 30, 40]]"), [("cat", (1, 2, 30, 40))]),
        ("See " + ref("cat") + " " + det("[[0,0,999,999]]") + ".<eos>", [("cat", (0, 0, 999, 999))]),
        (ref("cat") + det(" [ [1 ,2, 3,4 ] , [5,6,7,8]\n] "), [("cat", (1, 2, 3, 4)), ("cat", (5, 6, 7, 8))]),
        (ref("a") + det("[[1,2,3,4]]") + ref("b") + det("[[5,6,7,8]]"), [("a", (1, 2, 3, 4)), ("b", (5, 6, 7, 8))]),
        (ref("a") + ref("b") + det("[[1,2,3,4]]") + det("[[5,6,7,8]]"), [("a", (1, 2, 3, 4)), ("b", (5, 6, 7, 8))]),
        (ref(" 左边的长颈鹿。\n") + det("[[1,2,3,4]]"), [("左边的长颈鹿。", (1, 2, 3, 4))]),
        (ref("[[9,9]] <b> \"'\\ 🦒") + det("[[1,2,3,4]]"), [("[[9,9]] <b> \"'\\ 🦒", (1, 2, 3, 4))]),
        (ref("point") + det("[[7,7,7,7]]"), [("point", (7, 7, 7, 7))]),
        (ref("zeros") + det("[[007, 010, 099, 100]]"), [("zeros", (7, 10, 99, 100))]),
    ],
)
def test_well_formed(text, boxes):
    result = read_grounding(text)
    assert [(found.label, found.box) for found in result.boxes] == boxes
    assert result.problems == []
    assert parse_grounding(text, strict=True) == result.boxes


@pytest.mark.parametrize(
    ("body", "kept", "problem"),
    [
        ("[[1, 2, 3.5, 4]]", 0, "must hold whole numbers 0..999"),
        ("[[1, 2, -3, 4]]", 0, "must hold whole numbers"),
        ("[[a, 2, 3, 4]]", 0, "must hold whole numbers"),
        ("[[١, ٢, ٣, ٤]]", 0, "must hold whole numbers"),
        ("[[1, 2, 3, " + "9" * 5000 + "]]", 0, "must hold whole numbers"),
        ("[[__import__('os').abort(), 2, 3, 4]]", 0, "must hold whole numbers"),
        ("[[1, 2, 3, 1000]]", 0, "leaves the range 0..999"),
        ("[[30, 2, 3, 4]]", 0, "ends before it starts"),
        ("[[3, 20, 30, 4]]", 0, "ends before it starts"),
        ("[[1, 2, 3]]", 0, "has 3 values, not 4"),
        ("[[1, 2, 3, 4, 5]]", 0, "has 5 values, not 4"),
        ("[[]]", 0, "has 1 values, not 4"),
        ("[]", 0, "holds '' where [x1, y1, x2, y2] should stand"),
        ("[1, 2, 3, 4]", 0, "where [x1, y1, x2, y2] should stand"),
        ("1, 2, 3, 4", 0, "holds '1, 2, 3, 4', not [[x1, y1, x2, y2], ...]"),
        ("", 0, "holds '', not [["),
        ("[", 0, "holds '[', not [["),
        ("[[[1, 2, 3, 4]]]", 0, "where [x1, y1, x2, y2] should stand"),
        ("[[1, 2, 3, 4], ]", 1, "holds ' ' where"),
        ("[[1, 2, 3, 4] [5, 6, 7, 8]]", 1, "holds '[5, 6, 7, 8]' after a box"),
        ("[[1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11]]", 2, "has 3 values, not 4"),
    ],
)
def test_malformed_boxes_are_reported_and_the_others_kept(body, kept, problem):
    result = read_grounding("x " + ref("cat") + det(body))
    assert len(result.boxes) == kept and all(found.label == "cat" for found in result.boxes)
    assert len(result.problems) == 1
    assert problem in result.problems[0] and "<|det|> at character 20" in result.problems[0]
    assert len(result.problems[0]) < 200


@pytest.mark.parametrize(
    ("text", "boxes", "problems"),
    [
        (det("[[1,2,3,4]]"), [("", (1, 2, 3, 4))], ["<|det|> at character 0 has no label"]),
        (ref("cat") + det("[[1,2,3,4"), [], ["holds '[[1,2,3,4', not"]),
        (ref("cat") + "<|det|>[[1,2,3,4", [], ["<|det|> at character 18 is not closed: the answer may be cut off"]),
        ("<|ref|>cat", [], ["<|ref|> at character 0 is not closed"]),
        ("<|/det|> cat", [], ["<|/det|> at character 0 closes nothing"]),
        (
            "<|ref|>cat" + det("[[1,2,3,4]]"),
            [("", (1, 2, 3, 4))],
            ["<|ref|> at character 0 is not closed before <|det|>"],
        ),
        (
            ref("a") + "<|det|>[[1,2,3,4]]" + ref("b") + det("[[5,6,7,8]]"),
            [("b", (5, 6, 7, 8))],
            ["<|det|> at character 16 is not closed before <|ref|>"],
        ),
        (
            ref("a") + det("broken") + ref("b") + det("[[5,6,7,8]]"),
            [("b", (5, 6, 7, 8))],
            ["holds 'broken'"],
        ),
        (
            "<|ref|>a<|ref|>b<|/ref|>" + det("[[5,6,7,8]]"),
            [("b", (5, 6, 7, 8))],
            ["<|ref|> at character 0 is not closed before <|ref|>"],
        ),
        ("<|ref|>a<|grounding|>b<|/ref|>", [], ["not closed before <|grounding|>", "closes nothing"]),
    ],
)
def test_malformed_tags_are_reported(text, boxes, problems):
    result = read_grounding(text)
    assert [(found.label, found.box) for found in result.boxes] == boxes
    assert len(result.problems) == len(problems), result.problems
    for expected, problem in zip(problems, result.problems, strict=True):
        assert expected in problem


def test_a_label_that_is_only_mentioned_does_not_shift_the_others():
    text = (
        "Find "
        + ref("the dog")
        + ": "
        + ref("a dog")
        + "\n"
        + det("[[1,2,3,4]]")
        + ref("its ball")
        + det("[[5,6,7,8]]")
    )
    result = read_grounding(text)
    assert [found.label for found in result.boxes] == ["a dog", "its ball"]
    assert result.problems == ["<|ref|> at character 5 has no boxes (<|det|>) that belong to it"]


def test_spare_refs_and_dets_are_paired_in_order():
    text = ref("a") + "and" + ref("b") + "and" + ref("c") + "at" + det("[[1,1,1,1]]") + "and" + det("[[2,2,2,2]]")
    result = read_grounding(text)
    assert [found.label for found in result.boxes] == ["a", "b"]
    assert len(result.problems) == 1
    text = ref("a") + det("[[1,1,1,1]]") + "and" + det("[[2,2,2,2]]")
    result = read_grounding(text)
    assert [found.label for found in result.boxes] == ["a", ""]
    assert len(result.problems) == 1


def test_malformed_is_logged_or_raised(caplog):
    text = ref("cat") + det("[[1,2,3]]")
    with caplog.at_level(logging.WARNING, logger="deepseek_vl2.serve.grounding"):
        assert parse_grounding(text) == []
    assert "has 3 values, not 4" in caplog.text
    with pytest.raises(ValueError, match=r"malformed grounding: .* has 3 values, not 4"):
        parse_grounding(text, strict=True)


@pytest.mark.parametrize(
    "text",
    [
        "<|det|>" * 100_000,
        "<|ref|>" * 100_000,
        det("[" * 500_000),
        det("[" * 500_000 + "]" * 500_000),
        det("[" + " " * 500_000 + "]"),
        det("[[" + "1," * 250_000 + "]]"),
        det("[[1,2,3,4]" + " " * 500_000 + "x]"),
        det("[" + ",".join(["[1,2,3,4]"] * 50_000) + "]"),
        (" " * 5 + det("[[1,2,3,4]]")) * 20_000 + " " * 500_000 + det(""),
        (ref("a" * 50) + det("[[1,2,3,4]]")) * 10_000 + ref("b"),
        "<|ref|" * 100_000,
    ],
)
def test_huge_texts_take_no_time(text):
    started = time.perf_counter()
    read_grounding(text)
    strip_grounding(text)
    assert time.perf_counter() - started < 4


@pytest.mark.parametrize(
    ("box", "size", "pixels"),
    [
        ((0, 0, 999, 999), (640, 480), (0, 0, 640, 480)),
        ((500, 333, 501, 666), (640, 480), (320, 160, 320, 320)),
        ((1, 998, 2, 999), (1000, 1), (1, 0, 2, 1)),
    ],
)
def test_pixels(box, size, pixels):
    assert GroundedBox("x", box).to_pixels(*size) == pixels


def test_every_coordinate_scales_by_the_formula_of_the_interface():
    for value in range(1000):
        assert GroundedBox("x", (value, value, value, value)).to_pixels(641, 97) == (
            int(value / 999 * 641),
            int(value / 999 * 97),
            int(value / 999 * 641),
            int(value / 999 * 97),
        )


def test_json_form():
    found = GroundedBox("猫", (0, 100, 999, 200))
    assert found.to_dict() == {"label": "猫", "box": [0, 100, 999, 200]}
    assert json.loads(json.dumps(found.to_dict((999, 1998))))["pixels"] == [0, 200, 999, 400]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("nothing to do", "nothing to do"),
        ("A " + ref("cat") + det("[[1,2,3,4]]") + " and a " + ref("狗") + det("[[5,6,7,8]]") + ".", "A cat and a 狗."),
        ("<|grounding|>A " + ref("cat"), "A cat"),
        ("A <|ref|>ca", "A ca"),
        ("A " + ref("cat") + "<|det|>[[1,2", "A cat"),
        ("A " + ref("cat") + "<|det|>[[1,2" + ref("dog"), "A catdog"),
    ],
)
def test_plain_text(text, plain):
    assert strip_grounding(text) == plain
