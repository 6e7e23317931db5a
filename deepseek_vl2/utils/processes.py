"""Running a command as several processes that torchrun starts and that share one model."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from typing import Any

import torch

TORCHRUN_EXAMPLE = "torchrun --nproc-per-node 2 inference.py --tp"


def num_processes() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if torch.distributed.is_torchelastic_launched() else 1


def is_first_process() -> bool:
    """Whether this is the one of the processes that speaks and writes."""
    return num_processes() == 1 or os.environ["RANK"] == "0"


def sharing_options(is_shared: bool, has_whole_experts: bool = False) -> dict[str, Any]:
    """Keywords for `load_pretrained_model` that share a model out among the processes.

    Args:
        is_shared: Whether it is to be shared out at all.
        has_whole_experts: Whether each process gets some experts whole (expert parallelism) and not a part of each.

    Raises:
        ValueError: If a model is to be shared and torchrun has not started this process, or the other way round.
    """
    if not is_shared:
        if num_processes() > 1:
            raise ValueError(
                f"torchrun started {num_processes()} processes, each of which would load the whole model; add --tp to "
                "share one model, or start one process without torchrun"
            )
        return {}
    if not torch.distributed.is_torchelastic_launched():
        raise ValueError(f"--tp and --ep share a model among processes that torchrun starts: {TORCHRUN_EXAMPLE}")
    if num_processes() == 1:
        return {}
    from transformers.distributed import DistributedConfig

    ep_size = num_processes() if has_whole_experts else 1
    return {"distributed_config": DistributedConfig(tp_size=num_processes(), ep_size=ep_size)}


def common_seed(seed: int | None, device: torch.device) -> int | None:
    """A seed that is the same in all processes that share a model, as they have to sample the same tokens.

    Args:
        seed: The seed, or None for any.
        device: Where the model is.

    Returns:
        The seed; None only if there was none and nothing is shared.
    """
    if seed is None and num_processes() > 1:
        seeds = [secrets.randbits(62)]
        torch.distributed.broadcast_object_list(seeds, device=device)
        return seeds[0]
    return seed


@contextlib.contextmanager
def only_first_process_speaks() -> Iterator[None]:
    """Silences standard output and error of the other processes, and leaves their group at the end of the work."""
    with contextlib.ExitStack() as stack:
        if not is_first_process():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield
        if num_processes() > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def is_first_to_fail() -> bool:
    """Whether no other process has asked this before, so that what stops all of them is said once."""
    if num_processes() == 1:
        return True
    store, *_ = next(iter(torch.distributed.rendezvous("env://")))
    return store.add("deepseek_vl2/failures", 1) == 1
