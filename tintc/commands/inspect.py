"""tintc inspect: a compiled graph at any stage, its slots and its nodes."""

from __future__ import annotations

import re
from pathlib import Path

from tintc.commands import console
from tintc.commands.compile import island_lines, states, summary
from tintc.commands.parameters import answers, flops_text, print_parameters
from tintc.commands.sheet import Sheet
from tintc.commands.view import View
from tintc.compiler.artifact import load, read_program
from tintc.compiler.artifact_reader import read_manifest, read_report
from tintc.compiler.report_types import Report
from tintc.compiler.stages import records_of, stage_records
from tintc.ir.call_sizes import call_sizes
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import UsageError
from tintc.ir.layout import Layout
from tintc.ir.named import Stage
from tintc.ir.records import NodeRecord, argument_text, arguments_text, shape_text
from tintc.ir.selection import Selection
from tintc.page.model_explorer import model_explorer_file
from tintc.runtime.specialize.chosen import chosen_text


def run(path: Path, asked: View, *, as_json: bool) -> None:
    """Prints the summary, or what the options ask for."""
    view = asked.checked(as_json=as_json)
    manifest = read_manifest(path)
    stage: Stage = view.stage or "lowered"
    if view.slots:
        config = SimulatorConfig.from_dict(manifest.config)
        _print_slots(manifest.layout, Selection(config, manifest.aliases), view.form)
    elif view.node is not None:
        _print_node(records_of(path, stage), view.node, stage, view.form)
    elif view.stage is not None or view.form in ("code", "dot", "model-explorer"):
        _print_graph(path, stage, view.form)
    else:
        facts = read_report(path)
        if view.params:
            _print_parameters(path, facts, view.form)
        else:
            _print_summary(facts, view.form)


def _print_summary(facts: Report, form: str) -> None:
    if form == "json":
        console.print_json(facts)
        return
    console.print_table(summary(facts))
    console.out.print()
    console.print_table(_operators(facts["operators"]))
    for line in island_lines(facts):
        console.print_text(line)


def _print_parameters(path: Path, facts: Report, form: str) -> None:
    parameters, estimate = facts["parameters"], facts["estimate"]
    if form == "json":
        console.print_json(parameters)
        return
    from tintc.compiler.reports.direct import direct_flops

    program = read_program(path)
    print_parameters(parameters)
    console.out.print()
    call = f"1 x {estimate['tokens']} tokens, {estimate['training_segment']} trained"
    rows = {
        **answers(parameters),
        **states(facts),
        "one call": call,
        "FLOPs": flops_text(estimate["flops"], direct_flops(program, call_sizes(program.facts))),
    }
    console.print_table(console.named(rows))


def _print_graph(path: Path, stage: Stage, form: str) -> None:
    if form == "code" and stage == "emitted":
        console.out.out(
            _one_argument_a_line(load(path).emitted(differentiable=False).code.strip()),
            highlight=False,
        )
        return
    if form == "model-explorer":
        # as its readers take it: without the version of tintc's own documents
        console.print_line(model_explorer_file(load(path), stage))
        return
    simulator = load(path) if stage == "optimized" else None
    records = records_of(path, stage) if simulator is None else stage_records(simulator, stage)
    choices = simulator.chosen() if simulator and form in ("json", "table") else None
    if form == "json":
        nodes = [record.to_dict() for record in records]
        told = {} if choices is None else {"choices": choices}
        console.print_json({"stage": stage, **told, "nodes": nodes})
    elif form == "dot":
        console.out.out(as_dot(records), highlight=False)
    elif form == "code":
        console.out.out(as_code(records), highlight=False)
    else:
        console.print_table(_table(records, stage))
        if choices is not None:
            console.out.print()
            console.print_text(chosen_text(choices))


def _one_argument_a_line(code: str) -> str:
    code = re.sub(
        r"\btintc_runtime_backends_transformer_modules_parts_", "", code
    )  # fx spells classes out
    code = re.sub(r"'(\{\"inputs\"[^']*)'", _shortened, code)
    signature, body = code.split("):\n", 1)
    return signature.replace("(", "(\n    ", 1).replace(", ", ",\n    ") + ",\n):\n" + body


def _shortened(program: re.Match[str]) -> str:
    return f"<{len(program.group(1))} characters>"


def _operators(counts: dict[str, int]) -> Sheet:
    table = Sheet("operator", "calls")
    for name, count in counts.items():
        table.add_row(f"tint.{name}", str(count))
    return table


def _table(records: list[NodeRecord], stage: Stage) -> Sheet:
    table = Sheet(
        "node",
        "operator",
        "shape",
        "phase",
        "step",
        "module",
        "reads",
    )
    for record in records:
        phase = record.info.get("phase", record.kind if record.kind != "call" else "")
        reads = (
            ", ".join(record.inputs())
            if record.kind != "output"
            else f"{len(record.inputs())} nodes"
        )
        step = str(record.info.get("step", "")) if record.info.get("phase") else ""
        shape = (
            shape_text(record.shape) if stage != "emitted" else ""
        )  # plain torch calls carry no shapes
        table.add_row(
            record.name, record.operator, shape, phase, step, record.info.get("module", ""), reads
        )
    return table


def as_code(records: list[NodeRecord]) -> str:
    """One assignment a line, with shape, module and source line behind it."""
    lines = ["def simulator("]
    lines += [
        f"    {record.name},  # {shape_text(record.shape)}"
        for record in records
        if record.kind in ("input", "parameter")
    ]
    lines.append("):")
    for record in records:
        if record.kind == "output":
            lines.append(f"    return {argument_text(record.args[0])}")
        elif record.kind == "call":
            lines.append(_assignment(record))
    return "\n".join(lines)


def _assignment(record: NodeRecord) -> str:
    args = arguments_text(record)
    origin = (part for part in (record.info.get("module"), record.info.get("source")) if part)
    behind = "  ".join([shape_text(record.shape), *origin])
    return f"    {record.name} = {record.operator}({args})  # {behind}"


_COLORS = {"forward": "#cfe2f3", "backward": "#f4cccc", "descent": "#d9ead3"}


def as_dot(records: list[NodeRecord]) -> str:
    """The graph for Graphviz (`| dot -Tsvg`): one box a node, coloured by phase; parameters are
    left out.
    """
    drawn = {record.name for record in records if record.kind != "parameter"}
    lines = [
        "digraph simulator {",
        '  node [shape=box, style=filled, fillcolor=white, fontname="Helvetica"];',
    ]
    for record in records:
        if record.name not in drawn:
            continue
        color = _COLORS.get(record.info.get("phase", ""), "#eeeeee")
        label = f"{record.name}\\n{record.operator} {shape_text(record.shape)}".replace('"', "'")
        lines.append(f'  "{record.name}" [label="{label}", fillcolor="{color}"];')
        lines += [
            f'  "{source}" -> "{record.name}";' for source in record.inputs() if source in drawn
        ]
    return "\n".join([*lines, "}"])


def _print_slots(layout: Layout, selection: Selection, form: str) -> None:
    if form == "json":
        console.print_json(layout.to_dict())
        return
    prefix = Sheet(
        "prefix slot",
        "shape",
        "learns",
        "pages",
        "tokens",
        "rows a token",
        "coordinates",
    )
    for slot in layout.prefix.values():
        first = slot.tiles[0]
        pages = str(first.page) if len(slot.tiles) == 1 else f"{first.page}-{slot.tiles[-1].page}"
        shape = shape_text(list(slot.shape))
        learns = "yes" if slot.updated else "no gradient" if slot.trainable else ""
        if slot.updated and (factor := selection.factor(slot.parameter)) != 1:
            learns = f"at {factor:g} of the rate"
        prefix.add_row(
            slot.name,
            shape,
            learns,
            pages,
            str(first.tokens),
            str(first.groups),
            str(first.coordinates),
        )
    memory = Sheet("memory slot", "coordinates", "until", "kept for training")
    for held in layout.memory.values():
        memory.add_row(held.name, str(held.coordinates), held.last, "yes" if held.kept else "")
    console.print_text(
        f"{layout.pages} pages of K = {layout.prefix_tokens} prefix tokens, D_sim = "
        f"{layout.sim_hidden}, H_sim = {layout.sim_heads}; "
        f"an input token has {layout.memory_width:,} coordinates"
    )
    console.out.print()
    console.print_table(prefix)
    console.out.print()
    console.print_table(memory)


def _print_node(records: list[NodeRecord], name: str, stage: Stage, form: str) -> None:
    record = next((r for r in records if r.name == name), None)
    if record is None:
        near = [r.name for r in records if name in r.name][:5]
        hint = (
            f"; names that contain it: {', '.join(near)}"
            if near
            else f"; tintc inspect DIR --stage {stage} lists all"
        )
        raise UsageError(f"no node {name} in the {stage} graph{hint}")
    users = [r.name for r in records if name in r.inputs()]
    if form == "json":
        console.print_json({**record.to_dict(), "users": users})
        return
    rows = {
        "node": record.name,
        "operator": record.operator,
        "shape": shape_text(record.shape),
        **record.info,
        "arguments": ", ".join(argument_text(a) for a in record.args),
        "users": ", ".join(users) or "none",
    }
    console.print_table(console.named(rows))
