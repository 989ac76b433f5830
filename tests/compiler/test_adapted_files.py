"""What was adapted, as files: what comes back is what was saved, nothing else's is taken for it,
and nothing half-written stays.
"""

import errno
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import tintc
from tests.oracle.reference import reference
from tests.support.artifacts import artifact, edit_json
from tests.support.command import process
from tests.support.families import FAMILIES
from tests.support.models import ragged_train_mask, tokens
from tests.support.nano import nano
from tests.support.tolerances import SIMULATOR, error
from tintc.compiler import adapted_writer as module
from tintc.compiler.adapted_manifest import ADAPTED
from tintc.compiler.artifact_reader import manifest_digest
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import ArtifactError, NumericalError, UsageError
from tintc.runtime.adapted import Adapted
from tintc.runtime.decoding.program import Updates
from tintc.runtime.simulator import Simulator

IDS, MASK = tokens(3, 9, 19, seed=3), ragged_train_mask(3, 9, seed=2)
CONFIG = SimulatorConfig.exact(inner_lr=0.05)
OTHERS = tokens(2, 6, 19, seed=9)


def compiled(
    family: str = "llama",
    config: SimulatorConfig = CONFIG,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Simulator:
    return tintc.compile(FAMILIES[family].build(dtype), config, check="none", **options)


@pytest.fixture
def simulator() -> Simulator:
    return compiled()


@pytest.fixture
def adapted(simulator: Simulator) -> Adapted:
    return simulator.adapt(IDS, MASK)


@pytest.fixture
def saved(adapted: Adapted, tmp_path: Path) -> Path:
    """Three sequences, in the format tintc."""
    return tintc.save_adapted(adapted, tmp_path / "saved").path


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def listing(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class TestOwnFormat:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("form", ["weights", "factors"])
    def test_bit_for_bit(self, form: str, dtype: torch.dtype, tmp_path: Path) -> None:
        simulator = compiled("gpt2", dtype=dtype)
        adapted = simulator.adapt(IDS, MASK, form=form)  # type: ignore[arg-type]
        tintc.save_adapted(adapted, tmp_path / "saved")
        found = tintc.load_adapted(tmp_path / "saved", compiled("gpt2", dtype=dtype))
        assert (found.form, found.index) == (form, adapted.index)
        assert found.updates.positions == adapted.updates.positions
        assert_same(found.updates.values, adapted.updates.values)
        assert torch.equal(found(IDS).logits, adapted(IDS).logits)
        assert_same(found.state_dict(2), adapted.state_dict(2))

    def test_only_what_is_selected(self, adapted: Adapted, tmp_path: Path) -> None:
        chosen = adapted.select([2, 0, 2])
        tintc.save_adapted(chosen, tmp_path / "saved")
        found = tintc.load_adapted(tmp_path / "saved", adapted.simulator)  # type: ignore[arg-type]
        assert found.index == (1, 0, 1) and found.updates.contexts == 2
        assert torch.equal(found(IDS).logits, chosen(IDS).logits)

    def test_with_the_path_of_an_artifact(self, adapted: Adapted, tmp_path: Path) -> None:
        tintc.save(adapted.simulator, tmp_path / "sim")  # type: ignore[arg-type]
        tintc.save_adapted(adapted, tmp_path / "saved")
        found = tintc.load_adapted(tmp_path / "saved", tmp_path / "sim")
        assert torch.equal(found(IDS).logits, adapted(IDS).logits)

    @pytest.mark.slow
    def test_on_the_other_back_end(self, tmp_path: Path) -> None:
        """Whose weights are the same numbers, and which reads own weights."""
        adapted = compiled("gpt2").adapt(IDS, MASK, form="factors")
        tintc.save_adapted(adapted, tmp_path / "saved")
        other = compiled("gpt2", backend="transformer")
        found = tintc.load_adapted(tmp_path / "saved", other)
        assert found.form == "weights"
        assert error(found(IDS).logits, adapted(IDS).logits) < SIMULATOR[torch.float64]

    def test_twice_the_same_bytes(self, adapted: Adapted, tmp_path: Path) -> None:
        for name in ("a", "b"):
            tintc.save_adapted(adapted, tmp_path / name)
        assert listing(tmp_path / "a") == listing(tmp_path / "b")

    def test_values_are_those_of_the_oracle(self, tmp_path: Path) -> None:
        model = FAMILIES["gpt2"].build()
        config = replace(CONFIG, steps=2)
        simulator = tintc.compile(model, config, check="none")
        tintc.save_adapted(simulator.adapt(IDS, MASK), tmp_path / "saved")
        found = tintc.load_adapted(tmp_path / "saved", simulator)
        for index, expected in enumerate(reference(model, config, IDS, MASK).states):
            state = found.state_dict(index)
            assert state.keys() == expected.keys()
            for name in expected:
                assert error(state[name], expected[name]) < SIMULATOR[torch.float64], name


class TestCheckpoint:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_loads_in_transformers(self, family: str, tmp_path: Path) -> None:
        train = SimulatorConfig.exact(inner_lr=0.05, train=("*",))
        one = compiled(family, train).adapt(IDS, MASK).select(1)
        saved = tintc.save_adapted(one, tmp_path / "hf", "hf")
        assert (saved.path, saved.format, saved.rows) == (tmp_path / "hf", "hf", ())
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        assert_same(model.state_dict(), one.state_dict())
        assert model.generation_config.eos_token_id == model.config.eos_token_id
        expected = one(OTHERS).logits
        tolerance = 1e-5 if FAMILIES[family].casts else SIMULATOR[torch.float64]
        assert error(model(OTHERS).logits, expected) < tolerance

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_has_the_type_of_what_was_learned(self, dtype: torch.dtype, tmp_path: Path) -> None:
        """Float32 of a half-precision simulator, which keeps it."""
        one = compiled(dtype=dtype).adapt(IDS, MASK).select(0)
        tintc.save_adapted(one, tmp_path / "hf", "hf")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        assert model.dtype is torch.float32
        expected = {name: value.float() for name, value in one.state_dict().items()}
        assert_same(model.state_dict(), expected)

    def test_tied_weights_stand_there_once(self, tmp_path: Path) -> None:
        one = compiled("gpt2").adapt(IDS, MASK).select(0)
        tintc.save_adapted(one, tmp_path / "hf", "hf")
        assert "lm_head.weight" not in load_file(tmp_path / "hf" / "model.safetensors")

    def test_has_the_tokenizer_and_compiles_again(self, tmp_path: Path) -> None:
        simulator = tintc.load(artifact())
        vocabulary = simulator.program.facts.vocab_size
        one = simulator.adapt(tokens(1, 9, vocabulary), torch.ones(1, 9).long())
        tintc.save_adapted(one, tmp_path / "hf", "hf")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
        assert tokenizer("The river")["input_ids"] == simulator.tokenizer("The river")["input_ids"]
        again = tintc.compile(str(tmp_path / "hf"), check="none")
        ids = tokens(2, 7, vocabulary)
        assert torch.equal(again.predict_initial(ids), one(ids).logits)

    def test_a_model_without_a_config(self, tmp_path: Path) -> None:
        one = tintc.compile(nano(), CONFIG, check="none").adapt(IDS[:1], MASK[:1])
        with pytest.raises(UsageError, match="came without a config; expected a model that"):
            tintc.save_adapted(one, tmp_path / "hf", "hf")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"model_type": "nobody"}, "cannot be built again from its config"),
            ({"model_type": "bert"}, "no model can be built|are not those of the model"),
            ({"num_hidden_layers": 3}, "are not those of the model that its config describes"),
        ],
    )
    def test_a_config_of_another_model(
        self, change: dict[str, Any], said: str, simulator: Simulator, tmp_path: Path
    ) -> None:
        simulator.source = simulator.source | {"config": simulator.source["config"] | change}
        one = simulator.adapt(IDS[:1], MASK[:1])
        with pytest.raises(UsageError, match=said) as raised:
            tintc.save_adapted(one, tmp_path / "hf", "hf")
        assert "\n" not in str(raised.value) and "use the format" in str(raised.value)
        assert list(tmp_path.iterdir()) == []


class TestRefused:
    @pytest.mark.parametrize("format", ["hf", "peft"])
    def test_several_sequences(self, format: Any, adapted: Adapted, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"holds one sequence, and there are 3.*select\(i\)"):
            tintc.save_adapted(adapted, tmp_path / "out", format)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("format", ["onnx", "", None])
    def test_no_format(self, format: Any, adapted: Adapted, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"format is .*; expected tintc, hf, peft"):
            tintc.save_adapted(adapted, tmp_path / "out", format)

    @pytest.mark.parametrize("format", ["hf", "tintc"])
    def test_a_rank_of_what_has_none(self, format: Any, adapted: Adapted, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="rank is 4, and only the format peft has ranks"):
            tintc.save_adapted(adapted, tmp_path / "out", format, rank=4)

    def test_what_is_not_adapted(self, simulator: Simulator, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"got a Simulator; expected what simulator\.adapt"):
            tintc.save_adapted(simulator, tmp_path / "out")  # type: ignore[arg-type]

    @pytest.mark.parametrize("format", ["hf", "peft"])
    def test_what_is_not_finite(self, format: Any, adapted: Adapted, tmp_path: Path) -> None:
        values = {name: value * float("nan") for name, value in adapted.updates.values.items()}
        diverged = Adapted(adapted.simulator, Updates(values, frozenset()), [0])
        with pytest.raises(NumericalError, match=r"is not finite at .*smaller inner_lr"):
            tintc.save_adapted(diverged, tmp_path / "out", format)


def reseal(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """As whoever forges a manifest would."""

    def edit(manifest: dict[str, Any]) -> dict[str, Any]:
        change(manifest)
        del manifest["manifest_sha256"]
        return manifest | {"manifest_sha256": manifest_digest(manifest)}

    edit_json(root / ADAPTED, edit)


class TestLoading:
    @pytest.mark.parametrize("name", [ADAPTED, "updates.safetensors"])
    def test_altered(self, name: str, saved: Path, simulator: Simulator) -> None:
        content = bytearray((saved / name).read_bytes())
        content[len(content) // 2] ^= 1
        (saved / name).write_bytes(content)
        self.assert_refused(saved, simulator, "altered or truncated|cannot be read|malformed")

    @pytest.mark.parametrize("name", [ADAPTED, "updates.safetensors"])
    def test_truncated(self, name: str, saved: Path, simulator: Simulator) -> None:
        content = (saved / name).read_bytes()
        (saved / name).write_bytes(content[: len(content) // 2])
        self.assert_refused(saved, simulator, "altered or truncated|cannot be read")

    @pytest.mark.parametrize("name", [ADAPTED, "updates.safetensors"])
    def test_removed(self, name: str, saved: Path, simulator: Simulator) -> None:
        (saved / name).unlink()
        self.assert_refused(saved, simulator, "holds nothing adapted|No such file")

    def test_an_artifact(self, simulator: Simulator) -> None:
        self.assert_refused(artifact(), simulator, "holds nothing adapted: it has no")

    def test_nothing_there(self, simulator: Simulator, tmp_path: Path) -> None:
        self.assert_refused(tmp_path / "nowhere", simulator, "holds nothing adapted")

    def test_another_format_version(self, saved: Path, simulator: Simulator) -> None:
        reseal(saved, lambda manifest: manifest.update(format_version=2))
        self.assert_refused(saved, simulator, "has format version 2; this tintc reads version 1")

    @pytest.mark.parametrize(
        "change",
        [
            {"index": [0, 1, 3]},
            {"contexts": 4},
            {"factored": ["model.layers.0.mlp.up_proj.weight"]},
            {"factored": ["model.norm.weight"]},
            {"index": []},
            {"index": ["0"]},
            {"files": {}},
            {"more": 1},
        ],
        ids=str,
    )
    def test_forged(self, change: dict[str, Any], saved: Path, simulator: Simulator) -> None:
        reseal(saved, lambda manifest: manifest.update(change))
        self.assert_refused(saved, simulator, "save it again")

    def assert_refused(self, path: Path, simulator: Simulator, said: str) -> None:
        with pytest.raises(ArtifactError, match=said) as raised:
            tintc.load_adapted(path, simulator)
        assert "\n" not in str(raised.value)

    def test_other_weights(self, saved: Path, simulator: Simulator) -> None:
        with torch.no_grad():
            next(simulator.prefix.parameters()).view(-1)[0] += 1
        with pytest.raises(UsageError, match="belongs to another model, to other weights"):
            tintc.load_adapted(saved, simulator)

    @pytest.mark.slow
    def test_another_dtype(self, saved: Path) -> None:
        with pytest.raises(UsageError, match="another dtype"):
            tintc.load_adapted(saved, compiled(dtype=torch.float32))

    def test_another_config(self, saved: Path) -> None:
        other = compiled(config=replace(CONFIG, inner_lr=0.01))
        with pytest.raises(UsageError, match=r"adapted with inner_lr 0\.05, and this .* has 0\.01"):
            tintc.load_adapted(saved, other)

    def test_another_format(self, adapted: Adapted, tmp_path: Path) -> None:
        tintc.save_adapted(adapted.select(0), tmp_path / "hf", "hf")
        with pytest.raises(UsageError, match=r"has the format hf; .*AutoModelForCausalLM"):
            tintc.load_adapted(tmp_path / "hf", adapted.simulator)  # type: ignore[arg-type]

    def test_no_simulator(self, saved: Path) -> None:
        with pytest.raises(UsageError, match="simulator is a NoneType; expected the one that was"):
            tintc.load_adapted(saved, None)  # type: ignore[arg-type]

    def test_an_artifact_is_not_taken_for_it(self, saved: Path) -> None:
        with pytest.raises(ArtifactError, match="is no tintc artifact"):
            tintc.load(saved)


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestWriting:
    @pytest.mark.parametrize("format", ["tintc", "hf"])
    @pytest.mark.parametrize("fails", ["write", "write_manifest"])
    def test_full_disk_keeps_what_was_there(
        self, format: Any, fails: str, adapted: Adapted, tmp_path: Path
    ) -> None:
        one = adapted.select(0)
        tintc.save_adapted(one, tmp_path / "out", format)
        before = listing(tmp_path)
        name = {"tintc": "save_file", "hf": "write_checkpoint"}[format]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name if fails == "write" else fails, full_disk)
            for place in ("out", "new/parents/out"):
                with pytest.raises(ArtifactError, match="No space left on device"):
                    tintc.save_adapted(one, tmp_path / place, format, force=True)
        assert listing(tmp_path) == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_an_existing_path(self, saved: Path, adapted: Adapted, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"exists; pass force=True"):
            tintc.save_adapted(adapted.select(0), saved)
        tintc.save_adapted(adapted.select(0), saved, "hf", force=True)
        assert AutoModelForCausalLM.from_pretrained(saved) is not None
        tintc.save_adapted(adapted, saved, force=True)
        assert len(tintc.load_adapted(saved, adapted.simulator)) == 3  # type: ignore[arg-type]

    def test_force_spares_what_it_did_not_write(self, adapted: Adapted, tmp_path: Path) -> None:
        tintc.save(adapted.simulator, tmp_path / "sim")  # type: ignore[arg-type]
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "a.txt").write_text("mine")
        before = listing(tmp_path)
        for name in ("sim", "notes"):
            with pytest.raises(UsageError, match="does not replace what it did not write"):
                tintc.save_adapted(adapted, tmp_path / name, force=True)
        assert listing(tmp_path) == before

    @pytest.mark.slow
    def test_killed_while_writing(self, tmp_path: Path) -> None:
        """What it leaves is not at the target, and the next call removes it."""
        tintc.save(compiled(), tmp_path / "sim")
        code = """
import os, signal, sys, torch, tintc
from tintc.compiler import adapted_writer
adapted = tintc.load(sys.argv[1]).adapt(torch.arange(9)[None], torch.ones(1, 9).long())
adapted_writer.write_manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
tintc.save_adapted(adapted, sys.argv[2])
"""
        done = process(tmp_path / "sim", tmp_path / "out", code=code)
        assert done.returncode == -signal.SIGKILL, done
        assert not (tmp_path / "out").exists()
        adapted = tintc.load(tmp_path / "sim").adapt(IDS, MASK)
        tintc.save_adapted(adapted, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "sim"]

    def test_nothing_of_this_machine(self, adapted: Adapted, tmp_path: Path) -> None:
        tintc.save_adapted(adapted.select(0), tmp_path / "out", "hf")
        for name, content in listing(tmp_path / "out").items():
            assert str(tmp_path).encode() not in content, name
        manifest = json.loads((tmp_path / "out" / ADAPTED).read_text())
        assert set(manifest["files"]) | {ADAPTED} == set(listing(tmp_path / "out"))
