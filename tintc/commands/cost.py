"""tintc cost: parameters, FLOPs and memory of a simulator, from a model's config alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tintc.commands import console
from tintc.commands.compile import inner_rule, learners
from tintc.commands.parameters import answers, flops_text, print_parameters
from tintc.commands.sheet import Sheet
from tintc.ir.config import SimulatorConfig

Asked = tuple[str, SimulatorConfig, dict[str, Any]]  # a source, its config, and options of its own


def run(asked: list[Asked], *, as_json: bool, options: dict[str, Any]) -> None:
    """Counts on shapes and prints one model at length, or several as the rows of a table."""
    from tintc.compiler.reports.cost import STAGES, cost_report

    found = []
    with console.stages(STAGES * len(asked)) as stage:
        for source, config, own in asked:
            start = time.monotonic()
            facts = cost_report(source, config, progress=stage, **own, **options)
            found.append({**facts, "seconds": round(time.monotonic() - start, 2)})
    if as_json:
        console.print_json(found[0] if len(found) == 1 else {"models": found})
    elif len(found) > 1:
        console.print_table(_comparison(found))
        console.print_text(
            f"one call: {_each(found, console.call_text)}, {_each(found, _steps)}; "
            f"{_each(found, _built)}; "
            "of direct: over the FLOPs of fine-tuning the model directly by exact gradients; "
            "seconds: what counting took"
        )
        for facts in found:
            _print_breakdown(facts, facts["source"])
    else:
        console.print_table(_summary(found[0]))
        console.out.print()
        print_parameters(found[0]["parameters"])
        _print_breakdown(found[0])


def _print_breakdown(facts: dict[str, Any], title: str = "") -> None:
    """FLOPs by phase and operator, if they were asked for."""
    if "breakdown" not in facts:
        return
    found = facts["breakdown"]
    table = Sheet(
        "phase and operator", "calls", "FLOPs", "of all", "lower bound", "over", numeric=1
    )
    for phase in found["phases"]:
        table.add_row(phase["phase"], "", *_beside(phase, found))
        for row in phase["operators"]:
            name = row["operator"].removeprefix("tint.")
            table.add_row(f"  {name}", str(row["calls"] or ""), *_beside(row, found))
    table.add_row("all", "", *_beside(found, found))
    console.out.print()
    if title:
        console.print_text(title)
    console.print_table(table)
    direct, bound = found["direct_flops"], found["lower_bound"]
    console.print_text(
        f"fine-tuning the model directly: {console.number(direct)}FLOP; this call has "
        f"{found['flops'] / direct:.3f} of them, the lower bound {bound / direct:.3f}"
    )
    console.print_text(f"lower bound: {found['lower_bound_is']}")


def _beside(counted: dict[str, Any], found: dict[str, Any]) -> tuple[str, ...]:
    """FLOPs, their part of all, the lower bound and how far above it they are."""
    flops, bound = counted["flops"], counted["lower_bound"]
    over = f"{flops / bound:.2f}" if bound else ""
    least = f"{console.number(bound)}FLOP" if bound else ""
    return f"{console.number(flops)}FLOP", f"{flops / found['flops']:.1%}", least, over


def _comparison(found: list[dict[str, Any]]) -> Sheet:
    """One row a model. FLOPs are those of one call, and their ratio to direct fine-tuning."""
    names = next(iter(found))["parameters"]["shares"]
    everywhere = names and all(facts["parameters"]["shares"] for facts in found)
    shared = [f"share {name}" for name in names] if everywhere else ["simulator"]
    columns = (
        "model",
        "auxiliary",
        "K",
        "D_sim",
        "H_sim",
        "pages",
        *shared,
        "FLOPs",
        "of direct",
        "weights GB",
        "peak GB",
        "seconds",
    )
    table = Sheet(*columns)
    for facts in found:
        parameters, layout = facts["parameters"], facts["layout"]
        totals = parameters["shares"].values() if everywhere else (parameters["total"],)
        table.add_row(
            facts["source"],
            console.number(parameters["auxiliary"]),
            *(str(layout[name]) for name in ("prefix_tokens", "sim_hidden", "sim_heads", "pages")),
            *(console.number(total) for total in totals),
            f"{console.number(facts['flops'])}FLOP",
            f"{facts['flops'] / facts['direct_flops']:.2f}",
            *(f"{facts[name] / 1e9:,.4g}" for name in ("weight_bytes", "peak_bytes")),
            f"{facts['seconds']:.1f}",
        )
    return table


def _summary(facts: dict[str, Any]) -> Sheet:
    parameters, layout = facts["parameters"], facts["layout"]
    prefix = {
        "prefix": f"K {layout['prefix_tokens']}, D_sim {layout['sim_hidden']}, H_sim "
        f"{layout['sim_heads']}, {layout['pages']:,} pages; "
        f"an input token has {layout['memory_width']:,} coordinates",
    }
    rows = {
        "source": facts["source"],
        "simulator": f"{parameters['backend']} back end, {parameters['total']:,} parameters",
        "inner training": f"{_steps(facts)} on "
        f"{learners(facts['config'], facts['trained_blocks'], facts['blocks'])}",
        **inner_rule(facts["config"]),
        **(prefix if parameters["backend"] == "transformer" else {}),
        **answers(parameters),
        "one call": console.call_text(facts),
        "FLOPs": flops_text(facts["flops"], facts["direct_flops"]),
        "memory": f"weights {facts['weight_bytes'] / 1e9:,.4g} GB in {facts['dtype']}, peak "
        f"{facts['peak_bytes'] / 1e9:,.4g} GB",
    }
    return console.named(rows)


def _each(found: list[dict[str, Any]], said: Callable[[dict[str, Any]], str]) -> str:
    """What is said of all, or of each, as compiled simulators have configs of their own."""
    return " or ".join(dict.fromkeys(map(said, found)))


def _built(facts: dict[str, Any]) -> str:
    return f"{facts['parameters']['backend']} back end in {facts['dtype']}"


def _steps(facts: dict[str, Any]) -> str:
    return console.steps(facts["config"]["steps"])
