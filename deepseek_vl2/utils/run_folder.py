"""The folder of a run that may be stopped at any moment: its settings, and its records line by line.

A record is a line of JSON that is on the disk before the next is computed. What a stop leaves of a line is cut off when
the run goes on, and settings that would give other records are refused.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

try:
    import fcntl
except ModuleNotFoundError:  # on Windows
    fcntl = None  # type: ignore[assignment]

from deepseek_vl2.utils.data_files import write_whole
from deepseek_vl2.utils.errors import naming_file
from deepseek_vl2.utils.io import resolve_model_path

SETTINGS_FILE = "settings.json"
LOCK_FILE = "lock"
# Of larger files of a checkpoint (the weights) blocks count that lie evenly in them, from the first bytes to the last:
# reading all would take as long as loading. Many small ones, so that training one part of the model is seen, too.
_NUM_BLOCKS = 1024
_BLOCK_BYTES = 4096
_CARD_SUFFIXES = {".md", ".png", ".jpg", ".jpeg"}


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path) -> str:
    """SHA-256 over names, sizes and content of a checkpoint's files; of those above 4 MiB, over a sample of it.

    A model card and its pictures change nothing about answers and do not count.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file() and path.suffix not in _CARD_SUFFIXES):
        size = path.stat().st_size
        content = file_digest(path) if size <= _NUM_BLOCKS * _BLOCK_BYTES else _sampled_digest(path, size)
        digest.update(f"{path.name}\n{size}\n{content}\n".encode())
    return digest.hexdigest()


def _sampled_digest(path: Path, size: int) -> str:
    """SHA-256 over blocks of a file that lie evenly in it."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for number in range(_NUM_BLOCKS):
            file.seek(number * (size - _BLOCK_BYTES) // (_NUM_BLOCKS - 1))
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def model_digest(model_path: str) -> str | None:
    """Digest of a model's folder; `None` for a name on the hub.

    Raises:
        OSError: there is no such folder.
    """
    folder = Path(resolve_model_path(model_path))
    return folder_digest(folder) if folder.is_dir() else None


def begin_or_resume(folder: Path, settings: Mapping[str, Any], records_name: str) -> None:
    """Notes the settings of a new run; checks those of one that goes on.

    Args:
        folder: made if it is not there.
        settings: what decides about the records, as JSON can hold it.
        records_name: file of the records in the folder.

    Raises:
        ValueError: the folder holds a run with other settings (they are named), or records without settings.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS_FILE
    if not path.exists():
        if (folder / records_name).exists():
            raise ValueError(f"{folder} has {records_name} but no {SETTINGS_FILE}; take another folder")
        write_whole(path, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        return
    try:
        before = _parse_object(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); take another folder") from error
    names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if names:
        changes = "; ".join(f"{name} was {before.get(name)!r}, is {settings.get(name)!r}" for name in names)
        raise ValueError(
            f"{folder} holds a run with other settings: {changes}. Take another folder, or the same settings"
        )


def _parse_object(text: bytes) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"no object, but {value!r:.40}")
    return value


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keeps a second run out of a folder. The system gives the folder free when the process ends, however it does.

    On Windows, which has no such locks, it does not.

    Args:
        folder: made if it is not there.

    Raises:
        BlockingIOError: another run is at work in it.
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    path = folder / LOCK_FILE
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise BlockingIOError(
                f"another run is at work in {folder} (process {owner}); wait for its end, or take another output"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def append_records(file: FileIO, records: Iterable[Mapping[str, Any]]) -> list[int]:
    """Writes records as lines of JSON, and waits until they are on the disk.

    Args:
        file: opened with `mode="ab", buffering=0`: what could not be written must not be tried again when it is closed.
        records: as JSON can hold them.

    Returns:
        Length of each line in bytes.

    Raises:
        OSError: they cannot be written; the file is named.
    """
    lines = [(json.dumps(record, ensure_ascii=False) + "\n").encode() for record in records]
    content = memoryview(b"".join(lines))
    with naming_file(Path(str(file.name))):
        while content:
            content = content[file.write(content) :]
        os.fsync(file.fileno())
    return [len(line) for line in lines]


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads records; a last line without an end is cut off the file first.

    Args:
        path: file of the records; need not be there.

    Yields:
        Where the record's line begins (bytes), and the record.

    Raises:
        ValueError: a line is damaged.
        OSError: the file cannot be read or written.
    """
    if not path.exists():
        return
    with path.open("r+b") as file:
        start = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                file.truncate(start)
                return
            try:
                yield start, _parse_object(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is damaged ({error}); take another folder") from error
            start += len(line)
