"""Results come back, also after a kill in the middle of a line; what is no result is refused."""

import json
from pathlib import Path

import pytest

from tintc.evaluate.store import Store
from tintc.ir.errors import InputError

SHARED = {"model": {"name": "toy"}}


def test_a_result_comes_back_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "units.jsonl"
    first = Store(path, SHARED)
    assert first.get({"a": 1, "b": [1, 2]}) is None
    first.put({"a": 1, "b": [1, 2]}, {"loss": 0.1234567890123})
    second = Store(path, SHARED)
    assert second.get({"b": [1, 2], "a": 1}) == {"loss": 0.1234567890123}
    assert (second.found, second.computed, first.computed) == (1, 0, 1)


@pytest.mark.parametrize("unit", [{"a": 2}, {"a": 1, "b": 0}, {}])
def test_another_unit_is_another_result(tmp_path: Path, unit: dict[str, int]) -> None:
    store = Store(None, SHARED)
    store.put({"a": 1}, {"loss": 1.0})
    assert store.get(unit) is None


def test_another_model_is_another_result(tmp_path: Path) -> None:
    path = tmp_path / "units.jsonl"
    Store(path, SHARED).put({"a": 1}, {"loss": 1.0})
    assert Store(path, {"model": {"name": "other"}}).get({"a": 1}) is None


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_line_that_was_cut_off_is_dropped_and_the_file_goes_on(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "units.jsonl"
    store = Store(path, SHARED)
    store.put({"a": 1}, {"loss": 1.0})
    store.put({"a": 2}, {"loss": 2.0})
    path.write_bytes(path.read_bytes()[:-cut])
    again = Store(path, SHARED)
    assert again.get({"a": 1}) == {"loss": 1.0} and again.get({"a": 2}) is None
    again.put({"a": 2}, {"loss": 3.0})
    assert [json.loads(line)["result"]["loss"] for line in path.read_text().splitlines()] == [
        1.0,
        3.0,
    ]


@pytest.mark.parametrize("text", ["hello\n", "[]\n", '{"key": 1}\n', "\xff\n"])
def test_a_file_that_is_something_else_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "units.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="earlier run"):
        Store(path, SHARED)
    assert path.read_bytes() == text.encode("latin-1")
