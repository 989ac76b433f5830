"""Layer norms over the last dimension.

layer_norm(x, [D], gamma, beta, eps)  ->  tint.norm_forward(x, tint.prefix(gamma), tint.prefix(beta), eps, "layer")
"""

from __future__ import annotations

from torch import fx

from tintc.compiler.builder import Builder, operands, short_label
from tintc.compiler.node_meta import info
from tintc.compiler.pass_manager import Context, graph_pass
from tintc.passes.patterns import aten, calls, is_parameter, with_defaults
from tintc.passes.recognize_linear import read_slot


@graph_pass(requires=("well_formed",), ensures=("well_formed",))
def recognize_norm(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines. A gain or shift that is missing stays None."""
    build = Builder(graph)
    for node in [n for n in graph.nodes if calls(n, aten.layer_norm)]:
        x, width, gamma, beta, eps = with_defaults(operands(node), None, None, None, None, 1e-5)
        if len(width) != 1 or any(p is not None and not is_parameter(p) for p in (gamma, beta)):
            info(node).refused = "it normalises several dimensions, or its gain or shift is computed"
            continue
        with graph.inserting_before(node):
            read = [None if p is None else read_slot(build, node, p, 0, width[0], False) for p in (gamma, beta)]
            label = short_label(info(node).module)
            new = build.call("norm_forward", x, *read, eps, "layer", like=node, label=label, shape=("B", "T", width[0]))
        node.replace_all_uses_with(new)
    graph.eliminate_dead_code()
    return graph
