"""The page as one user meets it: examples, pictures, streaming, boxes, changes to the conversation, looks."""

import asyncio
import base64
import json
import re

import gradio as gr
import pytest
from browsing import ANSWER, DESKTOP, PHONE, wait_until
from gradio.components.base import _Keywords
from PIL import Image

WHERE = "<|ref|>The red star.<|/ref|>."
FINISHED = _Keywords.FINISHED_ITERATING  # stands for gradio's own last message, which repeats what was sent before
WINDOWS = {"desktop": DESKTOP, "phone": PHONE}


@pytest.mark.parametrize("window", ["desktop", "phone"])
def test_every_example_is_answered_with_one_click(visit, demo, images, window):
    visitor = visit(viewport=WINDOWS[window], is_mobile=window == "phone", has_touch=window == "phone")
    page = visitor.page
    assert page.title() == "DeepSeek-VL2"
    assert "ready" in page.locator("#model-state").inner_text()
    num_examples = page.locator("#chat button.example").count()
    assert num_examples == len(demo._examples) >= 5
    visitor.shoot(f"{window}-first")
    for number in range(num_examples if window == "desktop" else 1):
        visitor.click_example(number)
        visitor.wait_for_answers(1)
        shown = page.locator("#chat .user .pictures img")
        assert shown.count() == len(demo._examples[number].pictures)
        assert visitor.last_words
        assert "prompt tokens" in visitor.answers.inner_text()
        if demo._examples[number].prompt.startswith(("<|ref|>", "Find")):
            assert visitor.answers.locator("tbody tr").count() >= 1
            assert visitor.answers.locator(".pictures img").count() == 1
        visitor.shoot(f"{window}-example-{number + 1}")
        visitor.start_anew()
    visitor.add_pictures(images / "visual_grounding_1.jpeg")
    send = page.locator("#question .submit-button").bounding_box()
    assert send["y"] + send["height"] <= WINDOWS[window]["height"], "the button to send is out of view"
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= WINDOWS[window]["width"], "the page is wider than the window"
    assert visitor.outside_requests == []
    assert visitor.errors == []


def test_pictures_by_upload_paste_and_drop(visitor, images):
    page = visitor.page
    visitor.add_pictures(images / "visual_grounding_1.jpeg")
    script = """([kind, data]) => {
        const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], kind + '.jpeg', {type: 'image/jpeg'}));
        const area = document.querySelector('#question textarea');
        const event = kind === 'paste'
            ? new ClipboardEvent('paste', {clipboardData: transfer, bubbles: true, cancelable: true})
            : new DragEvent('drop', {dataTransfer: transfer, bubbles: true, cancelable: true});
        area.dispatchEvent(event);
    }"""
    for count, (kind, name) in enumerate(
        [("paste", "visual_grounding_2.jpeg"), ("drop", "visual_grounding_3.jpeg")], 2
    ):
        data = base64.b64encode((images / name).read_bytes()).decode()
        page.evaluate(script, [kind, data])
        page.wait_for_function(f"document.querySelectorAll('#question .thumbnail-item').length === {count}")
    visitor.shoot("thumbnails")
    visitor.ask("What is in the pictures?")
    assert page.locator("#chat .user .pictures img").count() == 3
    assert all(page.locator("#chat .user .pictures img").nth(i).evaluate("img => img.naturalWidth") for i in range(3))
    assert visitor.thumbnails.count() == 0
    assert visitor.textarea.input_value() == ""


def test_an_answer_streams(visitor, slow_model, images):
    slow_model(token=0.3)
    visitor.send("<|grounding|>Describe the picture.", images / "visual_grounding_1.jpeg")
    page = visitor.page
    page.evaluate("""() => {
        window.lengths = [];
        window.timer = setInterval(() => {
            const words = document.querySelectorAll('#chat .message.bot:not(.html)');
            const length = words.length ? words[words.length - 1].innerText.length : 0;
            if (length !== window.lengths.at(-1)) window.lengths.push(length);
        }, 30);
    }""")
    page.wait_for_selector("#question .stop-button")
    page.wait_for_function("window.lengths.filter(length => length > 0).length >= 3")
    assert visitor.answers.count() == 0, "the answer was over before it was shown"
    visitor.shoot("streaming")
    slow_model.stop()
    visitor.wait_for_answers(1)
    lengths = page.evaluate("window.lengths")
    assert lengths == sorted(lengths)


def test_boxes_can_be_enlarged_and_downloaded(visitor, images):
    page = visitor.page
    visitor.ask(WHERE, images / "visual_grounding_1.jpeg")
    row = visitor.answers.locator("tbody tr").first.locator("td").all_inner_texts()
    with page.expect_download() as download:
        visitor.answers.locator("figure a.download").click()
    with Image.open(download.value.path()) as marked, Image.open(images / "visual_grounding_1.jpeg") as original:
        assert download.value.suggested_filename == "boxes_1.jpg"
        assert marked.size == original.size
        assert marked.tobytes() != original.convert("RGB").tobytes()
    with page.expect_download() as download:
        visitor.answers.get_by_text("JSON").click()
    (box,) = json.loads(download.value.path().read_text())
    assert [str(value) for value in (box["picture"], box["label"], *box["pixels"])] == row
    picture = visitor.answers.locator("button.enlarge")
    assert "with boxes: red star" in picture.locator("img").get_attribute("alt")
    small = picture.locator("img").bounding_box()
    picture.click()
    large = page.locator("dialog.enlarged img").bounding_box()
    assert large["width"] > 1.5 * small["width"]
    visitor.shoot("enlarged")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog.enlarged", state="detached")
    assert picture.evaluate("button => button === document.activeElement")


def test_the_last_turn_can_be_repeated_changed_and_removed(visitor, slow_model, images):
    page = visitor.page
    visitor.ask("How many objects are there?", images / "visual_grounding_1.jpeg")
    first = visitor.last_words
    slow_model(token=0.3)  # so that the answer can be seen to go and come back
    visitor.button("Retry").click()
    page.wait_for_selector("#question .stop-button")
    assert visitor.answers.count() == 0
    slow_model.stop()
    visitor.wait_for_answers(1)
    assert visitor.last_words == first  # greedy

    visitor.ask("What color is the star?")
    assert visitor.last_words == "red"
    visitor.button("Edit").click()
    page.locator("#chat textarea").fill("What color is the circle?")
    visitor.button("Submit").click()
    visitor.wait_for_words("blue")
    visitor.wait_for_answers(2)
    assert "the circle?" in page.locator("#chat").inner_text()
    assert "the star?" not in page.locator("#chat").inner_text()

    visitor.button("Undo").click()
    visitor.wait_for_answers(1)
    visitor.wait_for_draft("What color is the circle?")
    visitor.start_anew()
    assert page.locator(ANSWER).count() == 0
    assert visitor.textarea.input_value() == ""


@pytest.mark.parametrize("late_message", ["answer", "closing"])
def test_the_end_of_an_answer_does_not_come_back_in_a_new_conversation(visitor, monkeypatch, late_message):
    page = visitor.page
    prepare_output, sent = gr.Blocks.postprocess_data, []

    async def prepare_slowly(blocks, block_fn, predictions, *arguments):
        is_closing = predictions[0] is FINISHED
        is_answer = len(predictions) == 4 and not is_closing and predictions[2].get("submit_btn") is True
        if is_answer if late_message == "answer" else is_closing:
            sent.append(predictions)
            await asyncio.sleep(1.0)
        return await prepare_output(blocks, block_fn, predictions, *arguments)

    monkeypatch.setattr(gr.Blocks, "postprocess_data", prepare_slowly)
    visitor.send("What color is the star?")
    wait_until(lambda: sent)
    page.locator("#new").click()
    page.wait_for_selector("#chat button.example")
    page.wait_for_timeout(1500)  # for what may come too late
    assert page.locator("#chat .message").count() == 0
    visitor.ask("What color is the circle?")  # the page goes on


def test_words_can_be_copied_as_they_were_written(visit):
    visitor = visit(permissions=["clipboard-read", "clipboard-write"])
    for words in (WHERE, "<b>bold</b> &lt; a & b"):
        visitor.ask(words)
        visitor.page.locator('#chat .user-row + * button[aria-label="Copy message"]').last.click()
        visitor.page.wait_for_function(
            "words => navigator.clipboard.readText().then(text => text === words)", arg=words
        )


def test_settings_reach_the_model(visitor, images):
    page = visitor.page
    visitor.open_settings()
    visitor.set_number("max_new_tokens", 3)
    visitor.ask("<|grounding|>Describe the picture.", images / "visual_grounding_1.jpeg")
    assert "3 new tokens" in visitor.answers.inner_text()
    assert "cut off" in visitor.answers.inner_text()
    tokens = int(re.search(r"(\d+) of them for pictures", visitor.answers.inner_text())[1])
    visitor.start_anew()
    page.locator("#setting-use_tiling input").uncheck()
    visitor.set_number("chunk_size", 16)
    visitor.set_number("temperature", 0.8)
    visitor.set_number("seed", 5)
    visitor.ask("<|grounding|>Describe the picture.", images / "visual_grounding_1.jpeg")
    assert int(re.search(r"(\d+) of them for pictures", visitor.answers.inner_text())[1]) < tokens
    assert "get vague" in page.locator("#status").inner_text()
    page.locator("#settings").scroll_into_view_if_needed()
    visitor.shoot("settings")


def test_history_that_does_not_fit_is_left_out_with_a_notice(visitor, images):
    visitor.ask("How many objects are there?", images / "visual_grounding_1.jpeg")
    visitor.open_settings()
    visitor.set_number("history_tokens", 64)
    visitor.ask("What color is the star?")
    assert "first 1 turn(s) are left out, with their pictures" in visitor.answers.last.inner_text()
    assert "0 of them for pictures" in visitor.answers.last.inner_text()


def test_language_follows_the_browser_and_can_be_switched(visit, images):
    visitor = visit(locale="zh-CN")
    page = visitor.page
    assert page.evaluate("document.documentElement.lang") == "zh"
    assert page.locator("#new").inner_text() == "新对话"
    assert "已就绪" in page.locator("#model-state").inner_text()
    visitor.ask(WHERE, images / "visual_grounding_1.jpeg")
    assert "提示" in visitor.answers.inner_text()
    visitor.shoot("chinese")
    visitor.send(" ")
    assert visitor.message() == "请先输入问题。"
    page.locator("#language").click()
    page.wait_for_function("document.documentElement.lang === 'en'")
    assert page.locator("#new").inner_text() == "New conversation"
    assert "prompt tokens" in visitor.answers.inner_text()  # what was said before, too


def test_light_and_dark(visit):
    for scheme, is_dark in (("light", False), ("dark", True)):
        visitor = visit(color_scheme=scheme)
        body = visitor.page.locator("body")
        dark = "body => getComputedStyle(document.querySelector('gradio-app, .gradio-container')).backgroundColor"
        first = body.evaluate(dark)
        assert ("dark" in (body.get_attribute("class") or "")) == is_dark
        visitor.page.locator("#theme").click()
        visitor.page.wait_for_function(f"document.body.classList.contains('dark') === {'false' if is_dark else 'true'}")
        assert body.evaluate(dark) != first


def test_the_keyboard_is_enough(visitor):
    page = visitor.page

    def reach(selector):
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("where => !!document.activeElement.closest(where)", selector):
                return
        pytest.fail(f"Tab does not reach {selector}")

    page.locator("body").click(position={"x": 2, "y": 2})
    reach("#chat button.example")
    page.keyboard.press("Enter")
    visitor.wait_for_answers(1)
    reach(".answer-details button.enlarge")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog.enlarged")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog.enlarged", state="detached")
    reach("#question textarea")
    page.keyboard.type("How many objects are there?")
    page.keyboard.press("Enter")
    visitor.wait_for_answers(2)
    page.locator("body").click(position={"x": 2, "y": 2})
    reach("#new")
    page.keyboard.press("Enter")
    page.wait_for_selector("#chat button.example")
