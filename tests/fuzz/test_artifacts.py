"""Artifacts spoiled at random, most with checksums made right as a forger would: what is not
refused runs; nothing ends otherwise.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.hostile_tokenizers import spoil_tokenizer
from tests.fuzz.mutations import flip, mutate
from tests.fuzz.victim import attacked, spoiled, use
from tests.support.artifacts import seal

FILES = ("manifest.json", "graph.json", "report.json", "weights.safetensors")
JSON = ("graph.json", "graph.json", "manifest.json", "report.json")
TOKENIZER = ("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")


@pytest.fixture(autouse=True)
def _somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where code out of an artifact would leave its mark


@pytest.mark.cases(1000, 25)
def test_flipped_bytes(cases: range, tmp_path: Path) -> None:
    for case in cases:
        with spoiled(case, tmp_path) as (folder, numbers):
            file = numbers.choice((*FILES, *TOKENIZER))
            flip(folder / file, numbers)
            if numbers.random() < 0.7 and file != "manifest.json":
                seal(folder)
            attacked("bytes flipped", lambda: use(folder))


@pytest.mark.cases(1000, 25)
def test_mutated_structure(cases: range, tmp_path: Path) -> None:
    for case in cases:
        with spoiled(case, tmp_path) as (folder, numbers):
            file = numbers.choice((*JSON, *TOKENIZER))
            mutate(folder / file, numbers)
            # of no manifest that a seal could stand in, its reader says so
            unreadable = (TypeError, KeyError, AttributeError, ValueError, RecursionError)
            with contextlib.suppress(*unreadable):
                seal(folder)
            attacked("structures mutated", lambda: use(folder))


@pytest.mark.cases(100, 10)
def test_hostile_tokenizers(cases: range, tmp_path: Path) -> None:
    for case in cases:
        with spoiled(case, tmp_path) as (folder, numbers):
            spoil_tokenizer(folder / "tokenizer", case, numbers)
            attacked("hostile tokenizers", lambda: use(seal(folder)))


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def _device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # as /dev/zero
    except PermissionError:
        path.symlink_to("/dev/zero")


def _unreadable(path: Path) -> None:
    path.write_bytes(b"{}")
    path.chmod(0)


ODDITIES: dict[str, Callable[[Path], Any]] = {
    "fifo": _fifo,
    "device": _device,
    "link to a device": _link("/dev/zero"),
    "link outside": _link("/etc/passwd"),
    "link to itself": lambda path: path.symlink_to(path),
    "link to nothing": _link("nowhere"),
    "unreadable": _unreadable,
    "directory": Path.mkdir,
    "empty": Path.touch,
}


@pytest.mark.cases(50, 10)
def test_odd_files(cases: range, tmp_path: Path) -> None:
    """In place of a file, and beside the files that belong there."""
    names = (*FILES, *TOKENIZER, "tokenizer/added_tokens.json", "tokenizer")
    rows = [(name, kind) for kind in ODDITIES for name in names]
    for case in cases:
        name, kind = rows[case * 37 % len(rows)]  # 37 and 72 have no factor in common
        with spoiled(case, tmp_path) as (folder, _):
            path = folder / name
            if path.is_dir():
                path.rename(tmp_path / f"aside-{case}")
            else:
                path.unlink(missing_ok=True)
            ODDITIES[kind](path)
            attacked("odd files", lambda: use(folder))
