"""Conversations to learn from: read from JSON lines, checked, encoded.

A line holds `{"conversations": [{"role": ..., "content": ..., "images": [...]}, ...]}` (or `"messages"`), in the forms
that the processor understands. Paths of pictures are relative to the file.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from deepseek_vl2.models import DeepseekV2Config, DeepseekVLV2Processor
from deepseek_vl2.models.chat_format import Speaker, content_text, speaker_of
from deepseek_vl2.models.generation import check_prompt_length
from deepseek_vl2.models.processing_deepseek_vl_v2 import VLChatProcessorOutput
from deepseek_vl2.models.processor_inputs import check_messages
from deepseek_vl2.serve.grounding import read_grounding
from deepseek_vl2.utils.data_files import parse_json, with_full_paths
from deepseek_vl2.utils.errors import describe_error
from deepseek_vl2.utils.io import load_pil_images

logger = logging.getLogger(__name__)

CONVERSATION_KEYS = ("conversations", "messages")


@dataclass(frozen=True)
class Sample:
    """A conversation to learn from.

    Attributes:
        source: file and line, for messages.
        messages: as the processor takes them; pictures by full path or address.
    """

    source: str
    messages: list[dict[str, Any]]


class ConversationEncoder:
    """Encodes conversations with the processor's own labels: answers and their end-of-sentence tokens only.

    Args:
        processor: of the model. It is not changed: published ones learn questions too unless told not to.
        language_config: of the model; says how many positions it has.
    """

    def __init__(self, processor: DeepseekVLV2Processor, language_config: DeepseekV2Config) -> None:
        self.processor = copy.copy(processor)
        self.processor.mask_prompt = True
        self.language_config = language_config

    def __call__(self, messages: Sequence[Mapping[str, Any]]) -> VLChatProcessorOutput:
        """Encodes one conversation.

        Raises:
            ValueError: the processor refuses it, or it has more tokens than the model has positions.
            OSError: a picture cannot be read.
        """
        images = load_pil_images(messages)
        encoded = self.processor.process_one(conversations=messages, images=images, inference_mode=False)
        check_prompt_length(len(encoded), self.language_config)
        return encoded


class UnusableSampleError(ValueError):
    """A conversation that cannot be encoded, by file and line.

    Args:
        message: the reason. Out of a process that prepares pictures torch raises the error anew with that process's
            whole trace, of which only the end is the reason.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].rstrip())


class ConversationDataset(Dataset[VLChatProcessorOutput]):
    """Samples, encoded when they are asked for."""

    def __init__(self, samples: Sequence[Sample], encoder: ConversationEncoder) -> None:
        self.samples = samples
        self.encoder = encoder

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> VLChatProcessorOutput:
        sample = self.samples[index]
        try:
            return self.encoder(sample.messages)
        except (ValueError, OSError) as error:
            raise UnusableSampleError(f"{sample.source}: {describe_error(error)}") from error


def read_samples(
    path: Path, encoder: ConversationEncoder, skip_bad: bool = False, check_samples: bool = True
) -> list[Sample]:
    """Reads and checks a file of conversations. Empty lines count for nothing.

    Args:
        path: JSON lines, UTF-8.
        encoder: encodes them later, and here for the check.
        skip_bad: whether to go on without the bad lines, which are logged.
        check_samples: whether to encode each conversation once. Without it only form, answers, boxes and the presence
            of pictures are checked.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is bad (all are named, with reasons and their number), or no line can be used.
    """
    samples: list[Sample] = []
    problems: list[str] = []
    with path.open("rb") as file, tqdm(total=path.stat().st_size, desc=f"Read {path.name}", unit="B") as bar:
        for number, line in enumerate(file, start=1):
            bar.update(len(line))
            if not line.strip():
                continue
            sample = f"{path}:{number}"
            try:
                samples.append(Sample(sample, parse_line(line, path.parent, encoder.processor)))
                if check_samples:
                    encoder(samples[-1].messages)
            except (ValueError, OSError) as error:
                if samples and samples[-1].source == sample:
                    samples.pop()
                problems.append(f"{sample}: {describe_error(error)}")
    total = len(samples) + len(problems)
    if not total:
        raise ValueError(f"{path} is empty: it holds no conversations")
    if problems:
        _report(path, problems, total, skip_bad and bool(samples))
    return samples


def _report(path: Path, problems: list[str], total: int, can_go_on: bool) -> None:
    count = f"{len(problems)} of {total} lines of {path} cannot be used"
    if can_go_on:
        logger.warning("%s\n%s; going on with the rest", "\n".join(problems), count)
        return
    way_out = "" if len(problems) == total else ", or go on without them: skip_bad: true (--skip-bad)"
    raise ValueError("\n".join([*problems, f"{count}; mend them{way_out}"]))


def parse_line(line: bytes, folder: Path, processor: DeepseekVLV2Processor) -> list[dict[str, Any]]:
    """Reads one conversation.

    Args:
        line: JSON, UTF-8.
        folder: what paths of pictures are relative to.
        processor: knows the roles.

    Returns:
        The messages with full paths.

    Raises:
        ValueError: it is no JSON or no conversation, there is no answer, an answer has no text or a malformed box.
        OSError: a picture is not there.
    """
    document = parse_json(line.rstrip())
    keys = [key for key in CONVERSATION_KEYS if isinstance(document, dict) and key in document]
    if len(keys) != 1:
        raise ValueError(f"the line must hold an object with one of the keys {', '.join(CONVERSATION_KEYS)}")
    messages = document[keys[0]]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{keys[0]!r} must be a list of messages with role and content")
    check_messages(messages)
    template = processor.new_chat_template()
    speakers = [speaker_of(message["role"], template) for message in messages]
    texts = [content_text(message.get("content"), processor.image_token).strip() for message in messages]
    if Speaker.ASSISTANT not in speakers:
        raise ValueError("the conversation has no answer to learn")
    for number, (speaker, text) in enumerate(zip(speakers, texts, strict=True)):
        if speaker is Speaker.ASSISTANT:
            _check_answer(text, number)
    return [with_full_paths(message, folder) for message in messages]


def _check_answer(text: str, number: int) -> None:
    if not text:
        raise ValueError(f"message {number} is an answer with no text")
    problems = read_grounding(text).problems
    if problems:
        raise ValueError(f"the answer in message {number} has malformed boxes: {'; '.join(problems)}")


def split_samples(samples: Sequence[Sample], eval_share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Deals samples out at random.

    Returns:
        Those to learn, and those to measure, at least one of each.

    Raises:
        ValueError: there are too few.
    """
    count = max(1, round(len(samples) * eval_share))
    if len(samples) <= count:
        raise ValueError(f"{len(samples)} conversation(s) cannot be split with eval_share: {eval_share}; give more")
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = set(order[:count])
    return (
        [sample for index, sample in enumerate(samples) if index not in chosen],
        [sample for index, sample in enumerate(samples) if index in chosen],
    )
