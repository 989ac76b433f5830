"""What every site holds beside its data."""

import gzip
from pathlib import Path

import pytest

from tintc.page import static


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A built page in place of the package's own."""
    root = tmp_path / "package"
    (root / "static" / "runtime").mkdir(parents=True)
    (root / "static" / "assets").mkdir()
    (root / "static" / "index.html").write_text("page")
    (root / "static" / "assets" / "page.js").write_text("code")
    (root / "static" / "runtime" / "run.wasm.gz").write_bytes(gzip.compress(b"\0asm"))
    monkeypatch.setattr(static.resources, "files", lambda package: root)
    return root


def _files(root: Path) -> set[str]:
    return {f.relative_to(root).as_posix() for f in root.rglob("*") if f.is_file()}


def test_runtime_is_unpacked(package: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    static.copy_static(out, runtime=True)
    assert _files(out) == {"index.html", "assets/page.js", "runtime/run.wasm"}
    assert (out / "runtime" / "run.wasm").read_bytes() == b"\0asm"


def test_no_runtime_without_a_model(package: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    static.copy_static(out, runtime=False)
    assert _files(out) == {"index.html", "assets/page.js"}
