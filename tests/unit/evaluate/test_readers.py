"""Files of benchmarks: every form gives the same samples, and bad entries are named."""

import base64
import copy
import csv
import json

import pytest
from benchmark_files import HEIGHT, WIDTH, lines, png, read, take_all, tsv

from deepseek_vl2.evaluate.readers import choose_format, read_samples
from deepseek_vl2.evaluate.readers.common import listed, read_box
from deepseek_vl2.evaluate.tasks import TASKS
from deepseek_vl2.nano.architecture import nano_processor
from deepseek_vl2.train.data import parse_line

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


SENTENCES = ["left cat", " red cat "]


@pytest.mark.parametrize(
    ("field", "sentences"),
    [
        ("sents", SENTENCES),
        ("captions", SENTENCES),
        ("sentences", [{"sent": "left cat"}, {"sent": "red cat", "sent_id": 4}]),
        ("sentences", [{"raw": "left cat"}, {"raw": "red cat"}]),
    ],
)
@pytest.mark.parametrize("is_list", [True, False])
def test_an_entry_with_several_sentences_gives_a_sample_for_each(folder, field, sentences, is_list):
    rest = {name: value for name, value in ENTRY.items() if name != "sentence"}
    entries = [{**rest, field: sentences, "id": 5}, {**rest, field: sentences[:1]}]
    content = json.dumps(entries) if is_list else lines(*entries)
    samples, problems = read(folder, "d.json", content, "refcoco_list", box_format="xyxy")
    assert problems == []
    place = "entry" if is_list else "line"
    assert [(sample.id, sample.where, sample.question) for sample in samples] == [
        ("5, sentence 1", f"{place} 1, sentence 1", "left cat"),
        ("5, sentence 2", f"{place} 1, sentence 2", "red cat"),
        (f"{place} 2, sentence 1", f"{place} 2, sentence 1", "left cat"),
    ]
    assert all(sample.boxes == ((10, 5, 30, 25),) for sample in samples)


def test_a_bad_sentence_of_several_is_named_alone(folder):
    sentences = ["left cat", 7, {"sent": " "}, {"text": "red cat"}]
    content = "{\n" + lines({**ENTRY, "sentence": sentences}, {**ENTRY, "sentence": []})
    (sample,), problems = read(folder, "d.jsonl", content, "refcoco_list", box_format="xyxy")
    assert sample.question == "left cat"
    places = ["line 1", *(f"line 2, sentence {number}" for number in (2, 3, 4)), "line 3"]
    assert [problem.where for problem in problems] == places
    assert "not JSON" in problems[0].reason
    assert all("no question" in problem.reason for problem in problems[1:])


def test_pictures_of_a_refcoco_list_by_image_path_and_their_sizes_as_text(folder):
    entry = {**ENTRY, "image": None, "image_path": "a.png", "bbox_format": "xyxy"}
    sizes = [("60", "40"), ("60.0", 40.0), ("", None), ("61", 40), ("wide", 40), (60, [40]), (60, "nan"), (60, True)]
    content = json.dumps([{**entry, "width": width, "height": height} for width, height in sizes])
    samples, problems = read(folder, "d.json", content, "refcoco_list")
    assert [(sample.where, sample.sizes) for sample in samples] == [
        (f"entry {number}", ((WIDTH, HEIGHT),)) for number in (1, 2, 3)
    ]
    reasons = (
        "has 60x40 pixels, the file says 61x40",
        "width must be a number of pixels, not 'wide'",
        "height must be a number of pixels, not [40]",
        "height must be a number of pixels, not 'nan'",
        "height must be a number of pixels, not True",
    )
    assert all(reason in problem.reason for reason, problem in zip(reasons, problems, strict=True))


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


def choice_file(form, options, answer):
    """A file with one multiple choice and the ending that says its format."""
    if form == "tsv":
        return "d.tsv", tsv({"index": 1, "image": png(), "question": "q", "answer": answer, **options})
    if form == "conversations":
        return "d.jsonl", lines({"messages": [QUESTION], "answer": answer, "options": options})
    if form == "fields":
        return "d.jsonl", lines({"question": "q", "image": "a.png", "answer": answer, **options})
    return "d.jsonl", lines({"question": "q", "image": "a.png", "answer": answer, "options": list(options.values())})


def read_choice(folder, form, options, answer):
    name, content = choice_file(form, options, answer)
    format_name = form if form in ("tsv", "conversations") else "lmms_eval"
    return read(folder, name, content, format_name, prepare=TASKS["mmstar"].prepare)


ANIMALS = {"A": "cat", "B": "dog", "C": "U.S."}
LETTERED = {"A": "B", "B": "A"}
IN_ALL_FORMATS = pytest.mark.parametrize("form", ["tsv", "conversations", "fields", "options"])


@IN_ALL_FORMATS
@pytest.mark.parametrize(
    ("options", "answer", "letter"),
    [
        *[(ANIMALS, answer, "B") for answer in ("B", "b", " dog ", "(B)", "(b)", "B.", "B)", "b. ")],
        (ANIMALS, "U.S.", "C"),
        (LETTERED, "B", "B"),  # a capital letter goes before the text
        ({"A": "B+", "B": "A+"}, "A+", "B"),
        ({"A": "[1, 2]", "B": "1", "C": "3"}, "[1, 2]", "A"),
    ],
)
def test_answers_to_a_choice_by_letter_and_by_text(folder, form, options, answer, letter):
    (sample,), problems = read_choice(folder, form, options, answer)
    assert (sample.answers, sample.options, problems) == ((letter,), options, [])


@IN_ALL_FORMATS
@pytest.mark.parametrize(
    ("options", "answer", "reason"),
    [
        (ANIMALS, "horse", "the answer 'horse' is none of the options' letters A, B, C"),
        (ANIMALS, "Dog", "the answer 'Dog' is none of the options' letters A, B, C"),
        (ANIMALS, "(D)", "the answer '(D)' is none of the options' letters A, B, C"),
        (ANIMALS, "(B", "the answer '(B' is none of the options' letters A, B, C"),
        (ANIMALS, "A or B", "the answer 'A or B' is none of the options' letters A, B, C"),
        ({"A": "cat", "B": "dog", "C": "dog"}, "dog", "the answer 'dog' may be option B or C of A, B, C; write its"),
        ({"A": "b", "B": "a"}, "a", "the answer 'a' may be option A or B of A, B; write its capital letter alone"),
        ({"A": "(B)", "B": "(A)"}, "(A)", "the answer '(A)' may be option A or B of A, B"),
    ],
)
def test_answers_to_a_choice_that_name_no_option_or_several_are_refused(folder, form, options, answer, reason):
    samples, (problem,) = read_choice(folder, form, options, answer)
    assert samples == []
    assert reason in problem.reason
