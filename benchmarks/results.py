"""Figures of a run, their table, and the JSON that ends it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        name: What it is, unique in a run.
        value: The number.
        unit: Its unit.
        limit: The best this machine could do, in the same unit; None if there is no such thing.
        share: Share of the limit that was reached, measured side by side with it; None without a limit.
    """

    name: str
    value: float
    unit: str
    limit: float | None = None
    share: float | None = None


def rounded(value: float | None) -> float | None:
    """A number with the digits that a measurement has."""
    return None if value is None else float(f"{value:.5g}")


def format_table(figures: Sequence[Figure]) -> str:
    """Figures as a table with aligned columns."""
    rows = [("figure", "value", "unit", "limit", "share")]
    for figure in figures:
        limit = "" if figure.limit is None else f"{figure.limit:.4g}"
        share = "" if figure.share is None else f"{100 * figure.share:.1f} %"
        rows.append((figure.name, f"{figure.value:.4g}", figure.unit, limit, share))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    aligned = [
        "  ".join(
            cell.rjust(width) if column in (1, 3, 4) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(aligned)


def figures_as_json(figures: Sequence[Figure]) -> dict[str, dict[str, Any]]:
    """Figures by name, without what is None."""
    result = {}
    for figure in figures:
        content = asdict(figure)
        name = content.pop("name")
        for key in ("value", "limit", "share"):
            content[key] = rounded(content[key])
        result[name] = {key: value for key, value in content.items() if value is not None}
    return result
