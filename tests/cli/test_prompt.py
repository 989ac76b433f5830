"""Of a long text as much is read and made tokens of as is asked for, and the tokens are those of
the whole.
"""

import io
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tintc as package
from tests.support.artifacts import POSITIONS, TEXT, artifact
from tests.support.command import tintc
from tintc.commands import prompt
from tintc.commands.prompt import Prompt
from tintc.ir.errors import InputError


def of(text: str, size: int = 7) -> Prompt:
    return Prompt("here", iter([text[i : i + size] for i in range(0, len(text), size)]))


def counted(text: str) -> list[int]:
    """One token a word, its length, and an end: what no prefix of the text has."""
    return [*map(len, text.split()), -1]


def from_behind(text: str) -> list[int]:
    """Pairs of letters, counted from the end: where a part ends makes a difference to all."""
    first = len(text) % 2
    return [ord(text[i]) for i in range(first, len(text), 2)]


TEXTS = st.text("ab \n\u00e9\u2028", min_size=1, max_size=400).filter(str.strip)


@given(TEXTS, st.integers(1, 30), st.integers(1, 50))
@pytest.mark.slow
def test_tokens_of_a_part_are_those_of_the_whole(text: str, count: int, size: int) -> None:
    for tokenize in (counted, from_behind, list_of):
        whole = tokenize(text.strip())
        found = of(text, size)
        assert found.ids(tokenize, count) == whole[:count]
        assert found.is_whole == (len(whole) <= count)
        assert found.ids(tokenize, None) == whole
        assert found.is_whole


def list_of(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_an_endless_text_is_not_read_to_its_end() -> None:
    read = 0

    def words() -> Iterator[str]:
        nonlocal read
        for read in itertools.count(1):  # noqa: B007
            yield "the sea "

    found = Prompt("here", words())
    assert found.ids(counted, 100) == [3] * 100
    assert not found.is_whole
    assert read < 1000


def test_only_as_much_is_made_tokens_of() -> None:
    lengths = []

    def tokenize(text: str) -> list[int]:
        lengths.append(len(text))
        return counted(text)

    assert len(of("river " * 100_000, 4096).ids(tokenize, 64)) == 64
    assert max(lengths) <= 4 * prompt._LIKELY * 64


@pytest.mark.parametrize("count", [1, 2, 7, 30, POSITIONS])
def test_a_real_tokenizer(count: int) -> None:
    tokenizer = package.load(artifact()).tokenizer
    text = " ".join([TEXT] * 40)

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        return ids

    assert of(text).ids(tokenize, count) == tokenize(text)[:count]


@pytest.mark.parametrize("text", ["", " \n ", "\ufeff \n"])
def test_no_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(text)
    with pytest.raises(InputError, match="the text is empty"):
        Prompt.of_file(str(tmp_path / "text"))


def test_characters_that_chunks_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "_CHUNK", 3)
    text = "caf\u00e9 \U0001f30a " * 20
    (tmp_path / "text").write_text(text, encoding="utf-8-sig")
    assert Prompt.of_file(str(tmp_path / "text")).ids(list_of, None) == list_of(text.strip())


def test_what_lies_behind_the_part_is_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is looked at is refused if it is no text."""
    monkeypatch.setattr(prompt, "_CHUNK", 64)
    (tmp_path / "text").write_bytes(b"the sea " * 1000 + b"\xff")
    found = Prompt.of_file(str(tmp_path / "text"))
    assert found.ids(counted, 5) == [3] * 5
    with pytest.raises(InputError, match="it is not UTF-8 text"):
        found.ids(counted, None)


def test_standard_input_that_is_closed() -> None:
    closed = pytest.raises(InputError, match="cannot read standard input: it is closed")
    with mock.patch.object(sys, "stdin", None), closed:
        Prompt.of_file("-")


class TestCommand:
    def test_a_long_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Cut to so many tokens, it is what its first tokens are; its end is never read."""
        monkeypatch.setattr(prompt, "_CHUNK", 4096)
        (tmp_path / "long").write_bytes(f"{TEXT} ".encode() * 2000 + b"\xff")
        found = tintc("run", artifact(), "--file", tmp_path / "long", "--tokens", 40, "--json")
        short = tintc("run", artifact(), "--text", f"{TEXT} " * 9, "--tokens", 40, "--json")
        assert (found.code, found.document) == (0, short.document)

    def test_more_than_the_simulator_takes(self, tmp_path: Path) -> None:
        (tmp_path / "long").write_text(f"{TEXT} " * 20_000)
        message = tintc("run", artifact(), "--file", tmp_path / "long").refused(2)
        assert f"the text has more than {POSITIONS} tokens" in message

    def test_standard_input_without_an_end(self) -> None:
        class Endless(io.RawIOBase):
            def readable(self) -> bool:
                return True

            def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
                buffer[:] = (b"the river " * (len(buffer) // 10 + 1))[: len(buffer)]
                return len(buffer)

        with mock.patch.object(io, "BytesIO", return_value=io.BufferedReader(Endless())):
            done = tintc("run", artifact(), "-", "--tokens", 12, "--json")
        assert done.document["tokens"] == 12
