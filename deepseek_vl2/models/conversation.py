"""Prompt templates of DeepSeek-VL2: how a list of turns becomes text."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum, auto
from typing import Any

from deepseek_vl2.models.special_tokens import ASSISTANT, EOS, IMAGE, USER


class SeparatorStyle(IntEnum):
    """How a template joins its turns."""

    DeepSeek = auto()
    DeepSeekV2 = auto()
    PLAIN = auto()
    ALIGNMENT = auto()


@dataclass
class Conversation:
    """A template and the turns that were put into it.

    A turn is `[role, message]`; an empty message stands for the answer that is asked for. Turns are separated by
    `sep` and `sep2` in alternation, so they are expected to alternate as well.
    """

    name: str
    system_template: str = "{system_message}"
    system_message: str = ""
    roles: tuple[str, str] = ("USER", "ASSISTANT")
    messages: Sequence[Any] = ()
    # Turns at the start that are examples, not shown in a chat window.
    offset: int = 0
    sep_style: SeparatorStyle = SeparatorStyle.DeepSeek
    sep: str = "\n"
    sep2: str | None = None
    stop_str: str | list[str] | None = None
    stop_token_ids: list[int] | None = field(default=None)

    def get_prompt(self) -> str:
        """Print the conversation as the text that the model reads.

        Raises:
            ValueError: `sep_style` is not one of `SeparatorStyle`.
        """
        if self.sep_style == SeparatorStyle.DeepSeek:
            return self._system_prefix() + "".join(
                f"{role}: {message}{self._separator(i)}" if message else f"{role}:"
                for i, (role, message) in enumerate(self.messages)
            )
        if self.sep_style == SeparatorStyle.DeepSeekV2:
            return self._system_prefix() + "".join(
                self._deepseek_v2_turn(role, message) for role, message in self.messages if message
            )
        if self.sep_style == SeparatorStyle.PLAIN:
            return "".join(
                _text_of(message) + self._separator(i) for i, (_, message) in enumerate(self.messages) if message
            )
        if self.sep_style == SeparatorStyle.ALIGNMENT:
            # Captioning: whatever the question says, the model sees the picture alone.
            return "".join(
                (f"{IMAGE}\n" if i % 2 == 0 else _text_of(message)) + self._separator(i)
                for i, (_, message) in enumerate(self.messages)
                if message
            )
        raise ValueError(
            f"unknown sep_style {self.sep_style!r}: take one of {[style.name for style in SeparatorStyle]}"
        )

    def set_system_message(self, system_message: str) -> None:
        """Replace the system message."""
        self.system_message = system_message

    def append_message(self, role: str, message: str | None) -> None:
        """Add a turn; a message of `None` or `""` asks for an answer."""
        self.messages = [*self.messages, [role, message]]

    def reset_message(self) -> None:
        """Remove every turn."""
        self.messages = []

    def update_last_message(self, message: str) -> None:
        """Fill in the last turn, which is usually appended empty and answered later.

        Raises:
            ValueError: there is no turn yet.
        """
        if not self.messages:
            raise ValueError("the conversation has no message to update: append one first")
        self.messages[-1][1] = message

    def to_gradio_chatbot(self) -> list[list[str | None]]:
        """List the turns as pairs [question, answer]; an open question has the answer `None`."""
        pairs: list[list[str | None]] = []
        for i, (_, message) in enumerate(self.messages[self.offset :]):
            if i % 2 == 0:
                pairs.append([message, None])
            else:
                pairs[-1][1] = message
        return pairs

    def to_openai_api_messages(self) -> list[dict[str, str]]:
        """List the turns as OpenAI chat messages, the system message first; an open answer is left out."""
        system = self.system_template.format(system_message=self.system_message)
        messages = [{"role": "system", "content": system}]
        for i, (_, message) in enumerate(self.messages[self.offset :]):
            if i % 2 == 0:
                messages.append({"role": "user", "content": message})
            elif message is not None:
                messages.append({"role": "assistant", "content": message})
        return messages

    def copy(self) -> "Conversation":
        """Copy the template with its turns, so that appending to one leaves the other alone."""
        return Conversation(
            name=self.name,
            system_template=self.system_template,
            system_message=self.system_message,
            roles=self.roles,
            messages=[[role, message] for role, message in self.messages],
            offset=self.offset,
            sep_style=self.sep_style,
            sep=self.sep,
            sep2=self.sep2,
            stop_str=self.stop_str,
            stop_token_ids=self.stop_token_ids,
        )

    def dict(self) -> dict[str, Any]:
        """Return name, system message, roles, turns and offset."""
        values = asdict(self)
        return {
            "template_name": values["name"],
            "system_message": values["system_message"],
            "roles": values["roles"],
            "messages": values["messages"],
            "offset": values["offset"],
        }

    def _system_prefix(self) -> str:
        system = self.system_template.format(system_message=self.system_message)
        return system + self.sep if system else ""

    def _separator(self, turn: int) -> str:
        return self.sep if turn % 2 == 0 else self.sep2 or ""

    def _deepseek_v2_turn(self, role: str, message: str) -> str:
        if role in ("User", self.roles[0]):
            return f"<｜sft▁begin｜>\n{message}{self.sep}"
        return f"{message}{self.sep2 or ''}"


def _text_of(message: Any) -> str:
    """Return the text of a turn, which may be stored as (text, picture, mode)."""
    return message[0] if isinstance(message, tuple) else message


_templates: dict[str, Conversation] = {}


def register_conv_template(template: Conversation, override: bool = False) -> None:
    """Make a template available under its name.

    Raises:
        ValueError: the name is taken and `override` is false.
    """
    if template.name in _templates and not override:
        raise ValueError(f"a template named {template.name!r} exists already: pass override=True to replace it")
    _templates[template.name] = template


def get_conv_template(name: str) -> Conversation:
    """Return a fresh copy of a registered template.

    Raises:
        ValueError: no template has this name.
    """
    if name not in _templates:
        raise ValueError(f"unknown template {name!r}: take one of {sorted(_templates)}")
    return _templates[name].copy()


register_conv_template(
    Conversation(
        name="deepseek",
        roles=(USER, ASSISTANT),
        sep_style=SeparatorStyle.DeepSeek,
        sep="\n\n",
        sep2=EOS,
        stop_token_ids=[100001],
        stop_str=["User:", EOS],
    )
)
register_conv_template(
    Conversation(
        name="deepseekv2",
        roles=("|<User>|", "|<Assistant>|"),
        sep_style=SeparatorStyle.DeepSeekV2,
        sep="\n<｜sft▁end｜>",
        sep2=EOS,
        stop_token_ids=[100001],
        stop_str=["User:", EOS],
    )
)
for _name, _style in (("plain", SeparatorStyle.PLAIN), ("alignment", SeparatorStyle.ALIGNMENT)):
    register_conv_template(
        Conversation(
            name=_name,
            system_template="",
            roles=("", ""),
            sep_style=_style,
            sep="",
            sep2="",
            stop_token_ids=[100001],
            stop_str=["</s>"],
        )
    )
