"""The requests that the server takes: the fields of the OpenAI chat protocol, and few of its own.

What would change an answer and is not supported is refused, never passed over. Fields that cannot change an answer
(`user`, `metadata`, ...) are taken and not used.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from deepseek_vl2.serve.api.errors import UNSUPPORTED

MAX_ANSWERS = 8
MAX_STOP_WORDS = 16
MAX_STOP_LENGTH = 256
DEFAULT_MAX_TOKENS = 512

# Not supported; these values mean that they are not asked for.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "skip_special_tokens": (False,),
}


def _encodable(text: str) -> str:
    """Refuses halves of surrogate pairs, which JSON can write and UTF-8 cannot."""
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise PydanticCustomError("bad_text", "the text holds half of a surrogate pair, which is no letter")
    return text


def _unsupported(name: str) -> PydanticCustomError:
    return PydanticCustomError(UNSUPPORTED, "{name} is not supported: leave it out", {"name": name})


def _may_block(moderation: Any) -> bool:
    """Whether a moderation could put something else in the answer's place; scores beside it cannot."""
    policy = moderation.get("policy") if isinstance(moderation, dict) else None
    rules = policy.values() if isinstance(policy, dict) else ()
    return any(isinstance(rule, dict) and rule.get("mode") == "block" for rule in rules)


Text = Annotated[str, AfterValidator(_encodable)]
StopWord = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH), AfterValidator(_encodable)]


def _text_or_list(value: Any) -> str:
    """Which alternative a value is meant for, so that errors are about that one."""
    return "list" if isinstance(value, list) else "text"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ImageUrl(_Strict):
    """A picture: `https:` address or data URI; `detail` low shows the model one view, all else tiles."""

    url: Text
    detail: Literal["auto", "low", "high", "original"] = "auto"


class TextPart(_Strict):
    """A part of a message: text."""

    type: Literal["text"]
    text: Text
    prompt_cache_breakpoint: Any = None


class ImagePart(_Strict):
    """A part of a message: a picture."""

    type: Literal["image_url"]
    image_url: ImageUrl
    prompt_cache_breakpoint: Any = None


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
TextContent = Annotated[
    Annotated[Text, Tag("text")] | Annotated[list[TextPart], Tag("list")], Discriminator(_text_or_list)
]
Content = Annotated[Annotated[Text, Tag("text")] | Annotated[list[Part], Tag("list")], Discriminator(_text_or_list)]
StopWords = Annotated[
    Annotated[StopWord, Tag("text")] | Annotated[list[StopWord], Field(max_length=MAX_STOP_WORDS), Tag("list")],
    Discriminator(_text_or_list),
]


class SystemMessage(_Strict):
    """Instructions; the first message only."""

    role: Literal["system", "developer"]
    content: TextContent
    name: Text | None = None


class UserMessage(_Strict):
    """A question, with its pictures."""

    role: Literal["user"]
    content: Content
    name: Text | None = None


class AssistantMessage(_Strict):
    """An earlier answer, also as the server or the official client gave it: only its text is read."""

    role: Literal["assistant"]
    content: TextContent
    name: Text | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None
    boxes: list[Any] | None = None
    box_problems: list[Any] | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Strict):
    """How an answer is streamed."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(_Strict):
    """Body of `POST /v1/chat/completions`."""

    model: Text
    messages: Annotated[list[Message], Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int | None, Field(ge=1, le=2**31 - 1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=2**31 - 1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2, description="0 (default): the likeliest token")] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=0, le=2**31 - 1, description="0: all tokens")] = None
    repetition_penalty: Annotated[float | None, Field(ge=0.01, le=10)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), le=2**63 - 1)] = None
    n: Annotated[int | None, Field(ge=1, le=MAX_ANSWERS)] = None
    stop: StopWords | None = None

    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    skip_special_tokens: Any = None

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    moderation: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None

    @model_validator(mode="after")
    def _check(self) -> "ChatRequest":
        for name, neutral in _NEUTRAL.items():
            value = getattr(self, name)
            if value is not None and value not in neutral:
                raise _unsupported(name)
        if _may_block(self.moderation):
            raise _unsupported("moderation")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise PydanticCustomError("contradiction", "max_tokens and max_completion_tokens differ: give one of them")
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("contradiction", "stream_options needs stream: true")
        return self

    @property
    def max_new_tokens(self) -> int:
        """Most tokens of an answer."""
        return self.max_completion_tokens or self.max_tokens or DEFAULT_MAX_TOKENS

    @property
    def stop_words(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ErrorContent(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Body of every response with a status from 400 on."""

    error: ErrorContent
