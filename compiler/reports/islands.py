"""What a program computes in islands, for reports: how many, where, of which operators."""

from __future__ import annotations

from collections import Counter

from tintc.compiler.cost import estimate
from tintc.compiler.report_types import IslandKind, Islands
from tintc.ir.call_sizes import call_sizes
from tintc.ir.dialect import argument, is_tint
from tintc.ir.island import read
from tintc.ir.node_meta import info
from tintc.ir.ops.island import island_forward
from tintc.ir.program import Program
from tintc.runtime.simulator import Simulator


def islands(simulator: Simulator) -> Islands:
    """kinds: of the first forward pass; islands of one program are one kind. recognized: share of
    one call's FLOPs (matrix products) that no island takes.
    """
    program = simulator.program
    kinds = island_kinds(program)
    if not kinds:
        return {"recognized": 1.0, "kinds": []}
    sizes = call_sizes(program.facts)
    cost = estimate(program, simulator.backend, simulator.dtype, **sizes)
    share = 1 - cost.island_flops / cost.flops if cost.flops else 1.0
    return {"recognized": share, "kinds": kinds}


def island_kinds(program: Program) -> list[IslandKind]:
    """In the order of their first use."""
    found: dict[str, IslandKind] = {}
    for node in program.graph.nodes:
        if not is_tint(node, island_forward) or info(node).step != 0:
            continue
        text = argument(node, "program")
        if text not in found:
            called = Counter(_named(node.function) for node in read(text).forward.nodes)
            found[text] = {
                "count": 0,
                "module": info(node).module,
                "source": info(node).source,
                "operators": [name for name, _ in called.most_common() if name],
                "weights": sum(port.kind == "weight" for port in read(text).inputs),
                "ordered": argument(node, "mask") is not None,
            }
        found[text]["count"] += 1
    return list(found.values())


def _named(function: object) -> str:
    """The ATen operator; nothing for arithmetic of sizes."""
    packet = getattr(function, "overloadpacket", None)
    return "" if packet is None else str(packet)


def _place(kind: IslandKind) -> str:
    times = f" x{kind['count']}" if kind["count"] > 1 else ""
    return f"{kind['module'] or 'the model'}{times} ({kind['source'] or 'no source line'})"


def said(found: Islands) -> str:
    """`97 % of the FLOPs in recognised operators, 2 islands: blocks.0 (...), ...`."""
    kinds = found["kinds"]
    if not kinds:
        return ""
    count = sum(kind["count"] for kind in kinds)
    places = [_place(kind) for kind in kinds]
    return (
        f"{found['recognized']:.1%} of the FLOPs in recognised operators, {count} "
        f"island{'s' if count > 1 else ''}: {', '.join(places[:4])}"
        + (f" and {len(places) - 4} more kinds" if len(places) > 4 else "")
    )
