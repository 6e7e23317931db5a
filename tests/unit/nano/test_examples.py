"""The pictures in `images/`: the generator draws them, and their boxes are those of scenes.json."""

import json

import numpy as np
import pytest
from PIL import Image

from deepseek_vl2.nano import examples
from deepseek_vl2.nano.examples import EXAMPLES, LAYOUTS, NAMES, example_scene
from deepseek_vl2.nano.scenes import MARK_RGB


@pytest.fixture(scope="module")
def folder(repository):
    return repository / "images"


def test_the_folder_holds_the_examples_and_nothing_else(folder):
    assert {path.name for path in folder.iterdir()} == {*NAMES, "scenes.json"}
    # The names that the reference's README uses.
    assert set(NAMES) >= {
        "visual_grounding_1.jpeg",
        "visual_grounding_2.jpeg",
        "visual_grounding_3.jpeg",
        "grounding_conversation_1.jpeg",
        "vqa_1.jpeg",
        "multi_image_1.jpeg",
        "multi_image_2.jpeg",
        "multi_image_3.jpeg",
        "incontext_visual_grounding_1.jpeg",
        "icl_vg_2.jpeg",
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_what_the_generator_draws(folder, name):
    with Image.open(folder / name) as picture:
        assert picture.format == "JPEG"
        stored = np.asarray(picture.convert("RGB"), dtype=float)
    drawn = np.asarray(example_scene(name).draw(), dtype=float)
    assert stored.shape == drawn.shape
    assert np.abs(stored - drawn).mean() < 2
    others = [other for other in NAMES if other != name and example_scene(other).size == example_scene(name).size]
    for other in others:  # the bound tells pictures of one size apart
        assert np.abs(stored - np.asarray(example_scene(other).draw(), dtype=float)).mean() > 4


@pytest.mark.parametrize("name", NAMES)
def test_scenes_file_holds_labels_and_boxes(folder, name):
    content = json.loads((folder / "scenes.json").read_text(encoding="utf-8"))
    assert list(content) == list(NAMES)
    scene = example_scene(name)
    size = scene.size
    assert size == (LAYOUTS[name] if name in LAYOUTS else EXAMPLES[name])[1]
    if name in EXAMPLES:
        assert len(scene.objects) == len(EXAMPLES[name][2])  # everything planned found a place
    assert [(item["label"], tuple(item["box"])) for item in content[name]] == [
        (item.description, item.box) for item in scene.objects
    ]
    for x1, y1, x2, y2 in (item["box"] for item in content[name]):
        assert 0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1]
        assert name in LAYOUTS or min(x2 - x1, y2 - y1) >= 0.09 * min(size)


@pytest.mark.parametrize("name", NAMES)
def test_boxes_lie_on_the_painted_objects(folder, name):
    with Image.open(folder / name) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=float)
    for item in example_scene(name).objects:
        near = np.abs(pixels - np.array(item.rgb)).max(axis=-1) < 40
        x1, y1, x2, y2 = (int(value) for value in item.box)
        ys, xs = np.nonzero(near[y1:y2, x1:x2])
        found = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert np.abs(found - [0, 0, x2 - x1, y2 - y1]).max() <= 3


def test_the_marked_object_stands_in_a_red_rectangle():
    name = "incontext_visual_grounding_1.jpeg"
    marked = example_scene(name).objects[EXAMPLES[name][3]]
    is_red = (np.asarray(example_scene(name).draw()) == MARK_RGB).all(axis=-1)
    ys, xs = np.nonzero(is_red)
    x1, y1, x2, y2 = marked.box
    assert xs.min() < x1 and ys.min() < y1 and xs.max() > x2 and ys.max() > y2
    assert not is_red[int(y1) : int(y2), int(x1) : int(x2)].any()
    for other in example_scene(name).objects:
        if other is not marked:
            x1, y1, x2, y2 = (int(value) for value in other.box)
            assert not is_red[y1:y2, x1:x2].any()


def test_writing_them_again_gives_the_same_files(tmp_path):
    assert examples.main([str(tmp_path / "first")]) == 0
    examples.write_examples(tmp_path / "second")
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert names == {*NAMES, "scenes.json"}
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_unknown_example():
    with pytest.raises(ValueError, match=r"no example 'cat\.png'.*visual_grounding_1\.jpeg"):
        example_scene("cat.png")
