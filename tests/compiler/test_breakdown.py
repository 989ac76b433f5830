"""FLOPs by phase and operator: sums against torch's own counter, rows against formulas by hand."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.support.flops import counting
from tests.support.grid import grid
from tests.support.models import opt, simulate, tokens
from tintc.compiler.cost import estimate
from tintc.compiler.reports.breakdown import breakdown
from tintc.compiler.reports.cost import COUNTED
from tintc.ir.call_sizes import CallSizes, Predict
from tintc.ir.config import SimulatorConfig
from tintc.runtime.simulator import Simulator

HIDDEN, HEADS, FFN, VOCAB, LAYERS = 32, 2, 80, 100, 2
BATCH, TOKENS, SEGMENT = 3, 40, 19
PRODUCTS = ("tint.linear_forward", "tint.linear_residual")

PAPER, EXACT = SimulatorConfig.paper, SimulatorConfig.exact
CONFIGS = {
    "paper": PAPER(),
    "exact": EXACT(),
    "3 steps of the top block": EXACT(steps=3, layers=1),
    "a loop": EXACT(steps=6),
    "a loop over the top block": PAPER(steps=6, layers=1),
    "a loop with states": EXACT(steps=6, momentum=0.9, layers=1),
    "muon": EXACT(steps=2, optimizer="muon", layers=1),
    "one kind of weight": EXACT(train=("*.fc1.*",)),
}


def simulator(config: SimulatorConfig, **changes: Any) -> Simulator:
    model = opt(
        hidden=HIDDEN, heads=HEADS, ffn=FFN, vocab=VOCAB, layers=LAYERS, positions=64,
        dtype=torch.float32,
    )  # fmt: skip
    compiled = simulate(model, config)
    return Simulator(
        compiled.program, compiled.prefix.tensors(), optimize=changes.get("optimize", COUNTED)
    ).requires_grad_(False)


def sizes() -> CallSizes:
    return {"batch": BATCH, "tokens": TOKENS, "segment": SEGMENT}


def counted(compiled: Simulator, predict: Predict = "all") -> int:
    """What torch counts of a real call."""
    ids = tokens(BATCH, TOKENS, VOCAB)
    mask = (torch.arange(TOKENS) <= SEGMENT).long().expand(BATCH, TOKENS)
    # torch counts no fused attention of a CPU, which is written out instead
    counter = counting()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        compiled(ids, mask, predict=predict)
    return int(counter.get_total_flops())


def phases(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {phase["phase"]: phase for phase in found["phases"]}


@grid(together=1, name=CONFIGS, predict=["all", "rest"])
def test_the_sum_is_what_torch_counts(name: str, predict: Predict) -> None:
    # torch knows nothing of its fused way back on a CPU
    names = [n for n in COUNTED if n != "flash_attention"]
    compiled = simulator(CONFIGS[name], optimize=names)
    found = breakdown(compiled, sizes(), optimize=names, predict=predict)
    assert found["flops"] == counted(compiled, predict)
    assert (
        found["flops"]
        == estimate(
            compiled.program, "fused", torch.float32, optimize=names, predict=predict, **sizes()
        ).flops
    )
    for phase in found["phases"]:
        assert phase["flops"] == sum(row["flops"] for row in phase["operators"])
        assert phase["lower_bound"] <= phase["flops"]
        assert all(row["lower_bound"] <= row["flops"] for row in phase["operators"])
    assert found["lower_bound"] == pytest.approx(
        sum(phase["lower_bound"] for phase in found["phases"]), abs=len(found["phases"])
    )


class TestRows:
    def test_of_a_forward_pass_by_hand(self) -> None:
        rows = breakdown(simulator(CONFIGS["exact"]), sizes(), optimize=COUNTED)
        (last,) = [p for p in rows["phases"] if p["phase"] == "last forward"]
        products = 2 * TOKENS * (4 * HIDDEN**2 + 2 * HIDDEN * FFN) * LAYERS
        head = 2 * TOKENS * HIDDEN * VOCAB
        by_name = {row["operator"]: row for row in last["operators"]}
        own = sum(by_name.get(name, {"lower_bound": 0})["lower_bound"] for name in PRODUCTS)
        assert own == BATCH * (products + head)
        attention = by_name["tint.attention_forward"]
        assert attention["flops"] == BATCH * LAYERS * 2 * 2 * TOKENS**2 * HIDDEN
        pairs = TOKENS * (TOKENS + 1) // 2
        assert attention["lower_bound"] == BATCH * LAYERS * 2 * 2 * pairs * HIDDEN
        assert attention["calls"] == LAYERS

    def test_the_head_stands_where_it_runs(self) -> None:
        """Logits of the training pass are made in chunks on the way back."""
        found = phases(breakdown(simulator(CONFIGS["paper"]), sizes(), optimize=COUNTED))
        rows = {row["operator"]: row for row in found["step 0 backward"]["operators"]}
        both = 2 * BATCH * 2 * SEGMENT * HIDDEN * VOCAB
        assert rows["tint.head_gradient"]["flops"] == both
        assert rows["tint.head_gradient"]["lower_bound"] == both
        plain = [n for n in COUNTED if n != "chunk_head"]
        without = phases(breakdown(simulator(CONFIGS["paper"]), sizes(), optimize=plain))
        assert without["step 0 forward"]["flops"] - found["step 0 forward"]["flops"] == both // 2

    @pytest.mark.slow
    def test_updates_stand_where_they_are_made_or_read(self) -> None:
        """Factors have no descent: what they need stands beside the products with them."""
        low_rank = breakdown(simulator(CONFIGS["paper"]), sizes(), optimize=["low_rank_updates"])
        own = breakdown(simulator(CONFIGS["paper"]), sizes(), optimize=())
        assert "step 0 descent" not in phases(low_rank)
        names = {row["operator"] for row in phases(low_rank)["last forward"]["operators"]}
        assert "tint.low_rank" in names
        assert phases(own)["step 0 descent"]["lower_bound"] > 0
        assert own["lower_bound"] == low_rank["lower_bound"]

    def test_of_the_rest_by_hand(self) -> None:
        """K = T - S positions of the top block; keys and values, and blocks below, of all T."""
        config = EXACT()
        kept = TOKENS - SEGMENT
        found = [
            phases(breakdown(simulator(config), sizes(), optimize=COUNTED, predict=predict))
            for predict in ("all", "rest")
        ]
        every, rest = ({r["operator"]: r for r in p["last forward"]["operators"]} for p in found)
        top = 2 * (2 * HIDDEN**2 + 2 * HIDDEN * FFN) + 2 * HIDDEN * VOCAB
        own = [
            sum(of.get(name, {"lower_bound": 0})["lower_bound"] for name in PRODUCTS)
            for of in (every, rest)
        ]
        assert own[0] - own[1] == BATCH * SEGMENT * top
        attention = [of["tint.attention_forward"]["lower_bound"] for of in (every, rest)]
        pairs = SEGMENT * (SEGMENT + 1) // 2  # of tokens that predict nothing
        assert attention[0] - attention[1] == BATCH * 2 * 2 * pairs * HIDDEN
        assert rest["tint.attention_forward"]["flops"] == BATCH * 4 * HIDDEN * TOKENS * (
            (LAYERS - 1) * TOKENS + kept
        )

    def test_direct(self) -> None:
        found = breakdown(simulator(CONFIGS["exact"]), sizes())
        assert found["direct_flops"] > found["lower_bound"]


@pytest.mark.slow
def test_the_transformer_has_phases_too() -> None:
    fused = simulator(CONFIGS["paper"])
    built = Simulator(fused.program, fused.prefix.tensors(), backend="transformer", share="all")
    built = built.requires_grad_(False)
    found = breakdown(built, sizes())
    assert found["flops"] == estimate(built.program, "transformer", torch.float32, **sizes()).flops
    assert {"step 0 forward", "step 0 backward", "step 0 descent", "last forward"} <= set(
        phases(found)
    )
    assert found["lower_bound"] == breakdown(fused, sizes())["lower_bound"]
