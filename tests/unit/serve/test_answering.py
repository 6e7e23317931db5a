"""Answering for the page, on nano's architecture with random weights: history, features, stop."""

import threading
import time

import pytest
import torch
from page_answers import said
from PIL import Image

from deepseek_vl2.nano.architecture import nano_processor, untrained_nano
from deepseek_vl2.serve.app_modules.answering import ModelAnswerer
from deepseek_vl2.serve.app_modules.conversation import Question, Turn
from deepseek_vl2.serve.app_modules.engine import Job, Request
from deepseek_vl2.serve.app_modules.limits import UploadLimits
from deepseek_vl2.serve.app_modules.settings import Settings
from deepseek_vl2.serve.app_modules.texts import UserError
from deepseek_vl2.serve.picture_features import PictureFeatures
from deepseek_vl2.utils.io import LoadedModel

SHORT = Settings(max_new_tokens=4)


@pytest.fixture(scope="module")
def loaded():
    processor = nano_processor()
    model = untrained_nano(processor.tokenizer, seed=3).eval()
    torch.nn.init.normal_(model.language.lm_head.weight, std=0.3, generator=torch.Generator().manual_seed(5))
    return LoadedModel(processor.tokenizer, processor, model)


@pytest.fixture(scope="module")
def answerer(loaded, tmp_path_factory):
    return ModelAnswerer(loaded, UploadLimits(), tmp_path_factory.mktemp("marked"))


@pytest.fixture
def picture(tmp_path):
    def make(color, size=(300, 120)):
        path = tmp_path / f"{color}.png"
        Image.new("RGB", size, color).save(path)
        return str(path)

    return make


@pytest.fixture
def encoded_views(loaded, monkeypatch):
    """Counts the views that go through the vision tower."""
    counts = []
    inner = loaded.model.vision.forward

    def forward(views):
        counts.append(len(views))
        return inner(views)

    monkeypatch.setattr(loaded.model.vision, "forward", forward)
    return counts


def ask(answerer, question, turns=(), settings=SHORT, num_left_out=0):
    request = Request(tuple(turns), question, settings, num_left_out)
    return answerer.answer(request, Job(request))


def test_known_pictures_change_nothing_but_the_work(loaded, answerer, picture, encoded_views):
    questions = Question("What?", (picture("red"), picture("blue", (90, 200))))
    first = ask(answerer, questions)
    num_views = sum(encoded_views)
    assert num_views > 3
    second = ask(answerer, Question("And?"), [Turn(questions, said("red"))])
    again = ask(answerer, questions)
    assert sum(encoded_views) == num_views
    assert again.text == first.text
    assert second.statistics.num_image_tokens == first.statistics.num_image_tokens
    assert second.statistics.num_prompt_tokens > first.statistics.num_prompt_tokens


def test_a_users_next_turn_is_read_from_where_it_differs(answerer, picture):
    def reused(user, turns=()):
        request = Request(tuple(turns), question, SHORT)
        statistics = answerer.answer(request, Job(request, user)).statistics
        return statistics.num_reused_tokens, statistics.num_prompt_tokens

    question = Question("What is this?", (picture("red"),))
    assert reused("anna")[0] == 0
    known, total = reused("anna")
    assert known == total - 1 > 50
    assert reused("anna", [Turn(question, said("a star"))])[0] >= total
    assert reused("bert")[0] == 0
    answerer.forget("anna")
    assert reused("anna")[0] == 0


def test_embeddings_from_memory_are_those_of_the_model(loaded, picture):
    processor, model = loaded.processor, loaded.model
    images = [Image.new("RGB", size, color) for size, color in (((300, 120), "red"), ((80, 90), "lime"))]
    messages = [{"role": "user", "content": "<image> and <image>"}, {"role": "assistant", "content": ""}]
    inputs = processor(conversations=messages, images=images).to("cpu", dtype=model.dtype)
    parts = {name: inputs[name] for name in ("input_ids", "images", "images_seq_mask", "images_spatial_crop")}
    features = PictureFeatures(model)
    with torch.inference_mode():
        expected = model.prepare_inputs_embeds(**parts)
        for _ in range(2):
            torch.testing.assert_close(features.embed(**parts), expected)
        text_only = processor(conversations=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}])
        ids = {name: text_only[name] for name in parts}
        assert features.embed(**ids).shape[1] == text_only.input_ids.shape[1]


def test_memory_for_features_is_bounded(loaded, answerer, picture, monkeypatch):
    features = PictureFeatures(loaded.model, max_bytes=60_000)
    for color in ("red", "green", "blue", "white", "black"):
        answerer.sessions.forget("")
        monkeypatch.setattr(answerer.sessions, "features", features)
        ask(answerer, Question("What?", (picture(color),)))
    answerer.sessions.forget("")
    assert 0 < features.num_bytes <= 60_000


def test_an_answer_that_holds_the_mark_of_pictures_can_be_followed_up(answerer, picture):
    turns = [Turn(Question("What tag?", (picture("red"),)), said("<image> it is <image>"))]
    assert ask(answerer, Question("And?"), turns).statistics.num_prompt_tokens > 0


def test_history_is_shortened_turn_by_turn_with_its_pictures(answerer, picture):
    turns = [Turn(Question("What? " * 40, (picture(color),)), said("It. " * 20)) for color in ("red", "blue", "lime")]
    everything = ask(answerer, Question("And?"), turns, Settings(max_new_tokens=4, history_tokens=4096))
    assert everything.num_left_out == 0
    limit = everything.statistics.num_prompt_tokens - 1
    shorter = ask(answerer, Question("And?"), turns, Settings(max_new_tokens=4, history_tokens=limit))
    assert shorter.num_left_out == 1
    assert shorter.statistics.num_prompt_tokens < limit
    alone = ask(answerer, Question("And?"), turns, Settings(max_new_tokens=4, history_tokens=0))
    assert alone.num_left_out == 3
    assert alone.statistics.num_image_tokens == 0
    later = ask(answerer, Question("And?"), turns, Settings(max_new_tokens=4, history_tokens=4096), num_left_out=1)
    assert later.num_left_out == 1


def test_a_question_that_cannot_fit_is_refused_with_its_numbers(answerer):
    with pytest.raises(UserError, match=r"has \d{4,} tokens, the model has room for 4096") as caught:
        ask(answerer, Question("red circle " * 6000), [Turn(Question("a"), said("b"))])
    assert caught.value.values["limit"] == 4096


def test_tiling_can_be_switched_off(answerer, picture):
    question = Question("What?", (picture("red", (300, 120)),))
    tiled, plain = (
        ask(answerer, question, settings=Settings(max_new_tokens=4, use_tiling=use)).statistics.num_image_tokens
        for use in (True, False)
    )
    assert tiled > plain > 0


def test_turns_without_an_answer_are_not_part_of_the_prompt(answerer, picture):
    stopped = Turn(Question("What is this?", (picture("red"),)), said(""))
    with_it = ask(answerer, Question("And?"), [stopped])
    without = ask(answerer, Question("And?"))
    assert with_it.statistics.num_prompt_tokens == without.statistics.num_prompt_tokens


def test_a_seed_makes_sampling_repeatable(answerer):
    def sample(seed):
        settings = Settings(max_new_tokens=12, temperature=1.0, top_p=1.0, seed=seed)
        return ask(answerer, Question("What?"), settings=settings).text

    assert sample(7) == sample(7)
    assert len({sample(seed) for seed in range(5)}) > 1


def test_boxes_are_drawn_on_the_pictures_that_they_belong_to(answerer, picture, monkeypatch):
    text = (
        "In the first image <|ref|>a<|/ref|><|det|>[[0, 0, 999, 999]]<|/det|>"
        "in the second image <|ref|>b<|/ref|><|det|>[[0, 0, 500, 500]]<|/det|>"
    )
    pictures = (picture("red", (200, 100)), picture("blue", (100, 400)), picture("lime"))

    class Saying(list):
        num_prompt_tokens, num_image_tokens, num_new_tokens, is_cut_off, reuse = 1, 0, 2, False, None

        def stop(self):
            pass

    monkeypatch.setattr(
        "deepseek_vl2.serve.app_modules.answering.AnswerStream", lambda *_, **__: Saying([text[:50], text[50:]])
    )
    answer = ask(answerer, Question("Where?", pictures))
    assert [(box.picture, box.label, box.pixels) for box in answer.boxes] == [
        (1, "a", (0, 0, 200, 100)),
        (2, "b", (0, 0, 50, 200)),
    ]
    assert answer.words == "In the first image ain the second image b"
    assert [number for number, _ in answer.marked_pictures] == [1, 2]
    sizes = []
    for _, path in answer.marked_pictures:
        with Image.open(path) as marked:
            sizes.append(marked.size)
    assert sizes == [(200, 100), (100, 400)]
    follow_up = ask(answerer, Question("And where?"), [Turn(Question("What?", pictures[:1]), said("a"))])
    assert follow_up.boxes[0].pixels == (0, 0, 200, 100)  # of the picture asked about before


def test_stop_leaves_the_prefill_between_two_layers(loaded, answerer, picture):
    layers = []
    hooks = [
        layer.register_forward_pre_hook(lambda *_: (layers.append(1), time.sleep(0.2))[0])
        for layer in loaded.model.language.model.layers
    ]
    request = Request((), Question("What?", (picture("red"),)), SHORT)
    job = Job(request)
    answers = []
    asking = threading.Thread(target=lambda: answers.append(answerer.answer(request, job)))
    try:
        asking.start()
        while not layers:
            time.sleep(0.005)
        job.stop()
        asking.join(60)
    finally:
        for hook in hooks:
            hook.remove()
    assert answers[0].text == ""
    assert answers[0].was_stopped
    assert len(layers) <= 2  # of five in the first pass alone
