"""Lines of JSON, pictures by path, files written at once."""

import pytest

from deepseek_vl2.utils.data_files import parse_json, picture_path, write_whole


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'{"a": "\xc3\xa4"}', {"a": "ä"}),
        ("[1]", [1]),
        (b"\xef\xbb\xbf[1]", [1]),
        (b"null", None),
        (r'"\ud83d\ude00"', "😀"),
    ],
)
def test_json(text, value):
    assert parse_json(text) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{no", "not JSON: Expecting property name enclosed in double quotes at line 1, column 2"),
        ("[1,\n]", "not JSON: "),
        ("", "not JSON: Expecting value at line 1, column 1"),
        (b"\xff\xfe[", "not UTF-8 text: invalid start byte at byte 0"),
        ('["a\\ud83d"]', "a text holds half a character: '\\ud83d'"),
        ("[" * 100_000, "not JSON that can be read: brackets are nested too deeply"),
    ],
)
def test_what_is_no_json_is_told_with_its_place(text, reason):
    with pytest.raises(ValueError) as caught:
        parse_json(text)
    assert str(caught.value).startswith(reason)


def test_pictures_are_looked_for_in_the_folder(tmp_path, monkeypatch):
    (tmp_path / "a.png").touch()
    assert picture_path("a.png", tmp_path) == str(tmp_path / "a.png")
    assert picture_path(str(tmp_path / "a.png"), tmp_path / "elsewhere") == str(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    assert picture_path("a.png", type(tmp_path)(".")) == str(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=r"there is no picture 'b.png' \(looked for .*/b\.png\)"):
        picture_path("b.png", tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no picture"):
        picture_path(".", tmp_path)


@pytest.mark.parametrize("name", [7, None, "", ["a.png"]])
def test_what_is_no_path_is_shown(tmp_path, name):
    with pytest.raises(ValueError, match="a picture is given by its path, not by "):
        picture_path(name, tmp_path)


def test_a_file_is_replaced_at_once(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800")
    assert path.read_text() == "old"
    write_whole(path, "new")
    assert path.read_text() == "new"
