"""Referring expressions, in the two forms in which RefCOCO, RefCOCO+ and RefCOCOg are passed around.

`refcoco_list`: a JSON list, or JSON lines, of {image (or file_name, img_path, image_path), sentence (or caption, sent,
sents, expression, captions, sentences), bbox, width, height}; how boxes are written is said by a field `bbox_format` or
by the option. A list of sentences, texts or objects with `sent` or `raw`, gives a sample for each.
`refcoco_refs`: one object with what the original release has in two files, `refs` (its pickle refs(unc).p, a list:
ref_id, ann_id, image_id, sentences), `annotations` and `images` as in COCO's instances file (they may stand in a part
`instances`); its boxes are x, y, width, height.
"""

import codecs
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_vl2.evaluate.readers.common import (
    ReadOptions,
    as_mapping,
    first_of,
    id_of,
    is_number,
    json_lines,
    question_of,
    read_box,
)
from deepseek_vl2.evaluate.samples import Sample
from deepseek_vl2.utils.data_files import parse_json, picture_path

SENTENCE_FIELDS = ("sentence", "caption", "sent", "sents", "expression", "captions", "sentences")
# Of a sentence that is an object, as in the original release.
OBJECT_FIELDS = ("sent", "raw")


def list_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields the entries of a JSON list or of JSON lines; those with a list of sentences once for each.

    Raises:
        ValueError: it begins like a list and is none.
    """
    with path.open("rb") as file:
        is_list = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    if not is_list:
        for where, line in json_lines(path):
            yield from _by_sentence(where, _entry_of(line))
        return
    for number, entry in enumerate(_json_of(path), start=1):
        yield from _by_sentence(f"entry {number}", entry)


def _entry_of(line: bytes) -> Any:
    """What a line holds; a broken one stays as it is, its sample cannot be built."""
    try:
        return parse_json(line)
    except ValueError:
        return line


def _by_sentence(where: str, entry: Any) -> Iterator[tuple[str, Any]]:
    """Yields an entry; one with a list of sentences once for each, with an id of its own."""
    sentences = first_of(entry, *SENTENCE_FIELDS) if isinstance(entry, Mapping) else None
    if not isinstance(sentences, list):
        yield where, entry
        return
    others = {name: value for name, value in entry.items() if name not in SENTENCE_FIELDS}
    for number, sentence in enumerate(sentences, start=1):
        sample_id = f"{id_of(entry, where)}, sentence {number}"
        yield f"{where}, sentence {number}", {**others, "id": sample_id, SENTENCE_FIELDS[0]: sentence}


def list_sample(entry: Any, where: str, options: ReadOptions) -> Sample:
    """Builds the sample of an entry.

    Raises:
        ValueError: it is no such object, nothing says how its box is written, the box is not within the picture, or
            the picture has another size than the entry says.
        OSError: the picture is not there.
    """
    fields = as_mapping(parse_json(entry) if isinstance(entry, bytes) else entry, "an entry")
    box_format = fields.get("bbox_format", options.box_format)
    if box_format is None:
        raise ValueError("nothing says how boxes are written: give --box_format xyxy or xywh, or a field bbox_format")
    if fields.get("bbox") is None:
        raise ValueError("no expected box (bbox)")
    sentence = first_of(fields, *SENTENCE_FIELDS)
    if isinstance(sentence, Mapping):
        question = question_of(sentence, *OBJECT_FIELDS)
    else:
        question = question_of(fields, *SENTENCE_FIELDS)
    return _sample(id_of(fields, where), where, question, fields, box_format, options)


class Expression(NamedTuple):
    """One sentence of one ref, and the tables that it points into."""

    ref: Mapping[str, Any]
    sentence: Any
    annotations: Mapping[Any, Mapping[str, Any]]
    images: Mapping[Any, Mapping[str, Any]]


def refs_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields every sentence of every ref.

    Raises:
        ValueError: it is no JSON object with refs, annotations and images.
    """
    document = as_mapping(_json_of(path), str(path))
    tables = as_mapping(document.get("instances", document), "'instances'")
    refs, annotations, images = (
        _list_of(part, name, path) for part, name in ((document, "refs"), (tables, "annotations"), (tables, "images"))
    )
    by_annotation, by_image = _by_id(annotations), _by_id(images)
    for number, ref in enumerate(refs, start=1):
        sentences = ref.get("sentences") if isinstance(ref, Mapping) else None
        if not isinstance(sentences, list) or not sentences:
            yield f"ref {number}", None
            continue
        for index, sentence in enumerate(sentences, start=1):
            yield f"ref {number}, sentence {index}", Expression(ref, sentence, by_annotation, by_image)


def _json_of(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _list_of(fields: Mapping[str, Any], name: str, path: Path) -> list[Any]:
    if not isinstance(fields.get(name), list):
        raise ValueError(f"{path} must have the lists refs, annotations and images (the last two may be in instances)")
    return fields[name]


def _by_id(parts: list[Any]) -> dict[str | int, Mapping[str, Any]]:
    return {part["id"]: part for part in parts if isinstance(part, Mapping) and _is_id(part.get("id"))}


def _is_id(value: Any) -> bool:
    return isinstance(value, (str, int))


def refs_sample(entry: Expression | None, where: str, options: ReadOptions) -> Sample:
    """Builds the sample of a sentence.

    Raises:
        ValueError: it has no sentences, or its annotation or image is missing or bad.
        OSError: the picture is not there.
    """
    if entry is None:
        raise ValueError("the ref is no object with a list of sentences")
    ref, sentence = entry.ref, as_mapping(entry.sentence, "a sentence")
    annotation, image = (
        table.get(ref[name]) if _is_id(ref.get(name)) else None
        for table, name in ((entry.annotations, "ann_id"), (entry.images, "image_id"))
    )
    if annotation is None or image is None:
        raise ValueError(f"there is no annotation {ref.get('ann_id')!r} or no image {ref.get('image_id')!r}")
    sample_id = str(sentence.get("sent_id", where))
    fields = {**image, "image": image.get("file_name"), "bbox": annotation.get("bbox"), "split": ref.get("split")}
    return _sample(sample_id, where, question_of(sentence, *OBJECT_FIELDS), fields, "xywh", options)


def _sample(
    sample_id: str, where: str, sentence: str, fields: Mapping[str, Any], box_format: str, options: ReadOptions
) -> Sample:
    picture = picture_path(first_of(fields, "image", "file_name", "img_path", "image_path"), options.picture_root)
    (size,) = options.sizes_of([picture])
    said = (_side(fields, "width"), _side(fields, "height"))
    if any(number not in (None, side) for number, side in zip(said, size, strict=True)):
        raise ValueError(f"{picture} has {size[0]}x{size[1]} pixels, the file says {said[0]}x{said[1]}")
    return Sample(
        id=sample_id,
        where=where,
        question=sentence.strip(),
        pictures=(picture,),
        sizes=(size,),
        boxes=(read_box(fields["bbox"], box_format, size),),
        category=str(first_of(fields, "category", "split") or ""),
        split=str(fields.get("split") or ""),
    )


def _side(fields: Mapping[str, Any], name: str) -> int | float | None:
    """A side of the picture as the file says it, as a number or in text; `None` if it does not.

    Raises:
        ValueError: it is no number.
    """
    value = first_of(fields, name)
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        number = value
    if number is not None and not is_number(number):
        raise ValueError(f"{name} must be a number of pixels, not {value!r:.80}")
    return int(number) if isinstance(number, float) and number.is_integer() else number
