"""tintc bench --generate: an adapted simulator's tokens a second beside Hugging Face's."""

from __future__ import annotations

from typing import Any

from tintc.commands import console
from tintc.commands.bench import measure
from tintc.commands.sheet import Sheet
from tintc.ir.config import SimulatorConfig
from tintc.ir.rule_values import rule_text

_SIDES = {
    "unmodified": "the unmodified model",
    "loop": "a loop, updated weights loaded",
    "own_loop": "a loop over our program for one",
}


def run(source: str, config: SimulatorConfig, settings: dict[str, Any], *, as_json: bool) -> None:
    """Measures and prints all sides; settings: fields of
    `tintc.evaluate.speed.generation.Settings`."""
    from tintc.evaluate.speed.generation import Settings, generate_report, stages

    chosen = Settings(**settings)
    measure(
        stages(chosen),
        lambda stage: generate_report(source, config, chosen, progress=stage),
        lambda facts: [_summary(facts), _sides(facts)],
        as_json=as_json,
    )


def _summary(facts: dict[str, Any]) -> Sheet:
    """What was measured, where, and whether both sides agree."""
    config, check, memory = facts["config"], facts["check"], facts["bandwidth"]
    adapting = ", ".join(
        f"{found['adapt_seconds']:.2f} s for {batch} ({found['form']})"
        for batch, found in _by_batch(facts)
    )
    rows = {
        "source": facts["source"],
        "generated": f"{facts['new_tokens']} tokens behind {facts['tokens']}, greedily",
        "inner training": f"{console.steps(config['steps'])} at learning rate "
        f"{config['inner_lr']:g} on {facts['train_fraction']:.0%} of each sequence",
        **({"inner rule": rule_text(facts["rule"])} if facts["rule"] else {}),
        "adapting": f"{adapting}; not in what follows",
        "machine": f"{facts['device_name']} ({facts['device']}), {facts['dtype']}, "
        f"{facts['threads']} threads, torch {facts['torch']}",
        "memory": f"a token reads {memory['bytes_read_per_token'] / 1e6:.0f} MB of weights at "
        f"batch 1: {memory['bytes_per_second'] / 1e9:.1f} GB/s, {memory['share']:.0%} of the "
        f"{memory['copy_bytes_per_second'] / 1e9:.1f} GB/s that a copy moves",
        "check": f"logits differ from those of the model with the updated weights by "
        f"{check['difference']:.1e} of the largest, limit {check['tolerance']:.0e}",
    }
    return console.named(rows)


def _by_batch(facts: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    return [(1, facts["alone"]), (facts["batch"], facts["beside"])]


def _sides(facts: dict[str, Any]) -> Sheet:
    """One row a comparison."""
    table = Sheet("batch", "generate of", "ours, t/s", "theirs", "times", "from", "to", numeric=2)
    for batch, found in _by_batch(facts):
        speed = found["tokens_per_second"]
        for name, said in _SIDES.items():
            if name in speed:
                low, high = found[f"range_{name}"]
                times = (f"{value:.3f}" for value in (found[f"times_{name}"], low, high))
                row = (str(batch), said, f"{speed['ours']:.1f}", f"{speed[name]:.1f}")
                table.add_row(*row, *times)
    return table
