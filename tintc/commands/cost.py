"""tintc cost: parameters, FLOPs and memory of a simulator, from a model's config alone."""

from __future__ import annotations

import time
from typing import Any

from rich.table import Table

from tintc.commands import console
from tintc.commands.parameters import answers, print_parameters
from tintc.compiler.config import SimulatorConfig


def run(source: str, config: SimulatorConfig, *, as_json: bool, options: dict[str, Any]) -> None:
    """Counts on the meta device and prints."""
    from tintc.compiler.cost_report import cost_report

    start = time.monotonic()
    with console.stages(5) as stage:
        facts = cost_report(source, config, progress=stage, **options)
    seconds = time.monotonic() - start
    if as_json:
        console.print_json({**facts, "seconds": round(seconds, 2)})
        return
    console.print_table(_summary(facts), fold=True)
    console.out.print()
    print_parameters(facts["parameters"])


def _summary(facts: dict[str, Any]) -> Table:
    parameters, layout, config = facts["parameters"], facts["layout"], facts["config"]
    ratio = facts["flops"] / facts["direct_flops"]
    rows = {
        "source": facts["source"],
        "simulator": f"{parameters['backend']} back end, {parameters['total']:,} parameters",
        "inner training": f"{config['steps']} step{'s' if config['steps'] > 1 else ''} on the top {facts['trained_blocks']} "
        f"of {facts['blocks']} blocks",
        "prefix": f"K {layout['prefix_tokens']}, D_sim {layout['sim_hidden']}, H_sim {layout['sim_heads']}, {layout['pages']} pages; "
        f"{layout['memory_width']:,} coordinates an input token",
        **answers(parameters),
        "one call": f"{facts['batch']} x {facts['tokens']} tokens, {facts['trained_tokens']} trained",
        "FLOPs": f"{console.number(facts['flops'])}FLOP, {ratio:.2f} of {console.number(facts['direct_flops'])}FLOP for fine-tuning the "
        "model directly by exact gradients",
        "memory": f"weights {facts['weight_bytes'] / 1e9:.3g} GB in {facts['dtype']}, peak {facts['peak_bytes'] / 1e9:.3g} GB",
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", value)
    return table
