"""tintc bench --stream: a stream against loops that one would write by hand, chunk by chunk."""

from __future__ import annotations

from typing import Any

from tintc.commands import console
from tintc.commands.bench import measure
from tintc.commands.sheet import Sheet
from tintc.ir.config import SimulatorConfig
from tintc.ir.rule_values import rule_text

_LOOPS = {
    "recompute": "loop that recomputes its context",
    "cache": "loop that keeps its keys",
}


def run(source: str, config: SimulatorConfig, settings: dict[str, Any], *, as_json: bool) -> None:
    """Measures and prints all sides; settings: fields of
    `tintc.evaluate.speed.streaming.Settings`."""
    from tintc.evaluate.speed.streaming import Settings, stages, stream_report

    chosen = Settings(**settings)
    measure(
        stages(chosen),
        lambda stage: stream_report(source, config, chosen, progress=stage),
        lambda facts: [_summary(facts), _sides(facts)],
        as_json=as_json,
    )


def _summary(facts: dict[str, Any]) -> Sheet:
    """What was measured, where, and whether stream and loop agree."""
    config, check = facts["config"], facts["check"]
    limit = check["tolerance"]
    agreement = "what the configured approximations change, no error"
    rows = {
        "source": facts["source"],
        "stream": f"{facts['batch']} texts, chunks of {facts['chunk']} targets, context "
        f"{facts['context']}, keys {facts['keys']}",
        "inner training": f"{console.steps(config['steps'])} a chunk at learning rate "
        f"{config['inner_lr']:g}",
        **({"inner rule": rule_text(facts["rule"])} if facts["rule"] else {}),
        "machine": f"{facts['device_name']} ({facts['device']}), {facts['dtype']}, "
        f"{facts['threads']} threads, torch {facts['torch']}",
        "check": f"losses differ from the loop's by {check['difference']:.1e} of the largest "
        f"({check['chunks']} chunks)" + (f", limit {limit:.0e}" if limit else f": {agreement}"),
    }
    if facts["memory"] is not None:
        peaks = facts["memory"]["peak_bytes"]
        said = ", ".join(f"{size / 1e9:.4g} GB over {n} contexts" for n, size in peaks.items())
        rows["peak memory"] = f"{said} (one text, this process)"
    return console.named(rows)


def _sides(facts: dict[str, Any]) -> Sheet:
    """One row a loop."""
    table = Sheet(
        "against", "stream tokens/s", "loop tokens/s", "ratio of seconds", "from", "to", "counted",
        numeric=1,
    )  # fmt: skip
    for kind, found in facts["against"].items():
        low, high = found["ratio_range"]
        table.add_row(
            _LOOPS[kind],
            *(f"{found[f'{side}_tokens_per_second']:.1f}" for side in ("stream", "loop")),
            *(f"{value:.3f}" for value in (found["ratio"], low, high, found["counted"])),
        )
    return table
