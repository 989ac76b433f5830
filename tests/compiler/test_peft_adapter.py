"""LoRA adapters, as the installed peft reads them: the adapted model is the one whose weights
`Adapted.state_dict` gives.
"""

import copy
import errno
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import tintc
from tests.oracle.reference import reference
from tests.support.families import FAMILIES
from tests.support.models import ragged_train_mask, randomized, tokens
from tests.support.nano import nano
from tests.support.tolerances import ADAPTER, HALF_LOGITS, SIMULATOR, error
from tintc.compiler import peft_adapter as module
from tintc.compiler.peft_adapter import truncated
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import ArtifactError, UsageError
from tintc.runtime.adapted import Adapted

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'tintc[peft]'")
IDS = tokens(1, 9, 19, seed=3)
MASK = ragged_train_mask(1, 9, seed=2)
RATE = 0.05


@pytest.fixture(autouse=True)
def _no_warning_of_tied_weights() -> Iterator[None]:
    """peft says that merging may be difficult; nothing is merged here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        warnings.filterwarnings("error", message=".*missing adapter keys")
        yield


def adapted_model(model: nn.Module, preset: str = "exact", **config: Any) -> Adapted:
    chosen = SimulatorConfig.preset(preset, **{"inner_lr": RATE, **config})
    return tintc.compile(model, chosen, check="none").adapt(IDS, MASK)


def with_state(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    found = copy.deepcopy(model)
    found.load_state_dict(state)
    return found


def logits(model: nn.Module) -> Tensor:
    out = model(input_ids=tokens(2, 7, 19, seed=8))
    found: Tensor = getattr(out, "logits", out)
    return found.detach()


def config_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "adapter_config.json").read_text())
    return found


def loaded(model: nn.Module, path: Path) -> nn.Module:
    found: nn.Module = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(path))
    return found.eval()


def assert_loads(model: nn.Module, adapted: Adapted, path: Path, dtype: torch.dtype) -> None:
    """The adapter is not only exact: it is not nothing either."""
    expected = logits(with_state(model, adapted.state_dict()))
    found = logits(loaded(model, path))
    assert error(found, expected) < ADAPTER[dtype]
    assert error(found, logits(model)) > 100 * ADAPTER[dtype]


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, paper": ("llama", {"preset": "paper", "steps": 2}),
    "gpt2": ("gpt2", {}),
    "gpt2, paper": ("gpt2", {"preset": "paper"}),
    "llama, everything": ("llama", {"train": ("*",)}),
    "gpt2, everything": ("gpt2", {"train": ("*",), "steps": 2}),
    "phi, everything": ("phi", {"train": ("*",)}),
    "norms alone": ("gpt2", {"train": ("*ln_*",)}),
    "biases alone": ("gpt2", {"train": ("*.bias",)}),
    "adam": ("llama", {"optimizer": "adam", "inner_lr": 0.01}),
    "loop": ("llama", {"steps": 6, "layers": 1}),
}


class TestFullRank:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("case", CASES)
    def test_is_the_adapted_model(self, case: str, dtype: torch.dtype, tmp_path: Path) -> None:
        family, config = CASES[case]
        model = FAMILIES[family].build(dtype)
        adapted = adapted_model(model, **config)
        tintc.save_adapted(adapted, tmp_path / "lora", "peft")
        assert_loads(model, adapted, tmp_path / "lora", dtype)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_of_every_family(self, family: str, tmp_path: Path) -> None:
        model = FAMILIES[family].build()
        adapted = adapted_model(model, train=("*",), inner_lr=0.02)
        saved = tintc.save_adapted(adapted, tmp_path / "lora", "peft")
        assert {row.name for row in saved.rows} <= set(adapted.state_dict())
        assert_loads(model, adapted, tmp_path / "lora", torch.float64)

    def test_nothing_was_learned(self, tmp_path: Path) -> None:
        """PEFT still wants factors: some that are 0."""
        model = FAMILIES["llama"].build()
        simulator = tintc.compile(model, SimulatorConfig.exact(inner_lr=RATE), check="none")
        with pytest.warns(UserWarning, match="target"):
            adapted = simulator.adapt(IDS, torch.zeros_like(MASK))
        saved = tintc.save_adapted(adapted, tmp_path / "lora", "peft")
        assert {(row.rank, row.error) for row in saved.rows} == {(1, 0.0), (None, 0.0)}
        assert torch.equal(logits(loaded(model, tmp_path / "lora")), logits(model))

    def test_of_a_tied_head(self, tmp_path: Path) -> None:
        """Embedding and head are two modules with the same numbers."""
        adapted = adapted_model(FAMILIES["gpt2"].build(), train=("*wte*", "*.c_fc.*"))
        tintc.save_adapted(adapted, tmp_path / "lora", "peft")
        saved = config_of(tmp_path / "lora")["modules_to_save"]
        assert saved == ["transformer.wte", "lm_head"]
        assert_loads(FAMILIES["gpt2"].build(), adapted, tmp_path / "lora", torch.float64)

    @pytest.mark.slow
    def test_in_half_precision_the_factors_are_not(self, tmp_path: Path) -> None:
        model = FAMILIES["llama"].build(torch.bfloat16)
        adapted = adapted_model(model)
        tintc.save_adapted(adapted, tmp_path / "lora", "peft")
        tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
        factors = [value for name, value in tensors.items() if "lora_" in name]
        assert {value.dtype for value in factors} == {torch.float32}
        expected = logits(with_state(model, adapted.state_dict()))
        found = logits(loaded(model, tmp_path / "lora"))
        assert error(found, expected) < HALF_LOGITS[torch.bfloat16]

    def test_state_is_that_of_the_oracle(self, tmp_path: Path) -> None:
        """Merged into the model, which is what autograd and SGD make of it."""
        model = FAMILIES["gpt2"].build()
        config = SimulatorConfig.exact(inner_lr=RATE, steps=2)
        adapted = tintc.compile(model, config, check="none").adapt(IDS, MASK)
        tintc.save_adapted(adapted, tmp_path / "lora", "peft")
        merged = loaded(model, tmp_path / "lora").merge_and_unload().state_dict()
        expected = reference(model, config, IDS, MASK).states[0]
        assert merged.keys() == expected.keys()
        for name, value in expected.items():
            assert error(merged[name], value) < SIMULATOR[torch.float64], name

    def test_twice_the_same_bytes(self, tmp_path: Path) -> None:
        adapted = adapted_model(FAMILIES["llama"].build())
        for name in ("a", "b"):
            tintc.save_adapted(adapted, tmp_path / name, "peft")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


class TestRanks:
    @pytest.mark.slow
    def test_no_more_than_positions_and_sizes(self, tmp_path: Path) -> None:
        """The gradient reaches the positions in front of the last target, once a step."""
        model = FAMILIES["llama"].build()
        reached = int(MASK[0].sum()) - 1
        for steps in (1, 2, 6):
            adapted = adapted_model(model, steps=steps)
            assert adapted.updates.positions == reached
            saved = tintc.save_adapted(adapted, tmp_path / f"{steps}", "peft")
            state = adapted.state_dict()
            for row in saved.rows:
                if row.how == "target_modules":
                    assert row.rank is not None and row.error < 1e-12
                    assert row.rank <= min(steps * reached, *state[row.name].shape), row
                    assert row.rank == reached or steps > 1

    def test_whatever_holds_the_update(self, tmp_path: Path) -> None:
        """Positions of several training calls: those of the longest."""
        config = SimulatorConfig.exact(inner_lr=RATE)
        simulator = tintc.compile(FAMILIES["gpt2"].build(), config, check="none")
        short = simulator.adapt(IDS[:, :3], MASK[:, :3], form="factors")
        parts = [simulator.adapt(IDS, MASK, form="factors"), short]
        assert [part.updates.positions for part in parts] == [3, 2]
        both = tintc.stack(parts)
        for number, form in enumerate((both, both.with_form("weights"))):
            assert form.updates.positions == 3
            saved = tintc.save_adapted(form.select(1), tmp_path / f"{number}", "peft")
            assert max(row.rank or 0 for row in saved.rows) <= 3  # 2, and the weights' rounding

    def test_in_float32_the_rounding_of_weights_is_left_out(self, tmp_path: Path) -> None:
        saved = tintc.save_adapted(
            adapted_model(FAMILIES["llama"].build(torch.float32)), tmp_path / "lora", "peft"
        )
        reached = int(MASK[0].sum()) - 1
        assert max(row.rank or 0 for row in saved.rows) == reached

    @pytest.mark.parametrize("rank", [1, 2, 5])
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_error_is_the_tail_of_the_dense_update(
        self, family: str, rank: int, tmp_path: Path
    ) -> None:
        model = FAMILIES[family].build()
        adapted = adapted_model(model, optimizer="adam", inner_lr=0.01)  # of full rank
        saved = tintc.save_adapted(adapted, tmp_path / "lora", "peft", rank=rank)
        before, after = model.state_dict(), adapted.state_dict()
        merged = loaded(model, tmp_path / "lora").merge_and_unload().state_dict()
        rows = [row for row in saved.rows if row.how == "target_modules"]
        assert len(rows) == (14 if family == "llama" else 8)
        for row in rows:
            update = (after[row.name] - before[row.name]).numpy()
            values = numpy.linalg.svd(update, compute_uv=False)
            tail = float(numpy.linalg.norm(values[rank:]) / numpy.linalg.norm(values))
            assert row.rank == rank
            assert row.error == pytest.approx(tail, rel=1e-6, abs=1e-12)
            left = (merged[row.name] - after[row.name]).norm() / numpy.linalg.norm(values)
            assert float(left) == pytest.approx(tail, rel=1e-6, abs=1e-12)

    def test_a_low_rank_is_found_the_short_way(self) -> None:
        drawn = torch.Generator().manual_seed(5)
        random = [torch.randn(n, 6, generator=drawn, dtype=torch.float64) for n in (180, 240)]
        update = random[0] @ torch.diag(10.0 ** -torch.arange(6).double()) @ random[1].T
        noisy = update + 1e-9 * torch.randn(180, 240, generator=drawn, dtype=torch.float64)
        values = numpy.linalg.svd(noisy.numpy(), compute_uv=False)
        for rank in (1, 3, 6):
            found = truncated(noisy, torch.float64, at_most=rank, of_update=6)
            tail = float(numpy.linalg.norm(values[rank:]) / numpy.linalg.norm(values))
            assert found.rank == rank and found.error == pytest.approx(tail, rel=1e-6)

    def test_as_peft_reads_them(self, tmp_path: Path) -> None:
        """Every matrix by its whole path, and its scale is 1 whatever its rank is."""
        model = FAMILIES["gpt2"].build()
        saved = tintc.save_adapted(
            adapted_model(model, steps=4), tmp_path / "lora", "peft", rank=12
        )
        found = peft.LoraConfig.from_pretrained(str(tmp_path / "lora"))
        paths = {r.name.removesuffix(".weight"): r for r in saved.rows if r.rank is not None}
        assert set(found.target_modules) == set(paths)
        assert found.r == found.lora_alpha == max(row.rank for row in paths.values())
        assert found.rank_pattern == found.alpha_pattern
        assert (found.bias, found.fan_in_fan_out, found.task_type) == (
            "lora_only",
            True,
            "CAUSAL_LM",
        )
        layers = {
            name: layer
            for name, layer in loaded(model, tmp_path / "lora").named_modules()
            if isinstance(layer, peft.tuners.lora.LoraLayer)
        }
        assert {name.removeprefix("base_model.model.") for name in layers} == set(paths)
        for name, layer in layers.items():
            row = paths[name.removeprefix("base_model.model.")]
            assert layer.r["default"] == row.rank and layer.scaling["default"] == 1.0

    def test_a_llama_as_vllm_takes_it(self, tmp_path: Path) -> None:
        """No biases and no modules beside the factors, which vLLM refuses, and one scale."""
        adapted = adapted_model(FAMILIES["llama"].build(), train=("*_proj.weight",), steps=4)
        tintc.save_adapted(adapted, tmp_path / "lora", "peft")
        found = config_of(tmp_path / "lora")
        assert (found["bias"], found["modules_to_save"], found["use_dora"]) == ("none", None, False)
        assert found["lora_alpha"] == found["r"] >= max(found["rank_pattern"].values())
        names = load_file(tmp_path / "lora" / "adapter_model.safetensors")
        assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)

    @pytest.mark.parametrize("rank", [0, -1, 13, 2.0, True, "all", None])
    def test_no_rank(self, rank: Any, tmp_path: Path) -> None:
        adapted = adapted_model(FAMILIES["gpt2"].build())
        with pytest.raises(UsageError, match="expected full, or a whole number from 1 to 12"):
            tintc.save_adapted(adapted, tmp_path / "lora", "peft", rank=rank)
        assert list(tmp_path.iterdir()) == []

    def test_a_rank_without_a_matrix(self, tmp_path: Path) -> None:
        adapted = adapted_model(FAMILIES["gpt2"].build(), train=("*ln_*",))
        with pytest.raises(UsageError, match="rank is 1, and no matrix was trained"):
            tintc.save_adapted(adapted, tmp_path / "lora", "peft", rank=1)


class Raw(nn.Module):
    """A feed-forward unit whose matrices are parameters of its own, one of them transposed."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.up, self.down = (
            nn.Parameter(torch.zeros(ffn, hidden)),
            nn.Parameter(torch.zeros(ffn, hidden)),
        )
        self.inner = nn.Linear(ffn, ffn)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.inner(F.linear(x, self.up))) @ self.down


def raw_model(change: Callable[[Raw], None] = lambda raw: None) -> nn.Module:
    """Without a config; its last norm's path ends those of others."""
    model = nano()
    model.add_module("norm_1", model.ln_f)
    for block in model.blocks:
        block.up, block.act, block.down = Raw(6, 10), nn.Identity(), nn.Identity()
        change(block.up)
    return randomized(model).double()  # type: ignore[no-any-return]


class TestHandWritten:
    @pytest.mark.slow
    def test_parameters_of_other_modules(self, tmp_path: Path) -> None:
        """Which wrap everything that is in them, once for each."""
        model = raw_model()
        adapted = adapted_model(model, train=("*",))
        saved = tintc.save_adapted(adapted, tmp_path / "lora", "peft")
        how = {row.name: row.how for row in saved.rows}
        assert how["blocks.1.up.up"] == how["blocks.1.up.down"] == "target_parameters"
        assert how["blocks.1.up.inner.weight"] == "target_modules"
        assert how["blocks.1.up.inner.bias"] == "bias"
        assert set(how) == set(adapted.state_dict())
        assert_loads(model, adapted, tmp_path / "lora", torch.float64)

    def test_paths_that_others_end_with(self, tmp_path: Path) -> None:
        model = nano()
        model.norm_1 = model.ln_f
        del model.ln_f
        type(model).ln_f = property(lambda self: self.norm_1)  # type: ignore[attr-defined]
        try:
            adapted = adapted_model(model, train=("*norm*", "*qkv*"))
            tintc.save_adapted(adapted, tmp_path / "lora", "peft")
            assert "base_model.model.norm_1" in config_of(tmp_path / "lora")["modules_to_save"]
            assert_loads(model, adapted, tmp_path / "lora", torch.float64)
        finally:
            del type(model).ln_f  # type: ignore[attr-defined]

    def test_what_fits_no_form(self, tmp_path: Path) -> None:
        def beside_parameters(raw: Raw) -> None:
            raw.norm = nn.LayerNorm(10)
            raw.inner = nn.Sequential(raw.inner, raw.norm)

        adapted = adapted_model(raw_model(beside_parameters), train=("*",))
        with pytest.raises(UsageError, match=r"PEFT has no form for .*\.up\.norm\.weight"):
            tintc.save_adapted(adapted, tmp_path / "lora", "peft")
        assert list(tmp_path.iterdir()) == []


class TestWriting:
    def test_without_peft(self, tmp_path: Path) -> None:
        adapted = adapted_model(FAMILIES["gpt2"].build())
        absent = mock.patch.dict(sys.modules, {"peft": None})
        with absent, pytest.raises(UsageError, match=r"pip install 'tintc\[peft\]'"):
            tintc.save_adapted(adapted, tmp_path / "lora", "peft")
        assert list(tmp_path.iterdir()) == []

    def test_full_disk(self, tmp_path: Path) -> None:
        adapted = adapted_model(FAMILIES["gpt2"].build())

        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "save_file", full)
            with pytest.raises(ArtifactError, match="No space left on device"):
                tintc.save_adapted(adapted, tmp_path / "lora", "peft")
        assert list(tmp_path.iterdir()) == []

    def test_the_hub_s_name_of_the_model(self, tmp_path: Path) -> None:
        adapted = adapted_model(FAMILIES["gpt2"].build())
        origin = {"kind": "hub", "name": "some/model", "revision": "a" * 40}
        adapted.simulator.source |= origin  # type: ignore[union-attr]
        tintc.save_adapted(adapted, tmp_path / "lora", "peft")
        found = config_of(tmp_path / "lora")
        assert (found["base_model_name_or_path"], found["revision"]) == ("some/model", "a" * 40)
