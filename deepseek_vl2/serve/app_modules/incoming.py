"""What browsers and programs send, looked at before gradio does anything with it."""

from typing import Any

import gradio as gr
from gradio.data_classes import FileData
from gradio_client.utils import is_http_url_like
from pydantic import ValidationError

from deepseek_vl2.serve.app_modules.texts import UserError

_MAX_SHOWN = 60  # characters of what is refused


class GuardedBlocks(gr.Blocks):
    """A page that fetches nothing for those who use it, and tells in one line what is no message.

    gradio downloads an address that stands where a file's path is due, in any input, number fields included; and what
    does not fit a text box it reports in many lines, to the log too, with what was written.
    """

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], state: Any, explicit_call: bool = False
    ) -> list[Any]:
        """Check what was sent, then do what gradio does."""
        try:
            refuse_addresses(inputs)
            boxes = [isinstance(component, gr.MultimodalTextbox) for component in block_fn.inputs]
            boxes += [False] * len(inputs)  # gradio counts them itself
            inputs = [as_message(value) if is_box else value for value, is_box in zip(inputs, boxes, strict=False)]
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return await super().preprocess_data(block_fn, inputs, state, explicit_call)


def refuse_addresses(value: Any) -> None:
    """Refuse files that would have to be fetched from the network.

    Raises:
        UserError: there is one, however deep.
    """
    pending = [value]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            if is_http_url_like(part.get("path")):
                raise UserError("address", address=part["path"][:_MAX_SHOWN])
            pending += part.values()
        elif isinstance(part, (list, tuple)):
            pending += part


def as_message(value: Any) -> dict[str, Any] | None:
    """Give a question in the form that gradio's text box takes; a bare text is a question without pictures.

    Raises:
        UserError: it is neither a text nor an object with text and files.
    """
    if value is None:
        return None
    content = {"text": value} if isinstance(value, str) else value
    if isinstance(content, dict):
        words, files = content.get("text") or "", content.get("files") or []
        if isinstance(words, str) and isinstance(files, list) and all(map(_is_file, files)):
            return {"text": words, "files": files}
    raise UserError("not_a_message", value=repr(value)[:_MAX_SHOWN])


def _is_file(value: Any) -> bool:
    """Tell whether it is what gradio's clients make of a file."""
    try:
        FileData.model_validate(value, context={"validate_meta": True})
    except ValidationError:
        return False
    return True
