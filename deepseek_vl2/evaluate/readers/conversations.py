"""The library's own JSON lines, the form that fine-tuning reads, with what is expected.

`{"id": ..., "conversations": [{"role": "<|User|>", "content": "<image>\\n...", "images": ["a.jpg"]}, ...],
"answer": ..., "boxes": [[x1, y1, x2, y2], ...], "options": {"A": ...}, "category": ...}` (or `"messages"`).

Messages may have all the forms that fine-tuning takes: parts in OpenAI's style, a system message in front, pictures by
path, address or data URI. The conversation is asked word for word. A last message of the assistant is the expected
answer where `answer` (or `answers`) is missing, and the boxes marked in it are the expected ones where `boxes` (pixels
of the last picture) is. Where there are options, an answer is a letter ("B", "(B)", "B.", "B)") or an option's text.
"""

from collections.abc import Mapping
from types import NoneType
from typing import Any

from deepseek_vl2.evaluate.readers.common import (
    ReadOptions,
    as_mapping,
    first_of,
    id_of,
    letter_of,
    lettered,
    read_box,
    texts,
)
from deepseek_vl2.evaluate.samples import PixelBox, Sample
from deepseek_vl2.models.chat_format import Speaker, content_text, speaker_of
from deepseek_vl2.models.conversation import get_conv_template
from deepseek_vl2.models.special_tokens import IMAGE
from deepseek_vl2.serve.grounding import read_grounding
from deepseek_vl2.utils.data_files import parse_json, with_full_paths
from deepseek_vl2.utils.pictures import picture_sources


def conversation_sample(line: bytes, where: str, options: ReadOptions) -> Sample:
    """Builds the sample of a line.

    Raises:
        ValueError: no JSON object, no conversation that ends with a question, an answer that names several options, a
            bad box or picture.
        OSError: a picture is not there.
    """
    fields = as_mapping(parse_json(line), "a line")
    messages, speakers = _messages(fields)
    last_answer = ""
    if speakers and speakers[-1] is Speaker.ASSISTANT:
        last_answer = content_text(messages.pop().get("content"))
        speakers.pop()
    if not speakers or speakers[-1] is not Speaker.USER:
        raise ValueError("the conversation must end with a question of the user, or with one and its answer")
    asked = [_with_pictures(message, number, options) for number, message in enumerate(messages)]
    for number, (message, speaker) in enumerate(zip(asked, speakers, strict=True)):
        if speaker is Speaker.ASSISTANT and not message["content"].strip():
            raise ValueError(f"message {number} is an answer with no text")
    pictures = tuple(picture for message in asked for picture in message["images"])
    sizes = options.sizes_of(pictures)
    if not isinstance(fields.get("options"), (list, Mapping, NoneType)):
        raise ValueError(f"'options' must be a list or an object, not {fields['options']!r:.80}")
    choices = {letter: str(option) for letter, option in lettered(fields.get("options")).items()}
    answers = texts(first_of(fields, "answers", "answer"), reads_text=False) or ((last_answer,) if last_answer else ())
    return Sample(
        id=id_of(fields, where),
        where=where,
        question=asked[-1]["content"].replace(IMAGE, "").strip(),
        pictures=pictures,
        sizes=sizes,
        answers=tuple(letter_of(answer, choices) for answer in answers),
        boxes=_boxes(fields.get("boxes"), last_answer, sizes),
        options=choices,
        category=str(fields.get("category") or ""),
        messages=tuple(asked),
    )


def _messages(fields: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], list[Speaker]]:
    messages = first_of(fields, "conversations", "messages")
    if not isinstance(messages, list):
        raise ValueError("no list conversations (or messages); another kind of file needs --format")
    template = get_conv_template("deepseek")
    speakers = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {number} must be an object with role, content and images, not {message!r:.80}")
        try:
            speakers.append(speaker_of(message["role"], template))
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    return messages, speakers


def _with_pictures(message: Mapping[str, Any], number: int, options: ReadOptions) -> dict[str, Any]:
    """The message as text with its pictures' sources; without marks in the text, they are put in front."""
    content = content_text(message.get("content"))
    pictures = list(picture_sources([with_full_paths(message, options.picture_root)]))
    wrong = [source for source in pictures if not isinstance(source, str)]
    if wrong:
        raise ValueError(f"a picture of message {number} is given by its path or address, not by {wrong[0]!r:.80}")
    num_marks = content.count(IMAGE)
    if num_marks == 0:
        content = f"{IMAGE}\n" * len(pictures) + content
    elif num_marks != len(pictures):
        raise ValueError(f"message {number} has {num_marks} {IMAGE} mark(s) for {len(pictures)} picture(s)")
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
        return tuple(box.scale_to(*sizes[-1]) for box in grounding.boxes)
    if not isinstance(values, list):
        raise ValueError(f"'boxes' must be a list of boxes, not {values!r:.80}")
    return tuple(read_box(value, "xyxy", sizes[-1]) for value in values)
