"""Writes checkpoints of random weights, of the published sizes and layout: `python -m benchmarks.checkpoints`.

They are written tensor by tensor, so that memory does not grow with the model.
"""

import json
import math
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from benchmarks.sized_tokenizers import build_tokenizer
from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2Processor
from deepseek_vl2.models.weight_headers import read_header
from deepseek_vl2.utils.checkpoint_files import INDEX_FILE, check_weight_files
from deepseek_vl2.utils.command_line import OneLineParser
from deepseek_vl2.utils.errors import describe_error
from deepseek_vl2.utils.model_size import PUBLISHED_SIZES, checkpoint_shapes, published_config

PROGRAM = "python -m benchmarks.checkpoints"
SHARD_BYTES = 2_000_000_000
BYTES_PER_NUMBER = 2  # bfloat16
# Keeps hidden states of random layers near 1: no overflow, and no answer that is always the same.
WEIGHT_STD = 0.02
# So many different random numbers. A prime: rows that repeat them start at other places, so no two rows are equal.
POOL_SIZE = 16_777_259
# Free bytes to leave on the disk.
DISK_RESERVE = 1_000_000_000
GB = 1e9

Shapes = dict[str, tuple[int, ...]]


def sized_config(size: str, num_layers: int | None = None) -> DeepseekVLV2Config:
    """The configuration of a published checkpoint, with only its first layers if wanted.

    Raises:
        ValueError: An unknown size, or more layers than it has or fewer than one.
    """
    config = published_config(size)
    all_layers = config.language_config.num_hidden_layers
    if num_layers is not None and not 1 <= num_layers <= all_layers:
        raise ValueError(f"--layers {num_layers} must be 1 to {all_layers} for {size}")
    config.language_config.num_hidden_layers = num_layers or all_layers
    return config


class RandomNumbers:
    """Random weights, cut from one pool of normal numbers, which is much faster than drawing billions."""

    def __init__(self, seed: int = 0, pool_size: int = POOL_SIZE) -> None:
        generator = torch.Generator().manual_seed(seed)
        pool = torch.randn(pool_size, generator=generator) * WEIGHT_STD
        self._pool = pool.bfloat16()
        self._place = 0

    def take(self, count: int) -> torch.Tensor:
        """The next numbers [count] in bfloat16; the pool begins again at its end."""
        pieces = []
        while count:
            piece = self._pool[self._place : self._place + count]
            pieces.append(piece)
            count -= len(piece)
            self._place = (self._place + len(piece)) % len(self._pool)
        return torch.cat(pieces)


def random_tensor(name: str, shape: tuple[int, ...], numbers: RandomNumbers) -> torch.Tensor:
    """A weight of sensible size in bfloat16: norms are 1, biases 0, the rest normal."""
    if name.endswith(("bias", "e_score_correction_bias")):
        return torch.zeros(shape, dtype=torch.bfloat16)
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    return numbers.take(math.prod(shape)).view(shape)


def split_into_shards(shapes: Shapes, shard_bytes: int = SHARD_BYTES) -> list[Shapes]:
    """Deals tensors, in order, to shards of at most so many bytes; a larger tensor has a shard of its own."""
    shards: list[Shapes] = [{}]
    size = 0
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * BYTES_PER_NUMBER
        if shards[-1] and size + num_bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += num_bytes
    return shards


def write_shard(file: Path, shapes: Shapes, numbers: RandomNumbers) -> None:
    """Writes one safetensors file of random bfloat16 weights, holding one tensor at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * BYTES_PER_NUMBER
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # numbers are aligned, as the format asks for
    unfinished = file.with_suffix(".unfinished")
    with unfinished.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            stream.write(random_tensor(name, shape, numbers).view(torch.int16).numpy().data)
    unfinished.replace(file)


def iterate_shards(config: DeepseekVLV2Config, folder: Path, shard_bytes: int = SHARD_BYTES) -> Iterator[Path]:
    """Writes shard after shard, and gives each away when it is whole: who has used it may delete it.

    The index comes before the shards. Shards that are there from an earlier run stay.
    """
    shards = split_into_shards(checkpoint_shapes(config), shard_bytes)
    files = [folder / f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    weight_map = {name: file.name for file, shapes in zip(files, shards, strict=True) for name in shapes}
    total = sum(math.prod(shape) for shapes in shards for shape in shapes.values()) * BYTES_PER_NUMBER
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
    for number, (file, shapes) in enumerate(zip(files, shards, strict=True)):
        if not _holds(file, shapes):
            write_shard(file, shapes, RandomNumbers(seed=number))
        yield file


def _holds(file: Path, shapes: Shapes) -> bool:
    """Whether a file from an earlier run is whole and has these tensors."""
    if not file.is_file():
        return False
    try:
        header = read_header(file)
    except ValueError:
        return False
    return {name: tuple(tensor["shape"]) for name, tensor in header.items()} == shapes


def check_disk(folder: Path, num_bytes: int) -> None:
    """Refuses a checkpoint that the disk has no room for; what is there from an earlier run counts as room.

    Raises:
        OSError: There is too little room.
    """
    written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free = shutil.disk_usage(folder).free + written
    if num_bytes + DISK_RESERVE > free:
        raise OSError(
            f"the checkpoint takes {num_bytes / GB:.1f} GB and {free / GB:.1f} GB are free in {folder}; "
            "choose another folder, or fewer layers"
        )


def write_processor(config: DeepseekVLV2Config, folder: Path) -> None:
    """Writes configuration, tokenizer and processor."""
    config.save_pretrained(folder)
    processor = DeepseekVLV2Processor(
        build_tokenizer(config.language_config),
        candidate_resolutions=config.candidate_resolutions,
        patch_size=config.vision_config.patch_size,
        downsample_ratio=config.projector_config.downsample_ratio,
    )
    processor.check_vocab(config.language_config.vocab_size)
    processor.save_pretrained(folder)


def write_checkpoint(config: DeepseekVLV2Config, folder: Path, shard_bytes: int = SHARD_BYTES) -> Path:
    """Writes a whole checkpoint of random weights; what an earlier run has finished stays.

    Returns:
        The folder.

    Raises:
        OSError: There is too little room on the disk.
        ImportError: The package with the tokenizer is not installed.
        ValueError: There is no tokenizer for this configuration, or another model is in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shapes = checkpoint_shapes(config)
    _check_folder(config, folder)
    check_disk(folder, sum(math.prod(shape) for shape in shapes.values()) * BYTES_PER_NUMBER)
    write_processor(config, folder)
    num_shards = len(split_into_shards(shapes, shard_bytes))
    for _ in tqdm(iterate_shards(config, folder, shard_bytes), total=num_shards, desc="Shards", disable=None):
        pass
    problems = check_weight_files(folder).problems
    if problems:
        raise OSError(f"the checkpoint in {folder} did not get whole: {'; '.join(problems)}")
    return folder


def _check_folder(config: DeepseekVLV2Config, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        return
    there: Any = DeepseekVLV2Config.from_pretrained(folder)
    for name in ("vision_config", "projector_config", "language_config"):
        if getattr(there, name).to_dict() != getattr(config, name).to_dict():
            raise ValueError(f"{folder} holds another model (its {name} differs); choose another folder or delete it")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = OneLineParser(prog=PROGRAM, description="Write a checkpoint of random weights.")
    parser.add_argument("--size", required=True, choices=PUBLISHED_SIZES)
    parser.add_argument("--layers", type=int, help="only the first so many layers of the language model")
    parser.add_argument("--folder", type=Path, required=True, help="where to write; it is made if it is not there")
    parser.add_argument("--shard_gb", type=float, default=SHARD_BYTES / GB, help="largest shard; default: 2")
    options = parser.parse_args(arguments)
    if not options.shard_gb > 0:
        parser.error(f"--shard_gb {options.shard_gb} must be above 0")
    try:
        config = sized_config(options.size, options.layers)
        folder = write_checkpoint(config, options.folder, int(options.shard_gb * GB))
    except (ValueError, OSError, ImportError) as error:
        print(f"{PROGRAM}: error: {describe_error(error)}", file=sys.stderr)
        return 2
    found = check_weight_files(folder)
    print(f"{folder}: {len(found.files)} shards, {found.num_bytes / GB:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
