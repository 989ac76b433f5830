"""Every decoder family, in float64: its simulator's logits are the model's, and its updates are
those of autograd and SGD.

Each model is compared as it is, within what its casts to float32 cost, and without those casts
(`wide`), far more tightly.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.oracle.casts import no_casts
from tests.oracle.compare import assert_agrees
from tests.oracle.reference import reference
from tests.support.decoders import DECODERS
from tests.support.families import FAMILIES, VOCAB, Builder
from tests.support.models import tokens
from tests.support.scenarios import SCENARIOS
from tests.support.support_table import BEGIN, END, render
from tests.support.tolerances import (
    BACKENDS,
    CASTS,
    ROUNDED_ALIBI_LOGITS,
    SIMULATOR,
    error,
    measured,
)
from tests.support.variants import ROUNDED_ALIBI, VARIANTS
from tintc.compiler.driver import lower
from tintc.compiler.frontend.capture import Captured, capture
from tintc.ir.config import SimulatorConfig
from tintc.ir.program import Program
from tintc.runtime.simulator import Simulator

BUILDERS: dict[str, Builder] = {
    **{name: f.build for name, f in FAMILIES.items()},
    **VARIANTS,
    **DECODERS,
}
CASTING = [
    name
    for name in BUILDERS
    if name not in DECODERS and (FAMILIES[name.split("-")[0]].casts or name.endswith("eager"))
]
# A variant is captured a second time, as it is, only where it changes what is cast.
AS_IS = [
    name
    for name in CASTING
    if name in FAMILIES or name.endswith(("eager", "linear", "yarn", "phi-qk-norm"))
]
RATE = {"inner_lr": 0.002}
EXACT = {steps: SimulatorConfig.exact(steps=steps, **RATE) for steps in (1, 2)}
PAPER = SimulatorConfig.paper(steps=2, **RATE)
PAPER_OF_VARIANTS = SimulatorConfig.paper(finite_difference_scale=50.0, **RATE)
as_is_or_wide = pytest.mark.parametrize("wide", [False, True], ids=["as is", "no casts"])


@cache
def model_of(name: str) -> nn.Module:
    return {**BUILDERS, **ROUNDED_ALIBI}[name]()


@cache
def captured(name: str, wide: bool) -> Captured:
    with no_casts(wide):
        return capture(model_of(name))


@cache
def lowered(name: str, wide: bool, config: SimulatorConfig) -> Program:
    return lower(captured(name, wide).copy(), config)


def simulator_of(name: str, wide: bool, config: SimulatorConfig, **options: str) -> Simulator:
    return Simulator(lowered(name, wide, config), captured(name, wide).tensors, **options)  # type: ignore[arg-type]


def assert_trains_like_autograd(
    name: str, config: SimulatorConfig, scenario: str, wide: bool
) -> None:
    """A model without casts is captured once, and always held to the tight tolerance."""
    casts = name in CASTING
    inputs = SCENARIOS[scenario](2, 9, VOCAB)
    with no_casts(wide and casts):
        expected = reference(model_of(name), config, **inputs)
    limit = CASTS if casts and not wide else SIMULATOR[torch.float64]
    assert_agrees(
        simulator_of(name, wide and casts, config),
        expected,
        limit=limit,
        of=f"families {'as they are' if limit == CASTS else 'without casts'}, ",
        **inputs,
    )


def logits_error(name: str, wide: bool) -> float:
    """Of the logits before any step, relative to the largest."""
    model, ids = model_of(name), tokens(2, 9, VOCAB, seed=3)
    with torch.inference_mode():
        with no_casts(wide):
            out = model(ids)
        expected = getattr(out, "logits", out)
        found = simulator_of(name, wide, EXACT[2]).predict_initial(ids)
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", BUILDERS)
def test_initial_logits(name: str) -> None:
    if name in AS_IS:
        assert measured("families: initial logits, as is", logits_error(name, False)) < CASTS
    assert (
        measured("families: initial logits, without casts", logits_error(name, name in CASTING))
        < SIMULATOR[torch.float64]
    )


def test_initial_logits_of_rounded_alibi() -> None:
    """Where the model's own ALiBi is rounded to bfloat16, the simulator has it rounded or not:
    within that rounding, and no further.
    """
    (name,) = ROUNDED_ALIBI
    assert logits_error(name, False) < ROUNDED_ALIBI_LOGITS
    assert logits_error(name, True) < SIMULATOR[torch.float64]


@as_is_or_wide
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_exact(name: str, steps: int, wide: bool) -> None:
    """One step on padded sequences, two on ragged training segments."""
    assert_trains_like_autograd(name, EXACT[steps], {1: "padded_left", 2: "ragged"}[steps], wide)


@as_is_or_wide
@pytest.mark.parametrize("name", FAMILIES)
def test_paper(name: str, wide: bool) -> None:
    assert_trains_like_autograd(name, PAPER, "ragged", wide)


@pytest.mark.parametrize("name", FAMILIES)
def test_paper_in_the_top_block(name: str) -> None:
    """With a small scale the differences are far from the derivatives; padding stands on the
    left.
    """
    config = SimulatorConfig.paper(
        layers=1, finite_difference_scale=10.0, norm_update="all", **RATE
    )
    assert_trains_like_autograd(name, config, "padded_left", True)


@pytest.mark.parametrize("name", FAMILIES)
def test_value_attention(name: str) -> None:
    """The only deviation from exact gradients."""
    assert_trains_like_autograd(
        name, SimulatorConfig.exact(steps=2, attention_gradient="value", **RATE), "ragged", True
    )


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.masks])
def test_masks(name: str) -> None:
    """Demonstrations that see only themselves, at positions that restart where the family has
    positions of a caller's choice.
    """
    scenario = "demonstrations" if FAMILIES[name].position_ids else "blocks"
    assert_trains_like_autograd(name, EXACT[1], scenario, True)


@pytest.mark.parametrize("loss", ["mean_embedding", "quadratic"])
@pytest.mark.parametrize("name", ["gptj", "phi", "gemma", "bloom"])
def test_loss_gradients(name: str, loss: Any) -> None:
    """Heads with a bias, and tied ones."""
    assert_trains_like_autograd(
        name, SimulatorConfig.exact(loss_gradient=loss, **RATE), "ragged", True
    )


@pytest.mark.parametrize("name", [*VARIANTS, *DECODERS])
def test_variant(name: str) -> None:
    assert_trains_like_autograd(name, EXACT[2], "ragged", True)
    assert_trains_like_autograd(name, PAPER_OF_VARIANTS, "padded_left", True)


@pytest.mark.parametrize("preset", ["paper", "exact"])
@pytest.mark.parametrize("name", [*FAMILIES, *DECODERS])
def test_both_back_ends_agree(name: str, preset: str) -> None:
    config = {"paper": PAPER if name in FAMILIES else PAPER_OF_VARIANTS, "exact": EXACT[2]}[preset]
    inputs, wide = SCENARIOS["ragged"](2, 9, VOCAB), name in CASTING
    with torch.inference_mode():
        fused, transformer = (
            simulator_of(name, wide, config, backend=backend)(**inputs).logits
            for backend in ("fused", "transformer")
        )
    assert (
        measured("families: transformer against fused back end", error(transformer, fused))
        < BACKENDS[torch.float64]
    )


def test_the_docs_have_the_support_table() -> None:
    """`python -m tests.support.support_table` prints it."""
    page = Path(__file__).parents[2] / "docs" / "reference" / "support.md"
    text = page.read_text(encoding="utf-8")
    assert f"{BEGIN}\n{render()}\n{END}" in text
