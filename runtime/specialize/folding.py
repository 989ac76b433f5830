"""Takes what depends on weights alone out of a program, so that it is computed once and not in
every call.

y = f(x, stack_rows(W1, W2)), or original_square(W)
  ->  a graph of its own: {"w": stack_rows(W1, W2)};  y = f(x, w), with w a further input
"""

from __future__ import annotations

from torch import fx

from tintc.ir.builder import Builder, remove_dead
from tintc.ir.dialect import is_tint, is_wide
from tintc.ir.node_meta import copy_info, info
from tintc.ir.ops.linear import stack_rows
from tintc.ir.ops.states import original_square
from tintc.runtime.specialize.optimize import copy_graph

# Operators that copy or read a whole weight; views of one cost nothing.
FOLDED = (stack_rows, original_square)


def fold_weights(graph: fx.Graph) -> fx.Graph | None:
    """Rewrites the graph in place and returns the graph of what was taken out, or None if there is
    nothing. The names of its outputs are those of the further inputs. Not of a program that
    somebody differentiates: what is computed once has no gradient."""
    taken = [node for node in graph.nodes if is_tint(node, *FOLDED) and _of_weights(node)]
    if not taken:
        return None
    build, names = Builder(graph), {}
    for node in taken:
        folded = build.placeholder(f"{node.name}_folded", info(node).shape)
        copy_info(node, folded, role="input", wide=is_wide(node))
        node.replace_all_uses_with(folded)
        names[folded.name] = node
    output = graph.output_node()
    returned = output.args
    output.args = (names,)
    weights = copy_graph(graph)
    output.args = returned
    for part in (graph, weights):
        remove_dead(part)
    return weights


def _of_weights(node: fx.Node) -> bool:
    """Whether it depends on parameters alone."""
    if node.op == "placeholder":
        return info(node).role == "parameter"
    return all(_of_weights(source) for source in node.all_input_nodes)
