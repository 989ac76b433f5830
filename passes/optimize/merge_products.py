"""Makes one product of several that read the same activation: q, k and v, gate and up.

    linear_forward(x, W1, b1), linear_forward(x, W2, b2)
      ->  y = linear_forward(x, stack_rows(W1, W2), stack_rows(b1, b2))
          columns(y, 0, n1), columns(y, n1, n1 + n2)

The stacked weights depend on parameters only, so they are made once, when the weights are first
used (`runtime/specialize/folding.py`). Safe because every output is the same sum. For CUDA, where a
launch and a small product cost as much as a large one; on a CPU it was measured to gain nothing and
the stacked weights are a copy. Not where someone may ask for gradients: the copy would be made in
every call.
"""

from __future__ import annotations

from collections import defaultdict

from torch import fx

from tintc.ir.builder import Builder
from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import columns, linear_forward, prefix, stack_rows
from tintc.ir.pass_manager import graph_pass

_Group = list[fx.Node]


@graph_pass(requires=("well_formed",), ensures=("well_formed", "shapes_agree"))
def merge_products(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    if context.choices.device == "cpu" or context.choices.differentiable:
        return graph
    alike: dict[tuple[fx.Node, bool], _Group] = defaultdict(list)
    for node in graph.nodes:
        if is_tint(node, linear_forward) and is_tint(argument(node, "weight"), prefix):
            bias = argument(node, "bias")
            if bias is None or is_tint(bias, prefix):
                alike[argument(node, "x"), bias is None].append(node)
    stacked: dict[tuple[fx.Node, ...], fx.Node] = {}
    for group in alike.values():
        if len(group) > 1 and len({argument(node, "weight") for node in group}) == len(group):
            _merge(Builder(graph), group, stacked)
    return graph


def _merge(build: Builder, group: _Group, stacked: dict[tuple[fx.Node, ...], fx.Node]) -> None:
    first = group[0]
    weights, biases = ([argument(node, name) for node in group] for name in ("weight", "bias"))
    for read in (*weights, *biases):
        if read is not None and first < read:
            first.prepend(read)  # it reads a parameter alone
    fields = {"phase": info(first).phase, "step": info(first).step}
    with build.graph.inserting_before(first):
        weight = _stacked(build, weights, stacked)
        bias = None if biases[0] is None else _stacked(build, biases, stacked)
        y = build.call(
            linear_forward,
            argument(first, "x"),
            weight,
            bias,
            like=first,
            label=f"{first.name}_merged",
            **fields,
        )
        start = 0
        for node in group:
            width = info(node).shape[-1]
            assert isinstance(width, int)
            part = build.call(
                columns,
                y,
                start,
                start + width,
                like=node,
                label=f"{node.name}_columns",
                **fields,
            )
            node.replace_all_uses_with(part)
            start += width
    for node in group:
        build.graph.erase_node(node)


def _stacked(build: Builder, parts: _Group, stacked: dict[tuple[fx.Node, ...], fx.Node]) -> fx.Node:
    """Made once for all steps, and named by its parts: programs of other calls share what it is
    folded to by this name.
    """
    key = tuple(parts)
    if key not in stacked:
        stacked[key] = build.call(
            stack_rows, parts, like=parts[0], label="_and_".join(part.name for part in parts)
        )
    return stacked[key]
