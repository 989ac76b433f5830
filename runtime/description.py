"""What a simulator is, in five lines: for `repr`, and for notebooks."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass

from tintc.ir.builder import outputs
from tintc.ir.config import PRESETS, SimulatorConfig
from tintc.ir.precision import dtype_name
from tintc.ir.rule_values import rule_text
from tintc.runtime.compiled import Compiled
from tintc.runtime.showing.phases import as_svg, count_phases

# What distinguishes presets; steps, layers, rate and sizes are said apart.
_GRADIENTS = (
    "loss_gradient",
    "norm_gradient",
    "norm_update",
    "activation_gradient",
    "attention_gradient",
    "finite_difference_scale",
)


@dataclass(frozen=True)
class Description:
    """A title, and rows of a name and a short text. All plain text."""

    title: str
    rows: tuple[tuple[str, str], ...]


def describe(compiled: Compiled, source: Mapping[str, object]) -> Description:
    """source: where the auxiliary model came from: `name` and `kind`, and `revision` if it has
    one.
    """
    dtype = dtype_name(compiled.dtype)
    rows = {
        "back end": f"{compiled.backend}, {dtype} on {compiled.device}",
        "trains": _trained(compiled),
        "steps": _steps(compiled),
        "prefix": _prefix(compiled),
    }
    return Description(f"Simulator of {_origin(source)}", tuple(rows.items()))


def as_text(description: Description) -> str:
    """Five lines."""
    width = max(len(name) for name, _ in description.rows)
    lines = (f"  {name:{width}}  {value}" for name, value in description.rows)
    return "\n".join((description.title, *lines))


def as_html(description: Description) -> str:
    """A table, everything escaped."""
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in description.rows
    )
    return f"<table><caption>{html.escape(description.title)}</caption>{rows}</table>"


def graph_of_phases(compiled: Compiled) -> str:
    """An SVG of blocks and phases, with the operators of each."""
    config = compiled.config
    several = f"{config.steps} steps" if config.steps > 1 else "the step"
    counted = f"operators of {several} and of the last forward pass"
    if config.unrolled_steps < config.steps:
        counted = f"operators of a step, of which {config.steps} run in a loop, and the last pass"
    return as_svg(count_phases(compiled.program, config.unrolled_steps), counted)


def _origin(source: Mapping[str, object]) -> str:
    name = source.get("name")
    if name is None:
        return "a model of unknown source"
    known = (source.get(key) for key in ("kind", "revision"))
    # a name may hold anything, also line breaks
    return f"{' '.join(str(name).split())} ({', '.join(str(k) for k in known if k is not None)})"


def _trained(compiled: Compiled) -> str:
    program = compiled.program
    updated = outputs(program.graph)["updates"]
    numbers = sum(program.layout.prefix[slot].numbers for slot in updated)
    what = f"{program.facts.trained_blocks} of {program.facts.blocks} blocks"
    if compiled.config.train:
        what = f"what matches {', '.join(compiled.config.train)}"
    return f"{what}, {numbers:,} parameters in {len(updated)} slots"


def _steps(compiled: Compiled) -> str:
    config, rate = compiled.config, compiled.inner_lr
    number = config.inner_lr if rate.is_meta else float(rate.detach())
    rule = {name: value for name, value in config.rule.items() if name != "train"}
    steps = f"{config.steps} x inner_lr {number:g}"
    return ", ".join([steps, *([rule_text(rule)] if rule else []), _gradients(config)])


def _gradients(config: SimulatorConfig) -> str:
    """The preset that is nearest, and what differs from it."""
    differences = {
        name: [
            f"{field} {getattr(config, field)}"
            for field in _GRADIENTS
            if getattr(config, field) != getattr(SimulatorConfig.preset(name), field)
        ]
        for name in PRESETS
    }
    nearest = min(differences, key=lambda name: len(differences[name]))
    different = ", ".join(differences[nearest])
    return f"{nearest} gradients" + (f" but {different}" if different else "")


def _prefix(compiled: Compiled) -> str:
    layout = compiled.program.layout
    slots = f"{len(layout.prefix)} slots"
    if compiled.structure is None:
        return f"{slots}, weights as they are"
    sizes = f"K = {layout.prefix_tokens}, D_sim = {layout.sim_hidden}, H_sim = {layout.sim_heads}"
    return f"{slots} in {layout.pages} pages, {sizes}, shared: {compiled.share}"
