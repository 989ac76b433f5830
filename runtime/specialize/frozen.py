"""What no step changes, in a loop over the program of one step: computed by the first, given to
the others and to the prediction.

    segment(x, n), x = f(weights that do not learn, tokens)  ->  x returned, and an input
"""

from __future__ import annotations

from torch import fx

from tintc.ir.builder import Builder, ancestors, before_step, descendants
from tintc.ir.dialect import is_tint
from tintc.ir.node_meta import copy_info, info
from tintc.ir.ops.attention import attention_forward
from tintc.ir.ops.embedding import segment
from tintc.ir.ops.linear import linear_forward
from tintc.ir.outputs import Output

NAME = "frozen_once"  # of the optimization


def frozen_names(graph: fx.Graph) -> tuple[str, ...]:
    """Of a lowered graph: names of the values that a training pass begins with, as far as they cost
    products.
    """
    changed = descendants(before_step(graph).values())
    found = dict.fromkeys(node.args[0] for node in graph.nodes if is_tint(node, segment))
    return tuple(
        value.name
        for value in found
        if isinstance(value, fx.Node)
        and value not in changed
        and any(is_tint(n, linear_forward, attention_forward) for n in ancestors([value]))
    )


def named(graph: fx.Graph, names: tuple[str, ...]) -> dict[str, fx.Node]:
    """The values of these nodes, by the names that programs have for them."""
    return {f"{Output.FROZEN}/{node.name}": node for node in graph.nodes if node.name in names}


def give_frozen(graph: fx.Graph, names: tuple[str, ...]) -> None:
    """The values of these nodes are inputs."""
    build = Builder(graph)
    for name, node in named(graph, names).items():
        given = build.placeholder(f"{node.name}_given", info(node).shape)
        copy_info(node, given, role="input", slot=name, shape=info(node).shape)
        node.replace_all_uses_with(given)
