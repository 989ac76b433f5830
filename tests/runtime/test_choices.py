"""What a calibration chooses: every choice forced both ways gives the same numbers, and is made."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.models import gpt2, opt, simulate
from tests.support.optimized import exact, pruned
from tests.support.speeds import SPEEDS, by_rows, full_at, only
from tests.support.stages import Stage
from tests.support.tolerances import OPTIMIZED, error
from tintc.evaluate.speed.workload import random_workload
from tintc.ir.calibration import fixed
from tintc.ir.config import SimulatorConfig
from tintc.ir.dialect import operator_of
from tintc.ir.ops.onednn import available
from tintc.passes.optimize.onednn_products import onednn_products
from tintc.runtime.simulator import Simulator
from tintc.runtime.slices import Work, slice_size
from tintc.runtime.specialize.chosen import chosen_text
from tintc.runtime.specialize.programs import Programs

needs_onednn = pytest.mark.skipif(not available(), reason="this torch has no oneDNN")
WORK = random_workload(29, batch=5, tokens=11, trained=7)


def called(simulator: Simulator) -> dict[str, Tensor]:
    with torch.inference_mode():
        out = simulator(WORK.ids_BT, WORK.train_mask, return_initial=True)
        logits = simulator(WORK.ids_BT, WORK.train_mask).logits
        losses = simulator.losses(WORK.ids_BT, WORK.train_mask, WORK.ids_BT).losses
    assert out.initial_logits is not None
    return {"both": out.logits, "initial": out.initial_logits, "logits": logits, "losses": losses}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("build", "config"),
    [(opt, SimulatorConfig.exact), (gpt2, SimulatorConfig.paper)],
    ids=["opt exact", "gpt2 paper"],
)
def test_same_numbers_whatever_is_chosen(build: Any, config: Any, dtype: torch.dtype) -> None:
    simulator = simulate(build(), config(inner_lr=0.01, steps=2)).to(dtype)
    simulator.optimizations = ()
    expected = called(simulator)
    simulator.optimizations = True  # type: ignore[assignment]
    made = {}
    for name, speed in SPEEDS.items():
        simulator.calibration = speed  # type: ignore[assignment]
        found = called(simulator)
        for kind, value in expected.items():
            assert error(found[kind], value) < OPTIMIZED[dtype], (name, kind)
        sizes = {"batch": 5, "tokens": 11, "segment": 6}
        made[name] = simulator.chosen(sizes)  # type: ignore[arg-type]
    products = {name: each["products"] for name, each in made.items()}
    assert products["blas"]["onednn"] == 0 < products["blas"]["blas"]
    if dtype == torch.float32 and available():
        assert products["onednn"]["blas"] == 0 < products["onednn"]["onednn"]
        assert min(products["by_rows"].values()) > 0
    assert made["slow_memory"]["updates"]["own_weights"] == 0
    assert made["fast_memory"]["updates"]["own_weights"] > 0
    assert made["small_slices"]["sequences_together"] == 1
    assert made["large_slices"]["sequences_together"] == 5
    assert [made[name]["chunk_tokens"] for name in ("small_slices", "large_slices")] == [4, 64]


def test_the_fixed_calibration_measures_nothing_and_says_so() -> None:
    simulator = simulate(opt(dtype=torch.float32), SimulatorConfig.exact(inner_lr=0.01))
    found = simulator.chosen()
    assert (found["measured"], found["calibration"]) == (False, {"from": "fixed"})
    assert chosen_text(found).startswith("calibration fixed; products: ")
    assert "head in chunks of a fixed number of logits" in chosen_text(found)
    simulator.calibration = full_at(16)  # type: ignore[assignment]
    text = chosen_text(simulator.chosen())
    assert "calibration measured, a test; " in text and "chunks of 16 tokens" in text


def test_programs_know_sizes_only_where_kernels_depend_on_them() -> None:
    """Else every length would have a program of its own; where they do, one for each doubling."""
    simulator = simulate(opt(dtype=torch.float32), SimulatorConfig.exact())
    weight = next(simulator.prefix.parameters())
    kind = simulator._usual(("logits",), differentiable=False)
    for speed, programs in ((only("blas"), 1), (fixed("cpu"), 1), (by_rows(), 4)):
        made = Programs(simulator.program, None, ("onednn_products",), None, speed)
        sizes = {made.choose(kind, weight, tokens, 1, 1).sizes for tokens in range(2, 14)}
        assert len(sizes) == programs


@needs_onednn
def test_products_that_are_slower_there_stay() -> None:
    """By the rows, inner size and columns that each product has."""
    sizes = (("B", 8), ("T", 8), ("S", 2))
    options: dict[str, Any] = {"dtype": torch.float32, "calibration": by_rows(), "sizes": sizes}
    at = pruned(exact(steps=2), low_rank=frozenset(), **options)
    found = [str(operator_of(node)) for node in onednn_products(*_copied(at)).nodes]
    # the segment's shared products have 8 * 2 rows, those of the last forward pass 8 * 8
    assert found.count("tint.onednn_product") > 0 < found.count("tint.linear_forward")
    assert found.count("tint.linear_descent") > 0  # as many rows as a weight has


def _copied(at: Stage) -> Any:
    from tintc.runtime.specialize.optimize import copy_graph

    return copy_graph(at.graph), at.context


def test_as_many_sequences_as_products_need() -> None:
    """The fewest that lose nothing, by an exhaustive search."""
    for rows in (1, 16, 64):
        speed = full_at(rows)
        for batch, tokens in ((1, 8), (7, 8), (16, 4), (64, 1)):
            rates = [speed.rate(n * tokens, 16, 16) for n in range(1, batch + 1)]
            found = slice_size(batch, Work(tokens, widths=[(16, 16)]), speed)
            assert speed.rate(found * tokens, 16, 16) == max(rates)
            slices = math.ceil(batch / found)
            assert found == math.ceil(batch / slices)


def test_rows_of_training_passes_count() -> None:
    """Whole texts keep a product busy, their short segments do not: several go together, the more
    the more steps there are.
    """
    speed = full_at(64)
    alone = Work(64, widths=[(16, 16)])
    assert slice_size(16, alone, speed) == 1
    trained = [dataclasses.replace(alone, segment=4, steps=steps) for steps in (1, 50)]
    sizes = [slice_size(16, work, speed) for work in trained]
    assert 1 < sizes[0] <= sizes[1] == 16
