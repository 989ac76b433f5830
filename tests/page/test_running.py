"""What the browser gets to run: the model, the tokenizer and the pair, run here by onnxruntime."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from tokenizers import Tokenizer

import tintc
from tests.support.artifacts import TEXT, artifact, copy_of, edit_json, seal, source_directory
from tests.support.nano import nano
from tests.support.pages import content, site
from tests.support.tolerances import ONNX
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import ArtifactError, UnsupportedModelError, UsageError
from tintc.page import running
from tintc.page.running import _in_front
from tintc.page.site import write_site
from tintc.runtime.onnx_pair import OnnxPair
from tintc.runtime.simulator import Simulator


def loaded() -> Simulator:
    return tintc.load(artifact())


def token_ids() -> list[int]:
    """As the page makes them: what stands in front, then the tokenizer's own."""
    about = content("run")
    tokenizer = Tokenizer.from_file(str(site().path / about["tokenizer"]))
    return [*about["prepend"], *tokenizer.encode(TEXT).ids]


def session(name: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(site().path / name), providers=["CPUExecutionProvider"])


class TestModel:
    def test_tokens_are_those_of_transformers(self) -> None:
        assert token_ids() == loaded().tokenizer(TEXT)["input_ids"]

    @pytest.mark.parametrize("rate", [0.0, 0.01, 0.1])
    def test_losses_are_the_simulators(self, rate: float) -> None:
        about, ids = content("run"), token_ids()
        trained = len(ids) // 2
        feed: dict[str, Any] = {
            "input_ids": np.array([ids]),
            "labels": np.array([ids]),
            "train_mask": (np.arange(len(ids)) < trained)[None].astype(np.int64),
            "inner_lr": np.array(rate, np.float32),
        }
        assert set(feed) == set(about["inputs"])
        for name, value in feed.items():
            assert str(value.dtype) == about["inputs"][name]["dtype"]
            assert value.ndim == len(about["inputs"][name]["shape"])
        after, before = session(about["model"]).run(about["outputs"], feed)
        simulator = loaded()
        simulator.inner_lr.data.fill_(rate)
        tensors = [torch.from_numpy(feed[n]) for n in ("input_ids", "train_mask", "labels")]
        with torch.inference_mode():
            found = simulator.losses(*tensors, return_initial=True)
        assert about["outputs"] == ["losses", "initial_losses"]
        limit = ONNX[torch.float32]
        assert np.abs(after - found.losses.numpy()).max() < limit
        assert found.initial_losses is not None
        assert np.abs(before - found.initial_losses.numpy()).max() < limit
        if rate == 0:
            assert np.abs(after - before).max() < limit

    def test_facts(self) -> None:
        about, simulator = content("run"), loaded()
        assert about["bytes"] == (site().path / about["model"]).stat().st_size
        assert about["max_tokens"] == simulator.program.facts.longest
        assert about["vocab"] == simulator.program.facts.vocab_size
        assert about["inner_lr"] == float(simulator.inner_lr.detach()) == 0.01
        assert all(example["name"] and example["text"] for example in about["examples"])
        assert (site().path / about["tokenizer_config"]).is_file()

    @pytest.mark.slow
    def test_other_types_run_in_float32(self, tmp_path: Path) -> None:
        simulator = tintc.load(artifact(), dtype=torch.bfloat16)
        found = write_site(simulator, tmp_path / "site")
        assert found.run and content("run", found.path)["dtype"] == "float32"
        assert simulator.dtype == torch.bfloat16  # a copy was converted


class TestPair:
    def test_adapts_and_decodes(self) -> None:
        pair = content("run")["pair"]
        models = [session(pair[name]) for name in ("train", "decode")]
        (external,) = pair["external"]
        assert (site().path / external["path"]).stat().st_size == external["bytes"]
        ids = np.array([token_ids()])
        train = np.ones_like(ids)
        adapter = OnnxPair(*models)
        decoding = adapter.decoding(adapter.adapt(ids, train))
        with torch.inference_mode():
            adapted = loaded().adapt(torch.from_numpy(ids), torch.from_numpy(train))
            expected = adapted(torch.from_numpy(ids)).logits
        assert np.abs(decoding(ids) - expected.numpy()).max() < ONNX[torch.float32]

    def test_facts_of_its_manifest(self) -> None:
        pair = content("run")["pair"]
        assert pair["vocabulary"] == content("run")["vocab"]
        assert {entry["name"] for entry in pair["cache"]} >= {"0.key", "0.value"}

    @pytest.mark.slow
    def test_none_of_the_transformer(self, tmp_path: Path) -> None:
        """Its model runs; there is no decoding with cached keys."""
        config = SimulatorConfig.paper(inner_lr=0.01)
        source = str(source_directory())
        simulator = tintc.compile(source, config, backend="transformer", check="none")
        found = write_site(simulator, tmp_path / "site")
        assert found.run and content("run", found.path)["pair"] is None
        assert [f.name for f in (found.path / "model").iterdir()] == ["simulator.onnx"]


class TestWithout:
    """The page comes without *Run* and says why."""

    def reason(self, folder: Path, simulator: Any = None, **options: Any) -> str:
        found = write_site(simulator or artifact(), folder / "site", **options)
        said = content("site", found.path)["views"]["run"]
        assert said == {"available": False, "reason": found.reason} and not found.run
        names = {file.name for file in found.path.rglob("*")}
        assert not names & {"run.json", "model", "tokenizer", "runtime"}
        assert found.reason is not None and "\n" not in found.reason
        return found.reason

    def test_not_asked_for(self, tmp_path: Path) -> None:
        assert "without the model" in self.reason(tmp_path, model=False)

    def test_too_large(self, tmp_path: Path) -> None:
        assert "0.01 MB" in self.reason(tmp_path, limit_mb=0.01)

    @pytest.mark.slow
    def test_larger_once_it_is_written(self, tmp_path: Path) -> None:
        numbers = sum(tensor.numel() for tensor in loaded().prefix.tensors().values())
        assert "the limit of this page" in self.reason(tmp_path, limit_mb=numbers * 4.001 / 1e6)

    @pytest.mark.slow
    def test_no_tokenizer(self, tmp_path: Path) -> None:
        simulator = tintc.compile(nano(), SimulatorConfig.paper(inner_lr=0.01))
        assert "no tokenizer" in self.reason(tmp_path, simulator)

    def test_not_exportable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(simulator: Any, target: Path, **_: Any) -> None:
            target.parent.mkdir()  # as the exporter does before it compares
            raise UnsupportedModelError("there is no standard operator for\nthis one")

        monkeypatch.setattr(running, "export_onnx", refuse)
        assert self.reason(tmp_path).endswith("there is no standard operator for this one")

    def test_without_numbers(self, tmp_path: Path) -> None:
        assert "meta device" in self.reason(tmp_path, loaded().to("meta"))


def test_what_stands_in_front() -> None:
    def tokenizer(text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [7, 8, 5, 9] if add_special_tokens else [5]}

    assert _in_front(tokenizer) == [7, 8]
    assert _in_front(loaded().tokenizer) == content("run")["prepend"] == [2]


class TestTarget:
    def test_force_replaces_a_page_alone(self, tmp_path: Path) -> None:
        out = tmp_path / "site"
        write_site(artifact(), out, model=False)
        with pytest.raises(UsageError, match="exists; pass force=True"):
            write_site(artifact(), out, model=False)
        write_site(artifact(), out, model=False, force=True)
        (out / "mine.txt").write_text("keep")
        with pytest.raises(UsageError, match=r"mine\.txt"):
            write_site(artifact(), out, model=False, force=True)
        other = tmp_path / "other"
        other.mkdir()
        (other / "notes").write_text("keep")
        with pytest.raises(UsageError, match="is no page of tintc's"):
            write_site(artifact(), other, model=False, force=True)

    def test_what_fails_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("tintc.page.site.copy_static", full)
        with pytest.raises(ArtifactError, match="No space left"):
            write_site(artifact(), tmp_path / "deep" / "site", model=False)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("limit", [0, -1, float("nan")])
    def test_limit(self, limit: float, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="limit_mb"):
            write_site(artifact(), tmp_path / "site", limit_mb=limit)

    @pytest.mark.parametrize("stage", ["captured", "canonical"])
    def test_a_forged_stage_is_one_line(self, stage: str, tmp_path: Path) -> None:
        """Loading checks the lowered graph, which runs; the page reads the others as well."""

        def forge(graph: dict[str, Any]) -> None:
            graph[stage][-1]["args"] = [[{"node": "nobody"}]]

        root = copy_of(artifact(), tmp_path / "forged")
        edit_json(root / "graph.json", forge)
        seal(root)
        with pytest.raises(ArtifactError, match="is malformed"):
            write_site(root, tmp_path / "site", model=False)

    def test_manifest_names_every_file(self) -> None:
        about = json.loads((site().path / "page.json").read_text(encoding="utf-8"))
        found = {f.relative_to(site().path).as_posix() for f in site().path.rglob("*.*")}
        assert {*about["files"], "page.json"} == {f for f in found if (site().path / f).is_file()}
