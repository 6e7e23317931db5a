"""The folder of a run: its settings, and its predictions line by line, so that a stopped run goes on where it was."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_vl2.evaluate.samples import Sample
from deepseek_vl2.utils.data_files import write_whole

SETTINGS_FILE = "settings.json"
PREDICTIONS_FILE = "predictions.jsonl"
# Of larger files of a checkpoint (the weights) only name and size count: reading them would take as long as loading.
_MAX_DIGESTED_BYTES = 2**20


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path) -> str:
    """SHA-256 over names and sizes of a checkpoint's files, and over the content of the small ones."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        size = path.stat().st_size
        content = file_digest(path) if size <= _MAX_DIGESTED_BYTES else ""
        digest.update(f"{path.name}\n{size}\n{content}\n".encode())
    return digest.hexdigest()


def begin_or_resume(folder: Path, settings: Mapping[str, Any]) -> None:
    """Notes the settings of a new run; checks those of one that goes on.

    Raises:
        ValueError: the folder holds a run with other settings (they are named), or predictions without settings.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS_FILE
    if not path.exists():
        if (folder / PREDICTIONS_FILE).exists():
            raise ValueError(f"{folder} has {PREDICTIONS_FILE} but no {SETTINGS_FILE}; take another folder")
        write_whole(path, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); take another folder") from error
    names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if names:
        changes = "; ".join(f"{name} was {before.get(name)!r}, is {settings.get(name)!r}" for name in names)
        raise ValueError(
            f"{folder} holds a run with other settings: {changes}. Take another folder, or the same settings"
        )


def read_predictions(folder: Path, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Reads what is there, in the samples' order; a last line without an end is cut off the file.

    Raises:
        ValueError: a line is damaged, or belongs to no or another sample.
    """
    path = folder / PREDICTIONS_FILE
    if not path.exists():
        return []
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with path.open("r+b") as file:
            file.truncate(end)
    records = list(_records(path, content[:end]))
    expected = [sample.id for sample in samples[: len(records)]]
    if [record.get("id") for record in records] != expected:
        raise ValueError(f"the lines of {path} do not belong to the samples of the data file; take another folder")
    return records


def _records(path: Path, content: bytes) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is damaged ({error}); take another folder") from error
