"""Settings, limits, texts, examples and what the page shows, without a browser or a model."""

import json
import re
import string
from dataclasses import replace

import pytest
from PIL import Image

from deepseek_vl2.serve.app_modules import rendering, texts
from deepseek_vl2.serve.app_modules.answering import load_upload
from deepseek_vl2.serve.app_modules.conversation import Answer, FoundBox, Question, Statistics, Turn
from deepseek_vl2.serve.app_modules.engine import FAILED, WEIGHTS, LoadState
from deepseek_vl2.serve.app_modules.limits import UploadLimits
from deepseek_vl2.serve.app_modules.sessions import Session
from deepseek_vl2.serve.app_modules.settings import NAMES, RANGES, Settings
from deepseek_vl2.serve.app_modules.texts import CHINESE, ENGLISH, UserError
from deepseek_vl2.serve.box_owners import assign_boxes
from deepseek_vl2.serve.examples import EXAMPLES, available_examples
from deepseek_vl2.serve.questions import place_image_marks

DEFAULTS = {name: getattr(Settings(), name) for name in NAMES}
SCRIPT = "<img src=x onerror=alert(1)><script>alert(2)</script>"


def test_defaults_are_within_their_ranges_and_greedy():
    assert Settings.checked(**DEFAULTS) == Settings()
    assert Settings().temperature == 0
    assert set(NAMES) - set(RANGES) == {"use_tiling"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", 5, "temperature is 5; it must be 0 to 1"),
        ("temperature", -0.1, "it must be 0 to 1"),
        ("temperature", float("nan"), "nan"),
        ("temperature", None, "temperature is None"),
        ("top_p", 0, "top_p is 0"),
        ("repetition_penalty", 0.5, "it must be 1 to 2"),
        ("max_new_tokens", 0, "it must be 1 to 2048"),
        ("max_new_tokens", 1.5, "a whole number"),
        ("max_new_tokens", "many", "'many'"),
        ("max_new_tokens", True, "True"),
        ("history_tokens", 10**6, "it must be 0 to 4096"),
        ("chunk_size", 0, "chunk_size is 0"),
        ("chunk_size", -2, "chunk_size is -2"),
        ("seed", -2, "seed is -2"),
        ("use_tiling", 1, "true or false"),
    ],
)
def test_settings_out_of_range_are_named(name, value, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        Settings.checked(**{**DEFAULTS, name: value})
    assert name in caught.value.describe(CHINESE)


def test_every_text_exists_in_both_languages_with_the_same_values():
    for key, (english, chinese) in texts._TEXTS.items():
        fields = [
            sorted(name for _, name, _, _ in string.Formatter().parse(text) if name) for text in (english, chinese)
        ]
        assert fields[0] == fields[1], key
        assert english.strip(), key
        assert chinese.strip(), key


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", CHINESE),
        ("en-US,zh;q=0.5", ENGLISH),
        ("de", ENGLISH),
        ("", ENGLISH),
        (None, ENGLISH),
    ],
)
def test_the_language_is_the_one_that_the_browser_wants_most(header, language):
    assert texts.preferred_language(header) == language


def test_limits_count_and_weigh_uploads(tmp_path):
    limits = UploadLimits(max_image_mb=0.001, max_pictures=2)
    limits.check_number(2)
    with pytest.raises(UserError, match=r"3 pictures: at most 2"):
        limits.check_number(3)
    (tmp_path / "big.png").write_bytes(b"x" * 2000)
    with pytest.raises(UserError, match=r"big.png has 0.0 MB; the limit is 0.001 MB"):
        limits.check_bytes(str(tmp_path / "big.png"))
    with pytest.raises(UserError, match=r"gone.png is no longer here"):
        limits.check_bytes(str(tmp_path / "gone.png"))


def test_uploads_must_be_pictures_and_messages_keep_the_path_secret(tmp_path):
    tmp_path = tmp_path / ("long" * 40)
    tmp_path.mkdir()
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (300, 200)).save(tmp_path / "wide.png")
    limits = UploadLimits(max_pixels=50_000)
    for name, reason in (("text.png", "not a picture"), ("wide.png", "300x200 = 60000 pixels")):
        with pytest.raises(UserError) as caught:
            load_upload(str(tmp_path / name), limits)
        assert name in str(caught.value)
        assert reason in str(caught.value)
        assert "long" not in str(caught.value)
    assert load_upload(str(tmp_path / "wide.png"), UploadLimits()).size == (300, 200)


@pytest.mark.parametrize(
    ("question", "num_pictures", "expected"),
    [
        ("Hi", 0, "Hi"),
        ("Hi", 2, "<image>\n<image>\nHi"),
        ("a <image> b <image>", 2, "a <image> b <image>"),
    ],
)
def test_pictures_stand_in_front_or_where_the_question_has_them(question, num_pictures, expected):
    assert place_image_marks(question, num_pictures) == expected


def test_marks_and_pictures_must_be_as_many():
    with pytest.raises(ValueError, match=r"1 <image> mark\(s\) for 2 picture\(s\)"):
        place_image_marks("<image> Where?", 2)


def box(label, x=1):
    return f"<|ref|>{label}<|/ref|><|det|>[[{x}, 2, {x + 9}, 40]]<|/det|>"


@pytest.mark.parametrize(
    ("answer", "question", "num_pictures", "owners"),
    [
        (box("a"), "Where?", 1, [0]),
        (box("a"), "Where?", 3, [2]),
        (box("a") + box("b", 5), "In the first image one is marked. Find it in the second image.", 2, [1, 1]),
        (box("a"), "Where is it in the first picture?", 2, [0]),
        (
            f"In the first image {box('a')}, in image_2 {box('b', 3)}, in the last picture {box('c', 7)}",
            "",
            3,
            [0, 1, 2],
        ),
        (f"第一张图 {box('a')} 第2张 {box('b', 3)}", "", 3, [0, 1]),
        (f"The sixth image {box('a')}, the 2nd picture {box('b', 3)}", "", 8, [5, 1]),
        (f"第六张图片 {box('a')} 图2 {box('b', 3)} 图片 10 {box('c', 5)}", "", 10, [5, 1, 9]),
        (box("a"), "in image 7", 2, [1]),  # there is no such picture
        ("<|ref|>image 1<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>", "", 2, [1]),  # a label is not a mention
        ("nothing", "", 2, []),
    ],
)
def test_boxes_belong_to_the_picture_that_is_named_else_the_last(answer, question, num_pictures, owners):
    boxes, problems = assign_boxes(answer, question, num_pictures)
    assert [owned.picture for owned in boxes] == owners
    assert problems == []


def test_an_answer_that_was_stopped_keeps_its_boxes_where_they_were():
    answer = f"image_1: {box('a')} image_2: {box('b', 3)} image_3: <|ref|>c<|/ref|><|det|>[[9, 1"
    boxes, problems = assign_boxes(answer, "", 3)
    assert [owned.picture for owned in boxes] == [0, 1]
    assert len(problems) == 1


def test_malformed_boxes_are_reported():
    boxes, problems = assign_boxes("<|ref|>a<|/ref|><|det|>[[1, 2, 3]]<|/det|>", "", 1)
    assert boxes == []
    assert "has 3 values" in problems[0]


def test_examples_are_seven_and_complete_or_left_out(repository, tmp_path):
    assert len(EXAMPLES) == 7
    assert all(example.title and example.title_zh and example.prompt and example.pictures for example in EXAMPLES)
    found = list(available_examples(repository / "images"))
    assert len(found) >= 5
    assert list(available_examples(tmp_path)) == []


def session_with(answer=None, pictures=(), language=ENGLISH, text=SCRIPT):
    return Session([Turn(Question(text, pictures), answer)], language=language)


def full_answer(**values):
    boxes = (FoundBox(1, SCRIPT, (0, 0, 99, 99), (0, 0, 9, 8)), FoundBox(2, "b", (1, 2, 3, 4), (5, 6, 7, 8)))
    marked = ((1, "/files/a b/boxes_1.jpg"), (2, "/files/boxes_2.jpg"))
    statistics = Statistics(108, 93, 17, 0.5, 2.5, 60)
    return Answer("raw " + SCRIPT, SCRIPT, boxes, marked, ("odd " + SCRIPT,), statistics, **values)


def html_of(part):
    return part.value


def test_what_users_and_model_write_is_shown_as_text():
    messages = rendering.chat_messages(session_with(full_answer(), ('/up/"><b>.png',)))
    asked, answered = messages
    for part in (asked["content"][1], answered["content"][0]):
        assert part == {"type": "text", "text": SCRIPT.replace("<", "&lt;")}
    for markup in (html_of(asked["content"][0]), html_of(answered["content"][1])):
        assert "<script" not in markup
        assert "onerror=alert" not in re.sub(r"&lt;.*?&gt;", "", markup)
        assert "<b>" not in markup
    for line in (rendering.error_line(SCRIPT), rendering.notice_line(SCRIPT)):
        assert "<script" not in line
    assert "<script" not in rendering.model_line(LoadState(FAILED, reason=SCRIPT), SCRIPT, ENGLISH)


@pytest.mark.parametrize(
    ("text", "markup"),
    [
        ("<|ref|>a star<|/ref|>. 1 < 2 && 3 > 2", None),
        (SCRIPT, SCRIPT.replace("<", "&lt;")),
        ("<!-- a --> </p> <?x ?> <svg/onload=a>", "&lt;!-- a --> &lt;/p> &lt;?x ?> &lt;svg/onload=a>"),
        ("&lt; &amp; &copy &#60; a&b", "&amp;lt; &amp;amp; &amp;copy &amp;#60; a&amp;b"),
        ("<<b", "<&lt;b"),
    ],
)
def test_only_tags_and_entities_are_escaped_and_come_back(text, markup):
    assert rendering.as_markup(text) == (text if markup is None else markup)
    assert rendering.from_markup(rendering.as_markup(text)) == text


def test_an_answer_shows_pictures_boxes_notes_and_figures():
    answered = rendering.chat_messages(session_with(full_answer(num_left_out=2, was_stopped=True, is_cut_off=True)))[1]
    markup = html_of(answered["content"][1])
    assert re.findall(r'<img src="([^"]+)"', markup) == [
        "gradio_api/file=/files/a%20b/boxes_1.jpg",
        "gradio_api/file=/files/boxes_2.jpg",
    ]
    assert 'alt="Picture 2 with boxes: b"' in markup
    assert "<td>2</td><td>b</td><td>5</td><td>6</td><td>7</td><td>8</td>" in markup
    for note in ("could not be read", "stopped", "cut off", "first 2 turn(s) are left out"):
        assert note in markup
    assert "108 prompt tokens, 93 of them for pictures, 60 known from before · first token after 0.50 s" in markup
    chinese = rendering.chat_messages(session_with(full_answer(num_left_out=2), language=CHINESE))[1]
    assert "最早的 2 轮" in html_of(chinese["content"][1])


def test_behind_a_proxy_pictures_are_fetched_from_its_path():
    session = session_with(pictures=("/up/a.png",))
    session.file_address = "/demo/gradio_api/file="
    assert 'src="/demo/gradio_api/file=/up/a.png"' in html_of(rendering.chat_messages(session)[0]["content"][0])


def test_pictures_with_boxes_are_deleted_with_their_turns(tmp_path):
    def turn(name):
        path = tmp_path / name / "boxes_1.jpg"
        path.parent.mkdir()
        path.touch()
        return Turn(Question("?"), replace(full_answer(), marked_pictures=((1, str(path)),)))

    session = Session([turn("a"), turn("b"), turn("c")])
    session.remove_last()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    session.clear()
    assert list(tmp_path.iterdir()) == []
    turn("d").delete_files()
    Turn(Question("?")).delete_files()


def test_loading_shows_its_progress():
    line = rendering.model_line(LoadState(WEIGHTS, 0.42, seconds=3.2), "tiny", ENGLISH)
    assert "tiny: loading, 42 % (3 s)" in line
    assert '<progress max="1" value="0.420"' in line


def test_an_answer_is_given_to_programs_as_json():
    document = full_answer().to_dict()
    assert json.loads(json.dumps(document)) == document
    assert document["boxes"][1] == {"picture": 2, "label": "b", "box": [1, 2, 3, 4], "pixels": [5, 6, 7, 8]}
    assert document["statistics"]["tokens_per_second"] == 8.0
    assert document["statistics"]["reused_tokens"] == 60
