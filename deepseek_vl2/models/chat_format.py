"""Chat messages in the forms users write them: roles, content parts, and the Jinja template for both."""

import re
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

from PIL import Image

from deepseek_vl2.models.conversation import Conversation
from deepseek_vl2.models.special_tokens import ASSISTANT, IMAGE, USER

USER_NAMES = (USER, "user", "User")
ASSISTANT_NAMES = (ASSISTANT, "assistant", "Assistant")
SYSTEM_NAMES = ("system", "System")
PICTURE_PARTS = ("image", "image_url")

# A printed conversation has a space between the assistant's mark and the answer, the ids that the model was trained
# on do not: an answer is encoded on its own.
ANSWER_START = re.compile(rf"(?<={re.escape(ASSISTANT)}:) ?")


class Speaker(Enum):
    """Who speaks in a message."""

    USER = "user"
    ASSISTANT = "assistant"
    SYSTEM = "system"


def speaker_of(role: str, conversation: Conversation) -> Speaker:
    """Find out who speaks under a role's name.

    Raises:
        ValueError: the role is neither the template's nor one of the common names.
    """
    if role == conversation.roles[0] or role in USER_NAMES:
        return Speaker.USER
    if role == conversation.roles[1] or role in ASSISTANT_NAMES:
        return Speaker.ASSISTANT
    if role in SYSTEM_NAMES:
        return Speaker.SYSTEM
    allowed = list(dict.fromkeys((*conversation.roles, *USER_NAMES, *ASSISTANT_NAMES, *SYSTEM_NAMES)))
    raise ValueError(f"unknown role {role!r}: take one of {allowed}")


def content_text(content: Any, image_token: str = IMAGE) -> str:
    """Turn a message's content into text with an `<image>` mark for every picture part.

    A line break follows a picture part unless it is the last or the next text brings its own, which gives the layout
    that the model was trained on (`<image>\\nquestion`).

    Args:
        content: text, `None`, or OpenAI-style parts
            (`{"type": "text", "text": ...}`, `{"type": "image_url", ...}`, `{"type": "image", ...}`).
        image_token: the mark.

    Raises:
        ValueError: a part of another type, or content that is neither text nor parts.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ValueError(f"a message's content is text or a list of parts, got {type(content).__name__}")
    pieces: list[str] = []
    for part in content:
        if pieces and pieces[-1] == image_token and not _begins_line(part):
            pieces.append("\n")
        pieces.append(image_token if is_picture_part(part) else part["text"])
    return "".join(pieces)


def _begins_line(part: Any) -> bool:
    return not is_picture_part(part) and part["text"].startswith("\n")


def is_picture_part(part: Any) -> bool:
    """Tell a picture part from a text part.

    Raises:
        ValueError: it is neither.
    """
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in PICTURE_PARTS:
        return True
    if kind == "text" and isinstance(part.get("text"), str):
        return False
    raise ValueError(f"unknown content part {part!r}: take type 'text' (with 'text'), 'image' or 'image_url'")


def pictures_in(messages: Iterable[Mapping[str, Any]]) -> list[Image.Image]:
    """Collect the PIL pictures that messages carry themselves, in order: in parts, or in a message's `images` list.

    Raises:
        ValueError: a picture is given by its address. Reading files is not the processor's business.
    """
    found: list[Any] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            found.extend(_payload(part) for part in content if is_picture_part(part))
        else:
            found.extend(message.get("images") or ())
    for picture in found:
        if not isinstance(picture, Image.Image):
            raise ValueError(
                f"the picture {str(picture)[:80]!r} is given by its address and images is None: read the pictures "
                "first, images=deepseek_vl2.utils.io.load_pil_images(conversations)"
            )
    return found


def _payload(part: Mapping[str, Any]) -> Any:
    """Return what a picture part holds: a picture, an address, or `None`."""
    for key in ("image", "image_url", "url", "path", "base64"):
        if key in part:
            value = part[key]
            return value.get("url") if isinstance(value, Mapping) else value
    return None


_CHAT_TEMPLATE = r"""
{{- bos_token -}}
{%- for message in messages -%}
  {%- set ns = namespace(text='') -%}
  {%- set content = message['content'] if message['content'] is defined and message['content'] else '' -%}
  {%- if content is string -%}
    {%- set ns.text = content -%}
  {%- else -%}
    {%- for part in content -%}
      {%- if part['type'] == 'text' -%}
        {%- set ns.text = ns.text + part['text'] -%}
      {%- elif part['type'] in ['image', 'image_url'] -%}
        {%- set ns.text = ns.text + '@IMAGE@' -%}
        {%- if not loop.last and not (loop.nextitem['text'] is defined and loop.nextitem['text'][:1] == '\n') -%}
          {%- set ns.text = ns.text + '\n' -%}
        {%- endif -%}
      {%- else -%}
        {{- raise_exception('unknown content part ' + part['type'] + ': take text, image or image_url') -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set text = ns.text | trim -%}
  {%- if message['role'] in @USER_NAMES@ -%}
    {{- '@USER@: ' + text + '\n\n' if text else '@USER@:' -}}
    {%- if not loop.last or add_generation_prompt -%}
      {{- '@ASSISTANT@:' -}}
    {%- endif -%}
  {%- elif message['role'] in @ASSISTANT_NAMES@ -%}
    {%- if '@IMAGE@' in text -%}
      {{- raise_exception('an answer cannot hold a picture (@IMAGE@)') -}}
    {%- endif -%}
    {{- ' ' + text if text -}}
    {%- if text or not loop.last -%}
      {{- eos_token -}}
    {%- endif -%}
  {%- elif message['role'] in @SYSTEM_NAMES@ -%}
    {%- if not loop.first -%}
      {{- raise_exception('a system message can only be the first message') -}}
    {%- endif -%}
    {{- text -}}
  {%- else -%}
    {{- raise_exception('unknown role ' + message['role'] + ': take one of @ALL_NAMES@') -}}
  {%- endif -%}
{%- endfor -%}
""".strip()


def build_chat_template(image_token: str = IMAGE) -> str:
    """Write the Jinja chat template.

    It prints what `DeepseekVLV2Processor` encodes for the same messages: the beginning-of-sentence token once, a
    leading system message, `<|User|>: question`, `<|Assistant|>: answer` and an end-of-sentence token after an answer.
    An empty last answer asks for one.
    """
    values = {
        "@IMAGE@": image_token,
        "@USER@": USER,
        "@ASSISTANT@": ASSISTANT,
        "@USER_NAMES@": str(list(USER_NAMES)),
        "@ASSISTANT_NAMES@": str(list(ASSISTANT_NAMES)),
        "@SYSTEM_NAMES@": str(list(SYSTEM_NAMES)),
        "@ALL_NAMES@": ", ".join((*USER_NAMES, *ASSISTANT_NAMES, *SYSTEM_NAMES)),
    }
    template = _CHAT_TEMPLATE
    for mark, value in values.items():
        template = template.replace(mark, value)
    return template
