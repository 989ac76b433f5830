"""What docs/guides/transformer.md says of parameters and FLOPs is what `tintc cost` prints.

docs/measured/cost.json holds the command's own output, without the list of modules; the page's
table is made from it. With --update-golden the slow test writes it anew.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.docs.test_generated import ROOT, generated
from tintc.compiler.reports.cost import cost_report
from tintc.ir.config import SimulatorConfig

FILE: Path = generated.MEASURED / "cost.json"
GUIDE = ROOT / "docs" / "guides" / "transformer.md"
REPORT = json.loads(FILE.read_text(encoding="utf-8"))


def counted(source: str, preset: str = "paper") -> dict[str, Any]:
    config = SimulatorConfig.preset(preset)
    facts = cost_report(source, config, backend="transformer")
    del facts["parameters"]["structure"]
    return json.loads(json.dumps(facts))  # type: ignore[no-any-return]


def without_time(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name != "seconds"}


@pytest.mark.slow
def test_opt_125m_is_as_stored() -> None:
    (stored,) = (facts for facts in REPORT["models"] if facts["source"] == "shape:opt-125m")
    assert counted("shape:opt-125m") == without_time(stored)


@pytest.mark.slow
def test_every_shape_is_as_stored(update_golden: bool) -> None:
    found = [
        {**counted(facts["source"]), "seconds": facts["seconds"]} for facts in REPORT["models"]
    ]
    if update_golden:
        FILE.write_text(json.dumps({**REPORT, "models": found}, indent=1) + "\n", encoding="utf-8")
    assert found == REPORT["models"]


def test_the_table_shows_all_of_them() -> None:
    table = generated.cost_of_shapes()
    assert len(table.splitlines()) == 2 + len(REPORT["models"])
    assert "<!-- generated: cost_of_shapes -->" in GUIDE.read_text(encoding="utf-8")
    for facts in REPORT["models"]:
        name = facts["source"].removeprefix("shape:")
        (row,) = (line for line in table.splitlines() if line.startswith(f"| {name} |"))
        assert f" {facts['flops'] / facts['direct_flops']:.2f} " in row


def test_what_the_guide_says_of_opt_125m() -> None:
    text = " ".join(GUIDE.read_text(encoding="utf-8").split())
    facts = REPORT["models"][0]
    parameters = facts["parameters"]
    parts = {part["name"]: part["count"] for part in parameters["parts"]}
    for number in (parameters["total"], parameters["auxiliary"], *parts.values()):
        assert f"{number:,}" in text, number
    shares = parameters["shares"]
    for name, count in shares.items():
        assert f"{count:,}" in text, name
    assert f"for OPT-125M {facts['direct_flops'] / 1e9:.1f} GFLOP" in text
    assert (
        f"{facts['flops'] / 1e9:.0f} GFLOP on 256 tokens, half of them trained: "
        f"{facts['flops'] / facts['direct_flops']:.2f} times the "
        f"{facts['direct_flops'] / 1e9:.0f} GFLOP" in text
    )


@pytest.mark.slow
def test_what_the_guide_says_of_exact() -> None:
    text, facts = GUIDE.read_text(encoding="utf-8"), counted("shape:opt-125m", "exact")
    ratio = facts["flops"] / facts["direct_flops"]
    assert f"`exact` takes {facts['flops'] / 1e9:.0f} GFLOP, {ratio:.2f} times" in text


def test_what_the_guide_concludes() -> None:
    text = " ".join(GUIDE.read_text(encoding="utf-8").split())

    def bounds(values: list[float], digits: int) -> str:
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"

    of_auxiliary = {
        share: [
            facts["parameters"]["shares"][share] / facts["parameters"]["auxiliary"]
            for facts in REPORT["models"]
        ]
        for share in ("none", "layers")
    }
    direct = [facts["flops"] / facts["direct_flops"] for facts in REPORT["models"]]
    assert f"{bounds(of_auxiliary['none'], 2)} times the parameters" in text
    assert f"{bounds(of_auxiliary['layers'], 2)} times with `layers`" in text
    assert f"takes {bounds(direct, 1)} times the FLOPs" in text
