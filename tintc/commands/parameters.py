"""Tables of a parameter report: what every parameter of a simulator is for."""

from __future__ import annotations

from tintc.commands import console
from tintc.commands.sheet import Sheet
from tintc.compiler.report_types import ParameterReport

_LETTERS = (
    "d: coordinates of a head; S, P: rows a token and heads a row of a tile; W: width of the "
    "range; q, k, v, o: of queries, keys, "
    "values and result. each: parameters of one module; copies: modules that there are for the uses"
)


def print_parameters(facts: ParameterReport) -> None:
    """The parts, then the structural constants by phase, operator and module."""
    parts = Sheet("part", "parameters", "of all", "formula")
    for part in facts["parts"]:
        parts.add_row(
            part["name"],
            f"{part['count']:,}",
            f"{part['count'] / facts['total']:.1%}",
            part["formula"],
        )
    parts.add_row("total", f"{facts['total']:,}", "100.0%", "")
    console.print_table(parts)
    if not facts["structure"]:
        return
    console.out.print()
    rows = Sheet(
        "phase",
        "operator",
        "module",
        "uses",
        "copies",
        "each",
        "parameters",
        "formula",
    )
    for row in facts["structure"]:
        sizes = ", ".join(f"{name} {value}" for name, value in row["sizes"].items())
        counts = (f"{row[name]:,}" for name in ("uses", "copies", "numbers", "count"))
        rows.add_row(
            row["phase"], row["operator"], row["module"], *counts, f"{row['formula']}  ({sizes})"
        )
    console.print_table(rows)
    console.print_text(_LETTERS)
    console.out.print()
    phases = Sheet("phase", "structural constants")
    for phase, count in facts["by_phase"].items():
        phases.add_row(phase, f"{count:,}")
    console.print_table(phases)


def answers(facts: ParameterReport) -> dict[str, str]:
    """What a reviewer asks about the parameters, by topic."""
    counts = {part["name"]: part["count"] for part in facts["parts"]}
    own = (
        counts.get("structural constants", 0)
        + counts.get("position code", 0)
        + counts["inner learning rate"]
    )
    passes = ", ".join(f"{count} {name}" for name, count in facts["passes"].items())
    if not facts["shares"]:
        return {
            "auxiliary model": f"{facts['auxiliary']:,} parameters; this back end adds the inner "
            "learning rate alone",
            "passes": passes,
            "the construction": "--backend transformer counts the paper's: prefix tokens and "
            "structural constants",
        }
    totals = ", ".join(f"{name} {count:,}" for name, count in facts["shares"].items())
    return {
        "auxiliary model": f"{facts['auxiliary']:,} parameters, which lie in the prefix numbers "
        "and the tables",
        "the simulator's own": f"{own:,}: no weight of the auxiliary model is among them; they are "
        "the same for any weights",
        "passes": passes,
        "total by --share": f"{totals} (now: {facts['share']})",
    }


def flops_text(flops: int, direct: int) -> str:
    """FLOPs of a call beside those of fine-tuning the model directly."""
    found, compared = console.number(flops), console.number(direct)
    return (
        f"{found}FLOP, {flops / direct:.2f} times the {compared}FLOP of fine-tuning the model "
        "directly by exact gradients"
    )
