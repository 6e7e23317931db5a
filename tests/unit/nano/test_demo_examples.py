"""The example questions of the page: the bundled nano answers each of them right."""

import pytest
import torch
from PIL import Image

from deepseek_vl2.evaluate.metrics import intersection_over_union
from deepseek_vl2.models.special_tokens import ASSISTANT, USER
from deepseek_vl2.nano.examples import example_scene
from deepseek_vl2.nano.questions import place_in_words, reading_order
from deepseek_vl2.serve.examples import EXAMPLES
from deepseek_vl2.serve.grounding import read_grounding
from deepseek_vl2.serve.questions import place_image_marks
from deepseek_vl2.utils.io import load_pretrained_model

FIND, FIND_ZH, FIND_ALL, GROUND, IN_CONTEXT, PARTS, COMPARE = EXAMPLES
LEAST_IOU = 0.5


@pytest.fixture(scope="module")
def answer(repository):
    """Answers an example greedily."""
    tokenizer, processor, model = load_pretrained_model("nano", "float32", "cpu")

    def ask(example):
        pictures = [Image.open(repository / "images" / name).convert("RGB") for name in example.pictures]
        content = place_image_marks(example.prompt, len(pictures))
        conversation = [{"role": USER, "content": content}, {"role": ASSISTANT, "content": ""}]
        inputs = processor(conversations=conversation, images=pictures, force_batchify=True)
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=200, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        new = ids[0, inputs["input_ids"].shape[1] :]
        return tokenizer.decode(new, skip_special_tokens=False).removesuffix(tokenizer.eos_token)

    return ask


def assert_boxes(example, text, wanted):
    """The answer's boxes are those of the objects of the example's last picture that are wanted, each once."""
    scene = example_scene(example.pictures[-1])
    items = [item for item in scene.objects if wanted(item)]
    found = [box.to_pixels(*scene.size) for box in read_grounding(text).boxes]
    assert len(found) == len(items) > 0, text
    for item in items:
        assert max(intersection_over_union(box, item.box) for box in found) >= LEAST_IOU, text


def test_there_is_one_for_each_ability():
    assert len({example.title for example in EXAMPLES}) == len({example.title_zh for example in EXAMPLES}) == 7


def test_one_object_is_found(answer):
    assert_boxes(FIND, answer(FIND), lambda item: item.description == "red star")


def test_an_object_is_found_by_a_chinese_phrase(answer):
    text = answer(FIND_ZH)
    assert "紫色的菱形" in FIND_ZH.prompt and "紫色的菱形" in text
    assert_boxes(FIND_ZH, text, lambda item: item.description == "purple diamond")


def test_all_objects_of_a_kind_are_found(answer):
    assert_boxes(FIND_ALL, answer(FIND_ALL), lambda item: item.description == "green circle")


def test_a_wish_is_met_by_the_object_that_fits(answer):
    assert "roll" in GROUND.prompt
    assert_boxes(GROUND, answer(GROUND), lambda item: item.name == "circle")


def test_the_kind_of_thing_that_is_marked_is_found_in_the_other_picture(answer):
    first = example_scene(IN_CONTEXT.pictures[0])
    kind = first.objects[first.marked].name
    assert_boxes(IN_CONTEXT, answer(IN_CONTEXT), lambda item: item.name == kind)


def test_every_part_of_a_picture_is_described(answer):
    scene = example_scene(PARTS.pictures[0])
    parts = [f"{place_in_words(item.center, scene.size)}: a {item.description}." for item in reading_order(scene)]
    assert answer(PARTS) == " ".join(parts)


def test_three_pictures_are_compared(answer):
    lines = []
    for number, name in enumerate(COMPARE.pictures, 1):
        shapes = ", ".join(f"a {item.description}" for item in reading_order(example_scene(name)))
        lines.append(f"image_{number}: {shapes}.")
    assert answer(COMPARE) == "\n".join(lines)
