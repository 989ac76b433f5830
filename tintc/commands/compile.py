"""tintc compile: source -> artifact, and a summary."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

from tintc.commands import console
from tintc.commands.sheet import Sheet
from tintc.compiler.artifact_files import check_target
from tintc.compiler.artifact_reader import read_report
from tintc.compiler.artifact_schema import TOKENIZER
from tintc.compiler.report_types import Report
from tintc.compiler.reports.islands import said
from tintc.ir.config import SimulatorConfig
from tintc.ir.rule_values import rule_text
from tintc.ir.selection import shortened


def run(
    source: str,
    output: Path,
    config: SimulatorConfig,
    *,
    force: bool,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """Compiles, writes the artifact and prints its report."""
    from tintc.compiler.artifact_writer import save
    from tintc.compiler.driver import compile as compile_model

    check_target(output, force=force)
    start = time.monotonic()
    with console.stages(5) as stage:
        simulator = compile_model(source, config, progress=stage, **options)
        stage("save")
        written = save(simulator, output, force=force)
    facts = read_report(written)
    seconds, peak = time.monotonic() - start, _peak_memory()
    if as_json:
        console.print_json(
            {
                **facts,
                "output": str(output),
                "seconds": round(seconds, 2),
                "peak_memory_bytes": peak,
            }
        )
        return
    console.print_table(summary(facts))
    if options.get("islands") == "report":
        for line in island_lines(facts):
            console.err.print(line, markup=False)
    if not console.Verbosity.quiet:
        console.err.print(
            f"wrote {output} in {seconds:.1f} s, peak memory {peak / 1e9:.1f} GB; {_next(output)}",
            markup=False,
        )


def _next(output: Path) -> str:
    """What can be done with an artifact: texts need a tokenizer."""
    look = f"next: tintc inspect {output}"
    if (output.expanduser() / TOKENIZER).is_dir():
        return f"{look}, or tintc run {output} --text '...'"
    return f"{look}, or tintc.load from Python: without a tokenizer it takes token ids, no texts"


def _peak_memory() -> int:
    """Most memory that this process held, in bytes. Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def summary(facts: Report) -> Sheet:
    """The report as a table of a dozen rows."""
    return console.named({**_computed(facts), **_built(facts)})


def _computed(facts: Report) -> dict[str, str]:
    """What the simulator computes, and of which model."""
    config, number = facts["config"], console.number
    approximations = ", ".join(
        f"{name.removesuffix('_gradient')} {config[name]}"
        for name in ("loss_gradient", "norm_gradient", "activation_gradient", "attention_gradient")
    )
    return {
        "source": f"{facts['source']['name']} ({facts['source']['kind']})",
        "auxiliary model": f"{number(facts['auxiliary_parameters'])} parameters, "
        f"{facts['blocks']} blocks, vocabulary {facts['vocab_size']}, "
        f"{facts['max_positions'] or 'unlimited'} positions",
        "inner training": f"{console.steps(config['steps'])} at learning rate "
        f"{facts['inner_lr']:g} on {learners(config, facts['trained_blocks'], facts['blocks'])}",
        **inner_rule(config),
        **_trained(facts),
        **states(facts),
        **_unlimited(facts),
        **_islands(facts),
        "gradients": approximations
        if config["train"]
        else f"{approximations}, norm update {config['norm_update']}",
    }


def _islands(facts: Report) -> dict[str, str]:
    """What no pass recognised, where there is any."""
    text = said(facts["islands"]) if "islands" in facts else ""
    return {"islands": text} if text else {}


def island_lines(facts: Report) -> list[str]:
    """Each kind of island in one line."""
    found = facts["islands"]["kinds"] if "islands" in facts else []
    return [
        f"island x{kind['count']} in {kind['module'] or 'the model'} "
        f"({kind['source'] or 'no source line'}): {', '.join(kind['operators'])}; "
        f"{kind['weights']} weights"
        + (", looks at other tokens or positions" if kind["ordered"] else ", token by token")
        for kind in found
    ]


def inner_rule(config: dict[str, Any]) -> dict[str, str]:
    """What is no plain sgd about the steps; what learns is said beside it."""
    rule = {n: v for n, v in SimulatorConfig.from_dict(config).rule.items() if n != "train"}
    return {"inner rule": rule_text(rule)} if rule else {}


def states(facts: Report) -> dict[str, str]:
    """What the rule keeps, a line for each kind."""
    number = console.number
    return {
        f"state {kind}": f"{state['slots']} slots, {number(state['numbers'])} numbers a sequence"
        for kind, state in facts.get("states", {}).items()
    }


def _unlimited(facts: Report) -> dict[str, str]:
    names = facts.get("unlimited", [])
    return {"max_drift leaves alone": f"{shortened(names)} (0 before training)"} if names else {}


def learners(config: dict[str, Any], trained_blocks: int, blocks: int) -> str:
    """What was asked to learn."""
    if config["train"]:
        return "what matches " + ", ".join(config["train"])
    return f"the top {trained_blocks} of {blocks} blocks"


def _trained(facts: Report) -> dict[str, str]:
    """What patterns select, and what they select in vain."""
    trained, unreached = facts["trained"], facts["trained"]["unreached"]
    if not (facts["config"]["train"] or facts["config"]["lr_scale"]):
        return {}
    rows = {
        "trained": f"{trained['weights']} weights, {console.number(trained['parameters'])} "
        f"parameters, {trained['share']:.2%} of all"
    }
    if unreached:
        rows["no gradient reaches"] = shortened(unreached)
    return rows


def _built(facts: Report) -> dict[str, str]:
    """What it is made of, and what a call costs."""
    estimate, number = facts["estimate"], console.number
    shared = f", structural constants shared: {facts['share']}"
    return {
        "prefix slots": f"{facts['prefix_slots']}, of which {facts['updated_slots']} are updated "
        f"({number(facts['updated_parameters'])} parameters)",
        "memory slots": f"{facts['memory_slots']} activations, {facts['kept_activations']} kept "
        f"for training, in {facts['memory_width']:,} coordinates of an input token",
        "simulator": f"K {facts['prefix_tokens']}, D_sim {facts['sim_hidden']}, H_sim "
        f"{facts['sim_heads']}, {facts['pages']} pages, "
        f"{number(facts['prefix_numbers'])} prefix numbers",
        "back end": f"{facts['backend']}, {facts['parameters']['total']:,} parameters"
        f"{shared if facts['backend'] == 'transformer' else ''}",
        "depth": f"{facts['depth']} modules",
        "weights": f"{estimate['weight_bytes'] / 1e6:.1f} MB in {facts['dtype']}",
        "one call": f"{number(estimate['flops'])}FLOP, peak {estimate['peak_bytes'] / 1e6:.1f} MB "
        f"(estimated: 1 x {estimate['tokens']} tokens, {estimate['training_segment']} trained)",
    }
