"""Answers in the form of the OpenAI protocol, whole or as a stream of events."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from deepseek_vl2.serve.api.engine import Finished, Piece
from deepseek_vl2.serve.api.errors import ApiError
from deepseek_vl2.serve.api.service import OpenRequest

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class ResponseHead:
    """What all parts of one response have in common."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def to_dict(self, kind: str) -> dict[str, Any]:
        """The beginning of a response or chunk."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


async def whole_response(head: ResponseHead, opened: OpenRequest) -> dict[str, Any]:
    """Waits for all answers.

    Raises:
        ApiError: as in `OpenRequest.events`.
    """
    texts = [""] * opened.num_answers
    reasons = [""] * opened.num_answers
    async for index, event in opened.events():
        if isinstance(event, Piece):
            texts[index] += event.text
        elif isinstance(event, Finished):
            reasons[index] = event.reason
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None, **_boxes(opened, text)},
            "logprobs": None,
            "finish_reason": reason,
        }
        for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
    ]
    return {**head.to_dict("chat.completion"), "choices": choices, "usage": usage(opened)}


async def stream_response(head: ResponseHead, opened: OpenRequest, includes_usage: bool) -> AsyncIterator[bytes]:
    """Yields server-sent events: chunks as the model speaks, boxes with the last chunk of an answer, then `[DONE]`.

    An error after the beginning is an event of its own, which ends the stream.
    """

    def chunk(choices: list[dict[str, Any]], **more: Any) -> bytes:
        extra = {"usage": None} if includes_usage else {}
        return _event({**head.to_dict("chat.completion.chunk"), "choices": choices, **extra, **more})

    def choice(index: int, delta: dict[str, Any], reason: str | None = None) -> list[dict[str, Any]]:
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}]

    texts = [""] * opened.num_answers
    for index in range(opened.num_answers):
        yield chunk(choice(index, {"role": "assistant", "content": ""}))
    try:
        async for index, event in opened.events():
            if isinstance(event, Piece):
                texts[index] += event.text
                yield chunk(choice(index, {"content": event.text}))
            elif isinstance(event, Finished):
                yield chunk(choice(index, _boxes(opened, texts[index]), event.reason))
    except ApiError as error:
        yield _event(error.content)
        return
    if includes_usage:
        yield chunk([], usage=usage(opened))
    yield DONE


def _boxes(opened: OpenRequest, text: str) -> dict[str, Any]:
    """The boxes of an answer as a field beside its text, and what is wrong with others."""
    boxes, problems = opened.prompt.pictures.find_boxes(text)
    return {"boxes": boxes, **({"box_problems": problems} if problems else {})}


def usage(opened: OpenRequest) -> dict[str, Any]:
    """Tokens of prompt and answers."""
    num_prompt_tokens = len(opened.prompt.inputs)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": opened.num_new_tokens,
        "total_tokens": num_prompt_tokens + opened.num_new_tokens,
        "prompt_tokens_details": {"image_tokens": opened.prompt.num_image_tokens, "cached_tokens": 0},
    }


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"
