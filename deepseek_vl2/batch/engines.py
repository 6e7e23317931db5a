"""Where a run is computed: in this process, or by workers of a Ray cluster. The records are the same."""

from collections.abc import Iterator
from dataclasses import dataclass

from tqdm.auto import tqdm

from deepseek_vl2.batch.answering import AnswerOptions, BatchAnswerer, ModelOptions
from deepseek_vl2.batch.preparing import BatchLimits
from deepseek_vl2.batch.record_file import RecordFile
from deepseek_vl2.batch.sources import Source
from deepseek_vl2.utils.hardware import use_chosen_num_threads


@dataclass(frozen=True)
class Job:
    """All that a process needs to know to answer items."""

    source: Source
    model: ModelOptions
    options: AnswerOptions
    limits: BatchLimits

    def answerer(self) -> BatchAnswerer:
        """Loads the model, with the number of threads that suits this process.

        Raises:
            OSError: it is not there.
            ValueError: an option does not fit.
        """
        use_chosen_num_threads()
        return BatchAnswerer(self.model.load(), self.options, self.limits)


def open_windows(job: Job, file: RecordFile) -> Iterator[range]:
    """The windows of a job in which an item has no record yet, as ranges of indices."""
    for start in range(0, len(file), job.limits.window):
        window = range(start, min(start + job.limits.window, len(file)))
        if not all(map(file.is_done, window)):
            yield window


def progress_bar(file: RecordFile) -> tqdm:
    """A bar with rate and time left, for the items that are still to be answered."""
    return tqdm(total=len(file), initial=file.num_done, desc="Answer", unit="item")


def run_here(job: Job, file: RecordFile) -> None:
    """Answers in this process what has no record yet.

    Raises:
        OSError: the model is not there, or a record cannot be written.
        ValueError: an option does not fit.
        MemoryError: a batch is too large. So is `torch.OutOfMemoryError`.
    """
    first = next(open_windows(job, file), None)
    if first is None:
        return
    answerer = job.answerer()
    with progress_bar(file) as bar:
        for records in answerer.records(job.source.items(first.start, len(file)), file.is_done):
            file.append(records)
            bar.update(len(records))
