"""Simulators that divide by gathered statistics: compiled, run, kept, loaded and verified; and what
is refused.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tintc
from tests.oracle.reference import reference
from tests.support.artifacts import seal
from tests.support.every import model_of
from tests.support.models import tokens
from tests.support.tolerances import SIMULATOR, error
from tintc import SimulatorConfig, Statistics
from tintc.compiler.artifact_schema import WEIGHTS
from tintc.compiler.casts import no_casts
from tintc.compiler.gradient_statistics import read_statistics
from tintc.compiler.verification import verify
from tintc.evaluate.speed.benchmark import updated_parameters
from tintc.ir.errors import ArtifactError, TintcError, UsageError
from tintc.ir.inputs import is_models_own, statistics_of

VOCAB, LIMIT = 29, SIMULATOR[torch.float64]
TEXT = tokens(1, 40, VOCAB - 1)[0] + 1
RMS: dict[str, Any] = {"optimizer": "rms", "eps": 0.1, "inner_lr": 0.002}


@cache
def gathered(name: str = "opt", **fields: Any) -> Statistics:
    with torch.inference_mode(False):
        simulator = tintc.compile(model_of(name), SimulatorConfig.exact(**fields), check="none")
        return tintc.gather_statistics(simulator, TEXT, chunk=8, context=5)


def made(
    name: str = "opt", statistics: Any = None, model: nn.Module | None = None, **fields: Any
) -> tintc.Simulator:
    config = SimulatorConfig.exact(**{**RMS, **fields})
    return tintc.compile(model or model_of(name), config, statistics=statistics, check="none")


def inputs() -> dict[str, Tensor]:
    ids = tokens(2, 9, VOCAB - 1) + 1
    return {"input_ids": ids, "train_mask": (torch.arange(9) < 6).long().expand_as(ids)}


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama"])
@pytest.mark.parametrize("train", [(), ("*",)])
@pytest.mark.slow
def test_steps_are_divided_by_what_was_gathered(
    name: str, train: tuple[str, ...], tmp_path: Path
) -> None:
    """Against the formula, before and after a file and an artifact."""
    found = gathered(name, train=train)
    file = found.save(tmp_path / "new folder" / "rms.safetensors")
    simulator = made(name, file, train=train, steps=2)
    with no_casts():
        trained = updated_parameters(simulator)
        expected = reference(
            model_of(name), simulator.config, **inputs(), trained=trained, rms=found.tensors
        )
    # LLaMA's own code rounds its rotary tables to float32
    limit = 1e-6 if name == "llama" else LIMIT
    assert error(simulator(**inputs()).logits, expected.logits) < limit
    loaded = tintc.load(tintc.save(simulator, tmp_path / "sim"))
    assert torch.equal(loaded(**inputs()).logits, simulator(**inputs()).logits)
    assert loaded.statistics == simulator.statistics == found.about.model_dump()
    assert verify(loaded, tokens=9).agrees
    state = loaded.updated_state_dict(**inputs())
    assert all(is_models_own(each) for each in state)


@pytest.mark.slow
def test_they_are_no_parameters() -> None:
    """Nor the model's: an outer loss trains none of them, and none is counted."""
    plain = made("opt", optimizer="sgd")
    simulator = made("opt", gathered())
    assert sum(p.numel() for p in simulator.parameters()) == sum(
        p.numel() for p in plain.parameters()
    )
    report, without = (tintc.parameter_report(each) for each in (simulator, plain))
    assert (report["auxiliary"], report["total"]) == (without["auxiliary"], without["total"])
    own = {n for n in simulator.prefix.tensors() if not is_models_own(n)}
    assert len(own) == len(updated_parameters(simulator))
    assert own <= dict(simulator.prefix.named_buffers()).keys()


def test_more_than_is_trained_is_fine() -> None:
    """Gradients of the upper blocks do not depend on whether lower ones learn."""
    some, every = gathered(layers=1), gathered()
    for name, value in some.tensors.items():
        assert error(every.tensors[name], value) < LIMIT
    logits = [made("opt", each, layers=1)(**inputs()).logits for each in (some, every)]
    assert error(*logits) < LIMIT


@pytest.mark.slow
def test_of_another_number_type() -> None:
    """The digest of a model is that of its weights, whatever their type."""
    model = model_of("opt")
    narrow = type(model)(model.config)
    narrow.load_state_dict(copy.deepcopy(model).float().state_dict())
    for dtype in (torch.float32, torch.bfloat16):
        simulator = made("opt", gathered(), model=narrow.to(dtype))
        assert simulator.dtype == dtype
        assert bool(torch.isfinite(simulator(**inputs()).logits).all())


class TestRefuses:
    def refused(self, message: str, kind: type[TintcError] = UsageError, **fields: Any) -> None:
        with pytest.raises(kind, match=message) as caught:
            made(**fields)
        assert "\n" not in str(caught.value)

    def test_none(self) -> None:
        self.refused("optimizer is rms.*expected statistics=FILE")

    def test_another_optimizer(self) -> None:
        self.refused("optimizer is adam; expected rms", statistics=gathered(), optimizer="adam")

    @pytest.mark.slow
    def test_another_model(self) -> None:
        other = type(model_of("opt"))(model_of("opt").config).double()
        self.refused("gathered on another model", statistics=gathered(), model=other)
        self.refused("gathered on another model", statistics=gathered("gpt2"))

    def test_another_preset(self) -> None:
        fields = {"attention_gradient": "value"}
        self.refused("attention_gradient full, and.*value", statistics=gathered(), **fields)
        paper = gathered(norm_gradient="first_order")
        fields = {"norm_gradient": "first_order", "finite_difference_scale": 10.0}
        self.refused("finite_difference_scale 1000", statistics=paper, **fields)
        made("opt", gathered(), finite_difference_scale=10.0)  # nothing depends on it

    def test_other_patterns(self) -> None:
        mlp = gathered(train=("*.fc1.*",))
        self.refused("2 of the weights that are trained are not in it: .*fc2", statistics=mlp,
                     train=("*.fc2.weight",))  # fmt: skip

    def test_no_file(self, tmp_path: Path) -> None:
        self.refused("does not exist; expected statistics", statistics=tmp_path / "rms")
        self.refused("is no plain file", statistics=tmp_path)
        os.mkfifo(tmp_path / "pipe")
        self.refused("is no plain file", statistics=tmp_path / "pipe")

    def test_a_file_of_something_else(self, tmp_path: Path) -> None:
        file = tmp_path / "rms"
        for content in (b"", b"text", b"\xff" * 100):
            file.write_bytes(content)
            self.refused("cannot be read as statistics", ArtifactError, statistics=file)
        save_file({"weight": torch.ones(2)}, file)
        self.refused("holds no statistics", ArtifactError, statistics=file)


def written(path: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    """A file of statistics with some of it changed."""
    gathered().save(path)
    with safe_open(path, framework="pt") as handle:
        about = json.loads(handle.metadata()["tintc.statistics"])
        held = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    save_file(tensors or held, path, {"tintc.statistics": json.dumps({**about, **changes})})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk": 0}, "malformed at chunk"),
        ({"chunks": "many"}, "malformed at chunks"),
        ({"gradients": {}}, "malformed at gradients"),
        ({"format_version": 2}, "malformed at format_version"),
        ({"strange": 1}, "malformed at strange"),
        ({"weights": "0"}, "malformed at weights"),
        ({"sha256": "0" * 64}, "altered or damaged"),
    ],
)
def test_damaged_metadata(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=message):
        read_statistics(written(tmp_path / "rms", **changes))


def test_damaged_numbers(tmp_path: Path) -> None:
    for value, message in ((-1.0, "no root mean squares"), (float("nan"), "no root mean squares"),
                           (1.0, "altered or damaged")):  # fmt: skip
        tensors = {name: tensor.clone() for name, tensor in gathered().tensors.items()}
        next(iter(tensors.values())).flatten()[0] = value
        with pytest.raises(ArtifactError, match=message):
            read_statistics(written(tmp_path / "rms", tensors))
    file = gathered().save(tmp_path / "rms")
    content = file.read_bytes()
    for cut in range(0, len(content), len(content) // 7):
        file.write_bytes(content[:cut])
        with pytest.raises(ArtifactError):
            read_statistics(file)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(ArtifactError, match="cannot write"):
        gathered().save(tmp_path / "taken")
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ArtifactError, match="cannot write"):
        gathered().save(tmp_path / "file" / "rms")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "taken"]


def test_a_compiled_simulator_brings_its_own(tmp_path: Path) -> None:
    """As a source, for another number of steps, without the file."""
    directory = tmp_path / "model"
    model = model_of("opt")
    model.save_pretrained(directory)
    config = SimulatorConfig.exact(**RMS)
    options: dict[str, Any] = {"dtype": torch.float64, "check": "none"}
    plain = tintc.compile(str(directory), SimulatorConfig.exact(), **options)
    found = tintc.gather_statistics(plain, TEXT, chunk=8, context=5)
    simulator = tintc.compile(str(directory), config, statistics=found, **options)
    tintc.save(simulator, tmp_path / "sim")
    again = tintc.compile(str(tmp_path / "sim"), config, **options)
    assert error(again(**inputs()).logits, simulator(**inputs()).logits) < LIMIT
    assert again.statistics == found.about.model_dump()
    given = tintc.compile(str(tmp_path / "sim"), config, statistics=found, **options)
    assert torch.equal(given(**inputs()).logits, again(**inputs()).logits)
    value = dataclasses.replace(config, attention_gradient="value")
    with pytest.raises(UsageError, match="the statistics of sim: gathered with"):
        tintc.compile(str(tmp_path / "sim"), value, **options)


def test_an_artifact_that_holds_other_numbers_is_refused(tmp_path: Path) -> None:
    """Its weights may come from anybody."""
    root = tintc.save(made("opt", gathered()), tmp_path / "sim")
    weights = load_file(root / WEIGHTS)
    name = next(name for name in weights if statistics_of(name) is not None)
    for spoiled, message in (
        ({**weights, name: -weights[name] - 1}, "holds no root mean squares"),
        ({**weights, name: weights[name].flatten()[:1]}, "has another shape"),
        ({key: value for key, value in weights.items() if key != name}, "there is no weight"),
    ):
        save_file(spoiled, root / WEIGHTS)
        seal(root)
        with pytest.raises(ArtifactError, match=message):
            tintc.load(root)
