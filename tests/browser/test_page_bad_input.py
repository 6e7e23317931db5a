"""What users get wrong gets its message in the page, and the next question works."""

import shutil
import struct
import zlib

import pytest

SCRIPT = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> **bold** $$x^2$$"


@pytest.fixture(scope="module")
def chat(demo, chromium):
    """One page for all of these: what went wrong before must not disturb what comes after."""
    from browsing import Visitor

    visitor = Visitor(chromium, demo.address)
    yield visitor
    visitor.context.close()


@pytest.fixture
def then_it_works(chat, images):
    """After the test, a question is answered in the same conversation."""
    chat.start_anew()
    yield
    if chat.thumbnails.count() or chat.textarea.input_value():
        chat.page.locator("#new").click()
        chat.page.wait_for_function(
            "document.querySelector('#question textarea').value + "
            "document.querySelectorAll('#question .thumbnail-item').length === '0'"
        )
    chat.ask("How many objects are there?", images / "visual_grounding_1.jpeg")
    assert chat.last_words.isdigit()
    assert chat.page.locator("#status [role=alert]").count() == 0


def test_no_text(chat, then_it_works):
    chat.send("   ")
    assert chat.message() == "Write a question first."


def test_pictures_without_text(chat, then_it_works, images):
    chat.send("", images / "visual_grounding_1.jpeg")
    assert chat.message() == "Write what you want to know about the picture(s)."
    assert chat.thumbnails.count() == 1  # nothing is lost


def test_text_without_pictures_is_answered(chat, then_it_works):
    before = chat.answers.count()
    chat.ask("What color is the star?")
    assert "0 of them for pictures" in chat.answers.nth(before).inner_text()
    chat.start_anew()


def test_thirty_pictures(chat, then_it_works, images, tmp_path):
    paths = [tmp_path / f"{number}.jpeg" for number in range(30)]
    for path in paths:
        shutil.copyfile(images / "visual_grounding_1.jpeg", path)
    chat.send("What is there?", *paths)
    assert chat.message() == "30 pictures: at most 10 go with one question. Remove some."
    chat.shoot("thirty-pictures")


def test_a_file_of_200_megabytes(chat, then_it_works, tmp_path):
    huge = tmp_path / "huge.png"
    with huge.open("wb") as file:
        file.truncate(200 * 2**20)
    chat.page.locator("#question input[type=file]").set_input_files(huge)
    toast = chat.page.get_by_text("maximum allowed size").first
    toast.wait_for()
    chat.shoot("too-big")
    assert chat.thumbnails.count() == 0
    chat.page.locator(".toast-close").first.click()


def test_a_text_file_named_png(chat, then_it_works, tmp_path):
    (tmp_path / "note.png").write_text("no picture")
    chat.send("What is it?", tmp_path / "note.png")
    assert chat.message().startswith("note.png cannot be used: it is not a picture")
    chat.wait_for_draft("What is it?")  # nothing is lost
    chat.shoot("text-named-png")


def test_a_picture_of_50000_by_50000(chat, then_it_works, tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 1, 0, 0, 0, 0)
    data = zlib.compress(bytes(50_000 // 8 + 1) * 100)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(bomb)
    chat.send("What is it?", tmp_path / "bomb.png")
    message = chat.message()
    assert "bomb.png cannot be used" in message
    assert "too large" in message
    chat.wait_for_draft("What is it?")


def test_html_and_markdown_are_shown_as_text(chat, then_it_works):
    page = chat.page
    chat.ask(SCRIPT)
    asked = page.locator("#chat .message.user").last
    assert asked.inner_text().strip() == SCRIPT
    assert page.locator("#chat .message.user img, #chat .message strong, #chat .katex").count() == 0
    chat.shoot("script-as-text")
    chat.button("Edit").click()
    page.locator("#chat textarea").press("End")
    page.keyboard.type(" <b>again</b>")
    chat.button("Submit").click()
    page.wait_for_function("document.querySelector('#chat .message.user').innerText.includes('again')")
    chat.wait_for_answers(1)
    page.wait_for_function(
        "text => [...document.querySelectorAll('#chat .message.user')].at(-1).innerText.trim() === text",
        arg=f"{SCRIPT} <b>again</b>",
    )
    assert page.title() == "DeepSeek-VL2", "the script was run"
    chat.start_anew()


def test_a_prompt_longer_than_the_context(chat, then_it_works):
    prompt = "red circle " * 5000
    chat.send(prompt)
    message = chat.message()
    assert "tokens, the model has room for 4096" in message
    assert "Shorten the text" in message
    chat.wait_for_draft(prompt)


def test_marks_without_pictures(chat, then_it_works):
    chat.send("<image> Where?")
    assert "1 <image> mark(s) for 0 picture(s)" in chat.message()
    chat.wait_for_draft("<image> Where?")
