"""Tables fit the terminal, or a row takes several lines; nothing of them is lost."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.artifacts import TEXT, artifact, source_directory
from tests.support.command import tintc
from tintc.commands.sheet import Sheet

WORD = st.text("abcdefgh.", min_size=1, max_size=24)
CELL = st.lists(WORD, max_size=7).map(" ".join)
WIDE = ("attention", "1,234,567", "a text of very many words that says what all of this is for")


def printed(sheet: Sheet, width: int) -> list[str]:
    return [line.plain for line in sheet.lines(width)]


@given(
    st.integers(1, 6).flatmap(lambda n: st.lists(st.tuples(*[CELL] * n), min_size=1, max_size=4)),
    st.integers(40, 120),
    st.booleans(),
)
def test_any_table(rows: list[tuple[str, ...]], width: int, right: bool) -> None:
    header = tuple(f"h{number}" for number in range(len(rows[0])))
    sheet = Sheet(*header, numeric=1 if right else None)
    for row in rows:
        sheet.add_row(*row)
    lines = printed(sheet, width)
    assert all(len(line) <= width and line == line.rstrip() for line in lines)
    words = [word for row in (header, *rows) for cell in row for word in cell.split()]
    assert sorted(" ".join(lines).split()) == sorted(words)


def test_what_fits_is_one_line_a_row() -> None:
    sheet = Sheet("name", "count", "says", numeric=1)
    sheet.add_row(*WIDE)
    assert printed(sheet, 81) == printed(sheet, 200)
    assert printed(sheet, 81) == [
        "name           count" + " " * 57 + "says",
        "attention  1,234,567  a text of very many words that says what all of this is for",
    ]


def test_what_does_not_is_several() -> None:
    sheet = Sheet("name", "count", "says")
    sheet.add_row(*WIDE)
    sheet.add_row("norm", "1", "")
    assert printed(sheet, 60) == [
        "name       count      says",
        "attention  1,234,567  a text of very many words that says",
        "                      what all of this is for",
        "norm       1",
    ]
    assert printed(sheet, 44) == [
        "name       count",
        "    says",
        "attention  1,234,567",
        "    a text of very many words that says what",
        "    all of this is for",
        "norm       1",
    ]


def test_a_word_is_never_broken() -> None:
    sheet = Sheet()
    sheet.add_row("module", "transformer." * 9)
    assert printed(sheet, 40) == ["module", "    " + "transformer." * 9]


def test_nothing() -> None:
    assert printed(Sheet(), 80) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", artifact),
        ("inspect", artifact, "--params"),
        ("inspect", artifact, "--slots"),
        ("inspect", artifact, "--stage", "lowered"),
        ("inspect", artifact, "--stage", "captured"),
        ("inspect", artifact, "--node", "logits_backward"),
        ("verify", artifact),
        ("run", artifact, "--text", "The river meets the sea, and the sea the river."),
        ("cost", "tiny-opt", source_directory, "--backend", "transformer"),
        ("bench", artifact, "--tokens", "12", "--pairs", "1", "--no-memory", "--each"),
        ("env",),
    ],
    ids=lambda arguments: " ".join(word for word in arguments if isinstance(word, str)),
)
def test_every_table_fits_80_columns(arguments: tuple[object, ...]) -> None:
    words = [word() if callable(word) else word for word in arguments]
    done = tintc(*words)
    assert done.code == 0
    for line in done.out.splitlines():
        assert len(line) <= 80 or re.fullmatch(r"\s*\S+", line), line


def test_the_table_of_an_experiment_does(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join([TEXT] * 30))
    options = ("--tokens", 16, "--limit", 1, "--inner-lr", 0.01, "--train-fraction", 0.5)
    done = tintc("eval", "lm", artifact(), "--data", tmp_path / "text.txt", *options)
    assert done.code == 0
    assert all(len(line) <= 80 for line in done.out.splitlines())


def test_a_wider_terminal_is_used() -> None:
    narrow, wide = (tintc("inspect", artifact(), "--slots", columns=c).out for c in (80, 200))
    assert len(wide.splitlines()) < len(narrow.splitlines())
    assert wide.split() == narrow.split()
