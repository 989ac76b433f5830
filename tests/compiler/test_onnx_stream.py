"""The exported program of a stream's window, chunk by chunk in onnxruntime in float32, against
autograd and torch.optim in float64 (tests/oracle/streaming.py) and against torch's own stream.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from tests.compiler.test_onnx import simulator
from tests.compiler.test_onnx_rules import loops, made
from tests.oracle.streaming import streamed
from tests.support.families import FAMILIES
from tests.support.grid import grid
from tests.support.models import simulate, tokens
from tests.support.onnx_streams import OnnxStream
from tests.support.rules import ALONE, RATE
from tests.support.tolerances import ONNX, error, measured
from tintc import export_onnx
from tintc.compiler.casts import no_casts
from tintc.compiler.onnx import Exported
from tintc.evaluate.speed.benchmark import updated_parameters
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import NumericalError, UsageError
from tintc.runtime.digest import digest_of
from tintc.runtime.first_values import first_values
from tintc.runtime.simulator import Simulator

VOCAB, CHUNK, CONTEXT = 29, 3, 5
LENGTHS = (15, 10, 7, 2)  # five chunks, the last one ragged; whole ones; ends in the middle; one
RULE = {"momentum": 0.9, "decay": 0.1}
LIMIT = ONNX[torch.float32]
RULES = ("sgd", "momentum", "adam", "clip", "muon", "decay", "drift", "scaled adam")


def exported(
    sim: Simulator, folder: Path, keys: Any = "recompute", **options: Any
) -> tuple[Exported, OnnxStream]:
    sizes: dict[str, Any] = {"chunk": CHUNK, "context": CONTEXT, "keys": keys}
    done = export_onnx(sim, folder / "model.onnx", stream=True, **sizes, **options)
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(done.path), quiet)
    longest = sim.program.facts.longest
    return done, OnnxStream(session, CHUNK, CONTEXT, sim.config.inner_lr, longest)


def documents(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    return [tokens(1, n, VOCAB - 1, seed=n)[0] + 1 for n in lengths]


def read(stream: OnnxStream, texts: list[Tensor]) -> list[Tensor]:
    return list(map(torch.from_numpy, stream.read([text.numpy() for text in texts])))


def assert_follows(
    folder: Path, name: str, keys: str, lengths: tuple[int, ...] = LENGTHS, **fields: Any
) -> Exported:
    """Losses of autograd in float64, and slots of torch's stream in float32."""
    sim, model = made(name, **fields)
    done, stream = exported(sim, folder, keys)
    texts = documents(lengths)
    found = read(stream, texts)
    with no_casts():
        expected = streamed(
            model, sim.config, texts, updated_parameters(sim), chunk=CHUNK, context=CONTEXT,
            keys=keys, longest=sim.program.facts.longest,
        )  # fmt: skip
    for one, other in zip(found, expected.losses, strict=True):
        off = measured(f"ONNX streams against autograd, float32, {keys}", error(one, other))
        assert off < LIMIT
    if sim.config.optimizer == "sgd" and sim.config.normalize == "none":  # others follow rounding
        assert_same_slots(sim, stream, texts, keys)
    return done


def assert_same_slots(sim: Simulator, stream: OnnxStream, texts: list[Tensor], keys: Any) -> None:
    """Those of every document, which a stream of torch's has left alone."""
    for row, text in enumerate(texts):
        alone = sim.stream(1, chunk=CHUNK, context=CONTEXT, keys=keys)
        for s in range(0, len(text), CHUNK):
            first = s + 1 if s else 0
            if len(part := text[first : s + CHUNK + 1]):
                alone.step(part[None])
        state = alone.state_dict()
        names = [name for name in state if name.startswith(("given/", "states/"))]
        assert {f"slots.{name.split('/', 1)[1]}" for name in names} == set(stream.slots)
        for name in names:
            own = torch.from_numpy(stream.slots[f"slots.{name.split('/', 1)[1]}"])[row]
            assert error(own, state[name][0]) < LIMIT, name


@grid(together=1, name=("opt", "gpt2", "llama"), keys=["recompute", "cache"], rule=RULES)
def test_every_rule(name: str, keys: str, rule: str, tmp_path: Path) -> None:
    done = assert_follows(tmp_path, name, keys, **ALONE.get(rule, {}))
    assert done.check is not None
    assert done.check.agrees
    assert done.stream


@pytest.mark.parametrize("keys", ["recompute", "cache"])
@pytest.mark.parametrize("steps", [2, 6])
@pytest.mark.slow
def test_several_steps(steps: int, keys: str, tmp_path: Path) -> None:
    """More than four are a Loop behind the first one, at its own factors of the schedule."""
    schedule = (0.5, 2.0, *[0.25] * (steps - 2))
    done = assert_follows(
        tmp_path, "llama", keys, steps=steps, schedule=schedule, momentum=0.9, decay=0.1
    )
    assert len(loops(onnx.load(done.path))) == (steps > 4)


@grid(together=1, name=("mistral", "bloom", "mpt", "falcon", "gemma"), keys=["recompute", "cache"])
def test_families(name: str, keys: str, tmp_path: Path) -> None:
    """Windows, ALiBi, one key head, soft-caps. Of keys=cache torch's stream is what autograd is
    compared with elsewhere.
    """
    sim = simulate(FAMILIES[name].build(torch.float32), SimulatorConfig.exact(inner_lr=RATE))
    _, stream = exported(sim, tmp_path, keys)
    texts = documents()
    found = read(stream, texts)
    for one, text in zip(found, texts, strict=True):
        scores = sim.score_first(text[None], chunk=CHUNK, context=CONTEXT, keys=keys)  # type: ignore[arg-type]
        off = measured(f"ONNX streams against torch, float32, {keys}", error(one, scores.losses[0]))
        assert off < LIMIT
    assert_same_slots(sim, stream, texts, keys)


@pytest.mark.parametrize("keys", ["recompute", "cache"])
def test_texts_longer_than_the_positions(keys: str, tmp_path: Path) -> None:
    """OPT has 32 of them here; with keys=cache the context is run again from position 0."""
    assert_follows(tmp_path, "opt", keys, lengths=(75,), momentum=0.9)


@pytest.mark.parametrize("train", ["*", "*embed*"])
def test_embeddings_and_the_head(train: str, tmp_path: Path) -> None:
    assert_follows(tmp_path, "opt", "recompute", train=(train,), momentum=0.5)


def test_paper(tmp_path: Path) -> None:
    sim = simulator("opt", "fused", "paper", 1)
    _, stream = exported(sim, tmp_path)
    texts = documents()
    for one, text in zip(read(stream, texts), texts, strict=True):
        wanted = sim.score_first(text[None], chunk=CHUNK, context=CONTEXT).losses[0]
        assert error(one, wanted) < LIMIT


@pytest.mark.parametrize("keys", ["recompute", "cache"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.slow
def test_other_types(dtype: torch.dtype, keys: str, tmp_path: Path) -> None:
    """ALiBi's biases too, which half precision would lose."""
    for name in ("opt", "bloom"):
        config = SimulatorConfig.exact(inner_lr=RATE, momentum=0.9, decay=0.1)
        sim = simulate(FAMILIES[name].build(dtype), config)
        done, _ = exported(sim, tmp_path, keys, force=True)
        assert done.check is not None
        assert done.check.outputs["losses"].error < ONNX[dtype]
        assert done.check.outputs["slots"].error < ONNX[dtype]


class TestRows:
    def test_a_row_without_labels_keeps_its_slots_to_the_bit(self, tmp_path: Path) -> None:
        sim, _ = made("llama", **RULE)
        _, stream = exported(sim, tmp_path)
        texts = [text.numpy() for text in documents((10, 10))]
        stream.read(texts)
        before, none = dict(stream.slots), np.zeros(0, np.int64)
        found = stream.run([texts[0][4:9], none], [texts[0][7:10], none], new=False)
        for name, value in before.items():
            assert np.array_equal(found[f"next.{name}"][1], value[1])
            assert not np.array_equal(found[f"next.{name}"][0], value[0])
        assert not found["losses"][1].any()

    def test_a_row_of_a_new_document_starts_anew(self, tmp_path: Path) -> None:
        """In the middle of the stream, while the other goes on."""
        sim, _ = made("llama", **RULE)
        _, stream = exported(sim, tmp_path)
        texts = [text.numpy() for text in documents((10, 10))]
        stream.read([texts[0][:4], texts[0][:4]])
        first, used = dict(stream.slots), []
        for new in ([True, False], [False, False]):
            stream.slots = first
            used.append(_window(stream, [texts[1][:3]] * 2, [texts[1][1:4]] * 2, new))
        stream.read([texts[1][:4]])
        alone = stream.slots
        for name, value in alone.items():
            assert np.allclose(used[0][f"next.{name}"][0], value[0], atol=LIMIT)
            assert np.array_equal(used[0][f"next.{name}"][1], used[1][f"next.{name}"][1])
        assert not np.allclose(used[1]["losses"][0], used[0]["losses"][0], atol=1e-3)

    def test_a_label_at_padding_is_none(self, tmp_path: Path) -> None:
        _, stream = exported(made("opt")[0], tmp_path)
        stream.slots = stream.empty("slots.", (1,))
        ids = np.array([[1, 5, 7, 9]])
        common = {
            "input_ids": ids, "attention_mask": np.array([[0, 1, 1, 1]]), **stream.slots,
            "new_document": np.array([True]), "inner_lr": np.array(RATE, np.float32),
        }  # fmt: skip
        one, other = (
            stream.session.run(None, {**common, "labels": np.array([[first, -100, 9, 3]])})
            for first in (4, -100)
        )
        assert all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))


def _window(stream: OnnxStream, windows: Any, targets: Any, new: list[bool]) -> Any:
    feed = {
        "input_ids": np.stack(windows), "attention_mask": np.ones_like(np.stack(windows)),
        "labels": np.stack(targets), "new_document": np.array(new), **stream.slots,
        "inner_lr": np.array(stream.rate, np.float32),
    }  # fmt: skip
    return dict(zip(stream.outputs, stream.session.run(None, feed), strict=True))


class TestFile:
    @pytest.mark.slow
    def test_weights_are_in_it_once(self, tmp_path: Path) -> None:
        """With a rule that reads W_0 too; and what a call's export holds is as large."""
        sim, _ = made("llama", decay=0.1, max_drift=0.5)
        done, _ = exported(sim, tmp_path)
        plain = export_onnx(sim, tmp_path / "call.onnx")
        assert done.weight_bytes == plain.weight_bytes
        external, _ = exported(sim, tmp_path, force=True, external_data=True, optimize=True)
        assert external.data is not None
        assert external.check is not None and external.check.agrees

    @pytest.mark.slow
    def test_what_follows_rounding_is_compared_by_its_losses(self, tmp_path: Path) -> None:
        """adam moves biases of keys, whose gradient is 0 in theory, where rounding points."""
        for rule, compared in (("adam", {"losses"}), ("momentum", {"losses", "slots"})):
            done, _ = exported(made("opt", **ALONE[rule])[0], tmp_path, force=True)
            assert done.check is not None
            assert set(done.check.outputs) == compared

    def test_metadata(self, tmp_path: Path) -> None:
        sim, _ = made("llama")
        done, stream = exported(sim, tmp_path, "cache")
        about = stream.session.get_modelmeta().custom_metadata_map
        assert json.loads(about["tintc.stream"]) == {
            "chunk": CHUNK, "context": CONTEXT, "keys": "cache",
            "weights": digest_of(sim.prefix.tensors()),
        }  # fmt: skip
        assert done.inputs[:5] == (
            "input_ids", "attention_mask", "labels", "inner_lr", "past_mask",
        )  # fmt: skip
        assert done.outputs[0] == "losses"
        given = [f"slots.{slot}" for slot in first_values(sim, 1)[0]]
        assert [name for name in done.inputs if name.startswith("slots.")] == given
        assert [name for name in done.outputs if name.startswith("next.")] == [
            f"next.{name}" for name in given
        ]

    def test_standard_operators(self, tmp_path: Path) -> None:
        for steps in (1, 6):
            done, _ = exported(made("llama", steps=steps)[0], tmp_path, "cache", force=True)
            model = onnx.load(done.path)
            onnx.checker.check_model(model, full_check=True)
            assert {node.domain for node in model.graph.node} == {""}

    def test_defaults(self, tmp_path: Path) -> None:
        done = export_onnx(made("llama")[0], tmp_path / "m.onnx", stream=True)
        about = {entry.key: entry.value for entry in onnx.load(done.path).metadata_props}
        said = json.loads(about["tintc.stream"])
        assert (said["chunk"], said["context"], said["keys"]) == (128, 384, "recompute")


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"outputs": ("losses",)}, "outputs of its own; got losses: expected stream alone"),
            ({"inputs": ("loss_mask",)}, "outputs of its own; got loss_mask"),
            ({"chunk": 0}, "chunk is 0; expected a whole number, at least 1"),
            ({"chunk": 30}, "windows of 35 tokens; this model takes 32"),
            ({"keys": "kept"}, "keys is 'kept'; expected recompute or cache"),
            ({"stream": False}, "chunk is of a stream; expected stream beside it"),
            ({"opset": 9}, "opset is 9"),
        ],
    )
    def test_refused(self, options: dict[str, Any], message: str, tmp_path: Path) -> None:
        how: dict[str, Any] = {"stream": True, "chunk": CHUNK, "context": CONTEXT, **options}
        with pytest.raises(UsageError, match=message):
            export_onnx(made("opt")[0], tmp_path / "model.onnx", **how)
        assert not list(tmp_path.iterdir())

    def test_the_transformer_back_end(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="needs the fused back end"):
            exported(simulator("opt", "transformer", "paper", 1), tmp_path)
        assert not list(tmp_path.iterdir())

    def test_a_stream_that_diverges(self, tmp_path: Path) -> None:
        with pytest.raises(NumericalError, match=r"not finite.*lower inner_lr"):
            exported(made("opt", inner_lr=1e30)[0], tmp_path)
        assert not list(tmp_path.iterdir())
