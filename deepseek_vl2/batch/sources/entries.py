"""Entries of JSON lines and Parquet: mappings with pictures, and with a question or conversation of their own."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_vl2.batch.items import (
    CONVERSATION_FIELDS,
    ID_FIELD,
    PROMPT_FIELD,
    Item,
    ItemPicture,
    PromptTemplate,
    ask_about,
    asked_conversation,
)
from deepseek_vl2.utils.data_files import ADDRESS, picture_path
from deepseek_vl2.utils.errors import describe_error

IMAGE_FIELDS = ("image", "images")


@dataclass(frozen=True)
class EntryReader:
    """How entries become items.

    A conversation is asked word for word; else the entry's own `prompt`; else the template, filled with its fields.

    Attributes:
        template: of the question.
        picture_root: what paths are relative to.
        image_column: field of the pictures; by default `image` or `images`.
    """

    template: PromptTemplate
    picture_root: Path
    image_column: str | None = None

    def item(self, index: int, entry: Mapping[str, Any]) -> Item:
        """The item of an entry; one that says what is wrong, where it cannot be asked."""
        item_id = str(index if entry.get(ID_FIELD) is None else entry[ID_FIELD])
        try:
            messages, pictures = self._asked(entry)
        except (ValueError, OSError) as error:
            return Item(index, item_id, problem=describe_error(error))
        return Item(index, item_id, messages, pictures)

    def _asked(self, entry: Mapping[str, Any]) -> tuple[tuple[Mapping[str, Any], ...], tuple[ItemPicture, ...]]:
        conversation = next((entry[name] for name in CONVERSATION_FIELDS if entry.get(name) is not None), None)
        if conversation is not None:
            return asked_conversation(conversation, self.picture_root)
        pictures = self._pictures(entry)
        prompt = entry.get(PROMPT_FIELD)
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError(f"{PROMPT_FIELD!r} must be a text, not {prompt!r:.80}")
        return ask_about(self.template.fill(entry) if prompt is None else prompt, pictures), pictures

    def _pictures(self, entry: Mapping[str, Any]) -> tuple[ItemPicture, ...]:
        names = IMAGE_FIELDS if self.image_column is None else (self.image_column,)
        cell = next((entry[name] for name in names if entry.get(name) is not None), None)
        is_named = cell is None and any(name in entry for name in names)
        is_asked_blind = not cell and entry.get(PROMPT_FIELD) is None  # the template's question is about a picture
        if is_named or is_asked_blind:
            raise ValueError(f"there is no picture: {' or '.join(names)} is missing or empty")
        cells = cell if isinstance(cell, list) else [] if cell is None else [cell]
        return tuple(self._picture(value) for value in cells)

    def _picture(self, cell: Any) -> ItemPicture:
        """A path, an address, encoded bytes, or a mapping of both, as the library datasets stores pictures."""
        if isinstance(cell, Mapping) and ("bytes" in cell or "path" in cell):
            cell = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
        if isinstance(cell, bytes) or (isinstance(cell, str) and ADDRESS.match(cell)):
            return cell
        return picture_path(cell, self.picture_root)
