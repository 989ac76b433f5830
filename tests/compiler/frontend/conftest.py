"""A hub with one model, and a cache for what is fetched."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.artifacts import source_directory
from tests.support.hub import Hub, copied, point_at, serving


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the model owner/good."""
    with serving(tmp_path / "hub") as hub:
        copied(source_directory(), hub.model("owner/good"))
        point_at(hub.url, monkeypatch)
        yield hub


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")
