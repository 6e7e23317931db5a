"""The library's own JSON lines, the form that fine-tuning reads, with what is expected.

`{"id": ..., "conversations": [{"role": "<|User|>", "content": "<image>\\n...", "images": ["a.jpg"]}, ...],
"answer": ..., "boxes": [[x1, y1, x2, y2], ...], "options": {"A": ...}, "category": ...}` (or `"messages"`).

The conversation is asked word for word. A last message of the assistant is the expected answer where `answer` (or
`answers`) is missing, and the boxes marked in it are the expected ones where `boxes` (pixels of the last picture) is.
"""

from collections.abc import Mapping
from typing import Any

from deepseek_vl2.evaluate.readers.common import ReadOptions, as_mapping, first_of, read_box, texts
from deepseek_vl2.evaluate.samples import PixelBox, Sample
from deepseek_vl2.models.chat_format import ASSISTANT_NAMES, USER_NAMES
from deepseek_vl2.models.special_tokens import IMAGE
from deepseek_vl2.serve.grounding import read_grounding
from deepseek_vl2.utils.data_files import parse_json, picture_path


def conversation_sample(line: bytes, where: str, options: ReadOptions) -> Sample:
    """Builds the sample of a line.

    Raises:
        ValueError: no JSON object, no conversation that ends with a question, a bad box or picture.
        OSError: a picture is not there.
    """
    fields = as_mapping(parse_json(line), "a line")
    messages = _messages(fields)
    last_answer = messages.pop()["content"] if messages[-1]["role"] in ASSISTANT_NAMES else ""
    if not messages or messages[-1]["role"] not in USER_NAMES:
        raise ValueError("the conversation must end with a question of the user, or with one and its answer")
    for number, message in enumerate(messages):
        if message["role"] in ASSISTANT_NAMES and not message["content"].strip():
            raise ValueError(f"message {number} is an answer with no text")
    messages = [_with_pictures(message, number, options) for number, message in enumerate(messages)]
    pictures = tuple(picture for message in messages for picture in message["images"])
    sizes = options.sizes_of(pictures)
    choices = as_mapping(fields.get("options", {}), "'options'")
    return Sample(
        id=str(fields.get("id", where)),
        where=where,
        question=messages[-1]["content"].replace(IMAGE, "").strip(),
        pictures=pictures,
        sizes=sizes,
        answers=texts(first_of(fields, "answers", "answer")) or ((last_answer,) if last_answer else ()),
        boxes=_boxes(fields.get("boxes"), last_answer, sizes),
        options={letter: str(option) for letter, option in choices.items()},
        category=str(fields.get("category") or ""),
        messages=tuple(messages),
    )


def _messages(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = first_of(fields, "conversations", "messages")
    if not isinstance(messages, list):
        raise ValueError("no list conversations (or messages); another kind of file needs --format")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {number} must be an object with role, content (text) and images")
        if message.get("role") not in (*USER_NAMES, *ASSISTANT_NAMES):
            raise ValueError(f"message {number} has the unknown role {message.get('role')!r}: take {USER_NAMES[0]!r}")
    return [dict(message) for message in messages]


def _with_pictures(message: Mapping[str, Any], number: int, options: ReadOptions) -> dict[str, Any]:
    names = message.get("images") or []
    if not isinstance(names, list):
        raise ValueError(f"'images' of message {number} must be a list of paths")
    content, num_marks = message["content"], message["content"].count(IMAGE)
    if num_marks == 0:
        content = f"{IMAGE}\n" * len(names) + content
    elif num_marks != len(names):
        raise ValueError(f"message {number} has {num_marks} {IMAGE} mark(s) for {len(names)} picture(s)")
    pictures = [picture_path(name, options.picture_root) for name in names]
    return {"role": message["role"], "content": content, "images": pictures}


def _boxes(values: Any, answer: str, sizes: tuple[tuple[int, int], ...]) -> tuple[PixelBox, ...] | None:
    grounding = read_grounding(answer)
    if values is None and grounding.problems:
        raise ValueError(f"the expected answer has malformed boxes: {'; '.join(grounding.problems)}")
    if values is None and not grounding.boxes:
        return None
    if not sizes:
        raise ValueError("boxes need a picture, there is none")
    if values is None:
        return tuple(box.to_pixels(*sizes[-1]) for box in grounding.boxes)
    if not isinstance(values, list):
        raise ValueError(f"'boxes' must be a list of boxes, not {values!r:.80}")
    return tuple(read_box(value, "xyxy", sizes[-1]) for value in values)
