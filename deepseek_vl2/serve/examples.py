"""The example questions of the page: what the reference's page shows, on the library's own pictures."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class ExampleQuestion(NamedTuple):
    """One question to try.

    Attributes:
        title: What it shows, in English.
        title_zh: The same in Chinese.
        prompt: What is asked.
        pictures: File names in the folder of pictures.
    """

    title: str
    title_zh: str
    prompt: str
    pictures: tuple[str, ...]


EXAMPLES = (
    ExampleQuestion("Find one object", "找到一个物体", "<|ref|>The red star.<|/ref|>.", ("visual_grounding_1.jpeg",)),
    ExampleQuestion(
        "Find an object by a Chinese phrase",
        "用中文短语找到物体",
        "找到<|ref|>紫色的菱形<|/ref|>",
        ("visual_grounding_2.jpeg",),
    ),
    ExampleQuestion(
        "Find all objects of a kind",
        "找到所有同类物体",
        "Find all the <|ref|>green circles<|/ref|>",
        ("visual_grounding_3.jpeg",),
    ),
    ExampleQuestion(
        "Grounded conversation",
        "带定位的对话",
        "<|grounding|>I want something that can roll, what should I take?",
        ("grounding_conversation_1.jpeg",),
    ),
    ExampleQuestion(
        "Find the same in another picture",
        "在另一张图中找同类",
        "<|grounding|>In the first image, an object within the red rectangle is marked. "
        "Locate the object of the same category in the second image.",
        ("incontext_visual_grounding_1.jpeg", "icl_vg_2.jpeg"),
    ),
    ExampleQuestion(
        "Describe a picture part by part",
        "逐部分描述图片",
        "Describe each part of this image in detail.",
        ("vqa_1.jpeg",),
    ),
    ExampleQuestion(
        "Compare several pictures",
        "多图理解",
        "This is image_1: <image>\nThis is image_2: <image>\nThis is image_3: <image>\n"
        "Can you tell me what are in the images?",
        ("multi_image_1.jpeg", "multi_image_2.jpeg", "multi_image_3.jpeg"),
    ),
)


def available_examples(folder: Path) -> Iterator[ExampleQuestion]:
    """Yields the examples whose pictures are all in a folder."""
    return (example for example in EXAMPLES if all((folder / name).is_file() for name in example.pictures))
