"""From items to batches: lengths first, then the pictures, both ahead of the model and in several threads."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from deepseek_vl2.batch.items import Item
from deepseek_vl2.batch.pictures import item_picture_size, load_item_picture
from deepseek_vl2.models import DeepseekV2Config, DeepseekVLV2Processor
from deepseek_vl2.models.generation import check_prompt_length
from deepseek_vl2.models.processing_deepseek_vl_v2 import VLChatProcessorOutput
from deepseek_vl2.utils.errors import describe_error

T = TypeVar("T")
_END = object()


@dataclass(frozen=True)
class BatchLimits:
    """How much is computed and held at a time. Answers do not depend on it.

    Attributes:
        batch_size: most questions of a batch.
        token_budget: most tokens of a batch, padding and room for the answers included. A question that is longer on
            its own is asked alone.
        window: so many items in a row are sorted by length together.
        num_readers: threads that read pictures.
        num_ahead: batches that are ready before the model asks for them.
    """

    batch_size: int = 8
    token_budget: int = 16384
    window: int = 128
    num_readers: int = 4
    num_ahead: int = 2


class PlannedItem(NamedTuple):
    """An item and the length of its question in tokens."""

    item: Item
    num_tokens: int


class PreparedItem(NamedTuple):
    """An item, encoded, with (width, height) of its pictures; or what is wrong with it."""

    item: Item
    encoded: VLChatProcessorOutput | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    problem: str = ""


def plan_batches(planned: Iterable[PlannedItem], limits: BatchLimits, max_new_tokens: int) -> list[list[PlannedItem]]:
    """Cuts items into batches of like length, the longest first: if memory is short, that shows at once.

    The same items always make the same batches.

    Args:
        planned: the items.
        limits: of a batch.
        max_new_tokens: room for each answer.
    """
    batches: list[list[PlannedItem]] = []
    for entry in sorted(planned, key=lambda entry: (-entry.num_tokens, entry.item.index)):
        longest = batches[-1][0].num_tokens if batches else 0
        num_rows = len(batches[-1]) + 1 if batches else 0
        fits = num_rows <= limits.batch_size and num_rows * (longest + max_new_tokens) <= limits.token_budget
        if batches and fits:
            batches[-1].append(entry)
        else:
            batches.append([entry])
    return batches


class Preparer:
    """Makes batches of items for a model.

    Args:
        processor: of the model.
        config: of its language model; says how many positions it has.
        limits: of a batch.
        max_new_tokens: room for each answer.
        use_tiling: whether pictures are cut into tiles.
    """

    def __init__(
        self,
        processor: DeepseekVLV2Processor,
        config: DeepseekV2Config,
        limits: BatchLimits,
        max_new_tokens: int,
        use_tiling: bool = True,
    ) -> None:
        self.processor = processor
        self.config = config
        self.limits = limits
        self.max_new_tokens = max_new_tokens
        self.use_tiling = use_tiling

    def batches(
        self, items: Iterable[Item], is_done: Callable[[int], bool]
    ) -> Generator[list[PreparedItem], None, None]:
        """Batches of windows of items, in order of the windows. Those of which all is done are left out.

        Args:
            items: in order, from the beginning of a window on.
            is_done: whether the item of an index needs no answer any more. It stays in its batch, for the batches to be
                the same as in a run that was not stopped.
        """
        remaining = iter(items)
        with ThreadPoolExecutor(self.limits.num_readers, thread_name_prefix="deepseek_vl2-reader") as readers:
            while window := list(islice(remaining, self.limits.window)):
                if all(is_done(item.index) for item in window):
                    continue
                measured = list(readers.map(self._measure, window))
                planned = [entry for entry in measured if isinstance(entry, PlannedItem)]
                failed = [entry for entry in measured if isinstance(entry, PreparedItem)]
                if failed:
                    yield failed
                for batch in plan_batches(planned, self.limits, self.max_new_tokens):
                    if not all(is_done(entry.item.index) for entry in batch):
                        yield list(readers.map(self._encode, [entry.item for entry in batch]))

    def _measure(self, item: Item) -> PlannedItem | PreparedItem:
        if item.problem:
            return PreparedItem(item, problem=item.problem)
        try:
            sizes = [item_picture_size(picture) for picture in item.pictures]
            num_tokens = self.processor.count_tokens(item.messages, sizes, cropping=self.use_tiling)
            check_prompt_length(num_tokens, self.config)
        except (ValueError, OSError) as error:
            return PreparedItem(item, problem=describe_error(error))
        return PlannedItem(item, num_tokens)

    def _encode(self, item: Item) -> PreparedItem:
        try:
            pictures = [load_item_picture(picture) for picture in item.pictures]
            encoded = self.processor.process_one(conversations=item.messages, images=pictures, cropping=self.use_tiling)
            check_prompt_length(len(encoded), self.config)
        except (ValueError, OSError) as error:
            return PreparedItem(item, problem=describe_error(error))
        return PreparedItem(item, encoded, tuple(picture.size for picture in pictures))


def read_ahead(source: Generator[T, None, None], num_ahead: int) -> Generator[T, None, None]:
    """Goes through a generator in a thread of its own, a bounded number of entries ahead.

    Args:
        source: closed at the end, and when its reader stops early.
        num_ahead: most entries that wait to be taken.
    """
    waiting: queue.Queue[Any] = queue.Queue(max(num_ahead, 1))
    is_stopped = threading.Event()

    def put(entry: Any) -> None:
        while not is_stopped.is_set():
            try:
                waiting.put(entry, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            with closing(source):
                for entry in source:
                    put(entry)
                    if is_stopped.is_set():
                        return
        finally:
            put(_END)

    with ThreadPoolExecutor(1, thread_name_prefix="deepseek_vl2-read-ahead") as executor:
        future = executor.submit(work)
        try:
            while (entry := waiting.get()) is not _END:
                yield entry
            future.result()  # raises what the source has raised
        finally:
            is_stopped.set()
