"""`tintc.show`: a page that is there as long as it can be seen, and gone afterwards."""

from __future__ import annotations

import json
import tempfile
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import tintc as package
from tests.support.models import opt, simulate
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import UsageError
from tintc.page import notebook
from tintc.runtime.simulator import Simulator


@pytest.fixture
def simulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Simulator:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = simulate(opt(dtype=torch.float32), SimulatorConfig.paper())
    found.source = {"name": '"><script>alert(1)</script>', "kind": "module"}
    return found


def fetched(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return json.loads(answer.read())


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: dict[str, dict[str, str | None]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = dict(attrs)


def folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("tintc-page-*"))


def test_is_served_until_it_is_closed(simulator: Simulator) -> None:
    before = folders()
    with package.show(simulator, height=400, model=False) as page:
        assert page.url.startswith("http://127.0.0.1:")
        assert fetched(page.url + "data/site.json")["title"] == simulator.source["name"]
        reader = _Reader()
        reader.feed(page._repr_html_())
        assert set(reader.tags) == {"iframe", "p", "a"}
        assert reader.tags["iframe"]["src"] == page.url
        assert reader.tags["iframe"]["height"] == "400"
        assert repr(page) == f"Page({page.url})"
        assert len(folders() - before) == 1
    assert page.closed
    assert "closed" in page._repr_html_() and "iframe" not in page._repr_html_()
    assert not folders() - before
    with pytest.raises(urllib.error.URLError):
        fetched(page.url + "data/site.json")
    page.close()


@pytest.mark.slow
def test_nobody_need_hold_it_and_another_takes_its_place(simulator: Simulator) -> None:
    url = package.show(simulator, model=False).url
    assert fetched(url + "data/site.json")["views"]["run"]["available"] is False
    with package.show(simulator, model=False) as second:
        assert second.url != url or second in notebook._OPEN
        assert len([page for page in notebook._OPEN if page.url in (url, second.url)]) == 1
    assert not {page for page in notebook._OPEN if page.url in (url, second.url)}


def test_refused(simulator: Simulator) -> None:
    before = folders()
    for height in (0, "wide", True, 1.5):
        with pytest.raises(UsageError, match="expected a whole number of pixels from 100"):
            package.show(simulator, height=height)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="got a str; expected a simulator"):
        package.show("tiny-opt")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="limit_mb is -1"):
        package.show(simulator, limit_mb=-1)
    assert folders() == before
