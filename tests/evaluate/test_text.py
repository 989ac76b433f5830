"""Texts are read, cut and drawn so that nothing is evaluated twice and bad files are named."""

import json
from pathlib import Path

import pytest
import torch

from tintc.evaluate.text import Text, draw, pieces, read_text, spread, titled
from tintc.ir.errors import InputError


def test_a_text_file_and_a_jsonl_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One day.\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(
        '{"text": "One."}\n\n{"text": "Two.", "more": 1}\n{"text": " "}\n', encoding="utf-8"
    )
    (tmp_path / "c.jsonl").write_text('{"text": "One\u2028line."}\n', encoding="utf-8")
    assert read_text(str(tmp_path / "c.jsonl")).text == "One\u2028line."
    assert read_text(str(tmp_path / "a.txt")).text == "One day.\n"
    assert read_text(str(tmp_path / "b.jsonl")) == Text("b.jsonl", "One.\n\nTwo.")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt holds no text"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read as UTF-8"),
        ("a.jsonl", b'{"text": "x"}\nhello\n', "a.jsonl, line 2"),
        ("a.jsonl", b'{"body": "x"}\n', 'line 1: expected an object with a "text"'),
        ("a.jsonl", b"[1]\n", "line 1"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_text(str(tmp_path / name))


def test_a_name_that_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no file .*wikitext-2, wikitext-103, c4"):
        read_text(str(tmp_path / "wikitext2"))


def test_pieces_do_not_overlap_and_leave_the_rest_out() -> None:
    assert pieces(torch.arange(11), 3, "x").tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    with pytest.raises(InputError, match="x has 2 tokens; expected at least one sequence of 3"):
        pieces(torch.arange(2), 3, "x")


def test_spread_and_draw() -> None:
    assert spread(10, 3) == [0, 3, 6] and spread(2, 5) == [0, 1] == spread(2, None)
    drawn = draw(20, 4, (1, 2, 3))
    assert len(drawn) == 12 and sorted(drawn.values()) == [1] * 4 + [2] * 4 + [3] * 4
    assert draw(20, 4, (1, 2, 3)) == drawn
    assert {index for index, seed in drawn.items() if seed == 1} == set(draw(20, 4, (1,)))
    assert len(draw(7, None, (1, 2))) == 6 and len(draw(7, 100, (5,))) == 7


WIKI = (
    " \n = Du Fu = \n \n A poet . \n = = Life = = \n He wrote . \n"
    " = <unk> ( poem ) = \n Lines = 3 = \n = = = Notes = = = \n"
)


def test_a_document_begins_at_a_title_as_wikitext_has_them(tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_text(WIKI, encoding="utf-8")
    first, second = read_text(str(tmp_path / "wiki.txt")).documents
    assert first.startswith(" = Du Fu = ") and first.endswith("He wrote . \n")
    assert second == WIKI[WIKI.index(" = <unk>") :]
    front = "What stands in front.\n"
    assert titled(front + WIKI)[0].startswith(front)
    assert titled("No title.") == ("No title.",)


def test_documents_of_a_jsonl_file_are_its_lines(tmp_path: Path) -> None:
    lines = [{"text": " = One = \n = Two = \n"}, {"text": ""}, {"text": "Three"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert read_text(str(tmp_path / "b.jsonl")).documents == tuple(x["text"] for x in lines)
