"""Inputs of a batch run: what becomes of folders, patterns, PDF files, JSON lines and Parquet."""

import io
import json
import pickle

import pyarrow
import pypdfium2
import pytest
from batch_inputs import save_pdf, save_pictures
from PIL import Image
from pyarrow import parquet

from deepseek_vl2.batch import pdf
from deepseek_vl2.batch.items import PromptTemplate
from deepseek_vl2.batch.pdf import PdfPage, draw_page, page_size
from deepseek_vl2.batch.pictures import item_picture_size, load_item_picture
from deepseek_vl2.batch.sources import open_source
from deepseek_vl2.batch.sources import parquet as parquet_source
from deepseek_vl2.serve.questions import DESCRIBE_PICTURE

# A PDF with an encryption dictionary whose passwords nobody knows.
ENCRYPTED_PDF = b"""%%PDF-1.4
1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj
2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj
3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 100 100]>>endobj
4 0 obj<</Filter/Standard/V 1/R 2/P -4/O<%s>/U<%s>>>endobj
trailer<</Root 1 0 R/Encrypt 4 0 R/ID[<00><00>]>>
%%%%EOF
""" % (b"11" * 32, b"22" * 32)


def all_items(source):
    return list(source.items(0, len(source)))


def texts(source):
    return [item.messages[0]["content"] for item in all_items(source)]


@pytest.fixture
def folder(tmp_path):
    """Pictures in two folders, a PDF of three pages, a broken one, an encrypted one, and files of other kinds."""
    save_pictures(tmp_path / "in", 2)
    save_pictures(tmp_path / "in" / "sub", 1)
    save_pdf(tmp_path / "in" / "doc.pdf", 3)
    (tmp_path / "in" / "broken.pdf").write_bytes(b"%PDF-1.4 nothing more")
    (tmp_path / "in" / "locked.pdf").write_bytes(ENCRYPTED_PDF)
    (tmp_path / "in" / "notes.txt").write_text("x")
    return tmp_path / "in"


def test_a_folder_gives_pictures_and_pages_by_name(folder):
    source = open_source(str(folder))
    items = all_items(source)
    pages = [f"doc.pdf#page={page}" for page in (1, 2, 3)]
    assert [item.id for item in items] == ["00.png", "01.png", "broken.pdf", *pages, "locked.pdf", "sub/00.png"]
    assert [item.index for item in items] == list(range(8)) == list(range(len(source)))
    assert items[4].pictures == (PdfPage(str(folder / "doc.pdf"), 1, 144),)
    assert items[0].pictures == (str(folder / "00.png"),)
    assert items[0].messages[0]["content"] == f"<image>\n{DESCRIBE_PICTURE}"
    assert "no PDF that can be read" in items[2].problem
    assert "encrypted" in items[6].problem
    assert not any(items[index].problem for index in (0, 1, 3, 4, 5, 7))
    for start in range(9):
        assert list(pickle.loads(pickle.dumps(source)).items(start, 8)) == items[start:]


def test_the_digest_is_that_of_the_list(folder):
    before = open_source(str(folder)).digest
    (folder / "00.png").write_bytes(b"mended later")
    assert open_source(str(folder)).digest == before
    (folder / "02.png").write_bytes(b"new")
    assert open_source(str(folder)).digest != before


def test_a_pattern(folder, monkeypatch):
    source = open_source(str(folder / "**" / "*.png"), prompt="{stem} of {name}?")
    assert [item.pictures for item in all_items(source)] == [
        (str(folder / name),) for name in ("00.png", "01.png", "sub/00.png")
    ]
    assert texts(source)[2] == "<image>\n00 of 00.png?"
    monkeypatch.chdir(folder)
    assert [item.id for item in all_items(open_source("*.png"))] == ["00.png", "01.png"]


def test_pages_of_a_pdf(folder):
    source = open_source(str(folder / "doc.pdf"), prompt="Read page {page} of {pages} of {name}.", pdf_dpi=72)
    assert texts(source)[2] == "<image>\nRead page 3 of 3 of doc.pdf."
    page = all_items(source)[1].pictures[0]
    assert item_picture_size(page) == (110, 120) == load_item_picture(page).size
    large = PdfPage(page.path, 1, 288)
    assert page_size(large) == (440, 480) == draw_page(large).size
    with pytest.raises(ValueError, match=r"page 2 of .* the limit is .*--pdf_dpi"):
        page_size(PdfPage(page.path, 1, 100_000))
    with pytest.raises(ValueError, match="page 10 of"):
        draw_page(PdfPage(page.path, 9))


def test_pages_and_bitmaps_are_closed_while_pdfium_is_locked(folder, monkeypatch):
    """Left to the garbage collector they would be closed beside another thread's drawing."""
    opened, closed = [], []
    original = pdf._page, pypdfium2.PdfPage.render, pypdfium2.internal.AutoCloseable.close

    def noting(function):
        def note(*arguments, **options):
            opened.append(function(*arguments, **options))
            return opened[-1]

        return note

    def close(self):
        closed.append((self, pdf._lock.locked()))
        original[2](self)

    monkeypatch.setattr(pdf, "_page", noting(original[0]))
    monkeypatch.setattr(pypdfium2.PdfPage, "render", noting(original[1]))
    monkeypatch.setattr(pypdfium2.internal.AutoCloseable, "close", close)
    page = PdfPage(str(folder / "doc.pdf"), 1, 72)
    assert page_size(page) == draw_page(page).size
    with pytest.raises(ValueError, match="the limit is"):
        page_size(PdfPage(page.path, 1, 100_000))
    # A document of another test may give way, too.
    locked = [is_locked for entry, is_locked in closed if any(entry is other for other in opened)]
    assert len(opened) == 4
    assert locked == [True] * 4
    assert not any(entry.raw for entry in opened)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("broken.pdf", "no PDF that can be read"),
        ("locked.pdf", "encrypted"),
        ("notes.txt", "give a folder"),
        ("*.webp", "no pictures or PDF files match"),
    ],
)
def test_inputs_that_cannot_be_used_as_a_whole(folder, name, said):
    with pytest.raises(ValueError, match=said):
        open_source(str(folder / name))


@pytest.mark.parametrize("name", ["gone", "gone.pdf", "gone.jsonl", "gone.parquet"])
def test_inputs_that_are_not_there(folder, name):
    with pytest.raises(FileNotFoundError, match="there is no"):
        open_source(str(folder / name))


def test_an_empty_input(tmp_path):
    with pytest.raises(ValueError, match="holds no pictures"):
        open_source(str(tmp_path))
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match="is empty"):
        open_source(str(tmp_path / "empty.jsonl"))
    (tmp_path / "no.parquet").write_text("no")
    with pytest.raises(ValueError, match="no Parquet file"):
        open_source(str(tmp_path / "no.parquet"))


def write_lines(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_json_lines(tmp_path):
    save_pictures(tmp_path, 2)
    conversation = [{"role": "user", "content": "<image>\nWhat?", "images": ["00.png"]}]
    parts = [{"role": "user", "content": [{"type": "image", "path": "01.png"}, {"type": "text", "text": "What?"}]}]
    name = write_lines(
        tmp_path / "in.jsonl",
        {"image": "00.png", "id": "first", "town": "Ulm"},
        "",
        {"images": ["00.png", "01.png"], "prompt": "Literally {town}?"},
        {"conversation": [*conversation, {"role": "assistant", "content": ""}]},
        {"messages": parts},
        {"prompt": "No picture."},
        {"prompt": "None either.", "images": []},
    )
    source = open_source(name, prompt="Where is {town}?")
    items = all_items(source)
    assert [item.id for item in items] == ["first", "1", "2", "3", "4", "5"]
    full = [str(tmp_path / file) for file in ("00.png", "01.png")]
    assert [list(item.pictures) for item in items] == [full[:1], full, full[:1], full[1:], [], []]
    assert texts(source)[:2] == ["<image>\nWhere is Ulm?", "<image>\n<image>\nLiterally {town}?"]
    assert items[2].messages == ({**conversation[0], "images": full[:1]},)
    assert items[4].messages[0]["content"] == "No picture."
    assert list(source.items(2, 4)) == items[2:4]
    assert not any(item.problem for item in items)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ([1], "must hold an object"),
        ({"image": "gone.png"}, "there is no picture 'gone.png'"),
        ({"image": 7}, "not by 7"),
        ({"image": None}, "there is no picture"),
        ({"text": "x"}, "there is no picture"),
        ({"images": []}, "there is no picture"),
        ({"image": "00.png", "prompt": 5}, "'prompt' must be a text"),
        ({"image": "00.png", "prompt": " "}, "the prompt is empty"),
        ({"image": "00.png", "prompt": "<image> <image> What?"}, "2 <image> mark"),
        ({"conversation": "x"}, "must be a list of messages"),
        ({"conversation": [{"role": "assistant", "content": "x"}]}, "must end with a question"),
        ({"messages": [{"role": "user", "content": 5}]}, "text or a list of parts, got int"),
        ({"messages": [{"role": "user", "content": [5]}]}, "unknown content part 5"),
    ],
)
def test_bad_lines_are_items_with_a_problem(tmp_path, line, said):
    save_pictures(tmp_path, 1)
    first, second = all_items(open_source(write_lines(tmp_path / "in.jsonl", line, {"image": "00.png"})))
    assert said in first.problem
    assert not second.problem


def test_a_field_that_is_missing_in_one_line(tmp_path):
    save_pictures(tmp_path, 1)
    name = write_lines(tmp_path / "in.jsonl", {"image": "00.png", "town": "Ulm"}, {"image": "00.png"})
    first, second = all_items(open_source(name, prompt="{town}?"))
    assert not first.problem
    assert "{town} has no value here; there is: image" in second.problem


def write_table(path, columns, **options):
    parquet.write_table(pyarrow.table(columns), path, **options)
    return str(path)


@pytest.mark.parametrize("rows_of_a_group", [2, 100])
def test_parquet_with_paths(tmp_path, monkeypatch, rows_of_a_group):
    monkeypatch.setattr(parquet_source, "ROWS_AT_ONCE", 3)
    save_pictures(tmp_path, 7)
    columns = {"file": [f"{n:02}.png" for n in range(7)], "id": list(range(10, 17)), "n": list(range(7)), "x": [0] * 7}
    name = write_table(tmp_path / "in.parquet", columns, row_group_size=rows_of_a_group)
    source = open_source(name, prompt="Number {n}?", image_column="file")
    items = all_items(source)
    assert [item.id for item in items] == [str(n) for n in range(10, 17)]
    assert texts(source)[6] == "<image>\nNumber 6?"
    assert items[6].pictures == (str(tmp_path / "06.png"),)
    for start in range(8):
        for stop in range(start, 8):
            assert list(source.items(start, stop)) == items[start:stop]


def test_parquet_with_bytes_and_lists(tmp_path):
    contents = []
    for color in ("red", "blue"):
        encoded = io.BytesIO()
        Image.new("RGB", (20, 10), color).save(encoded, "PNG")
        contents.append(encoded.getvalue())
    structs = [{"bytes": contents[0], "path": None}, {"bytes": contents[1], "path": "x.png"}, None]
    items = all_items(open_source(write_table(tmp_path / "a.parquet", {"image": structs})))
    assert [item.pictures for item in items[:2]] == [(contents[0],), (contents[1],)]
    assert "there is no picture" in items[2].problem
    assert item_picture_size(contents[0]) == (20, 10) == load_item_picture(contents[0]).size
    (item,) = all_items(open_source(write_table(tmp_path / "b.parquet", {"images": [contents]})))
    assert item.pictures == tuple(contents)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image_column": "gone"}, "no column 'gone'; there is: picture, n"),
        ({}, "name that of the pictures with --image_column"),
        ({"image_column": "picture", "prompt": "{gone}?"}, "no column 'gone' for the prompt"),
    ],
)
def test_columns_that_are_not_there(tmp_path, options, said):
    name = write_table(tmp_path / "in.parquet", {"picture": ["a.png"], "n": [1]})
    with pytest.raises(ValueError, match=said):
        open_source(name, **options)


def test_options_of_other_inputs_are_refused(folder):
    with pytest.raises(ValueError, match="--image_column file is for JSON lines and Parquet"):
        open_source(str(folder), image_column="file")
    with pytest.raises(ValueError, match=r"field \{town\} is not known; there is: path, name, stem"):
        open_source(str(folder), prompt="{town}?")


def test_addresses_are_not_fetched():
    with pytest.raises(ValueError, match="fetches nothing"):
        item_picture_size("https://example.com/a.png")


def test_a_picture_on_its_side_has_the_size_in_which_it_is_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert item_picture_size(str(tmp_path / "a.jpg")) == (20, 30) == load_item_picture(str(tmp_path / "a.jpg")).size


def test_a_template_fills_plain_names_only():
    template = PromptTemplate("<|ref|>{what}<|/ref|> in {{braces}} {n}")
    assert template.fields == {"what", "n"}
    assert template.fill({"what": "{n}", "n": 3}) == "<|ref|>{n}<|/ref|> in {braces} 3"


@pytest.mark.parametrize("text", ["{a.b}", "{a[0]}", "{}", "{a!r}", "{a:>3}", "{", "}", "", " ", "<image>"])
def test_what_is_no_template(text):
    with pytest.raises(ValueError, match="the prompt"):
        PromptTemplate(text)
