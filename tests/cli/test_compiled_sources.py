"""Commands that take a model take a compiled simulator too: its model and its config."""

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tintc as package
from tests.support.artifacts import (
    LAYERS,
    TEXT,
    artifact,
    copy_of,
    edit_json,
    seal,
    source_directory,
)
from tests.support.command import tintc
from tests.support.every import model_of
from tests.support.families import FAMILIES, VOCAB
from tests.support.grid import some
from tests.support.models import opt, tokens
from tintc import SimulatorConfig, parameter_report
from tintc.commands.compiled import Compiled, compiled
from tintc.compiler.artifact_schema import WEIGHTS
from tintc.compiler.frontend.sources import load_source, load_without_weights
from tintc.ir.errors import SourceError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the transformer back end, in float64, at a rate that was trained from outside."""
    config = SimulatorConfig.exact(steps=2, layers=1, inner_lr=0.5)
    simulator = package.compile(
        str(source_directory()), config, backend="transformer", share="all", dtype=torch.float64
    )
    simulator.inner_lr.data.fill_(0.25)
    return package.save(simulator, tmp_path_factory.mktemp("made") / "sim")


class TestModel:
    @some("name", FAMILIES, default=["opt", "gpt_neo", "falcon", "gemma2"])
    def test_is_the_one_that_was_compiled(self, name: str, tmp_path: Path) -> None:
        model = copy.deepcopy(model_of(name)).float()
        model.save_pretrained(tmp_path / "model")
        simulator = package.compile(str(tmp_path / "model"), check="none")
        loaded = load_source(str(package.save(simulator, tmp_path / "sim")))
        ids = tokens(2, 9, VOCAB)
        with torch.no_grad():
            assert torch.equal(loaded.model(ids).logits, model(ids).logits)
        assert not loaded.model.training
        assert {n for n, _ in loaded.model.named_parameters()} == {
            n for n, _ in model.named_parameters()
        }

    def test_description_and_tokenizer(self, folder: Path) -> None:
        loaded = load_source(folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        assert loaded.description.kind == "artifact"
        assert loaded.description.name == "sim"
        assert loaded.description.sha256 == manifest["files"][WEIGHTS]["sha256"]
        assert loaded.tokenizer(TEXT)["input_ids"]
        assert {p.dtype for p in loaded.model.parameters()} == {torch.float64}
        half = load_source(folder, dtype=torch.bfloat16).model
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        bare = load_without_weights(folder)
        assert all(p.is_meta for p in bare.model.parameters())

    def test_of_a_module_there_is_none(self, tmp_path: Path) -> None:
        class Mine(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = opt().float()

            def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
                logits: torch.Tensor = self.inner(input_ids, use_cache=False).logits
                return logits

        path = package.save(package.compile(Mine()), tmp_path / "sim")
        for load in (load_source, load_without_weights):
            with pytest.raises(SourceError, match="compiled from a module in Python"):
                load(path)
        assert "compiled from a module in Python" in tintc("cost", path).refused(1)
        assert tintc("verify", path, "--tokens", 9, "--json").document["agrees"]

    def test_weights_of_another_model(self, tmp_path: Path) -> None:
        path = copy_of(artifact(), tmp_path / "sim")
        weights = load_file(path / WEIGHTS)
        del weights["model.decoder.layers.0.fc1.weight"]
        save_file(weights, path / WEIGHTS)
        with pytest.raises(SourceError, match=r"not those of the model .*fc1"):
            load_source(seal(path))

    def test_altered(self, tmp_path: Path) -> None:
        path = copy_of(artifact(), tmp_path / "sim")
        edit_json(path / "graph.json", lambda graph: graph.pop("captured") and None)
        assert "is altered or truncated" in tintc("bench", path).refused(1)

    def test_its_own_name_is_no_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """tiny-opt is the bundled model, even where a simulator of that name lies."""
        copy_of(artifact(), tmp_path / "tiny-opt")
        monkeypatch.chdir(tmp_path)
        assert compiled("tiny-opt") is None
        assert compiled("./tiny-opt") is not None


class TestConfig:
    def test_is_where_options_start(self, folder: Path) -> None:
        found = compiled(str(folder))
        assert found == Compiled(
            SimulatorConfig.exact(steps=2, layers=1, inner_lr=0.25),
            "transformer",
            "all",
            "float64",
            LAYERS,
        )
        assert found.over_preset() == {
            "preset": "exact",
            "steps": 2,
            "layers": 1,
            "inner_lr": 0.25,
        }

    def test_only_what_differs_from_a_preset(self) -> None:
        """Lists and factors that are at their defaults do not; nor what `train` replaces, which no
        preset takes beside it.
        """
        config = SimulatorConfig.exact(train="*.mlp.*", norm_gradient="first_order", decay=0.1)
        found = Compiled(config, "fused", "none", "float32", LAYERS).over_preset()
        assert found == {
            "preset": "exact",
            "norm_gradient": "first_order",
            "train": ["*.mlp.*"],
            "decay": 0.1,
            "inner_lr": 1e-4,
        }
        assert SimulatorConfig.preset(found.pop("preset"), **found) == config

    @pytest.mark.slow
    def test_compile(self, folder: Path, tmp_path: Path) -> None:
        assert tintc("compile", folder, "-o", tmp_path / "a", "--steps", 1, "-q").code == 0
        again = package.load(tmp_path / "a")
        assert again.config == SimulatorConfig.exact(steps=1, layers=1, inner_lr=0.25)
        assert (again.backend, again.share, again.dtype) == ("transformer", "all", torch.float64)
        for options, expected in (
            (("--backend", "fused"), ("fused", "none")),
            (("--share", "layers"), ("transformer", "layers")),
        ):
            assert tintc("compile", folder, "-o", tmp_path / options[1], *options, "-q").code == 0
            other = package.load(tmp_path / options[1])
            assert (other.backend, other.share) == expected
        done = tintc("compile", folder, "-o", tmp_path / "b", "--preset", "paper", "-q")
        assert (done.code, package.load(tmp_path / "b").config) == (0, SimulatorConfig.paper())

    @pytest.mark.slow
    def test_cost(self, folder: Path) -> None:
        facts = tintc("cost", folder, "--tokens", 20, "--json").document
        assert facts["parameters"] == parameter_report(package.load(folder))
        assert facts["config"] == SimulatorConfig.exact(steps=2, layers=1, inner_lr=0.25).to_dict()
        assert facts["dtype"] == "float64"

    @pytest.mark.slow
    def test_cost_of_several_that_differ(self, folder: Path) -> None:
        done = tintc("cost", folder, artifact(), "--tokens", 20, columns=300)
        *_, caption = done.out.splitlines()
        assert "2 steps or 1 step" in caption
        assert "transformer back end in float64 or fused back end in float32" in caption

    def test_verify(self, folder: Path) -> None:
        stored = tintc("verify", folder, "--tokens", 9, "--json").document
        assert (stored["agrees"], stored["exact"]) == (True, True)
        other = tintc("verify", folder, "--tokens", 9, "--preset", "paper", "--json").document
        assert (other["agrees"], other["exact"]) == (True, False)

    def test_verify_a_source(self) -> None:
        exact = ("--preset", "exact", "--backend", "transformer", "--tokens", 9)
        done = tintc("verify", source_directory(), *exact, "--json").document
        assert (done["agrees"], done["exact"]) == (True, True)
        assert done["reference"] == "autograd through OPTForCausalLM"
        assert "neither a directory nor a hub id" in tintc("verify", "no such model").refused(1)

    @pytest.mark.slow
    def test_bench(self, folder: Path) -> None:
        options = ("--tokens", 12, "--pairs", 1, "--no-memory", "--json")
        facts = tintc("bench", folder, *options).document
        assert (facts["backend"], facts["share"], facts["dtype"]) == (
            "transformer",
            "all",
            "float64",
        )
        assert facts["config"]["inner_lr"] == 0.25
        assert [check["tolerance"] for check in facts["checks"]] == [1e-9, 1e-9]

    @pytest.mark.slow
    def test_memory_of_both_sides(self) -> None:
        """Each process loads it for itself."""
        done = tintc("bench", artifact(), "--tokens", 12, "--pairs", 1, "--json")
        assert done.document["memory"]["ratio"] > 0

    def test_eval_lm_measures_what_was_compiled(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "text.txt").write_text(" ".join([TEXT] * 30))
        options = ("--data", tmp_path / "text.txt", "--tokens", 16, "--limit", 1, "--json")
        report = tintc("eval", "lm", folder, *options, "--train-fraction", 0.5).document
        assert report["model"]["kind"] == "artifact"
        assert report["settings"]["presets"] == ["exact"]
        assert (report["settings"]["steps"], report["settings"]["layers"]) == (2, 1)
        rates = {row["learner"]: row["inner_lr"] for row in report["rows"]}
        assert rates["simulator"] == 0.25


class TestExperiments:
    """What they would have run with."""

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        found: list[Any] = []
        runs = (("evaluate", "run_lm"), ("evaluate", "run_classify"), ("ablate", "run"))
        for module, name in runs:
            command = importlib.import_module(f"tintc.commands.{module}")
            monkeypatch.setattr(command, name, lambda *given, **_: found.append(given))
        return found

    def test_lm(self, folder: Path, asked: list[Any]) -> None:
        lm = ("eval", "lm", folder, "--data", "d")
        assert tintc(*lm, "--steps", 3, "--inner-lr", "none").code == 0
        assert asked.pop()[3] == {
            "presets": ("exact",),
            "steps": 3,
            "layers": 1,
            "inner_lr": None,
            "changes": {},
        }
        assert tintc(*lm, "--preset", "paper").code == 0
        assert asked.pop()[3] == {"presets": ("paper",), "changes": {}}

    def test_classify(self, folder: Path, asked: list[Any]) -> None:
        assert tintc("eval", "classify", folder).code == 0
        assert asked.pop()[1] == {
            "presets": ("exact",),
            "inner_lr": 0.25,
            "changes": {},
            "budgets": ("6x2",),
        }
        assert tintc("eval", "classify", folder, "--budgets", "12x1").code == 0
        assert asked.pop()[1]["budgets"] == ("12x1",)

    def test_a_budget_that_is_no_part(self) -> None:
        one = Compiled(SimulatorConfig(layers=1), "fused", "none", "float32", 30)
        assert one.budget(12) is None
        assert Compiled(SimulatorConfig(), "fused", "none", "float32", 30).budget(12) == "12x1"

    def test_ablate(self, folder: Path, asked: list[Any]) -> None:
        assert tintc("ablate", folder, "--data", "d", "--layers", 2).code == 0
        *_, settings, base, how, _ = asked.pop()
        assert settings.inner_lr == 0.25
        assert base == SimulatorConfig.exact(steps=2, layers=2)
        assert how["dtype"] == torch.float64
