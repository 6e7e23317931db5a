"""Asks the model: samples in batches, greedily; every answer is judged and written at once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from deepseek_vl2.evaluate.predictions import PREDICTIONS_FILE, read_predictions
from deepseek_vl2.evaluate.samples import BadEntry, Sample
from deepseek_vl2.evaluate.tasks import Task
from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.models.generation import check_chunk_size, check_prompt_length
from deepseek_vl2.models.processing_deepseek_vl_v2 import VLChatProcessorOutput
from deepseek_vl2.serve.batch_generation import answer_batch
from deepseek_vl2.utils.io import load_image
from deepseek_vl2.utils.run_folder import append_records


class Asker:
    """A model with the settings that a run asks it with.

    Args:
        processor: the model's.
        config: the model's.
        load_model: gives the model; called when the first question is asked, so that a run in which all are answered
            goes without the weights.
        task: how samples are asked and judged.
        max_new_tokens: most tokens of an answer.
        chunk_size: tokens to prefill at once, -1 for all.
        use_tiling: whether pictures are cut into tiles. Without, each is its global view and one tile of the same size.

    Raises:
        ValueError: if `chunk_size` is none, or larger than the model's context.
    """

    def __init__(
        self,
        processor: DeepseekVLV2Processor,
        config: DeepseekVLV2Config,
        load_model: Callable[[], DeepseekVLV2ForCausalLM],
        task: Task,
        max_new_tokens: int,
        chunk_size: int = -1,
        use_tiling: bool = True,
    ) -> None:
        check_chunk_size(chunk_size, config.language_config.max_position_embeddings)
        self.processor = processor
        self.config = config
        self._load_model = load_model
        self.use_tiling = use_tiling
        self.task = task
        self.max_new_tokens = max_new_tokens
        self.chunk_size = chunk_size

    @cached_property
    def model(self) -> DeepseekVLV2ForCausalLM:
        """The model, loaded at the first use."""
        return self._load_model()

    def check(self, sample: Sample) -> None:
        """Refuses a question that cannot be asked. Needs no picture, only the sizes.

        Raises:
            ValueError: the processor refuses it, or it is longer than the model's positions.
        """
        sizes = [self._asked_size(size, number) for number, size in enumerate(sample.sizes)]
        num_tokens = self.processor.count_tokens(self.task.messages(sample, []), sizes, cropping=self.use_tiling)
        check_prompt_length(num_tokens, self.config.language_config)

    def encode(self, sample: Sample) -> VLChatProcessorOutput:
        """Encodes the question of a sample.

        Raises:
            ValueError: the processor refuses it.
            OSError: a picture is not there any more.
        """
        pictures = []
        for number, source in enumerate(sample.pictures):
            picture = load_image(source)
            size = self._asked_size(picture.size, number)
            pictures.append(picture if size == picture.size else picture.resize(size, Image.Resampling.BILINEAR))
        messages = self.task.messages(sample, pictures)
        return self.processor.process_one(conversations=messages, images=pictures, cropping=self.use_tiling)

    def _asked_size(self, size: tuple[int, int], number: int) -> tuple[int, int]:
        """Size in which the model is given a sample's picture."""
        scale = self.task.picture_scale if number == 0 else 1
        return size[0] * scale, size[1] * scale

    def answer(self, samples: Sequence[Sample]) -> list[str]:
        """Answers samples as one batch, special tokens of grounding kept."""
        prompts = [self.encode(sample) for sample in samples]
        answers = answer_batch(self.model, self.processor, prompts, self.max_new_tokens, self.chunk_size)
        return [answer.text for answer in answers]


def find_too_long(asker: Asker, samples: Sequence[Sample]) -> list[BadEntry]:
    """Checks every sample, so that a question without room in the model is found before the first is asked."""
    problems = []
    for sample in tqdm(samples, desc="Check lengths", unit="sample"):
        try:
            asker.check(sample)
        except ValueError as error:
            problems.append(BadEntry(sample.where, str(error)))
    return problems


def run(asker: Asker, samples: Sequence[Sample], folder: Path, batch_size: int) -> list[dict[str, Any]]:
    """Asks all samples that `folder` holds no answer to, and writes an answer as soon as it is there.

    Batches are the same in a run that was stopped, so that its file is that of one that was not.

    Returns:
        The records of all samples.

    Raises:
        ValueError: the file in `folder` belongs to other samples.
        OSError: it cannot be written.
    """
    records = read_predictions(folder, samples)
    with (
        (folder / PREDICTIONS_FILE).open("ab", buffering=0) as file,
        tqdm(total=len(samples), initial=len(records), desc="Ask", unit="sample") as bar,
    ):
        for record in _answers_after(len(records), asker, samples, batch_size):
            append_records(file, [record])
            records.append(record)
            bar.update()
    return records


def _answers_after(num_done: int, asker: Asker, samples: Sequence[Sample], batch_size: int) -> Iterator[dict[str, Any]]:
    for start in range(num_done - num_done % batch_size, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        answers = asker.answer(batch)
        for sample, answer in list(zip(batch, answers, strict=True))[max(num_done - start, 0) :]:
            yield make_record(sample, answer, asker.task)


def make_record(sample: Sample, answer: str, task: Task) -> dict[str, Any]:
    """One line of the predictions: the sample, the answer, and what it is worth."""
    judgement = task.judge(sample, answer)
    record: dict[str, Any] = {"id": sample.id, "category": sample.category, "answer": answer}
    if sample.split:
        record["split"] = sample.split
    record |= {
        "understood": judgement.understood,
        "is_readable": judgement.is_readable,
        "score": round(judgement.score, 6),
    }
    optional: Mapping[str, Any] = {
        "boxes": [[round(value, 2) for value in box] for box in judgement.boxes] or None,
        "iou": None if judgement.iou is None else round(judgement.iou, 6),
        "counts": judgement.counts,
    }
    return record | {name: value for name, value in optional.items() if value is not None}
