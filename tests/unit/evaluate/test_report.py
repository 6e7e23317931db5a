"""The report: one file, escaped, the worst first."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from deepseek_vl2.evaluate.report import MAX_PICTURE_SIDE, write_report
from deepseek_vl2.evaluate.results import summarize_run
from deepseek_vl2.evaluate.samples import Sample

EVIL = "<script>alert('&\"')</script>"
VOID = {"meta", "image", "rect"}


class Outline(HTMLParser):
    """Checks that tags are closed in order, and keeps what a page holds."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def find(self, tag, **attributes):
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [found for name, found in self.tags if name == tag and wanted.items() <= found.items()]


@pytest.fixture
def make(tmp_path):
    Image.new("RGB", (1200, 600), "red").save(tmp_path / "a.png")

    def write(samples, records, num_examples=60):
        results = {"task": "refcoco", "metric": "Acc@0.5 IoU", **summarize_run(records), "num_skipped": 2}
        results["settings"] = {"model": EVIL, "task": "refcoco"}
        write_report(tmp_path / "report.html", results, samples, records, num_examples)
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    def sample(name, **fields):
        picture = {"pictures": (str(tmp_path / "a.png"),), "sizes": ((1200, 600),)}
        return Sample(name, "line 1", f"question {name}", **{**picture, **fields})

    return write, sample


def record(name, score, **more):
    base = {"id": name, "category": "", "answer": f"answer {name}", "understood": "", "is_readable": True}
    return {**base, "score": score, **more}


def test_boxes_of_answer_and_data_are_drawn_in_the_pictures_own_pixels(make):
    write, sample = make
    boxed = sample("s", boxes=((100.0, 50.0, 300.0, 250.0),))
    page = Outline(write([boxed], [record("s", 0.0, boxes=[[110, 60, 200, 100]], iou=0.09)]))
    assert page.find("rect", class_="expected")[0].items() >= {
        ("x", "100"),
        ("y", "50"),
        ("width", "200"),
        ("height", "200"),
    }
    assert page.find("rect", class_="found")[0].items() >= {
        ("x", "110"),
        ("y", "60"),
        ("width", "90"),
        ("height", "40"),
    }
    assert page.find("svg")[0]["viewbox"] == "0 0 1200 600"
    assert page.find("p", class_="legend")


def test_pictures_are_inside_and_small_and_nothing_is_fetched(make):
    write, sample = make
    text = write([sample("s")], [record("s", 1.0)])
    source = Outline(text).find("image")[0]["href"]
    picture = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))))
    assert picture.size == (MAX_PICTURE_SIDE, MAX_PICTURE_SIDE // 2)
    assert not re.search(r"(?:src|href)=\"(?!data:)|url\(|@import|https?:", text)
    assert not Outline(text).find("p", class_="legend")  # no boxes


def test_everything_from_data_and_model_is_escaped(make):
    write, sample = make
    evil = sample(EVIL, answers=(EVIL,), options={"A": EVIL}, category=EVIL)
    text = write([evil], [record(EVIL, 0.0, answer=EVIL, understood=EVIL, category=EVIL)])
    page = Outline(text)
    assert "<script" not in text
    assert not page.find("script")
    assert "".join(page.texts).count(EVIL) >= 8


def test_the_worst_come_first_and_their_number_is_limited(make):
    write, sample = make
    records = [
        record("right", 1.0),
        record("near", 0.0, iou=0.4),
        record("far", 0.0, iou=0.1),
        record("unreadable", 0.0, is_readable=False, iou=0.0),
    ]
    samples = [sample(entry["id"]) for entry in records]
    text = write(samples, [{"iou": 1.0, **entry} for entry in records])
    assert re.findall(r"<p>question (\w+)", text) == ["unreadable", "far", "near", "right"]
    assert re.findall(r"<p>question (\w+)", write(samples, records, num_examples=2)) == ["unreadable", "far"]
    verdicts = re.findall(r'<b class="(\w+)">', text)
    assert verdicts == ["unread", "wrong", "wrong", "right"]


def test_numbers_and_categories(make):
    write, sample = make
    records = [record("1", 1.0, category="animals", iou=0.9), record("2", 0.0, category="cars", iou=0.2)]
    text = write([sample("1"), sample("2")], records)
    cards = dict(re.findall(r'<strong>(.*?)</strong><span class="quiet">(.*?)</span>', text))
    assert cards["50.00 %"] == "Acc@0.5 IoU"
    assert cards["55.00 %"] == "mean IoU"
    assert cards["0"] == "unreadable answers"
    assert "bad entries left out" in text
    assert re.findall(r'<th scope="row">(\w+)</th><td>1</td><td>([\d.]+)</td>', text) == [
        ("animals", "100.00"),
        ("cars", "0.00"),
    ]
    assert "prefers-color-scheme: dark" in text


def entries(text):
    """Names and values below the questions."""
    return re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text.partition("<details>")[0])


def test_expected_boxes_are_told_as_the_answers_are_understood(make):
    write, sample = make
    boxed = sample("s", boxes=((100.4, 50.0, 300.0, 250.0),), answers=("marks with numbers up to 999",))
    found = record("s", 0.0, boxes=[[110, 60, 200, 100]], iou=0.09, understood="110, 60, 200, 100")
    told = [("Answer", "answer s"), ("Understood", "110, 60, 200, 100"), ("Expected", "100, 50, 300, 250")]
    assert entries(write([boxed], [found])) == [*told, ("IoU", "0.090")]
    assert entries(write([boxed], [{**found, "counts": [0, 1, 1]}])) == [*told, ("mean IoU", "0.090")]
    nothing = record("s", 1.0, counts=[0, 0, 0])
    assert entries(write([sample("s", boxes=())], [nothing])) == [("Answer", "answer s"), ("Expected", "no box")]
    assert entries(write([sample("s", answers=("a", "b", "a"))], [record("s", 0.0)]))[1] == ("Expected", "a, b")


def test_without_pictures_and_categories(make):
    write, sample = make
    page = Outline(write([sample("s", pictures=(), sizes=())], [record("s", 0.5)]))
    assert not page.find("svg")
    assert not page.find("table")
    assert "50 %" in page.texts
