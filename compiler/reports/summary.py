"""What `tintc compile` prints and `report.json` holds: sizes, slots, depth and estimated costs."""

from __future__ import annotations

from collections import Counter

from torch import fx

from tintc.compiler.cost import estimate
from tintc.compiler.report_types import Report
from tintc.compiler.reports.islands import islands
from tintc.compiler.reports.parameters import parameter_report
from tintc.compiler.reports.states import states, unlimited
from tintc.compiler.reports.trained import trained_weights
from tintc.ir.builder import outputs
from tintc.ir.call_sizes import call_sizes, trained_tokens
from tintc.ir.dialect import is_tint, tint_name
from tintc.ir.ops.embedding import segment, segment_mask
from tintc.ir.ops.linear import prefix
from tintc.ir.precision import dtype_name
from tintc.runtime.simulator import Simulator


def report(simulator: Simulator) -> Report:
    """Facts of a compiled simulator, as JSON values. Costs are estimates for one sequence of
    `tokens`, half of it trained.
    """
    program, layout = simulator.program, simulator.program.layout
    dtype, parameters = simulator.dtype, parameter_report(simulator)
    sizes = call_sizes(program.facts)
    cost = estimate(program, simulator.backend, dtype, **sizes)
    weight_bytes = sum(p.numel() * p.element_size() for p in simulator.parameters())
    operators = Counter(name for node in program.graph.nodes if (name := tint_name(node)))
    trainable = [slot for slot in layout.prefix.values() if slot.trainable]
    updated = outputs(program.graph)["updates"]
    return {
        "source": {
            "kind": simulator.source.get("kind"),
            "name": simulator.source.get("name"),
            "revision": simulator.source.get("revision"),
            "sha256": simulator.source.get("sha256"),
        },
        "config": program.config.to_dict(),
        "inner_lr": float(simulator.inner_lr.detach()),
        "backend": simulator.backend,
        "share": simulator.share,
        "auxiliary_parameters": parameters["auxiliary"],
        "parameters": parameters,
        "blocks": program.facts.blocks,
        "trained_blocks": program.facts.trained_blocks,
        "trained": trained_weights(program, parameters["auxiliary"]),
        "states": states(program),
        "islands": islands(simulator),
        "unlimited": unlimited(simulator),
        "max_positions": program.facts.max_positions,
        "max_tokens": program.facts.max_tokens,
        "vocab_size": program.facts.vocab_size,
        "prefix_slots": len(layout.prefix),
        "trainable_slots": len(trainable),
        "updated_slots": len(updated),
        "updated_parameters": sum(layout.prefix[name].numbers for name in updated),
        "memory_slots": len(layout.memory),
        "kept_activations": sum(slot.kept for slot in layout.memory.values()),
        "memory_width": layout.memory_width,
        "prefix_tokens": layout.prefix_tokens,
        "sim_hidden": layout.sim_hidden,
        "sim_heads": layout.sim_heads,
        "pages": layout.pages,
        "prefix_numbers": layout.prefix_numbers,
        "operators": dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
        "depth": depth(program.graph)
        if simulator.structure is None
        else len(simulator.structure.uses),
        "dtype": dtype_name(dtype),
        "estimate": {
            "batch": 1,
            "tokens": sizes["tokens"],
            "training_segment": trained_tokens(sizes["tokens"]),
            "flops": cost.flops,
            "weight_bytes": weight_bytes,
            "peak_bytes": weight_bytes + cost.peak_bytes,
        },
    }


def depth(graph: fx.Graph) -> int:
    """`tint` operators on the longest path from input to logits; reads of prefix slots and slices
    do not count. (The transformer back end runs its modules in a row, so there depth is their
    number.)"""
    longest: dict[fx.Node, int] = {}
    for node in graph.nodes:
        below = max((longest[source] for source in node.all_input_nodes), default=0)
        is_module = tint_name(node) is not None and not is_tint(node, prefix, segment, segment_mask)
        longest[node] = below + int(is_module)
    return longest[graph.output_node()]
