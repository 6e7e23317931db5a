"""What a batch run says about an item: one line of its output."""

from dataclasses import replace
from typing import Any

from deepseek_vl2.batch.preparing import PreparedItem
from deepseek_vl2.serve.batch_generation import BatchAnswer
from deepseek_vl2.serve.box_owners import assign_boxes

# Differs between runs; all else is the same.
TIMING_FIELD = "seconds"


def answer_record(prepared: PreparedItem, answer: BatchAnswer, seconds: float) -> dict[str, Any]:
    """The record of an answer.

    Args:
        prepared: the question.
        answer: to it.
        seconds: that the model took; a question's share of its batch.
    """
    item, encoded = prepared.item, prepared.encoded
    boxes, problems = assign_boxes(answer.text, item.question, max(len(prepared.sizes), 1))
    return {
        "index": item.index,
        "id": item.id,
        "text": answer.text,
        "boxes": [
            {"picture": owned.picture + 1, **owned.box.to_dict(prepared.sizes[owned.picture])}
            for owned in boxes
            if prepared.sizes
        ],
        "box_problems": problems,
        "prompt_tokens": 0 if encoded is None else len(encoded),
        "image_tokens": 0 if encoded is None else sum(encoded.num_image_tokens),
        "new_tokens": answer.num_new_tokens,
        "is_cut_off": answer.is_cut_off,
        TIMING_FIELD: round(seconds, 4),
        "error": None,
    }


def error_record(prepared: PreparedItem) -> dict[str, Any]:
    """The record of an item that cannot be asked."""
    bare = replace(prepared.item, messages=())  # the question may be what cannot be read
    empty = answer_record(PreparedItem(bare, sizes=prepared.sizes), BatchAnswer("", 0, False), 0.0)
    problem = prepared.problem.encode("utf-8", "replace").decode()  # names of files may hold other bytes
    return empty | {"text": None, "error": problem}
