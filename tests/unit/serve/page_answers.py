"""Answers as the page keeps them, without a model."""

from typing import Any

from deepseek_vl2.serve.app_modules.conversation import Answer, Statistics


def said(text: str, **values: Any) -> Answer:
    """An answer of words alone."""
    return Answer(text, text, (), (), (), Statistics(1, 0, 1, 0.1, 0.2), **values)
