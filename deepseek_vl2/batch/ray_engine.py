"""A run on a Ray cluster: workers load the model once and answer a window of items at a time.

Workers read the input themselves, so that its paths must be the same on every node. A worker that is lost is started
again, and its window with it; a record is written once, by the process that started the run.
"""

import json
import logging
import os
from dataclasses import dataclass
from typing import Any

from deepseek_vl2.batch.engines import Job, open_windows, progress_bar
from deepseek_vl2.batch.record_file import RecordFile
from deepseek_vl2.utils.errors import describe_error

# A window that has cost so many workers their lives stops the run: likely it holds a picture that ends a process.
MAX_RETRIES = 5


@dataclass(frozen=True)
class ClusterOptions:
    """Which workers there are.

    Attributes:
        address: of a cluster; by default `RAY_ADDRESS`, else one is started on this machine for the run.
        num_workers: at the start, and at least.
        max_workers: as many as there is work and room for; by default no more than at the start.
        gpus_per_worker: by default 1 where the cluster has any, else 0.
        cpus_per_worker: reserved for each.
    """

    address: str | None = None
    num_workers: int = 1
    max_workers: int | None = None
    gpus_per_worker: float | None = None
    cpus_per_worker: float = 1


class WindowWorker:
    """An actor of the cluster.

    Args:
        job: what it answers.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.answerer = job.answerer()

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[str]]:
        """Answers windows, given and returned as JSON; see `_row`."""
        return {"records": [json.dumps(self._answer(json.loads(row))) for row in rows["window"]]}

    def _answer(self, window: dict[str, Any]) -> list[dict[str, Any]]:
        done = frozenset(window["done"])
        items = self.job.source.items(window["start"], window["stop"])
        return [record for records in self.answerer.records(items, done.__contains__) for record in records]


def run_on_ray(job: Job, file: RecordFile, cluster: ClusterOptions) -> None:
    """Answers what has no record yet on a cluster.

    Raises:
        ImportError: ray is not installed.
        ConnectionError: the cluster cannot be reached.
        ChildProcessError: the workers cannot do the work.
        OSError: a record cannot be written.
    """
    windows = [_row(window, file) for window in open_windows(job, file)]
    if not windows:
        return
    ray = _connect(cluster.address)
    try:
        with progress_bar(file) as bar:
            for row in _dataset(windows, job, cluster).iter_rows():
                records = json.loads(row["records"])
                file.append(records)
                bar.update(len(records))
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        raise ChildProcessError(
            f"the workers cannot go on: {describe_error(cause):.500} (what is answered is kept)"
        ) from error
    finally:
        ray.shutdown()


def _row(window: range, file: RecordFile) -> dict[str, str]:
    done = [index for index in window if file.is_done(index)]
    return {"window": json.dumps({"start": window.start, "stop": window.stop, "done": done})}


def _connect(address: str | None) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine unasked
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("--engine ray needs the package ray: pip install 'deepseek_vl2[ray]'") from error
    try:
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConnectionError(f"no Ray cluster at {address or 'this machine'}: {describe_error(error)}") from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


def _dataset(windows: list[dict[str, str]], job: Job, cluster: ClusterOptions) -> Any:
    import ray

    gpus = cluster.gpus_per_worker
    if gpus is None:
        gpus = float(job.model.device in ("auto", "cuda") and ray.cluster_resources().get("GPU", 0) > 0)
    # A block a window: what a lost worker was at is done again, and no more.
    dataset = ray.data.from_items(windows, override_num_blocks=len(windows))
    return dataset.map_batches(
        WindowWorker,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            min_size=cluster.num_workers, max_size=max(cluster.max_workers or 0, cluster.num_workers)
        ),
        num_cpus=cluster.cpus_per_worker,
        num_gpus=gpus,
        max_restarts=-1,
        max_task_retries=MAX_RETRIES,
    )
