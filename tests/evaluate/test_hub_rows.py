"""Data of the hub: the files of one split alone, without a word, and what goes wrong as it is told
of models.
"""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.support.artifacts import source_directory
from tests.support.command import tintc
from tests.support.hub import NOBODY, Fault, Hub, point_at, serving, sst2, wikitext
from tintc.evaluate.examples import read_split
from tintc.evaluate.hub_rows import Access
from tintc.evaluate.tasks import find_task
from tintc.evaluate.text import read_text
from tintc.ir.errors import SourceError

FILE = "{}-00000-of-00001.parquet"
SMALL = ("--tokens", 16, "--limit", 1, "--choosing", 1, "--train-fraction", "0.5", "--seeds", 1)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(tmp_path / "hub") as hub:
        wikitext(hub)
        sst2(hub)
        point_at(hub.url, monkeypatch, tmp_path / "home")
        yield hub


def refusal(data: str = "wikitext-2", **how: Any) -> str:
    with pytest.raises(SourceError) as caught:
        read_text(data, access=Access(**how))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_one_split_and_no_other_is_fetched(hub: Hub) -> None:
    text = read_text("wikitext-2")
    assert text.name == "wikitext-2 (test)"
    assert text.text.startswith(" the test river runs") and "train" not in text.text
    assert hub.fetched() == {"README.md", FILE.format("test")}
    assert "validation river" in read_text("wikitext-2", choose=True).text
    assert FILE.format("train") not in hub.fetched()


def test_evaluated_and_chosen_on(hub: Hub) -> None:
    """The test split is evaluated, and the validation split is what rates are chosen on."""
    command = ("eval", "lm", source_directory(), "--data", "wikitext-2", *SMALL, "--json")
    report = tintc(*command).document
    assert report["data"]["name"] == "wikitext-2 (test)"
    assert report["data"]["chosen_on"] == "wikitext-2 (validation)"


def test_fetched_once_and_read_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read_text("wikitext-2")
    hub.requests.clear()
    assert read_text("wikitext-2") == first
    assert not [name for name in hub.fetched() if name.endswith(".parquet")]
    hub.requests.clear()
    assert read_text("wikitext-2", access=Access(offline=True)) == first
    assert hub.requests == []
    assert "offline mode" in refusal("wikitext-103", offline=True)
    point_at(NOBODY, monkeypatch)
    assert read_text("wikitext-2") == first


def test_what_datasets_itself_prepared_is_found_offline(hub: Hub) -> None:
    datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")
    hub.requests.clear()
    assert "test river" in read_text("wikitext-2", access=Access(offline=True)).text
    assert hub.requests == []


def test_tasks(hub: Hub) -> None:
    task = find_task("sst2")
    assert [example.label for example in read_split(task, "train")] == [0, 1] * 12
    assert read_split(task, "test")[1].text == "a good validation film number 1"
    assert FILE.format("test") not in hub.fetched()  # which has no labels
    hub.requests.clear()
    assert len(read_split(task, "test", access=Access(offline=True))) == 24
    assert hub.requests == []


def test_the_libraries_say_nothing(
    hub: Hub, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    hub.faults.append(Fault("*.parquet", status=503, times=1, method="HEAD"))
    with caplog.at_level(logging.WARNING):
        read_text("wikitext-2")
        read_text("wikitext-2", access=Access(offline=True))
    assert capfd.readouterr().err == ""
    assert caplog.text == ""


class TestWhatGoesWrong:
    def test_nobody_answers(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        point_at(NOBODY, monkeypatch, tmp_path)
        start = time.monotonic()
        message = refusal()
        assert time.monotonic() - start < 3
        assert "Connection refused" in message and "--data FILE" in message
        with pytest.raises(SourceError, match=r"sst2 \(train\).*--data-dir with files"):
            read_split(find_task("sst2"), "train")

    def test_the_same_exit_code_as_for_a_model(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        point_at(NOBODY, monkeypatch, tmp_path)
        for command in (
            ("eval", "lm", "tiny-opt", "--data", "wikitext-2"),
            ("compile", "owner/good", "-o", tmp_path / "sim"),
        ):
            assert "Connection refused" in tintc(*command).refused(1)

    def test_no_such_data_set(self, hub: Hub) -> None:
        assert "there is no data set allenai/c4 on the hub" in refusal("c4")

    def test_no_such_split(self, hub: Hub) -> None:
        card = hub.dataset("Salesforce/wikitext") / "README.md"
        card.write_text(card.read_text().replace("split: test", "split: tests"))
        assert "it has no such split; it has train, tests, validation" in refusal()

    def test_damaged_on_the_way(self, hub: Hub) -> None:
        hub.faults.append(
            Fault("*.parquet", change=lambda data: data[:-9] + b"123456789", method="GET")
        )
        message = refusal()
        assert f"{FILE.format('test')} is damaged" in message and "delete /" in message

    def test_first_rows_alone_are_in_no_cache(self, hub: Hub) -> None:
        assert "its first rows alone are in no cache" in refusal("c4", offline=True)
