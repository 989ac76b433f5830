"""LoRA adapters, as the installed peft reads them: the adapted model is the one whose weights
`Adapted.state_dict` gives.
"""

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import tintc
from tests.oracle.reference import reference
from tests.support.families import FAMILIES
from tests.support.models import ragged_train_mask, tokens
from tests.support.nano import nano
from tests.support.tolerances import ADAPTER, SIMULATOR, error
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import NumericalError, UsageError
from tintc.runtime.adapted import Adapted

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'tintc[peft]'")
IDS = tokens(1, 9, 19, seed=3)
MASK = ragged_train_mask(1, 9, seed=2)
RATE = 0.05
EXACT = {"preset": "exact"}


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
