"""A model that answers items: the part that every engine shares."""

import hashlib
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from deepseek_vl2.batch.items import Item
from deepseek_vl2.batch.preparing import BatchLimits, PreparedItem, Preparer, read_ahead
from deepseek_vl2.batch.records import answer_record, error_record
from deepseek_vl2.models.generation import check_chunk_size
from deepseek_vl2.serve.batch_generation import answer_batch
from deepseek_vl2.serve.row_sampling import Sampling
from deepseek_vl2.utils.io import LoadedModel, load_pretrained_model


@dataclass(frozen=True)
class ModelOptions:
    """What is loaded, and where; see `load_pretrained_model`."""

    model_path: str = "nano"
    dtype: str | None = None
    device: str = "auto"
    adapter: str | None = None
    quantize: str | None = None

    def load(self) -> LoadedModel:
        """Loads the model.

        Raises:
            OSError: it is not there.
            ValueError: an option does not fit.
            ImportError: an adapter is given and peft is not installed.
        """
        return load_pretrained_model(
            self.model_path, self.dtype, self.device, self.adapter, quantize=self.quantize, pack=True
        )


@dataclass(frozen=True)
class AnswerOptions:
    """How the model answers; see `deepseek_generate`. Each item is sampled with a seed of its own."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    seed: int = 0
    use_tiling: bool = True
    chunk_size: int = -1


class BatchAnswerer:
    """Answers items in batches.

    Args:
        loaded: model, processor and tokenizer.
        options: how it answers.
        limits: how much at a time.

    Raises:
        ValueError: if the size of chunks is none, or larger than the model's context.
    """

    def __init__(self, loaded: LoadedModel, options: AnswerOptions, limits: BatchLimits) -> None:
        self.model = loaded.model
        self.processor = loaded.processor
        self.options = options
        self.limits = limits
        config: Any = loaded.model.config.language_config
        check_chunk_size(options.chunk_size, config.max_position_embeddings)
        self.preparer = Preparer(loaded.processor, config, limits, options.max_new_tokens, options.use_tiling)

    def records(
        self, items: Iterable[Item], is_done: Callable[[int], bool]
    ) -> Generator[list[dict[str, Any]], None, None]:
        """Answers items, a batch at a time; those that are done are left out.

        Args:
            items: in order, from the beginning of a window on.
            is_done: whether the item of an index has a record.
        """
        batches = self.preparer.batches(items, is_done)
        with closing(read_ahead(batches, self.limits.num_ahead)) as prepared:
            for batch in prepared:
                yield [record for record in self._answer(batch) if not is_done(record["index"])]

    def _answer(self, batch: list[PreparedItem]) -> list[dict[str, Any]]:
        failed = [error_record(prepared) for prepared in batch if prepared.encoded is None]
        asked = [(prepared, prepared.encoded) for prepared in batch if prepared.encoded is not None]
        if not asked:
            return failed
        start = time.perf_counter()
        answers = answer_batch(
            self.model,
            self.processor,
            [encoded for _, encoded in asked],
            self.options.max_new_tokens,
            self.options.chunk_size,
            [self._sampling(prepared.item) for prepared, _ in asked],
        )
        seconds = (time.perf_counter() - start) / len(asked)
        answered = zip(asked, answers, strict=True)
        return failed + [answer_record(prepared, answer, seconds) for (prepared, _), answer in answered]

    def _sampling(self, item: Item) -> Sampling:
        options = self.options
        return Sampling(
            options.temperature,
            options.top_p,
            repetition_penalty=options.repetition_penalty,
            seed=item_seed(options.seed, item.index),
        )


def item_seed(seed: int, index: int) -> int:
    """The seed that an item is sampled with, 0 to 2**63 - 1.

    Args:
        seed: of the run.
        index: of the item.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:8], "big") >> 1
