"""Readers of the files that benchmarks are published as. All give `Sample`s, and say what is wrong with the rest."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from deepseek_vl2.evaluate.readers.common import BOX_FORMATS, BoxFormat, ReadOptions, json_lines
from deepseek_vl2.evaluate.readers.conversations import conversation_sample
from deepseek_vl2.evaluate.readers.lmms_eval import lmms_eval_sample
from deepseek_vl2.evaluate.readers.refcoco import list_entries, list_sample, refs_entries, refs_sample
from deepseek_vl2.evaluate.readers.tsv import tsv_entries, tsv_sample
from deepseek_vl2.evaluate.samples import BadEntry, Sample

__all__ = ["BOX_FORMATS", "FORMATS", "BoxFormat", "ReadResult", "choose_format", "read_samples"]


@dataclass(frozen=True)
class Reader:
    """A format: how a file is cut into entries, and how an entry becomes a sample."""

    entries: Callable[[Path], Iterable[tuple[str, Any]]]
    build: Callable[[Any, str, ReadOptions], Sample]


FORMATS: Mapping[str, Reader] = MappingProxyType(
    {
        "tsv": Reader(tsv_entries, tsv_sample),
        "conversations": Reader(json_lines, conversation_sample),
        "lmms_eval": Reader(json_lines, lmms_eval_sample),
        "refcoco_list": Reader(list_entries, list_sample),
        "refcoco_refs": Reader(refs_entries, refs_sample),
    }
)
_BY_SUFFIX = {".tsv": "tsv", ".jsonl": "conversations"}


class ReadResult(NamedTuple):
    """What a file holds: samples in its order, and entries that cannot be used."""

    samples: list[Sample]
    problems: list[BadEntry]


def choose_format(path: Path, name: str | None = None) -> str:
    """The format by its name, else by the file's ending.

    Raises:
        ValueError: an unknown name, or an ending that does not say it.
    """
    chosen = _BY_SUFFIX.get(path.suffix.lower(), "") if name is None else name
    if chosen not in FORMATS:
        raise ValueError(f"what kind of file is {path}? Say it with --format: {', '.join(FORMATS)}")
    return chosen


def read_samples(
    path: Path,
    format_name: str,
    prepare: Callable[[Sample], Sample],
    picture_root: Path | None = None,
    box_format: BoxFormat | None = None,
    limit: int | None = None,
) -> ReadResult:
    """Reads a file and opens every picture in it, so that nothing is found wrong later.

    Args:
        path: the file.
        format_name: key of `FORMATS`.
        prepare: sample -> sample as it is asked about; refuses some by a ValueError; see `Task.prepare`.
        picture_root: what paths of pictures are relative to; by default the file's folder.
        box_format: of `refcoco_list` files that do not say it.
        limit: stop after so many samples.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not of this format at all, or empty.
    """
    reader = FORMATS[format_name]
    options = ReadOptions(path.parent if picture_root is None else picture_root, box_format)
    samples: dict[str, Sample] = {}
    problems: list[BadEntry] = []
    for where, entry in tqdm(reader.entries(path), desc=f"Read {path.name}", unit="entry"):
        try:
            sample = prepare(reader.build(entry, where, options))
            if sample.id in samples:
                raise ValueError(f"the id {sample.id!r} is that of {samples[sample.id].where}, too")
        except (ValueError, OSError) as error:
            problems.append(BadEntry(where, " ".join(str(error).split())))
            continue
        samples[sample.id] = sample
        if len(samples) == limit:
            break
    if not samples and not problems:
        raise ValueError(f"{path} is empty: it holds no questions")
    return ReadResult(list(samples.values()), problems)
