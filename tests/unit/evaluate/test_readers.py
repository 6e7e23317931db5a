"""Files of benchmarks: every form gives the same samples, and bad entries are named."""

import base64
import copy
import csv
import io
import json

import pytest
from PIL import Image

from deepseek_vl2.evaluate.readers import choose_format, read_samples
from deepseek_vl2.evaluate.readers.common import listed, read_box
from deepseek_vl2.nano.architecture import nano_processor
from deepseek_vl2.train.data import parse_line

WIDTH, HEIGHT = 60, 40


def take_all(sample):
    """A task's preparation that refuses nothing and changes nothing."""
    return sample


@pytest.fixture
def folder(tmp_path):
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (WIDTH, HEIGHT), color).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    return tmp_path


def png(color="red", size=(WIDTH, HEIGHT)):
    data = io.BytesIO()
    Image.new("RGB", size, color).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def read(folder, name, content, form=None, **options):
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return read_samples(path, choose_format(path, form), take_all, **options)


def tsv(*rows):
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, delimiter="\t", lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def lines(*documents):
    return "".join((doc if isinstance(doc, str) else json.dumps(doc)) + "\n" for doc in documents)


# -- tables of VLMEvalKit ---------------------------------------------------------------------------------------------


def test_tsv(folder):
    red, wide = png(), png("green", (50, 20))
    content = tsv(
        {"index": 7, "image": red, "question": "What?", "answer": "B", "A": "cat", "B": "dog", "category": "animals"},
        {"index": 8, "image": 7, "question": "And\nthis?", "answer": "['x', \"it's\"]", "hint": "Look."},
        {"index": 9, "image": f"['{red}', '{wide}']", "question": "Both?", "answer": "5"},
        {"index": 10, "question": "None?", "answer": "no"},
    )
    (first, second, third, fourth), problems = read(folder, "data.tsv", content)
    assert problems == []
    assert (first.id, first.where, first.question, first.category) == ("7", "line 2", "What?", "animals")
    assert (first.answers, first.options, first.boxes) == (("B",), {"A": "cat", "B": "dog"}, None)
    assert first.pictures == (base64.b64decode(red),)
    assert first.sizes == ((WIDTH, HEIGHT),)
    assert second.pictures == first.pictures
    assert (second.where, second.question, second.hint) == ("line 4", "And\nthis?", "Look.")
    assert (second.answers, second.options) == (("x", "it's"), {})
    assert third.sizes == ((WIDTH, HEIGHT), (50, 20))
    assert (fourth.pictures, fourth.sizes) == ((), ())


def test_tsv_with_paths_and_cells_longer_than_the_csv_modules_limit(folder):
    limit = csv.field_size_limit()
    content = tsv({"index": 1, "image_path": "['a.png', 'b.png']", "question": "q" * 200_000, "answer": "1"})
    (sample,), _ = read(folder, "data.tsv", content)
    assert sample.pictures == (str(folder / "a.png"), str(folder / "b.png"))
    assert len(sample.question) == 200_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": 99, "question": "q"}, "image names the row '99'"),
        ({"image": 1, "question": "q"}, "image names the row '1'"),  # itself
        ({"image": "x" * 100 + "!", "question": "q"}, "not base64"),
        ({"image": base64.b64encode(b"no picture" * 20).decode(), "question": "q"}, "not a picture"),
        ({"image_path": "gone.png", "question": "q"}, "no picture 'gone.png'"),
        ({"question": ""}, "no question"),
        ({"question": "q", "answer": "[{}]"}, "an answer must be a text"),
    ],
)
def test_bad_rows_of_a_table(folder, row, reason):
    good = {"index": 2, "image": png(), "question": "q", "answer": "a"}
    samples, (problem,) = read(folder, "data.tsv", tsv({"index": 1, "answer": "a", **row}, good))
    assert [sample.id for sample in samples] == ["2"]
    assert problem.where == "line 2"
    assert reason in problem.reason


@pytest.mark.parametrize("written", ["{0}\n", "{1}\n{2}", "data:image/png;base64,{0}", "['{0}']", "['7']", "a.png"])
def test_pictures_of_a_table_in_every_form(folder, written):
    red = png()
    cell = written.format(red, red[:80], red[80:])
    rows = ({"index": 7, "image": red, "question": "q"}, {"index": 8, "image": cell, "question": "q"})
    (first, second), problems = read(folder, "data.tsv", tsv(*rows))
    assert problems == []
    assert second.sizes == first.sizes == ((WIDTH, HEIGHT),)


def test_letters_of_a_table_may_have_space_and_be_small(folder):
    rows = ({"index": number, "question": "q", "answer": a, "A": "x", "B": "y"} for number, a in enumerate(["B ", "b"]))
    samples, _ = read(folder, "data.tsv", tsv(*rows))
    assert [sample.answers for sample in samples] == [("B",), ("B",)]


def test_a_row_of_a_table_that_is_not_utf8_is_named(folder):
    path = folder / "data.tsv"
    path.write_bytes(b"index\tquestion\tanswer\n1\tq\ta\n2\tcaf\xe9\ta\n3\tq\ta\n")
    samples, problems = read_samples(path, "tsv", take_all)
    assert [sample.id for sample in samples] == ["1", "3"]
    assert [str(problem) for problem in problems] == ["line 3: question is not UTF-8 text"]


def test_boxes_of_a_table(folder):
    """As VLMEvalKit's RefCOCO has them."""
    row = {"index": "", "image_path": "a.png", "question": "left cat", "answer": "[10, 5, 30, 25]"}
    corners = {"bbox_x1": "10.0", "bbox_y1": "5", "bbox_x2": "30.5", "bbox_y2": "25"}
    changes = [{}, {"bbox_x2": "far"}, {"bbox_x2": "70"}, {"image_path": ""}, dict.fromkeys(corners, "")]
    (first, last), problems = read(folder, "data.tsv", tsv(*(row | corners | change for change in changes)))
    assert (first.id, first.boxes, last.boxes) == ("line 2", ((10.0, 5.0, 30.5, 25.0),), None)
    reasons = ("a box must be four numbers", "not within the picture of 60x40", "a box needs a picture")
    assert all(reason in problem.reason for reason, problem in zip(reasons, problems, strict=True))


def test_splits_of_a_table(folder):
    rows = [{"index": n, "question": "q", "answer": "a", "category": "Art", "split": s} for n, s in enumerate("xy")]
    samples, _ = read(folder, "data.tsv", tsv(*rows))
    assert [(sample.category, sample.split) for sample in samples] == [("Art", "x"), ("Art", "y")]


def test_a_row_with_too_few_or_too_many_cells(folder):
    content = "index\tquestion\tanswer\n1\tq\n2\tq\ta\textra\n3\tq\ta\n"
    samples, problems = read(folder, "data.tsv", content)
    assert [sample.id for sample in samples] == ["3"]
    assert [problem.where for problem in problems] == ["line 2", "line 3"]


def test_a_table_with_a_byte_order_mark_and_quotation_marks_within_a_cell(folder):
    content = (
        '\ufeffindex\tquestion\tanswer\n1\t"Why" does it say so?\ta\n2\tA "b" c\t"x\ty"\n\n3\t"two\nlines"\t"""z"""\n'
    )
    samples, problems = read(folder, "data.tsv", content)
    assert problems == []
    assert [(sample.where, sample.question, sample.answers) for sample in samples] == [
        ("line 2", "Why does it say so?", ("a",)),
        ("line 3", 'A "b" c', ("x\ty",)),
        ("line 6", "two\nlines", ('"z"',)),
    ]


@pytest.mark.parametrize("rest", ["", '3\t"Right" so?\ta\n', "3\tq\ta\n"])
def test_a_quotation_mark_that_is_not_closed(folder, rest):
    with pytest.raises(ValueError, match=r"data\.tsv is no table.* line 3 is not closed"):
        read(folder, "data.tsv", f'index\tquestion\tanswer\n1\tq\ta\n2\t"Why does it?\ta\n{rest}')


def test_what_is_no_table_is_refused(folder):
    with pytest.raises(ValueError, match="no column index and no question"):
        read(folder, "data.tsv", "a\tb\n1\t2\n")
    (folder / "binary.tsv").write_bytes(b"index\tquestion\n\xff\xfe\t\n")
    _, (problem,) = read_samples(folder / "binary.tsv", "tsv", take_all)
    assert problem.reason == "index is not UTF-8 text"


# -- referring expressions --------------------------------------------------------------------------------------------

ENTRY = {"image": "a.png", "sentence": "left cat ", "bbox": [10, 5, 30, 25], "width": WIDTH, "height": HEIGHT}


def test_refcoco_list_says_how_its_boxes_are_written(folder):
    entries = [
        {**ENTRY, "bbox_format": "xyxy", "id": 5},
        {**ENTRY, "bbox_format": "xywh", "split": "testA"},
    ]
    first, second = read(folder, "d.json", json.dumps(entries), "refcoco_list").samples
    assert (first.id, first.question, first.boxes) == ("5", "left cat", ((10, 5, 30, 25),))
    assert (second.where, second.category, second.boxes) == ("entry 2", "testA", ((10, 5, 40, 30),))


def test_a_refcoco_list_may_leave_id_and_size_empty(folder):
    entries = [{**ENTRY, "bbox_format": "xyxy", "id": None, "width": None}] * 2
    samples, problems = read(folder, "d.json", json.dumps(entries), "refcoco_list")
    assert ([sample.id for sample in samples], problems) == (["entry 1", "entry 2"], [])


@pytest.mark.parametrize("is_list", [True, False])
def test_refcoco_list_with_a_byte_order_mark(folder, is_list):
    entry = {**ENTRY, "bbox_format": "xyxy"}
    (sample,), problems = read(folder, "d.json", "\ufeff" + json.dumps([entry] if is_list else entry), "refcoco_list")
    assert (sample.question, problems) == ("left cat", [])


@pytest.mark.parametrize("field", ["sentence", "caption", "sent", "sents", "expression"])
def test_refcoco_lines_with_the_boxes_said_by_the_option(folder, field):
    entry = {**ENTRY, field: "the cat"}
    if field != "sentence":
        del entry["sentence"]
    (sample,), _ = read(folder, "d.jsonl", lines(entry), "refcoco_list", box_format="xywh")
    assert (sample.question, sample.boxes, sample.where) == ("the cat", ((10, 5, 40, 30),), "line 1")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bbox_format": None}, "nothing says how boxes are written: give --box_format"),
        ({"bbox_format": "cxcywh"}, "unknown form of boxes 'cxcywh'"),
        ({"bbox": [10, 5, 62, 25]}, "not within the picture of 60x40"),
        ({"bbox": [-2, 5, 20, 25]}, "not within the picture"),
        ({"bbox": [30, 5, 10, 25]}, "has no area"),
        ({"bbox": [1, 2, 3]}, "four numbers"),
        ({"bbox": [1, 2, 3, "4"]}, "four numbers"),
        ({"bbox": [float("nan"), 2, 3, 4]}, "four numbers"),
        ({"bbox": [1, 2, float("inf"), 4]}, "four numbers"),
        ({"bbox": [1, 2, 10**400, 4]}, "four numbers"),
        ({"bbox": None}, "no expected box"),
        ({"width": 61}, "has 60x40 pixels, the file says 61x40"),
        ({"image": "gone.png"}, "no picture 'gone.png'"),
        ({"image": "broken.png"}, "broken"),
        ({"image": None}, "by its path"),
        ({"sentence": " "}, "no question"),
    ],
)
def test_bad_referring_expressions(folder, change, reason):
    entries = [{**ENTRY, "bbox_format": "xyxy", **change}, {**ENTRY, "bbox_format": "xyxy"}]
    samples, (problem,) = read(folder, "d.json", json.dumps(entries), "refcoco_list")
    assert len(samples) == 1
    assert problem.where == "entry 1"
    assert reason in problem.reason


REFS = {
    "refs": [
        {
            "ref_id": 1,
            "ann_id": 11,
            "image_id": 21,
            "split": "val",
            "sentences": [{"sent_id": 31, "sent": "left cat"}, {"sent_id": 32, "sent": "red cat"}],
        },
        {"ref_id": 2, "ann_id": 12, "image_id": 99, "split": "val", "sentences": [{"sent_id": 33, "sent": "dog"}]},
        {"ref_id": 3, "ann_id": 12, "image_id": 21, "sentences": []},
    ],
    "instances": {
        "annotations": [{"id": 11, "bbox": [10, 5, 30, 25]}, {"id": 12, "bbox": [0, 0, 5, 5]}],
        "images": [{"id": 21, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
    },
}


@pytest.mark.parametrize("is_nested", [True, False])
def test_refcoco_refs(folder, is_nested):
    document = REFS if is_nested else {"refs": REFS["refs"], **REFS["instances"]}
    samples, problems = read(folder, "d.json", json.dumps(document), "refcoco_refs")
    assert [(sample.id, sample.question, sample.category) for sample in samples] == [
        ("31", "left cat", "val"),
        ("32", "red cat", "val"),
    ]
    assert samples[0].boxes == ((10, 5, 40, 30),)  # COCO writes x, y, width, height
    assert [problem.where for problem in problems] == ["ref 2, sentence 1", "ref 3"]
    assert "no image 99" in problems[0].reason


@pytest.mark.parametrize(("table", "name"), [("refs", "ann_id"), ("refs", "image_id"), ("annotations", "id")])
def test_refcoco_refs_with_an_id_that_is_none(folder, table, name):
    document = copy.deepcopy({"refs": REFS["refs"][:1], **REFS["instances"]})
    document[table][0][name] = [1]
    samples, problems = read(folder, "d.json", json.dumps(document), "refcoco_refs")
    assert samples == []
    assert [problem.where for problem in problems] == ["ref 1, sentence 1", "ref 1, sentence 2"]
    assert "there is no annotation" in problems[0].reason


@pytest.mark.parametrize(("form", "content"), [("refcoco_refs", '{"refs": '), ("refcoco_list", '[{"image": ')])
def test_broken_json_is_refused_with_the_name_of_the_file(folder, form, content):
    with pytest.raises(ValueError, match=r"d\.json: "):
        read(folder, "d.json", content, form)


def test_refcoco_refs_needs_its_three_lists(folder):
    with pytest.raises(ValueError, match="lists refs, annotations and images"):
        read(folder, "d.json", json.dumps({"refs": []}), "refcoco_refs")


# -- lmms-eval --------------------------------------------------------------------------------------------------------


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


# -- conversations ----------------------------------------------------------------------------------------------------

QUESTION = {"role": "<|User|>", "content": "<image>\nWhere?", "images": ["a.png"]}
GROUNDED = "<|ref|>cat<|/ref|><|det|>[[0, 0, 999, 500]]<|/det|>"


def test_conversations(folder):
    content = lines(
        {"id": "one", "conversations": [QUESTION], "answer": "left", "boxes": [[1, 2, 30, 20]], "category": "c"},
        {"messages": [QUESTION, {"role": "<|Assistant|>", "content": GROUNDED}]},
        "",
        {"messages": [{**QUESTION, "content": "Where?", "role": "user"}], "answers": ["a", 2], "options": {"A": "x"}},
        {
            "messages": [QUESTION, {"role": "assistant", "content": "Here."}, {"role": "user", "content": "Sure?"}],
            "answer": "yes",
        },
    )
    (first, second, third, fourth), problems = read(folder, "d.jsonl", content)
    assert problems == []
    assert (first.id, first.question, first.category) == ("one", "Where?", "c")
    assert (first.answers, first.boxes) == (("left",), ((1, 2, 30, 20),))
    assert first.messages == ({**QUESTION, "images": [str(folder / "a.png")]},)
    assert (second.where, second.answers, second.boxes) == ("line 2", (GROUNDED,), ((0, 0, WIDTH, 500 / 999 * HEIGHT),))
    assert third.messages[0]["content"] == "<image>\nWhere?"  # the mark is put in front
    assert (third.answers, third.options, third.boxes) == (("A", "2"), {"A": "x"}, None)
    assert (fourth.question, len(fourth.messages), fourth.sizes) == ("Sure?", 3, ((WIDTH, HEIGHT),))


def test_conversations_in_every_form_that_fine_tuning_reads(folder):
    data_uri = f"data:image/png;base64,{png('green', (50, 20))}"
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    parts = [
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image", "path": "b.png"},
        {"type": "text", "text": "Which?"},
    ]
    documents = (
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}, answer]},
        {"messages": [{"role": "User", "content": "<image>Which?", "images": [data_uri]}, answer]},
        {"messages": [{"role": "user", "content": "<image>Which?", "images": [(folder / "b.png").as_uri()]}, answer]},
        {"messages": [{"role": "user", "content": "Hi", "images": None}, answer]},
    )
    processor = nano_processor()
    for document in documents:
        parse_line(json.dumps(document).encode(), folder, processor)
    samples, problems = read(folder, "d.jsonl", lines(*documents))
    assert problems == []
    assert [sample.answers for sample in samples] == [("A cat.",)] * 4
    system, question = samples[0].messages
    assert system == {"role": "system", "content": "Be brief.", "images": []}
    assert question["content"] == "<image>\n<image>\nWhich?"
    assert samples[0].pictures == (str(folder / "a.png"), str(folder / "b.png"))
    assert [sample.sizes for sample in samples[1:]] == [((50, 20),), ((WIDTH, HEIGHT),), ()]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{no json", "not JSON"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "unknown content part"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "names no picture"),
        ({"messages": [{**QUESTION, "images": [{"url": "a.png"}]}]}, "by its path or address"),
        ({"messages": [{**QUESTION, "images": ["gopher://a/b.png"]}]}, "addresses must start with http:"),
        ({"messages": [{**QUESTION, "role": "system"}]}, "must end with a question"),
        ({"messages": [{**QUESTION, "content": "<image>\ud800"}]}, "half a character"),
        ("[1]", "must be an object"),
        ({"doc": {}}, "--format"),
        ({"messages": [QUESTION["content"]]}, "message 0 must be an object"),
        ({"messages": [{**QUESTION, "role": "robot"}]}, "unknown role 'robot'"),
        ({"messages": [{"role": "<|Assistant|>", "content": "Yes."}]}, "must end with a question"),
        ({"messages": [{**QUESTION, "images": ["gone.png"]}]}, "no picture 'gone.png'"),
        ({"messages": [{**QUESTION, "images": ["broken.png"]}]}, "broken"),
        ({"messages": [{**QUESTION, "images": "a.png"}]}, "list of paths"),
        ({"messages": [{**QUESTION, "images": []}]}, "1 <image> mark(s) for 0 picture(s)"),
        ({"messages": [QUESTION, {"role": "assistant", "content": " "}, QUESTION]}, "message 1 is an answer with no"),
        ({"messages": [QUESTION], "boxes": [[0, 0, 99, 9]]}, "not within the picture"),
        ({"messages": [QUESTION], "boxes": "none"}, "must be a list of boxes"),
        ({"messages": [{"role": "user", "content": "Hi"}], "boxes": []}, "boxes need a picture"),
        ({"messages": [QUESTION, {"role": "assistant", "content": "<|det|>[[1"}]}, "malformed boxes"),
        ({"messages": [QUESTION], "options": "x"}, "'options' must be a list or an object, not 'x'"),
        ({"messages": [QUESTION], "id": "good"}, "that of line 2, too"),
    ],
)
def test_bad_conversations(folder, line, reason):
    good = {"id": "good", "messages": [QUESTION], "answer": "a"}
    samples, (problem,) = read(folder, "d.jsonl", "\n" + lines(good, line))
    assert [sample.id for sample in samples] == ["good"]
    assert problem.where == "line 3"
    assert reason in problem.reason


ASKED = {"conversations": [{"role": "<|User|>", "content": "q"}]}


@pytest.mark.parametrize("options", [{"a": "x", "b": "y"}, ["x", "y"]])
def test_options_of_conversations(folder, options):
    content = lines({**ASKED, "id": None, "options": options, "answer": "b "}, {**ASKED, "id": None, "options": None})
    (first, second), problems = read(folder, "data.jsonl", content)
    assert problems == []
    assert (first.options, first.answers) == ({"A": "x", "B": "y"}, ("B",))
    assert (first.id, second.id, second.options) == ("line 1", "line 2", {})


def test_options_that_no_answer_could_name_are_refused(folder):
    samples, (problem,) = read(folder, "data.jsonl", lines({**ASKED, "options": {"1": "x", "2": "y"}, "answer": "1"}))
    assert samples == []
    assert "options must be named by letters" in problem.reason and "'1'" in problem.reason


def test_a_line_that_is_not_utf8(folder):
    (folder / "d.jsonl").write_bytes(b"{}\xff\n")
    _, (problem,) = read_samples(folder / "d.jsonl", "conversations", take_all)
    assert "not UTF-8" in problem.reason


# -- what all share ---------------------------------------------------------------------------------------------------


def test_all_bad_entries_are_named_and_the_check_counts(folder):
    def refuse(sample):
        raise ValueError("no answer to compare with")

    path = folder / "d.jsonl"
    path.write_text(lines({"messages": [QUESTION]}, "{", {"messages": [QUESTION]}))
    samples, problems = read_samples(path, "conversations", refuse)
    assert samples == []
    assert [str(problem) for problem in problems][::2] == [
        "line 1: no answer to compare with",
        "line 3: no answer to compare with",
    ]
    assert problems[1].where == "line 2"


@pytest.mark.parametrize(
    ("form", "content"),
    [
        ("tsv", ""),
        ("tsv", "index\tquestion\n"),
        ("conversations", "\n"),
        ("conversations", "\ufeff\n"),
        ("refcoco_list", "[]"),
        ("lmms_eval", ""),
    ],
)
def test_empty_files_are_refused(folder, form, content):
    with pytest.raises(ValueError, match="empty"):
        read(folder, "d.json", content, form)


@pytest.mark.parametrize("text", ["[3, 5]", "[]", "['a', 'b']", "[[1, 2, 3, 4]]"])
def test_an_answer_in_brackets_is_a_text_where_files_have_lists(folder, text):
    content = lines({"messages": [QUESTION], "answer": text}, {"messages": [QUESTION], "answers": [text, "b"]})
    samples, problems = read(folder, "d.jsonl", content)
    assert problems == []
    assert [sample.answers for sample in samples] == [(text,), (text, "b")]


def test_limit_and_picture_root(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    content = lines(*({"messages": [QUESTION], "answer": "a"} for _ in range(3)))
    samples, _ = read(elsewhere, "d.jsonl", content, limit=2, picture_root=folder)
    assert [sample.where for sample in samples] == ["line 1", "line 2"]


def test_the_form_is_named_where_the_ending_does_not_say_it(tmp_path):
    assert choose_format(tmp_path / "x.TSV") == "tsv"
    assert choose_format(tmp_path / "x.jsonl") == "conversations"
    assert choose_format(tmp_path / "x.jsonl", "lmms_eval") == "lmms_eval"
    with pytest.raises(ValueError, match="--format"):
        choose_format(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("cell", "entries"),
    [
        ("['a', 'b']", ["a", "b"]),
        ('["a"]', ["a"]),
        ("[sic] text [here]", ["[sic] text [here]"]),
        ("[]", []),
        ("", []),
        (None, []),
        ("a, b", ["a, b"]),
        ((1, 2), [1, 2]),
        (0, [0]),
        ("[{[1]: 2}]", ["[{[1]: 2}]"]),  # no value of Python
    ],
)
def test_lists_in_cells(cell, entries):
    assert listed(cell) == entries


def test_a_box_may_end_a_fraction_of_a_pixel_outside():
    assert read_box([-0.4, 0, 60.5, 40], "xyxy", (60, 40)) == (-0.4, 0, 60.5, 40)
