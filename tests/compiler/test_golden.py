"""The golden files hold logits that the paper's own code computed in float64 (TINT.md section
5).
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.models import on_all_backends
from tests.support.tolerances import GOLDEN, error, measured
from tintc.ir.config import SimulatorConfig
from tintc.runtime.backends.transformer.structure import SHARES
from tintc.runtime.simulator import Simulator

FILES = sorted((Path(__file__).parents[1] / "golden").glob("*.safetensors"))


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["json"]), {
            name: file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118 (no mapping)
        }


def test_all_six_files_are_here() -> None:
    assert len(FILES) == 6


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_reproduced(path: Path) -> None:
    """On both back ends; however the structural constants are shared, to the bit."""
    header, tensors = load(path)
    model = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**header["config"])).double().eval()
    )
    weights = {
        name.removeprefix("aux."): value
        for name, value in tensors.items()
        if name.startswith("aux.")
    }
    left = model.load_state_dict(weights, strict=False)
    assert left.missing_keys == ["lm_head.weight"], (
        "tied to the token embedding, so the file holds it once"
    )
    assert not left.unexpected_keys
    config = SimulatorConfig.paper(
        inner_lr=header["inner_lr"],
        steps=header["steps"],
        layers=header["trained_layers"],
        norm_update=header["layernorm_update"],
        loss_gradient=header["loss_gradient"],
        finite_difference_scale=header["finite_difference_scale"],
    )
    logits = {
        name: check(simulator, name, tensors)
        for name, simulator in on_all_backends(model, config, SHARES).items()
    }
    assert set(logits) == {"fused", *SHARES}
    assert all(torch.equal(logits[share], logits["none"]) for share in SHARES)
    # The update is far larger than the tolerance, so the comparison above says something.
    assert error(tensors["final_logits"], tensors["initial_logits"]) > 1e-4


def check(simulator: Simulator, name: str, tensors: dict[str, Tensor]) -> Tensor:
    """The final logits, after comparing them and the initial ones with the file's."""
    with torch.inference_mode():
        out = simulator(tensors["input_ids"], tensors["train_mask"])
        both = simulator(tensors["input_ids"], tensors["train_mask"], return_initial=True)
    assert out.initial_logits is None
    for found, expected in (
        (out.logits, tensors["final_logits"]),
        (both.logits, tensors["final_logits"]),
        (both.initial_logits, tensors["initial_logits"]),
    ):
        assert (
            measured(f"golden files: logits, float64, {simulator.backend}", error(found, expected))
            < GOLDEN
        ), name
    return out.logits
