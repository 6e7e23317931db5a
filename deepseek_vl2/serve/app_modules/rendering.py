"""Turns and states as the page shows them. Text of users and of the model is escaped or sent as text, never as HTML."""

import base64
import html
import json
import re
import urllib.parse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from deepseek_vl2.serve.app_modules.conversation import Answer, FoundBox, Turn
from deepseek_vl2.serve.app_modules.engine import (
    ANSWERING,
    FAILED,
    IDLE,
    LIBRARIES,
    LOADING,
    READY,
    WAITING,
    WEIGHTS,
    Job,
    LoadState,
)
from deepseek_vl2.serve.app_modules.sessions import Session
from deepseek_vl2.serve.app_modules.texts import text

_TAG_START = re.compile(r"<(?=[A-Za-z/!?])")
_ENTITY_START = re.compile(r"&(?=[A-Za-z#])")
_ESCAPED = re.compile(r"&lt;|&amp;")
_MODEL_TEXTS = {
    IDLE: "model_idle",
    LIBRARIES: "model_libraries",
    LOADING: "model_loading",
    WEIGHTS: "model_weights",
    READY: "model_ready",
    FAILED: "model_failed",
}


def chat_messages(session: Session) -> list[dict[str, Any]]:
    """Show the conversation, with the words of the answer that is being made."""
    messages: list[dict[str, Any]] = []
    for turn in session.turns:
        messages += _turn_messages(turn, session)
    return messages


def _turn_messages(turn: Turn, session: Session) -> list[dict[str, Any]]:
    language = session.language
    shown = [
        _figure(session, path, text("sent_picture", language, number=number))
        for number, path in enumerate(turn.question.pictures, start=1)
    ]
    asked: list[Any] = [gr.HTML(f'<div class="pictures">{"".join(shown)}</div>')] if shown else []
    messages = [{"role": "user", "content": [*asked, _plain(turn.question.text)]}]
    if turn.answer is not None:
        messages.append({"role": "assistant", "content": _answer_parts(turn.answer, session)})
    elif session.job is not None and turn is session.turns[-1] and session.job.words:
        messages.append({"role": "assistant", "content": [_plain(session.job.words)]})
    return messages


def _figure(session: Session, path: str, description: str, is_download: bool = False) -> str:
    """Show a picture that page.js enlarges when it is clicked.

    gradio's own pictures in a conversation have no alternative text, and their buttons no names.
    """
    language = session.language
    address = _escaped(session.file_address + urllib.parse.quote(path))
    name = _escaped(description)
    download = ""
    if is_download:
        download = f'<a class="download" href="{address}" download="{_escaped(Path(path).name)}">'
        download += f"{_escaped(text('download_picture', language))}</a>"
    return (
        f'<figure><button type="button" class="enlarge" title="{_escaped(text("enlarge", language))}">'
        f'<img src="{address}" alt="{name}"></button>{download}</figure>'
    )


def _plain(content: str) -> dict[str, str]:
    """Text that is shown as it is."""
    return {"type": "text", "text": as_markup(content)}


def as_markup(content: str) -> str:
    """Write text so that gradio shows it as it is.

    gradio takes every text for HTML, Markdown or not, and leaves out what looks dangerous. Only what HTML would read as
    a tag or an entity is changed, so that other text can be copied and edited as it stands.
    """
    return _TAG_START.sub("&lt;", _ENTITY_START.sub("&amp;", content))


def from_markup(content: str) -> str:
    """Take back what `as_markup` did; page.js does the same to what is copied."""
    return _ESCAPED.sub(lambda found: {"&lt;": "<", "&amp;": "&"}[found[0]], content)


def _answer_parts(answer: Answer, session: Session) -> list[Any]:
    language = session.language
    blocks = [_marked_pictures(answer, session), _box_table(answer.boxes, language)]
    blocks += [_notes(answer, language), _statistics(answer, language)]
    words = answer.words.strip() or text("no_answer", language)
    return [_plain(words), gr.HTML("".join(blocks), elem_classes=["answer-details"])]


def _marked_pictures(answer: Answer, session: Session) -> str:
    figures = []
    for number, path in answer.marked_pictures:
        labels = ", ".join(dict.fromkeys(box.label for box in answer.boxes if box.picture == number))
        description = text("marked_picture", session.language, number=number, labels=labels)
        figures.append(_figure(session, path, description, is_download=True))
    return f'<div class="pictures">{"".join(figures)}</div>' if figures else ""


def _box_table(boxes: Sequence[FoundBox], language: str) -> str:
    """Show the boxes in pixels, with a download of them as JSON."""
    if not boxes:
        return ""
    head = [text("box_picture", language), text("box_label", language), "x1", "y1", "x2", "y2"]
    rows = "".join(_row("td", [box.picture, box.label, *box.pixels]) for box in boxes)
    document = json.dumps([box.to_dict() for box in boxes], ensure_ascii=False, indent=1)
    data = base64.b64encode(document.encode()).decode("ascii")
    return (
        f'<div class="boxes" tabindex="0" role="region" aria-label="{_escaped(_count(boxes, language))}"><table>'
        f"<caption>{_escaped(_count(boxes, language))}</caption>"
        f"<thead>{_row('th', head)}</thead><tbody>{rows}</tbody></table></div>"
        f'<a class="download" download="boxes.json" href="data:application/json;base64,{data}">'
        f"{_escaped(text('download_boxes', language))}</a>"
    )


def _count(boxes: Sequence[FoundBox], language: str) -> str:
    return text("boxes", language, count=len(boxes))


def _row(cell: str, values: Iterable[Any]) -> str:
    scope = ' scope="col"' if cell == "th" else ""
    return "<tr>" + "".join(f"<{cell}{scope}>{_escaped(value)}</{cell}>" for value in values) + "</tr>"


def _notes(answer: Answer, language: str) -> str:
    notes = [text("malformed", language, problem=problem) for problem in answer.problems]
    if answer.was_stopped:
        notes.append(text("stopped", language))
    if answer.is_cut_off:
        notes.append(text("cut_off", language))
    if answer.num_left_out:
        notes.append(text("left_out", language, count=answer.num_left_out))
    return "".join(f'<p class="note">{_escaped(note)}</p>' for note in notes)


def _statistics(answer: Answer, language: str) -> str:
    statistics = answer.statistics
    line = text(
        "statistics",
        language,
        prompt=statistics.num_prompt_tokens,
        image=statistics.num_image_tokens,
        reused=statistics.num_reused_tokens,
        first=f"{statistics.seconds_to_first_token:.2f}",
        speed=f"{statistics.tokens_per_second:.1f}",
        new=statistics.num_new_tokens,
    )
    return f'<p class="statistics">{_escaped(line)}</p>'


def model_line(state: LoadState, model: str, language: str) -> str:
    """Show how far the model is."""
    line = text(
        _MODEL_TEXTS[state.phase],
        language,
        model=model,
        seconds=round(state.seconds),
        percent=round(100 * state.fraction),
        reason=state.reason,
        device=state.device,
    )
    bar = ""
    if state.phase == WEIGHTS:
        bar = f'<progress max="1" value="{state.fraction:.3f}" aria-label="{_escaped(line)}"></progress>'
    role = "alert" if state.phase == FAILED else "status"
    return f'<div class="model {state.phase}" role="{role}">{_escaped(line)}{bar}</div>'


def job_line(job: Job, place: int | None, language: str) -> str:
    """Show how far an answer is."""
    if job.phase == WAITING:
        line = text("waiting", language, place=place) if place else text("waiting_next", language)
    else:
        line = text("answering" if job.phase == ANSWERING else "preparing", language)
    return f'<div class="state" role="status">{_escaped(line)}</div>'


def error_line(message: str) -> str:
    """Show what went wrong."""
    return f'<div class="error" role="alert">{_escaped(message)}</div>'


def notice_line(message: str) -> str:
    """Show something worth knowing."""
    return f'<div class="notice" role="status">{_escaped(message)}</div>'


def _escaped(value: Any) -> str:
    return html.escape(str(value), quote=True)
