"""Rows that share a context's weights stand side by side: prompts of one context, beams.

    attention_forward(q, with_past(k_past, k), with_past(v_past, v), mask, ...)
      ->  k' = with_past(k_past, split_rows(k, k_past)); v' likewise
          join_rows(attention_forward(split_rows(q, k_past), k', v', mask, ...), q)

Everywhere else a context's rows are one long sequence, (B, n N, D) for n rows of N tokens: products
read its weights once. Safe because only attention mixes tokens; positions are an input.
"""

from __future__ import annotations

from torch import fx

from tintc.ir.builder import Builder, input_node, reinfer
from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import copy_info, info
from tintc.ir.ops.attention import attention_forward, join_rows, split_rows, with_past
from tintc.ir.pass_manager import graph_pass


@graph_pass(requires=("well_formed",), ensures=("well_formed", "shapes_agree"))
def grouped_rows(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    build = Builder(graph)
    mask = input_node(graph, "attention_mask")
    copy_info(mask, mask, shape=("R", 1, "N", info(mask).shape[-1]))
    for node in list(graph.nodes):
        if is_tint(node, with_past):
            past, x = argument(node, "past"), argument(node, "x")
            copy_info(past, past, shape=("R", *info(past).shape[1:]))
            with graph.inserting_before(node):
                node.args = (past, _rows(build, x, past))
        elif is_tint(node, attention_forward):
            q, past = argument(node, "q"), argument(argument(node, "k"), "past")
            with graph.inserting_before(node):
                node.args = (_rows(build, q, past), *node.args[1:])
            with graph.inserting_after(node):
                joined = build.call(
                    join_rows, node, q, like=node, shape=info(q).shape, phase=info(node).phase,
                    step=info(node).step,
                )  # fmt: skip
            node.replace_all_uses_with(joined, delete_user_cb=lambda user: user is not joined)  # noqa: B023
    return reinfer(graph)


def _rows(build: Builder, x: fx.Node, past: fx.Node) -> fx.Node:
    return build.call(
        split_rows, x, past, like=x, label=f"{x.name}_rows", phase=info(x).phase, step=info(x).step
    )
