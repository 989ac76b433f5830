"""Every decoder family, in float64: its simulator's logits are the model's, and its updates are
those of autograd and SGD.

Each model is compared as it is, within what its casts to float32 cost, and without those casts
(`wide`), far more tightly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.oracle.compare import assert_agrees
from tests.oracle.reference import reference
from tests.support.decoders import DECODERS
from tests.support.every import BUILDERS, model_of, simulator_of
from tests.support.families import FAMILIES, VOCAB
from tests.support.grid import grid, some
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
from tintc.compiler.casts import no_casts
from tintc.ir.config import SimulatorConfig

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
WIDE = {False: "as is", True: "no casts"}


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


@some(
    ("name", "wide"),
    [*((name, name in CASTING) for name in BUILDERS), *((name, False) for name in AS_IS)],
    default=[
        *((name, name in CASTING) for name in BUILDERS),
        *((name, False) for name in AS_IS if name in FAMILIES),
    ],
)
def test_initial_logits(name: str, wide: bool) -> None:
    """The casts of variants as they are: see AS_IS."""
    as_is = name in CASTING and not wide
    kind = f"families: initial logits, {'as is' if as_is else 'without casts'}"
    limit = CASTS if as_is else SIMULATOR[torch.float64]
    assert measured(kind, logits_error(name, wide)) < limit


@pytest.mark.slow
def test_initial_logits_of_rounded_alibi() -> None:
    """Where the model's own ALiBi is rounded to bfloat16, the simulator has it rounded or not:
    within that rounding, and no further.
    """
    (name,) = ROUNDED_ALIBI
    assert logits_error(name, False) < ROUNDED_ALIBI_LOGITS
    assert logits_error(name, True) < SIMULATOR[torch.float64]


def of_families(*by_default: tuple[int, bool]) -> Any:
    """(name, steps, wide): of every family; by default only these (steps, wide)."""
    kinds = [(steps, wide) for steps in (1, 2) for wide in WIDE]
    rows = [(name, *kind) for name in FAMILIES for kind in kinds]
    return some(("name", "steps", "wide"), rows, [row for row in rows if row[1:] in by_default])


@of_families((2, True))
def test_exact(name: str, steps: int, wide: bool) -> None:
    """One step on padded sequences, two on ragged training segments."""
    assert_trains_like_autograd(name, EXACT[steps], {1: "padded_left", 2: "ragged"}[steps], wide)


@some(
    ("name", "wide"),
    [(name, wide) for name in FAMILIES for wide in WIDE],
    default=[(name, True) for name in FAMILIES],
)
def test_paper(name: str, wide: bool) -> None:
    assert_trains_like_autograd(name, PAPER, "ragged", wide)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow
def test_paper_in_the_top_block(name: str) -> None:
    """With a small scale the differences are far from the derivatives; padding stands on the
    left.
    """
    config = SimulatorConfig.paper(
        layers=1, finite_difference_scale=10.0, norm_update="all", **RATE
    )
    assert_trains_like_autograd(name, config, "padded_left", True)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["mean_embedding", "quadratic"])
@pytest.mark.parametrize("name", ["gptj", "phi", "gemma", "bloom"])
def test_loss_gradients(name: str, loss: Any) -> None:
    """Heads with a bias, and tied ones."""
    assert_trains_like_autograd(
        name, SimulatorConfig.exact(loss_gradient=loss, **RATE), "ragged", True
    )


@some(
    ("name", "preset"),
    [(name, preset) for name in (*VARIANTS, *DECODERS) for preset in ("exact", "paper")],
    default=[(name, "exact") for name in (*VARIANTS, *DECODERS)],
)
@pytest.mark.slow
def test_variant(name: str, preset: str) -> None:
    config, scenario = {
        "exact": (EXACT[2], "ragged"),
        "paper": (PAPER_OF_VARIANTS, "padded_left"),
    }[preset]
    assert_trains_like_autograd(name, config, scenario, True)


@grid(together=1, name=[*FAMILIES, *DECODERS], preset=["exact", "paper"])
@pytest.mark.slow
def test_both_back_ends_agree(name: str, preset: str) -> None:
    config = {"paper": PAPER if name in FAMILIES else PAPER_OF_VARIANTS, "exact": EXACT[2]}[preset]
    inputs, wide = SCENARIOS["ragged"](2, 9, VOCAB), name in CASTING
    with torch.inference_mode():
        fused, transformer = (
            simulator_of(name, wide, config, backend)(**inputs).logits
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
