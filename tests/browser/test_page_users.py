"""Several users at once, who stop, leave or come back: own conversations, and nobody holds the model up."""

from browsing import wait_until

WHERE = "<|ref|>The red star.<|/ref|>."
DESCRIBE = "<|grounding|>Describe the picture."


def test_two_browsers_have_their_own_pictures_and_conversations(visit, images):
    first, second = visit(), visit()
    first.send("How many objects are there?", images / "visual_grounding_1.jpeg")
    second.send("<|ref|>the cyan circle<|/ref|>.", images / "visual_grounding_2.jpeg")
    for visitor in (first, second):
        visitor.wait_for_answers(1)
    assert "cyan" not in first.page.locator("#chat").inner_text()
    assert "How many" not in second.page.locator("#chat").inner_text()
    assert "cyan circle" in second.answers.inner_text()
    first.ask("What color is the star?")
    assert first.last_words == "red"
    sources = [visitor.page.locator("#chat .user img").get_attribute("src") for visitor in (first, second)]
    assert sources[0] != sources[1]


def test_those_who_wait_see_their_place_and_can_stop(visit, demo, slow_model, images):
    slow_model(token=0.4)
    first, second, third = visit(), visit(), visit()
    first.send(DESCRIBE, images / "visual_grounding_1.jpeg")  # a long answer
    wait_until(lambda: demo.engine.num_running == 1)
    second.send("What is it?")
    second.page.get_by_text("Waiting: you are next.").wait_for()
    third.send("What is that?")
    third.page.get_by_text("Waiting: 1 before you.").wait_for()
    third.shoot("waiting")
    second.page.locator("#question .stop-button").click()
    second.page.wait_for_selector("#question .submit-button")
    second.wait_for_draft("What is it?")
    third.page.get_by_text("Waiting: you are next.").wait_for()
    slow_model.stop()
    for visitor in (first, third):
        visitor.wait_for_answers(1)
    assert second.answers.count() == 0
    second.ask("How many objects are there?")  # and goes on


def test_stop_during_prefill_frees_the_model_at_once(visit, demo, slow_model, images):
    slow_model(layer=3.0)
    visitor = visit()
    visitor.send(DESCRIBE, images / "visual_grounding_1.jpeg")
    wait_until(lambda: demo.engine.num_running == 1)
    assert visitor.page.locator("#chat .message.bot:not(.html)").count() == 0
    # The box is emptied when the question is taken; what is written before that would go with it.
    visitor.wait_for_draft("")
    visitor.textarea.fill("And then?")  # written while waiting
    visitor.page.locator("#question .stop-button").click()
    wait_until(lambda: demo.engine.num_running == 0, timeout=12)  # the first token would take 15 s
    visitor.page.wait_for_selector("#question .submit-button")
    slow_model.stop()
    # The question comes back with its picture, the draft stays below it, and there is no turn without an answer.
    visitor.wait_for_draft(DESCRIBE + "\nAnd then?")
    assert visitor.thumbnails.count() == 1
    assert visitor.page.locator("#chat .message").count() == 0
    visitor.shoot("stopped_before_the_first_word")
    visitor.textarea.fill(DESCRIBE)
    visitor.textarea.press("Enter")
    visitor.wait_for_answers(1)
    assert "<|det|>" not in visitor.last_words and visitor.last_words


def test_stop_during_decode_keeps_what_was_said(visit, demo, slow_model, images):
    slow_model(token=0.7)
    visitor = visit()
    visitor.send(DESCRIBE, images / "visual_grounding_1.jpeg")
    visitor.page.wait_for_selector("#chat .message.bot:not(.html)")
    visitor.page.locator("#question .stop-button").click()
    wait_until(lambda: demo.engine.num_running == 0, timeout=20)
    visitor.wait_for_answers(1)
    assert visitor.last_words
    assert "stopped" in visitor.answers.inner_text()
    visitor.shoot("stopped")
    slow_model.stop()
    visitor.ask("How many objects are there?")


def test_a_closed_tab_ends_its_answer(visit, demo, slow_model, images):
    slow_model(token=1.0)
    leaving, staying = visit(), visit()
    num_sessions = len(demo.sessions)
    leaving.send(DESCRIBE, images / "visual_grounding_1.jpeg")  # a long answer
    wait_until(lambda: demo.engine.num_running == 1)
    staying.send("How many objects are there?")
    wait_until(lambda: demo.engine.num_waiting == 1)
    leaving.page.close()
    wait_until(lambda: demo.engine.num_waiting == 0)
    wait_until(lambda: len(demo.sessions) == num_sessions - 1)
    slow_model.stop()
    staying.wait_for_answers(1)


def test_what_was_made_for_a_user_goes_with_the_user(visit, demo, served_folder, images):
    made_before = set(served_folder.rglob("boxes_*.jpg"))

    def ask_for_a_box(visitor):
        known = set(served_folder.rglob("boxes_*.jpg"))
        visitor.ask(WHERE, images / "visual_grounding_1.jpeg")
        made = set(served_folder.rglob("boxes_*.jpg")) - known
        assert len(made) == 1
        return made

    leaving, staying = visit(), visit()
    of_leaving, of_staying = ask_for_a_box(leaving), ask_for_a_box(staying)
    leaving.page.close()
    wait_until(lambda: not any(path.exists() for path in of_leaving))
    assert set(served_folder.rglob("boxes_*.jpg")) - made_before == of_staying


def test_a_reload_in_mid_answer_begins_anew(visit, demo, slow_model, images):
    slow_model(token=1.0)
    visitor = visit()
    visitor.send(DESCRIBE, images / "visual_grounding_1.jpeg")
    wait_until(lambda: demo.engine.num_running == 1)
    visitor.open()
    wait_until(lambda: demo.engine.num_running == 0)
    slow_model.stop()
    assert visitor.page.locator("#chat button.example").count() > 0
    visitor.ask(WHERE, images / "visual_grounding_1.jpeg")
    assert visitor.last_words == "red star"


def test_an_error_reaches_only_its_user(visit, images, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("no picture at all")
    first, second = visit(), visit()
    first.send("What is it?", broken)
    second.send("How many objects are there?", images / "visual_grounding_1.jpeg")
    assert "broken.png cannot be used" in first.message()
    second.wait_for_answers(1)
    assert second.page.locator("#status [role=alert]").count() == 0
