"""The report: one HTML file that needs nothing else, numbers on top, then answers, the worst first.

Everything that comes from data or model is escaped. Boxes are drawn over the pictures as SVG, expected ones dashed, so
that they can be told apart without colours, too.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from deepseek_vl2.evaluate.judges import describe_boxes
from deepseek_vl2.evaluate.samples import PixelBox, Sample
from deepseek_vl2.utils.data_files import write_whole
from deepseek_vl2.utils.io import load_image

MAX_PICTURE_SIDE = 480
JPEG_QUALITY = 80
MAX_TEXT = 600


def write_report(
    path: Path,
    results: dict[str, Any],
    samples: Sequence[Sample],
    records: Sequence[dict[str, Any]],
    num_examples: int,
) -> None:
    """Writes the page.

    Args:
        path: where to.
        results: content of results.json.
        samples: the questions.
        records: their judged answers, in the same order.
        num_examples: how many to show.

    Raises:
        OSError: it cannot be written, or a picture is not there any more.
    """
    pairs = sorted(zip(samples, records, strict=True), key=lambda pair: _goodness(pair[1]))
    write_whole(path, _page(results, pairs[:num_examples]))


def _goodness(record: dict[str, Any]) -> tuple[float, bool, float]:
    return record["score"], record["is_readable"], record.get("iou", 0.0)


def _page(results: dict[str, Any], pairs: Sequence[tuple[Sample, dict[str, Any]]]) -> str:
    style = files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    title = f"{results['task']}: {results['metric']}"
    model = results["settings"]["model"]
    has_boxes = any(record.get("boxes") or sample.boxes for sample, record in pairs)
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>",
        f'<header><h1>{escape(title)}</h1><div class="quiet">{escape(str(model))}</div></header>',
        _numbers(results),
        _parts(results["by_category"], "Category"),
        _parts(results["by_split"], "Split"),
        f"<h2>Answers, the worst first ({len(pairs)} of {results['overall']['num_samples']})</h2>",
        _legend() if has_boxes else "",
        '<main class="examples">',
        *(_example(sample, record) for sample, record in pairs),
        "</main>",
        _settings(results["settings"]),
        "</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _numbers(results: dict[str, Any]) -> str:
    overall = results["overall"]
    interval = overall["interval"]
    cards = [
        (f"{overall['score']:.2f} %", results["metric"]),
        (_bounds(interval), f"95 % interval ({interval['method']})"),
        *((f"{overall[name]:.2f} %", label) for name, label in _EXTRAS.items() if name in overall),
        *([(str(overall["num_right"]), "right")] if "num_right" in overall else []),
        (str(overall["num_samples"]), "samples"),
        (str(overall["num_unreadable"]), "unreadable answers"),
        *([(str(results["num_skipped"]), "bad entries left out")] if results["num_skipped"] else []),
    ]
    inner = "".join(
        f'<div class="number"><strong>{escape(value)}</strong><span class="quiet">{escape(label)}</span></div>'
        for value, label in cards
    )
    return f'<section class="numbers">{inner}</section>'


def _bounds(interval: dict[str, Any]) -> str:
    return f"{interval['low']:.1f}\u2013{interval['high']:.1f}"


_EXTRAS = {"mean_iou": "mean IoU", "precision": "precision", "recall": "recall"}


def _parts(numbers_by_name: dict[str, Any], what: str) -> str:
    """A table of the numbers of some parts of the questions, such as categories."""
    if not numbers_by_name:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{numbers["num_samples"]}</td><td>{numbers["score"]:.2f}</td>'
        f"<td>{_bounds(numbers['interval'])}</td>"
        f"<td>{numbers['num_unreadable']}</td>"
        f'<td class="bar"><div class="track"><span style="width:{numbers["score"]:.2f}%"></span></div></td></tr>'
        for name, numbers in numbers_by_name.items()
    )
    heads = "".join(f'<th scope="col">{head}</th>' for head in (what, "Samples", "Score %", "95 %", "Unreadable"))
    table = f'<table><thead><tr>{heads}<th aria-hidden="true"></th></tr></thead><tbody>{rows}</tbody></table>'
    return f'<h2>By {what.lower()}</h2><div class="table">{table}</div>'


def _legend() -> str:
    return (
        '<p class="legend"><span><i class="found"></i>box of the answer</span>'
        '<span><i class="expected"></i>expected box</span></p>'
    )


def _example(sample: Sample, record: dict[str, Any]) -> str:
    pictures = "".join(_picture(sample, index, record.get("boxes", ())) for index in range(len(sample.pictures)))
    entries = [("Answer", record["answer"])]
    if record["understood"]:
        entries.append(("Understood", record["understood"]))
    if "iou" in record or "counts" in record:  # boxes were judged, and those of the answer are understood as pixels
        entries.append(("Expected", describe_boxes(sample.boxes or ()) or "no box"))
    elif sample.answers:
        entries.append(("Expected", ", ".join(dict.fromkeys(sample.answers))))
    if "iou" in record:
        entries.append(("mean IoU" if "counts" in record else "IoU", f"{record['iou']:.3f}"))
    options = "".join(f"\n{letter}. {option}" for letter, option in sample.options.items())
    listed = "".join(f"<dt>{name}</dt><dd>{escape(_shorten(text))}</dd>" for name, text in entries)
    return (
        f'<article class="example">{pictures}<div class="text"><p>{escape(_shorten(sample.question + options))}</p>'
        f'<dl>{listed}</dl><p class="verdict">{_verdict(record)}'
        f"<span>{escape(_shorten(f'{sample.category} {sample.id}'.strip()))}</span></p></div></article>"
    )


def _verdict(record: dict[str, Any]) -> str:
    if not record["is_readable"]:
        return '<b class="unread">unreadable</b>'
    score = record["score"]
    kind, word = ("right", "right") if score == 1 else ("wrong", "wrong" if score == 0 else f"{100 * score:.0f} %")
    return f'<b class="{kind}">{word}</b>'


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " ..."


def _picture(sample: Sample, index: int, found: Iterable[Sequence[float]]) -> str:
    """A picture, scaled down; the last one with its boxes."""
    width, height = sample.sizes[index]
    picture = load_image(sample.pictures[index])
    picture.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=JPEG_QUALITY)
    source = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
    boxes = ""
    if index == len(sample.pictures) - 1:
        boxes = _rectangles("expected", sample.boxes or ()) + _rectangles("found", found)
    return (
        f'<svg class="picture" viewBox="0 0 {width} {height}" role="img" aria-label="picture {index + 1}">'
        f'<image href="{source}" width="{width}" height="{height}" preserveAspectRatio="none"/>{boxes}</svg>'
    )


def _rectangles(kind: str, boxes: Iterable[PixelBox | Sequence[float]]) -> str:
    return "".join(
        f'<rect class="{kind}" x="{x1:g}" y="{y1:g}" width="{x2 - x1:g}" height="{y2 - y1:g}"/>'
        for x1, y1, x2, y2 in boxes
    )


def _settings(settings: dict[str, Any]) -> str:
    entries = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in settings.items())
    return f"<details><summary>Settings</summary><dl>{entries}</dl></details>"
