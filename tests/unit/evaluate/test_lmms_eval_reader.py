"""Files of lmms-eval: its logs and documents give samples, and what can be meant in several ways is refused."""

import pytest
from benchmark_files import lines, read

from deepseek_vl2.evaluate.tasks import TASKS


def test_lmms_eval(folder):
    content = lines(
        {"doc_id": 3, "doc": {"question": "Q?", "answers": ["x", "y"], "image": "a.png"}, "target": "x"},
        {"doc_id": 4, "doc": {"question": "Q?", "image_path": ["a.png", "b.png"]}, "target": "z"},
        {"question": "Q?", "options": ["cat", "dog"], "answer": "dog", "id": "own", "category": "animals"},
        {"question": "Q?", "options": "['cat', 'dog']", "answer": "A"},
        {"question": "Q?", "A": "cat", "B": "dog", "answer": "B"},
    )
    samples, problems = read(folder, "d.jsonl", content, "lmms_eval")
    assert problems == []
    assert [sample.id for sample in samples] == ["3", "4", "own", "line 4", "line 5"]
    assert [sample.answers for sample in samples] == [("x", "y"), ("z",), ("B",), ("A",), ("B",)]
    assert samples[1].pictures == (str(folder / "a.png"), str(folder / "b.png"))
    assert samples[2].options == samples[3].options == samples[4].options == {"A": "cat", "B": "dog"}
    assert samples[2].category == "animals"


LABELS = ["root", "leaf", "stem"]


@pytest.mark.parametrize(
    ("fields", "answers"),
    [
        ({"doc": {"options": LABELS, "answer": "1"}, "target": "B"}, ("B",)),  # AI2D
        ({"doc": {"options": LABELS, "answer": "1"}}, ("B",)),
        ({"doc": {"options": LABELS, "answer": 0}, "target": "1"}, ("A",)),
        ({"doc": {"options": LABELS, "answer": "stem"}, "target": "2"}, ("C",)),
        ({"doc": {"options": ["3", "0", "1"], "answer": "1"}}, ("B",)),  # a place, as in AI2D
        ({"doc": {"choices": ["3", "0", "1"], "answer": "1"}}, ("C",)),  # a text, as in MathVista
        ({"doc": {"choices": ["3", "0", "1"], "answer": 1}}, ("B",)),  # a place, as in ScienceQA
        ({"doc": {"options": ["3", "0", "1"], "answer": "1"}, "target": "B"}, ("B",)),
        ({"doc": {"options": ["0", "1"], "answer": "1"}, "target": "1"}, ("B",)),  # a text or a place, the same
        ({"doc": {"A": "root", "B": "leaf", "answer": "1"}}, ("1",)),  # no list that could be counted
        ({"doc": {"options": LABELS, "answer": "7"}}, ("7",)),
        ({"doc": {"answer": 0}, "target": "zero"}, ("0",)),
        ({"doc": {"answer": ""}, "target": 0}, ("0",)),
        ({"doc": {"options": ["3", "0", "1"], "answer": "1"}, "target": "(B)"}, ("B",)),
        ({"doc": {"options": LABELS}, "target": "stem"}, ("C",)),
    ],
)
def test_answers_of_lmms_eval(folder, fields, answers):
    fields["doc"]["question"] = "Which?"
    (sample,), problems = read(folder, "d.jsonl", lines(fields), "lmms_eval")
    assert (sample.answers, problems) == (answers, [])


def test_options_of_lmms_eval_by_letter_and_as_choices(folder):
    documents = [
        {"question": "q", "answer": "b", "options": {"A": "x", "B": "y"}},
        {"question": "q", "answer": 1, "choices": ["x", "y"]},
    ]
    samples, problems = read(folder, "data.jsonl", lines(*documents), "lmms_eval")
    assert problems == []
    assert [(sample.options, sample.answers) for sample in samples] == [({"A": "x", "B": "y"}, ("B",))] * 2


def test_open_questions_of_mmmu_are_asked_beside_other_answers(folder):
    document = {"id": "v1", "question": "q <image 1>", "options": "[]", "answer": "['5', 'five']", "image_1": "a.png"}
    content = lines({"doc": document | {"question_type": "open", "split": "validation"}})
    (sample,), problems = read(folder, "data.jsonl", content, "lmms_eval")
    assert problems == []
    assert sample.options == {"A": "5", "B": "five", "C": "Other Answers"}
    assert (sample.answers, sample.split) == (("A", "B"), "validation")


@pytest.mark.parametrize("bbox", [[0.25, 0.5, 0.75, 1.0], [0.25, 0.5, 0.75, 1], [15, 20, 30, 20]])
def test_referring_expressions_of_lmms_eval(folder, bbox):
    document = {"question": "Give the box.", "answer": "the red one", "bbox": bbox, "image": "a.png"}
    (sample,), problems = read(folder, "data.jsonl", lines({"doc_id": 1, "doc": document}), "lmms_eval")
    assert problems == []
    assert (sample.question, sample.boxes) == ("the red one", ((15.0, 20.0, 45.0, 40.0),))


def test_shares_that_end_a_fraction_of_a_pixel_outside_are_no_pixels(folder):
    document = {"answer": "the red one", "bbox": [0, 0.5, 1.005, 1.01], "image": "a.png"}
    (sample,), _ = read(folder, "data.jsonl", lines({"doc": document}), "lmms_eval")
    assert sample.boxes == ((0.0, 20.0, pytest.approx(60.3), pytest.approx(40.4)),)


@pytest.mark.parametrize("is_log", [True, False])
def test_a_question_in_another_order_of_its_options_keeps_its_index(folder, is_log):
    """MMBench's CircularEval counts both as one."""
    document = {"question": "Which?", "A": "cat", "B": "dog", "answer": "A", "image": "a.png"}
    documents = [document | {"index": index} for index in (5, 1000005)]
    content = lines(*({"doc_id": number, "doc": doc} if is_log else doc for number, doc in enumerate(documents)))
    samples, problems = read(folder, "data.jsonl", content, "lmms_eval")
    assert ([sample.id for sample in samples], problems) == (["5", "1000005"], [])


def test_an_index_of_other_questions_does_not_go_before_the_number_of_the_log(folder):
    content = lines(*({"doc_id": n, "doc": {"index": 7, "question": "What?", "answer": "x"}} for n in (0, 1)))
    assert [sample.id for sample in read(folder, "data.jsonl", content, "lmms_eval").samples] == ["0", "1"]


@pytest.mark.parametrize(("numbers", "ids"), [((0, 1), ["0", "1"]), ((None, None), ["line 1", "line 2"])])
def test_expressions_for_the_same_object_stay_apart_though_lmms_eval_gives_them_one_id(folder, numbers, ids):
    document = {"question_id": "o1", "question": "Give the box.", "bbox": [1, 1, 5, 5], "image": "a.png"}
    expressions = ("the red one", "the left one")
    content = lines(
        *(
            document | {"answer": expression}
            if number is None
            else {"doc_id": number, "doc": document | {"answer": expression}}
            for number, expression in zip(numbers, expressions, strict=True)
        )
    )
    samples, problems = read(folder, "data.jsonl", content, "lmms_eval")
    assert problems == []
    assert [(sample.id, sample.question) for sample in samples] == list(zip(ids, expressions, strict=True))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": ["one", "two"]}, "2 referring expressions in 'answer'"),
        ({"bbox": [0.5, 0.5, 0.25, 1.0]}, "has no area"),
        ({"bbox": "all"}, "a box must be four numbers"),
        ({"image": None}, "a box needs a picture"),
    ],
)
def test_bad_referring_expressions_of_lmms_eval(folder, change, reason):
    document = {"answer": "the red one", "bbox": [1, 1, 5, 5], "image": "a.png"} | change
    samples, (problem,) = read(folder, "data.jsonl", lines({"doc": document}), "lmms_eval")
    assert samples == []
    assert reason in problem.reason


def test_referring_expressions_of_lmms_eval_keep_the_name_of_their_file(folder):
    document = {"question_id": "o1", "answer": ["the man"], "bbox": [15, 20, 30, 20], "file_name": "a.png"}
    others = [{"image": "b.png"}, {"image_1": "b.png"}, {"file_name": "gone.png"}, {"file_name": ""}]
    content = lines(*({"doc_id": n, "doc": document | other} for n, other in enumerate([{}, *others])))
    samples, problems = read(folder, "data.jsonl", content, "lmms_eval")
    assert (samples[0].question, samples[0].boxes) == ("the man", ((15, 20, 45, 40),))
    assert [sample.pictures for sample in samples] == [(str(folder / name),) for name in ("a.png", "b.png", "b.png")]
    assert [problem.reason.split(" (")[0] for problem in problems] == [
        "there is no picture 'gone.png'",
        "a box needs a picture, there is none",
    ]


def test_answers_of_people_as_vqa_writes_them(folder):
    document = {"question": "q", "answers": [{"answer": "a", "answer_id": 1}, {"answer": "b", "answer_id": 2}]}
    (sample,), _ = read(folder, "data.jsonl", lines({"doc": document}), "lmms_eval")
    assert sample.answers == ("a", "b")


def test_an_answer_of_lmms_eval_with_two_meanings_is_refused(folder):
    document = {"question": "Which?", "options": ["3", "0", "1"], "answer": "1"}
    _, (problem,) = read(folder, "d.jsonl", lines({"doc": document, "target": "1"}), "lmms_eval")
    assert "'1' may be option C, whose text it is, or option B" in problem.reason


def test_empty_cells_and_numbered_pictures_of_lmms_eval(folder):
    content = lines(
        {"question": "Q?", "A": "cat", "B": "dog", "C": "nan", "D": float("nan"), "hint": "nan", "answer": "A"},
        {"question": "Q?", "hint": "Look.", "image_1": "a.png", "image_2": "b.png", "image_3": None},
        {"question": "Q?", "image": "b.png", "image_1": "a.png"},
    )
    first, second, third = read(folder, "d.jsonl", content, "lmms_eval").samples
    assert (first.options, first.hint, first.pictures) == ({"A": "cat", "B": "dog"}, "", ())
    assert (second.hint, second.pictures) == ("Look.", (str(folder / "a.png"), str(folder / "b.png")))
    assert third.pictures == (str(folder / "b.png"),)


@pytest.mark.parametrize(
    ("tail", "options"),
    [
        ("\nOptions: A: x, B: y, C: z, D: w", ["x", "y", "z", "w"]),
        ("\n Options:\nA: x\nB: y", ["x", "y"]),
        ("\nOptions: A: red, green, B: 3:1, C: see: this, D: A, B", ["red, green", "3:1", "see: this", "A, B"]),
        ("\nOptions: A: H: 11 %, O: 89 %, B: H: 50 %, O: 50 %", ["H: 11 %, O: 89 %", "H: 50 %, O: 50 %"]),
        ("\nOptions: A: Yes., B: No.\nNever., C: nan, D: ", ["Yes.", "No.\nNever."]),  # what is padded is left out
        ("\nChoices:\n(A) 1, 2\n(B) (A) and 3\n(C) 4", ["1, 2", "(A) and 3", "4"]),
        ("\nOptions: A: one\nOptions: A: x, B: y", ["x", "y"]),
    ],
)
def test_options_at_the_end_of_a_question_as_mmstar_has_them(folder, tail, options):
    document = {"index": 3, "question": "Which, A: or B?" + tail, "answer": "B", "image": "a.png", "category": "math"}
    content = lines({"doc_id": 7, "doc": document, "target": "B"}, document | {"answer": options[0], "index": 4})
    (first, second), problems = read(folder, "d.jsonl", content, "lmms_eval", prepare=TASKS["mmstar"].prepare)
    assert problems == []
    assert first.question == second.question == "Which, A: or B?" + ("\nOptions: A: one" if "one" in tail else "")
    assert list(first.options) == list("ABCD")[: len(options)]
    assert list(first.options.values()) == list(second.options.values()) == options
    assert [(sample.id, sample.answers) for sample in (first, second)] == [("3", ("B",)), ("4", ("A",))]


@pytest.mark.parametrize(
    "fields",
    [
        {"question": "Which?\nOptions: B: x, C: y"},
        {"question": "Which?\nOptions: A: x, C: y"},
        {"question": "Which?\nOptions: a: x, b: y"},
        {"question": "Which? Options: A: x, B: y"},  # not a line of its own
        {"question": "Which of A: x, B: y?"},
        {"question": "Which?\n(A) x\n(B) y"},  # a list that is not said to be the options
        {"question": "\nOptions: A: x, B: y"},
        {"question": "Which?\nOptions: A: x, B: y", "options": ["one", "two"]},
        {"question": "Which?\nOptions: A: x, B: y", "A": "one", "B": "two"},
    ],
)
def test_a_question_without_options_at_its_end_or_with_others_stays(folder, fields):
    (sample,), _ = read(folder, "d.jsonl", lines(fields), "lmms_eval")
    assert sample.question == fields["question"]
    assert sample.options == ({"A": "one", "B": "two"} if len(fields) > 1 else {})


def test_options_at_the_end_of_a_question_that_can_be_cut_in_several_ways_are_refused(folder):
    question = "Which?\nOptions: A: H: 1, C: 4, B: H: 2, C: 4, C: none"
    _, (problem,) = read(folder, "d.jsonl", lines({"question": question, "answer": "A"}), "lmms_eval")
    assert "option C begins more than once" in problem.reason and "A: H: 1, C: 4" in problem.reason
