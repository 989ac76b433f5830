"""The parameter report against the parameters that there are."""

import copy
import json
import math
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch

from tests.support.models import FAMILIES, simulate
from tintc import parameter_report
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import UsageError
from tintc.runtime.backends.transformer.pages import PrefixPages
from tintc.runtime.backends.transformer.structure import SHARES
from tintc.runtime.simulator import Simulator

CONFIGS = {
    "paper": SimulatorConfig.paper(),
    "exact, 2 steps": SimulatorConfig.exact(steps=2),
    "top block": SimulatorConfig.paper(layers=1, norm_update="all"),
}


@cache
def fused(family: str, config: SimulatorConfig) -> Simulator:
    return simulate(FAMILIES[family](layers=3), config)


@cache
def transformer(family: str, config: SimulatorConfig, share: str = "none") -> Simulator:
    """Made once: do not change it."""
    compiled = fused(family, config)
    return Simulator(
        compiled.program, compiled.prefix.tensors(), backend="transformer", share=share
    )


def parts(report: dict[str, Any]) -> dict[str, int]:
    return {part["name"]: part["count"] for part in report["parts"]}


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_counted_once(family: str, config: SimulatorConfig, share: str) -> None:
    simulator = transformer(family, config, share)
    report = parameter_report(simulator)
    assert report["total"] == sum(p.numel() for p in simulator.parameters())
    assert sum(parts(report).values()) == report["total"]
    assert simulator.structure is not None
    assert isinstance(simulator.prefix, PrefixPages)
    assert parts(report) == {
        "prefix numbers": sum(p.numel() for p in simulator.prefix.pages),
        "tables": sum(p.numel() for p in simulator.prefix.tables.parameters()),
        "structural constants": sum(p.numel() for p in simulator.structure.layers.parameters()),
        "position code": simulator.structure.code.numel(),
        "inner learning rate": 1,
    }
    assert sum(row["count"] for row in report["structure"]) == parts(report)["structural constants"]
    assert sum(report["by_phase"].values()) == parts(report)["structural constants"]
    copies = Counter(type(module).__name__ for module in simulator.structure.layers.values())
    found: Counter[str] = Counter()
    for row in report["structure"]:
        found[row["module"]] += row["copies"]
    assert found == copies
    json.dumps(report)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_formulas_give_the_counts(config: SimulatorConfig) -> None:
    rows = parameter_report(transformer("opt", config))["structure"]
    assert len(rows) > 10
    for row in rows:
        assert eval(row["formula"], {"ceil": math.ceil}, row["sizes"]) == row["numbers"], row
        assert row["copies"] == row["uses"]
        assert row["count"] == row["numbers"] * row["copies"]


def test_the_formula_of_the_prefix_numbers() -> None:
    report = parameter_report(transformer("gpt2", CONFIGS["paper"]))
    (part,) = (part for part in report["parts"] if part["name"] == "prefix numbers")
    assert eval(part["formula"].partition("= ")[2]) == part["count"]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_sharing_saves_is_what_sharing_simulators_have(config: SimulatorConfig) -> None:
    totals = {
        share: sum(p.numel() for p in transformer("opt", config, share).parameters())
        for share in SHARES
    }
    for share in SHARES:
        report = parameter_report(transformer("opt", config, share))
        assert report["shares"] == totals
        assert report["share"] == share
    # Counted for a way of sharing that is not the simulator's own: what `tintc cost` does.
    for share in SHARES:
        found = parameter_report(transformer("opt", config, "all"), share)
        assert found == parameter_report(transformer("opt", config, share))
    assert totals["none"] > totals["layers"] > totals["all"]


def test_steps_cost_parameters_only_without_sharing() -> None:
    """Every pass of every step has modules of its own unless all that are equal are one."""
    one, three = (
        parameter_report(transformer("opt", SimulatorConfig.paper(steps=steps))) for steps in (1, 3)
    )
    assert three["shares"]["none"] > one["shares"]["none"]
    assert three["shares"]["all"] == one["shares"]["all"]
    assert (one["passes"], three["passes"]) == (
        {"forward": 2, "backward": 1, "descent": 1},
        {"forward": 4, "backward": 3, "descent": 3},
    )


def test_an_unknown_share_is_refused() -> None:
    simulator = transformer("opt", SimulatorConfig.paper())
    with pytest.raises(UsageError, match="share is 'some'; expected one of none, layers, all"):
        parameter_report(simulator, "some")
    with pytest.raises(UsageError, match="fused back end has no structural constants to share"):
        parameter_report(simulate(FAMILIES["opt"](), SimulatorConfig.paper()), "all")


def test_structural_constants_may_be_thawed() -> None:
    """They need no gradient by default; with one, an outer loss still reaches everything."""
    simulator = copy.deepcopy(transformer("opt", SimulatorConfig.paper())).requires_grad_(True)
    simulator(torch.arange(12).reshape(2, 6), torch.ones(2, 6)).logits.square().sum().backward()
    assert simulator.structure is not None
    found = [p.grad for p in simulator.structure.parameters()]
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in found) > len(found) / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_back_end(family: str) -> None:
    model = FAMILIES[family]()
    simulator = simulate(model, SimulatorConfig.paper())
    report = parameter_report(simulator)
    assert report["auxiliary"] == sum(p.numel() for p in model.parameters())
    assert (
        report["total"] == sum(p.numel() for p in simulator.parameters()) == report["auxiliary"] + 1
    )
    tables = sum(
        p.numel()
        for name, p in model.named_parameters()
        if any(part in name for part in ("embed_", "wte", "wpe"))
    )
    assert parts(report)["tables"] == tables
    assert (report["structure"], report["shares"]) == ([], {})


@pytest.mark.slow
def test_solved_sizes_have_the_fewest_parameters() -> None:
    """Of many K, D_sim and H_sim that a user could set, none gives a smaller simulator (gates and
    vectors aside). Built with shared constants, which is quicker, and counted without."""
    solved = transformer("opt", SimulatorConfig.paper())
    layout, best = solved.program.layout, parameter_report(solved)["total"]
    for heads in (2, 3, 5, 8, layout.sim_heads):
        for width in (3, 4, 6, 12, 20, layout.head_width):
            config = SimulatorConfig.paper(sim_heads=heads, sim_hidden=heads * width)
            if heads * width >= 12:
                assert (
                    parameter_report(transformer("opt", config, "all"), "none")["total"]
                    > 0.97 * best
                )


@pytest.mark.slow
@pytest.mark.parametrize(("share", "most"), [("none", 1_300_000_000), ("layers", 360_000_000)])
def test_opt_125m(share: str, most: int) -> None:
    """Counted from the emitted module. The paper's own code: 1,669,324,018 (docs/TINT.md)."""
    import tintc

    simulator = tintc.compile(
        "shape:opt-125m", tintc.SimulatorConfig.paper(), backend="transformer", share=share
    )
    counted = sum(p.numel() for p in simulator.parameters())
    assert counted == parameter_report(simulator)["total"]
    assert counted <= most
    ids = torch.randint(50272, (1, 256), generator=torch.Generator().manual_seed(0))
    train_mask = (torch.arange(256) < 128).long()[None]
    fused = Simulator(simulator.program, simulator.prefix.tensors())
    with torch.inference_mode():
        found, expected = simulator(ids, train_mask).logits, fused(ids, train_mask).logits
    # Rounding of float32 is amplified by the first-order ReLU's ramp (docs/reference/measured.md).
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-3
