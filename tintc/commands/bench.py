"""tintc bench: a simulator against the fine-tuning loop that one would write by hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tintc.commands import console
from tintc.commands.parameters import flops_text
from tintc.commands.sheet import Sheet
from tintc.ir.config import SimulatorConfig
from tintc.ir.rule_values import rule_text


def run(source: str, config: SimulatorConfig, settings: dict[str, Any], *, as_json: bool) -> None:
    """Measures and prints both sides; settings: fields of
    `tintc.evaluate.speed.report.Settings`."""
    from tintc.evaluate.speed.report import Settings, bench_report, stages

    chosen = Settings(**settings)
    measure(
        stages(chosen),
        lambda stage: bench_report(source, config, chosen, progress=stage),
        lambda facts: [
            _summary(facts),
            _sides(facts),
            *([] if facts["each"] is None else [_each(facts["each"])]),
        ],
        as_json=as_json,
    )


def measure(
    stages: int,
    report: Callable[[Callable[[str], None]], dict[str, Any]],
    sheets: Callable[[dict[str, Any]], list[Sheet]],
    *,
    as_json: bool,
) -> None:
    """Shows a report with the seconds that it took: as one document, or as sheets one below the
    other.
    """
    start = time.monotonic()
    with console.stages(stages) as stage:
        facts = report(stage)
    seconds = time.monotonic() - start
    if as_json:
        console.print_json({**facts, "seconds": round(seconds, 2)})
        return
    for number, sheet in enumerate(sheets(facts)):
        if number:
            console.out.print()
        console.print_table(sheet)
    if not console.Verbosity.quiet:
        console.err.print(f"measured in {seconds:.1f} s", markup=False)


def _summary(facts: dict[str, Any]) -> Sheet:
    """What was measured, where, and whether both sides agree."""
    config, speed = facts["config"], facts["throughput"]
    layers = "all blocks" if config["layers"] is None else f"the top {config['layers']} blocks"
    trained = "what `train` selects" if config["train"] else layers
    kind = "exact" if facts["exact"] else "approximate"
    rows = {
        "source": facts["source"],
        "simulator": f"{facts['backend']} back end, {kind} gradients, "
        f"{facts['simulator_parameters']:,} parameters",
        "optimizations": ", ".join(facts["optimizations"]) or "none",
        "inner training": f"{console.steps(config['steps'])} at learning rate "
        f"{config['inner_lr']:g} on {trained}",
        **({"inner rule": rule_text(facts["rule"])} if facts["rule"] else {}),
        "one call": console.call_text(facts),
        "machine": f"{facts['device_name']} ({facts['device']}), {facts['dtype']}, "
        f"{facts['threads']} threads, torch {facts['torch']}",
        "FLOPs": flops_text(speed["flops"], speed["direct_flops"]),
        "throughput": f"{console.number(speed['flops_per_second'])}FLOP/s: "
        f"{speed['share_of_peak']:.1%} of the "
        f"{console.number(speed['peak_flops_per_second'])}FLOP/s of a product of "
        f"{speed['matmul_size']} x {speed['matmul_size']} matrices "
        f"({max(speed['matmul_rates'], key=speed['matmul_rates'].get)})",
        **_time_spent(facts),
        **{f"check: {found['name']}": _check(found) for found in facts["checks"]},
    }
    if (products := facts["loop_products"]) is not None:
        rows["kernels"] = (
            f"same: {products['same_kernels']:.1%} of the loop's linear layers run on the "
            f"simulator's kernels, {console.number(products['flops'])}FLOP a sequence as before"
        )
    if facts["memory"] is not None:
        rows["memory"] = facts["memory"]["how"]
    return console.named(rows)


def _time_spent(facts: dict[str, Any]) -> dict[str, str]:
    """What was chosen, and where the simulator's time goes."""
    from tintc.runtime.specialize.chosen import chosen_text

    spent = facts["products"]
    return {
        **({} if facts["choices"] is None else {"choices": chosen_text(facts["choices"])}),
        "time": f"{spent['share']:.1%} is what the products take alone, at "
        f"{console.number(spent['flops'])}FLOP in {spent['product_seconds']:.4g} s; copies "
        f"{spent['copies']:.1%} of the operators' time",
    }


def _check(found: dict[str, Any]) -> str:
    text = (
        f"logits differ from those of {found['reference']} by {found['difference']:.1e} of the "
        f"largest ({found['sequences']} sequences)"
    )
    if found["tolerance"] is None:
        learns = "adapters learn" if found["name"] == "adapters" else "approximations change"
        return f"{text}: what the configured {learns}, no error"
    return f"{text}, limit {found['tolerance']:.0e}"


def _sides(facts: dict[str, Any]) -> Sheet:
    """One row a figure: the simulator's, that of what it is timed against, and how many times the
    latter the former is.
    """
    from tintc.evaluate.speed.rivals import KINDS

    table = Sheet("", "simulator", KINDS[facts["against"]].title, "ratio", "from", "to")
    low, high = facts["ratio_range"]
    times = (f"{facts[f'{side}_seconds']:.4g}" for side in ("simulator", "loop"))
    table.add_row(
        f"seconds, median of {facts['pairs']}",
        *times,
        *(f"{value:.3f}" for value in (facts["ratio"], low, high)),
    )
    first = (f"{facts['first_call_seconds'][side]:.4g}" for side in ("simulator", "loop"))
    table.add_row("seconds of the first call", *first, "", "", "")
    memory = facts["memory"]
    if memory is not None:
        for label, name, ratio in (
            ("GB before the call", "before_bytes", None),
            ("peak GB of the call", "call_peak_bytes", memory["call_ratio"]),
            ("peak GB of the process", "peak_bytes", memory["ratio"]),
        ):
            sizes = (
                "-" if (size := memory[side][name]) is None else f"{size / 1e9:.4g}"
                for side in ("simulator", "loop")
            )
            table.add_row(label, *sizes, "" if ratio is None else f"{ratio:.3f}", "", "")
    return table


def _each(rows: list[dict[str, Any]]) -> Sheet:
    """One row an optimization: how long the simulator takes without it."""
    table = Sheet("without", "seconds", "ratio to all on", "from", "to")
    for row in rows:
        name = "all of them" if row["name"] == "none" else row["name"]
        table.add_row(
            name,
            f"{row['without_seconds']:.4g}",
            *(f"{value:.3f}" for value in (row["ratio"], *row["ratio_range"])),
        )
    return table
