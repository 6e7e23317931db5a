"""From a request's messages to a prompt for the model, and from the answer's text to boxes in the pictures."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from deepseek_vl2.models.chat_format import content_text
from deepseek_vl2.models.generation import check_prompt_length
from deepseek_vl2.models.processing_deepseek_vl_v2 import DeepseekVLV2Processor, VLChatProcessorOutput
from deepseek_vl2.models.special_tokens import IMAGE
from deepseek_vl2.serve.api.errors import CLIENT_CLOSED_REQUEST, ApiError, bad_request
from deepseek_vl2.serve.api.pictures import PictureLoader
from deepseek_vl2.serve.api.schemas import AssistantMessage, ImagePart, Message, SystemMessage, UserMessage
from deepseek_vl2.serve.box_owners import assign_boxes
from deepseek_vl2.serve.grounding import read_grounding
from deepseek_vl2.serve.questions import place_image_marks
from deepseek_vl2.utils.io import LoadedModel

# No token of the published tokenizers is longer, so that longer texts need not be encoded to be refused.
MAX_LETTERS_OF_TOKEN = 128
TOO_LONG = "context_length_exceeded"


@dataclass(frozen=True)
class AskedPictures:
    """The pictures that an answer's boxes can lie in: those of the last question that has some.

    Attributes:
        question: text of the last question.
        sizes: (width, height) of each.
        first: how many pictures of the request come before them.
    """

    question: str
    sizes: tuple[tuple[int, int], ...]
    first: int

    def find_boxes(self, answer: str) -> tuple[list[dict[str, Any]], list[str]]:
        """Reads the boxes of an answer.

        Returns:
            Boxes as label, `box` (0..999), `pixels` and `picture`, which is counted over the request from 1; and a
            sentence on everything that is malformed.
        """
        if not self.sizes:
            return [], read_grounding(answer).problems
        owned, problems = assign_boxes(answer, self.question, len(self.sizes))
        boxes = [{"picture": self.first + picture + 1, **box.to_dict(self.sizes[picture])} for picture, box in owned]
        return boxes, problems


@dataclass(frozen=True)
class Prompt:
    """A prompt for the model, and what is needed to understand the answer."""

    inputs: VLChatProcessorOutput
    pictures: AskedPictures

    @property
    def num_image_tokens(self) -> int:
        """Tokens of the pictures."""
        return int(self.inputs.images_seq_mask.sum())


class PromptBuilder:
    """Builds prompts for one model.

    Args:
        loaded: the model.
        loader: loads the pictures.
    """

    def __init__(self, loaded: LoadedModel, loader: PictureLoader) -> None:
        self._processor: DeepseekVLV2Processor = loaded.processor
        self._config = loaded.model.config.language_config
        self._loader = loader

    def check(self, messages: Sequence[Message]) -> None:
        """Refuses what can be refused without loading a picture.

        Raises:
            ApiError: the messages do not make a question that this model can be asked.
        """
        _check_order(messages)
        limit = self._loader.limits.max_pictures
        count = sum(1 for _ in _picture_parts(messages))
        if count > limit:
            raise bad_request(f"{count} pictures are too many: this server takes {limit} a request", "messages")
        details = {part.image_url.detail == "low" for _, part in _picture_parts(messages)}
        if len(details) > 1:
            raise bad_request("detail low is for all pictures of a request or for none", "messages")
        length = sum(len(_text(message)) for message in messages)
        if length > self._config.max_position_embeddings * MAX_LETTERS_OF_TOKEN:
            raise bad_request(f"the text has {length} letters, more than fit into the model", "messages", TOO_LONG)

    def build(self, messages: Sequence[Message], is_cancelled: threading.Event) -> Prompt:
        """Loads the pictures and encodes the prompt; takes its time.

        Args:
            messages: of the request.
            is_cancelled: looked at before each picture; set when nobody waits for the prompt any more.

        Raises:
            ApiError: a picture cannot be loaded, the prompt does not fit into the model, or it is cancelled.
        """
        deadline = self._loader.fetch_deadline()
        pictures = []
        for place, part in _picture_parts(messages):
            _go_on_unless(is_cancelled)
            pictures.append(self._load(place, part, deadline))
        _go_on_unless(is_cancelled)
        is_tiled = not any(part.image_url.detail == "low" for _, part in _picture_parts(messages))
        conversation = [*_joined(messages), {"role": "assistant", "content": ""}]
        sizes = [picture.size for picture in pictures]
        try:
            # Counted first: cutting pictures up for a prompt that does not fit would take long.
            check_prompt_length(self._processor.count_tokens(conversation, sizes, cropping=is_tiled), self._config)
        except ValueError as error:
            raise bad_request(str(error), "messages", TOO_LONG) from error
        inputs = self._processor.process_one(conversations=conversation, images=pictures, cropping=is_tiled)
        return Prompt(inputs, _asked_pictures(messages, sizes))

    def _load(self, place: str, part: ImagePart, deadline: float) -> Image.Image:
        try:
            return self._loader.load(part.image_url.url, deadline)
        except (ValueError, OSError) as error:
            raise bad_request(str(error), f"{place}.image_url.url", "invalid_image_url") from error


def _go_on_unless(is_cancelled: threading.Event) -> None:
    if is_cancelled.is_set():
        raise ApiError(CLIENT_CLOSED_REQUEST, "nobody waits for the answer any more", code="client_closed_request")


def _check_order(messages: Sequence[Message]) -> None:
    for index, message in enumerate(messages):
        if isinstance(message, SystemMessage) and index > 0:
            raise bad_request("only the first message can be one of the system", f"messages.{index}.role")
        if not isinstance(message, UserMessage) and IMAGE in _text(message):
            raise bad_request(f"only questions can hold {IMAGE}", f"messages.{index}.content")
        # Others may be empty: a history can hold an answer without a word.
        if isinstance(message, UserMessage) and not _marked_text(message, index).strip():
            raise bad_request("the message is empty", f"messages.{index}.content")
        if isinstance(message, AssistantMessage) and not (index and isinstance(messages[index - 1], UserMessage)):
            raise bad_request("an answer comes after a question", f"messages.{index}.role")
    if not isinstance(messages[-1], UserMessage):
        raise bad_request("the last message must be the user's", f"messages.{len(messages) - 1}.role")


def _picture_parts(messages: Sequence[Message]) -> Iterator[tuple[str, ImagePart]]:
    """Picture parts in order, each with its place in the request."""
    for index, message in enumerate(messages):
        if not isinstance(message.content, str):
            for number, part in enumerate(message.content):
                if isinstance(part, ImagePart):
                    yield f"messages.{index}.content.{number}", part


def _text(message: Message) -> str:
    """Text of a message, without its pictures."""
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content if not isinstance(part, ImagePart))


def _marked_text(message: Message, index: int) -> str:
    """Text with a mark for each picture: where the user has put the marks, else where the picture parts stand.

    Raises:
        ApiError: there are marks, but not as many as pictures.
    """
    text = _text(message)
    if isinstance(message.content, str):
        num_pictures = 0
    else:
        num_pictures = sum(isinstance(part, ImagePart) for part in message.content)
    if IMAGE in text:
        try:
            return place_image_marks(text, num_pictures)
        except ValueError as error:
            raise bad_request(str(error), f"messages.{index}.content") from error
    if isinstance(message.content, str):
        return text
    return content_text([part.model_dump() for part in message.content])


def _joined(messages: Sequence[Message]) -> list[dict[str, str]]:
    """The conversation for the processor; questions that follow one another are joined.

    An empty system message is left out.
    """
    conversation: list[dict[str, str]] = []
    for index, message in enumerate(messages):
        role = "system" if isinstance(message, SystemMessage) else message.role
        text = _marked_text(message, index)
        if role == "system" and not text.strip():
            continue
        if role == "user" and conversation and conversation[-1]["role"] == "user":
            conversation[-1]["content"] += "\n" + text
        else:
            conversation.append({"role": role, "content": text})
    return conversation


def _asked_pictures(messages: Sequence[Message], sizes: Sequence[tuple[int, int]]) -> AskedPictures:
    """Pictures of the last turn of the user that has some."""
    turns: list[list[UserMessage]] = [[]]
    for message in messages:
        if isinstance(message, UserMessage):
            turns[-1].append(message)
        elif turns[-1]:
            turns.append([])
    counts = [sum(1 for _ in _picture_parts(turn)) for turn in turns]
    last = max((number for number, count in enumerate(counts) if count), default=len(turns) - 1)
    first = sum(counts[:last])
    question = "\n".join(_text(message) for message in turns[-1])
    return AskedPictures(question, tuple(sizes[first : first + counts[last]]), first)
