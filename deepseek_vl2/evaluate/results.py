"""From judged answers to numbers: overall and by category, each with its 95 % interval. Scores are in percent."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_vl2.evaluate.intervals import Interval, bootstrap_interval, wilson_interval
from deepseek_vl2.evaluate.metrics import BoxCounts

DIGITS = 2
# Of ids of MMBench.
REPEATED_FROM = 10**6


def summarize(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Numbers of some records, which are of one task.

    The score is the mean over samples; where boxes were counted it is the F1 of all boxes together.

    Returns:
        `score`, `interval` (`low`, `high`, `method`), `num_samples`, `num_unreadable`; `num_right` where every score is
        0 or 1; `mean_iou` over the expected boxes where there are some; `precision` and `recall` where several boxes
        may be asked for.
    """
    scores = np.array([record["score"] for record in records], dtype=np.float64)
    summary: dict[str, Any] = {"num_samples": len(records)}
    summary["num_unreadable"] = sum(not record["is_readable"] for record in records)
    if "counts" in records[0]:
        rows = np.array([record["counts"] for record in records], dtype=np.float64)
        total = _total(rows)
        interval = bootstrap_interval(rows, lambda drawn: _total(drawn).f1)
        summary |= _mean_iou(records) | {"precision": _percent(total.precision), "recall": _percent(total.recall)}
        return _with_score(summary, total.f1, interval)
    if np.isin(scores, (0.0, 1.0)).all():
        summary["num_right"] = int(scores.sum())
        interval = wilson_interval(summary["num_right"], len(records))
    else:
        interval = bootstrap_interval(scores, lambda drawn: float(drawn.mean()))
    return _with_score(summary | _mean_iou(records), float(scores.mean()), interval)


def _mean_iou(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean over all expected boxes, if there are any."""
    boxed = [record for record in records if "iou" in record]
    if not boxed:
        return {}
    num_expected = [BoxCounts(*record["counts"]).expected if "counts" in record else 1 for record in boxed]
    return {"mean_iou": _percent(float(np.average([record["iou"] for record in boxed], weights=num_expected)))}


def _total(rows: NDArray[np.float64]) -> BoxCounts:
    matched, found, expected = rows.sum(axis=0).astype(int).tolist()
    return BoxCounts(matched, found, expected)


def _percent(value: float) -> float:
    return round(100 * value, DIGITS)


def _with_score(summary: dict[str, Any], score: float, interval: Interval) -> dict[str, Any]:
    bounds = {"low": _percent(interval.low), "high": _percent(interval.high), "method": interval.method}
    return {"score": _percent(score), "interval": bounds, **summary}


def summarize_run(records: Sequence[dict[str, Any]], *, is_circular: bool = False) -> dict[str, Any]:
    """Numbers overall, by category and by split; see `summarize`.

    Args:
        records: of one task.
        is_circular: see `Task`; numbers are of questions then, in whatever order of options.
    """
    if is_circular:
        records = _by_question(records)
    parts = {"by_category": "category", "by_split": "split"}
    return {"overall": summarize(records), **{name: _by(records, field) for name, field in parts.items()}}


def _by(records: Sequence[dict[str, Any]], field: str) -> dict[str, dict[str, Any]]:
    values = sorted({record.get(field, "") for record in records} - {""})
    return {value: summarize([record for record in records if record.get(field) == value]) for value in values}


def _by_question(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record for all orders of a question's options; its score is the lowest.

    MMBench counts from 1,000,000 on where a question comes again. Ids that are no numbers are of questions that do not.
    """
    questions: dict[int | str, list[dict[str, Any]]] = {}
    for record in records:
        name = record["id"]
        questions.setdefault(int(name) % REPEATED_FROM if name.isdecimal() else name, []).append(record)
    return [
        same[0]
        | {
            "score": min(record["score"] for record in same),
            "is_readable": all(record["is_readable"] for record in same),
        }
        for same in questions.values()
    ]


def format_table(results: dict[str, Any]) -> str:
    """The numbers as a table for the terminal."""
    rows = [("all", results["overall"]), *results["by_category"].items()]
    rows += [(f"split {name}", numbers) for name, numbers in results["by_split"].items()]
    width = max(len("category"), *(len(name) for name, _ in rows))
    extras = [name for name in ("mean_iou", "precision", "recall") if name in results["overall"]]
    heads = "".join(f" {name.replace('_', ' '):>10}" for name in extras)
    lines = [f"{'category':<{width}} {'samples':>8} {'score %':>8} {'95 % interval':>17}{heads} {'unreadable':>11}"]
    for name, numbers in rows:
        bounds = f"{numbers['interval']['low']:.2f} - {numbers['interval']['high']:.2f}"
        values = "".join(f" {numbers[extra]:10.2f}" if extra in numbers else f" {'-':>10}" for extra in extras)
        lines.append(
            f"{name:<{width}} {numbers['num_samples']:8d} {numbers['score']:8.2f} {bounds:>17}{values} "
            f"{numbers['num_unreadable']:11d}"
        )
    return "\n".join(lines)
