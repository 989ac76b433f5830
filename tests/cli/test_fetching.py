"""What a download shows: a bar on a terminal, nothing else, and nothing at all with -q."""

import os
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from unittest import mock

import huggingface_hub.utils
import pytest
import transformers

from tests.support.artifacts import source_directory
from tests.support.command import Terminal, as_terminal, tintc
from tests.support.hub import Hub, copied, point_at, serving, wikitext
from tintc.commands import console
from tintc.compiler import libraries
from tintc.ir.named import FETCH, LOAD

BAR = "model.safetensors: 100%"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(tmp_path / "hub") as hub:
        copied(source_directory(), hub.model("owner/good"))
        wikitext(hub)
        point_at(hub.url, monkeypatch, tmp_path / "home")
        yield hub


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The libraries' bars as they are by default; the tests switch them off."""
    monkeypatch.delenv(libraries.NO_BARS, raising=False)
    for name in ("huggingface_hub.constants", "huggingface_hub.utils.tqdm"):
        monkeypatch.setattr(import_module(name), "HF_HUB_DISABLE_PROGRESS_BARS", None)
    transformers.logging.enable_progress_bar()
    yield
    transformers.logging.disable_progress_bar()


def on_a_terminal(*arguments: object) -> str:
    """What a command that ends well writes to a terminal on standard error."""
    finished = tintc(*arguments, terminal=True)
    assert finished.code == 0, finished
    return finished.err


@pytest.mark.usefixtures("bars")
class TestBars:
    def test_of_a_model(self, hub: Hub, tmp_path: Path) -> None:
        shown = on_a_terminal("compile", "owner/good", "-o", tmp_path / "sim")
        assert BAR in shown
        assert "wrote" in shown
        assert "Loading weights" not in shown

    def test_quiet(self, hub: Hub, tmp_path: Path) -> None:
        assert on_a_terminal("compile", "owner/good", "-o", tmp_path / "sim", "-q") == ""

    def test_no_terminal(self, hub: Hub, tmp_path: Path) -> None:
        finished = tintc("compile", "owner/good", "-o", tmp_path / "sim")
        assert finished.err.startswith("wrote ") and finished.err.count("\n") == 1

    def test_of_data(self, hub: Hub) -> None:
        small = ("--tokens", 16, "--limit", 1, "--train-fraction", "0.5", "--seeds", 1)
        command = ("eval", "lm", "owner/good", "--data", "wikitext-2", "--inner-lr", "1e-3", *small)
        shown = on_a_terminal(*command)
        assert BAR in shown and "test-00000-of-00001.parquet: 100%" in shown
        assert "Generating" not in shown

    def test_settings_come_back(self) -> None:
        with libraries.quiet():
            assert not huggingface_hub.utils.are_progress_bars_disabled()
            assert not transformers.logging.is_progress_bar_enabled()
        assert transformers.logging.is_progress_bar_enabled()
        with mock.patch.dict(os.environ, {libraries.NO_BARS: "1"}), libraries.quiet():
            assert huggingface_hub.utils.are_progress_bars_disabled()
        assert not huggingface_hub.utils.are_progress_bars_disabled()


def test_our_bar_leaves_room() -> None:
    """Fetching is a part of loading, and takes no bar of its own."""
    terminal = Terminal()
    with mock.patch.object(sys, "stderr", terminal), as_terminal(), console.stages(2) as stage:
        stage(LOAD)
        stage(FETCH)
        before = terminal.tell()
        print("the hub's bar", file=sys.stderr)
        assert terminal.getvalue()[before:] == "the hub's bar\n"
        stage(LOAD)
        time.sleep(0.2)  # the bar is drawn ten times a second
        assert "0/2" in terminal.getvalue()[before:]
        stage("capture")
        time.sleep(0.2)
    assert "1/2" in terminal.getvalue()
