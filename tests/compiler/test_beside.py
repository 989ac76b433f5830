"""What a killed process leaves beside its target is removed by the next run; what a living one has
there stays.
"""

import fcntl
import os
import signal
import time
from pathlib import Path
from typing import NoReturn

import pytest

import tintc
from tests.support.artifacts import artifact, copy_of
from tests.support.command import process
from tintc.compiler import beside
from tintc.compiler.artifact_files import check_target
from tintc.compiler.onnx import files as onnx

_KILLED = """
import os, signal, sys
from pathlib import Path
from tintc.compiler import beside
target, way = Path(sys.argv[1]), sys.argv[2]
with beside.temporary(target) as folder:
    (folder / "half").write_text("written")
    if way == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
    with beside.set_aside(target):
        if way == "replaced":
            folder.rename(target)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(target: Path, way: str) -> None:
    """A process that is killed on the way."""
    assert process(target, way, code=_KILLED).returncode == -signal.SIGKILL


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("one")
    return tmp_path / "out"


def test_a_directory_is_there_and_gone(target: Path) -> None:
    with beside.temporary(target) as folder:
        assert folder.parent == target.parent
        assert list(folder.iterdir()) == []
        (folder / "half").write_text("written")
    assert names(target.parent) == ["out"]
    with beside.temporary(target) as folder:
        folder.rename(target.parent / "moved")
    assert names(target.parent) == ["moved", "out"]


def test_a_target_comes_back_unless_it_is_replaced(target: Path) -> None:
    with pytest.raises(FileNotFoundError), beside.set_aside(target):
        (target / "old").read_text()
    assert (target / "old").read_text() == "one"
    with beside.set_aside(target):
        target.mkdir()
    assert list(target.iterdir()) == []
    assert names(target.parent) == ["out"]


def test_what_cannot_be_put_back_waits_for_the_next_run(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def away_only(self: Path, to: Path) -> Path:
        if Path(to).name == "out":
            raise PermissionError("not now")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", away_only)
    with pytest.raises(PermissionError), beside.set_aside(target):
        pass
    assert not target.exists()
    monkeypatch.undo()
    beside.clear(target)
    assert names(target.parent) == ["out"]
    assert names(target) == ["old"]


@pytest.mark.parametrize("way", ["writing", "moving", "replaced"])
def test_what_a_killed_process_left_is_removed(way: str, target: Path) -> None:
    killed(target, way)
    assert any(name.startswith(".out.tintc-") for name in names(target.parent))
    with beside.temporary(target) as mine:
        beside.clear(target)
        assert names(target.parent) == [mine.name, "out"]
    assert names(target) == ["half" if way == "replaced" else "old"]


def test_a_living_process_keeps_what_it_has(target: Path) -> None:
    with beside.temporary(target) as folder:
        (folder / "half").write_text("written")
        assert process(target, code=_CLEARS).returncode == 0
        assert (folder / "half").read_text() == "written"
    assert names(target.parent) == ["out"]


_CLEARS = """
import sys
from pathlib import Path
from tintc.compiler import beside
beside.clear(Path(sys.argv[1]))
"""


def test_other_names_stay(target: Path) -> None:
    parent = target.parent
    for name in (".out.backup01", ".out.old.backup01", ".outer.tintc-aaaaaaaa"):
        (parent / name).mkdir()
    (parent / ".out.tintc-note").write_text("a file")
    (parent / ".out.tintc-link").symlink_to(parent / ".out.backup01")
    before = names(parent)
    beside.clear(target)
    assert names(parent) == before
    beside.clear(parent / "absent" / "out")


def test_where_there_are_no_locks_a_day_must_pass(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> NoReturn:
        raise OSError("not supported")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)
        made, lock = beside._make(target)
        os.close(lock)
    beside.clear(target)
    assert made.is_dir()
    yesterday = time.time() - 2 * 24 * 3600
    os.utime(made, (yesterday, yesterday))
    beside.clear(target)
    assert names(target.parent) == ["out"]


def test_the_next_run_of_the_same_target_clears(tmp_path: Path) -> None:
    """Of an artifact, which it also finds in its place again, and of an ONNX model."""
    out, model = copy_of(artifact(), tmp_path / "out"), tmp_path / "m.onnx"
    killed(out, "moving")
    killed(model, "writing")
    assert not out.exists()
    assert len(names(tmp_path)) == 3
    with pytest.raises(tintc.UsageError, match="exists; pass force=True"):
        check_target(out, force=False)
    onnx.check_target(model, force=False)
    assert names(tmp_path) == ["out"]
    tintc.load(out)
