"""The benchmarks by name: how each is asked, judged and summed up.

Prompts are those of the authors' figures: the forms in which VLMEvalKit asks DeepSeek-VL2 (its `ImageVQADataset`,
`ImageMCQDataset`, `OCRBench` and its wrapper of the model), and for referring expressions the form of the model's own
README.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from deepseek_vl2.evaluate import metrics
from deepseek_vl2.evaluate.judges import (
    Judge,
    judge_box,
    judge_boxes,
    judge_choice,
    judge_exact_match,
    judge_ocrbench,
    judge_text,
)
from deepseek_vl2.evaluate.samples import Sample
from deepseek_vl2.models.special_tokens import ASSISTANT, IMAGE, REF_END, REF_START, USER

MAX_NEW_TOKENS = 512
_NUMBERED_PICTURE = re.compile(r"<image (\d+)>")
MIN_HUMAN_ANSWERS = metrics.VQA_FULL_AGREEMENT + 1

_SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
_SELECT = "Please select the correct answer from the options above."
_LETTER = (
    "Answer with the option's letter from the given choices directly. "
    "Answer the question using a single word or phrase.\n"
)


def ask_plainly(sample: Sample) -> str:
    """The question as it stands."""
    return _with_pictures(sample, sample.question)


def ask_shortly(sample: Sample) -> str:
    """The question, and to answer in a word or phrase."""
    return _with_pictures(sample, sample.question + _SHORT_ANSWER)


def ask_to_locate(sample: Sample) -> str:
    """A referring expression inside ref marks."""
    return _with_pictures(sample, f"{REF_START}{sample.question}{REF_END}.")


def ask_to_choose(sample: Sample) -> str:
    """Hint, question and options by letter."""
    return _with_pictures(sample, _choice_text(sample))


def as_it_stands(sample: Sample) -> Sample:
    """The sample itself."""
    return sample


def in_order_of_mention(sample: Sample) -> Sample:
    """The sample with the pictures that its texts name, one for each time, in this order and counted anew.

    So VLMEvalKit asks MMMU (its `split_MMMU`). A sample whose texts name none keeps all.

    Raises:
        ValueError: a picture is named that is not there.
    """
    order: list[int] = []

    def count_anew(match: re.Match[str]) -> str:
        order.append(int(match[1]) - 1)
        return f"<image {len(order)}>"

    def renumber(text: str) -> str:
        return _NUMBERED_PICTURE.sub(count_anew, text)

    # The order in which the prompt has them.
    hint, question = renumber(sample.hint), renumber(sample.question)
    options = {letter: renumber(option) for letter, option in sample.options.items()}
    wrong = [number + 1 for number in order if not 0 <= number < len(sample.pictures)]
    if wrong:
        raise ValueError(f"<image {wrong[0]}> is named, and there are {len(sample.pictures)} picture(s)")
    if not order:
        return sample
    pictures = tuple(sample.pictures[number] for number in order)
    sizes = tuple(sample.sizes[number] for number in order)
    return replace(sample, hint=hint, question=question, options=options, pictures=pictures, sizes=sizes)


def ask_mmmu(sample: Sample) -> str:
    """Options by letter; pictures stand in front, the text names them `<image 1>`, `<image 2>`, ..."""
    text = _choice_text(sample).replace(_SELECT, _LETTER).replace("Question:", "").replace("Options:\n", "")
    if "<image " not in text:
        text = "".join(f"<image {number}>" for number in range(1, len(sample.pictures) + 1)) + text
    return IMAGE * len(sample.pictures) + "\n" + text


def _choice_text(sample: Sample) -> str:
    hint = f"Hint: {sample.hint}\n" if sample.hint else ""
    options = "".join(f"{letter}. {option}\n" for letter, option in sample.options.items())
    return f"{hint}Question: {sample.question}\nOptions:\n{options}{_SELECT} \n"


def _with_pictures(sample: Sample, text: str) -> str:
    return text if IMAGE in text else f"{IMAGE}\n" * len(sample.pictures) + text


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        metric: name of its score.
        ask: sample -> text of the user.
        judge: sample and answer -> judgement.
        needs: what a sample must have: "answers", "people" (so many answers that they can agree), "box" (one), "boxes"
            or "options".
        needs_picture: whether every sample must have one.
        arrange: sample -> sample as it is asked about; may raise a ValueError.
        picture_scale: by how much the first picture is enlarged; VLMEvalKit doubles that of MMMU.
        is_circular: whether a question may be there several times, its options in another order; it is right if all
            are (MMBench's CircularEval).
    """

    metric: str
    ask: Callable[[Sample], str]
    judge: Judge
    needs: str = "answers"
    needs_picture: bool = True
    arrange: Callable[[Sample], Sample] = as_it_stands
    picture_scale: int = 1
    is_circular: bool = False

    def prepare(self, sample: Sample) -> Sample:
        """The sample as it is asked about.

        Raises:
            ValueError: see `check` and `arrange`.
        """
        self.check(sample)
        return self.arrange(sample)

    def check(self, sample: Sample) -> None:
        """Refuses a sample that this task cannot judge.

        Raises:
            ValueError: something that `needs` names is missing, or the picture.
        """
        if self.needs_picture and not sample.pictures:
            raise ValueError(
                "no picture (image, image_path, images, or image_1, image_2, ...), and this task asks about one; "
                "lmms-eval's --log_samples leaves such fields out: put them back into doc"
            )
        if self.needs == "box" and (sample.boxes is None or len(sample.boxes) != 1):
            raise ValueError(f"one expected box is needed, there are {len(sample.boxes or ())}")
        if self.needs == "boxes" and sample.boxes is None:
            raise ValueError("no expected boxes ('boxes'; an empty list where nothing should be found)")
        if self.needs in ("box", "boxes"):
            return
        if not sample.answers:
            raise ValueError("no answer to compare with")
        if not any(answer.strip() for answer in sample.answers):
            raise ValueError("the answer to compare with has no text")
        if self.needs == "people" and len(sample.answers) < MIN_HUMAN_ANSWERS:
            raise ValueError(
                f"{len(sample.answers)} answers: agreement with people needs at least {MIN_HUMAN_ANSWERS} of them"
            )
        if self.needs == "options":
            _check_choice(sample)

    def messages(self, sample: Sample, pictures: list[Any]) -> list[dict[str, Any]]:
        """The conversation that waits for the answer.

        Args:
            sample: the question.
            pictures: its pictures, loaded.
        """
        if not sample.messages:
            question = {"role": USER, "content": self.ask(sample), "images": pictures}
            return [question, {"role": ASSISTANT, "content": ""}]
        messages, rest = [], list(pictures)
        for message in sample.messages:
            number = len(message.get("images") or ())
            messages.append({"role": message["role"], "content": message["content"], "images": rest[:number]})
            rest = rest[number:]
        return [*messages, {"role": ASSISTANT, "content": ""}]


def _check_choice(sample: Sample) -> None:
    if len(sample.options) < 2:
        raise ValueError(f"{len(sample.options)} option(s): multiple choice needs at least 2")
    unknown = [answer for answer in sample.answers if answer not in sample.options]
    if unknown:
        raise ValueError(f"the answer {unknown[0]!r} is none of the options' letters {', '.join(sample.options)}")


_CHOICE = Task("accuracy", ask_to_choose, judge_choice, "options")
_ANLS = Task("ANLS", ask_shortly, judge_text(metrics.anls))

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "refcoco": Task("Acc@0.5 IoU", ask_to_locate, judge_box, "box"),
        "grounding_f1": Task("F1 at IoU 0.5", ask_to_locate, judge_boxes, "boxes"),
        "docvqa": _ANLS,
        "infovqa": _ANLS,
        "chartqa": Task("relaxed accuracy", ask_shortly, judge_text(metrics.relaxed_accuracy)),
        "textvqa": Task("VQA accuracy", ask_shortly, judge_text(metrics.vqa_accuracy), "people"),
        "ocrbench": Task("containment", ask_plainly, judge_ocrbench),
        "mmmu": Task("accuracy", ask_mmmu, judge_choice, "options", arrange=in_order_of_mention, picture_scale=2),
        "ai2d": _CHOICE,
        "mmbench": replace(_CHOICE, is_circular=True),
        "mmstar": _CHOICE,
        "exact_match": Task("exact match", ask_plainly, judge_exact_match, needs_picture=False),
    }
)
