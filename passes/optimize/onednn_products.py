"""Takes oneDNN's kernels for the products of a float32 call on a CPU that nobody differentiates.

    linear_forward, linear_backward, linear_residual  ->  onednn_product
    low_rank, linear_descent                          ->  onednn_low_rank, onednn_descent
    head_gradient, head_losses, head_logits           ->  the same with oneDNN inside

The same sums in another order. Why: `ir/ops/onednn.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tintc.ir.builder import Builder
from tintc.ir.context import Context
from tintc.ir.dialect import argument, tint_name
from tintc.ir.node_meta import info
from tintc.ir.ops.onednn import available
from tintc.ir.pass_manager import graph_pass


@graph_pass(requires=("well_formed",), ensures=("well_formed", "shapes_agree"))
def onednn_products(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    choices = context.choices
    if (
        choices.differentiable
        or choices.device != "cpu"
        or choices.dtype != torch.float32
        or not available()
    ):
        return graph
    build = Builder(graph)
    for node in list(graph.nodes):
        replacement = _replacement(node)
        if replacement is None:
            continue
        name, args = replacement
        record = info(node)
        with graph.inserting_before(node):
            new = build.call(
                name,
                *args,
                like=node,
                label=f"{node.name}_onednn",
                phase=record.phase,
                step=record.step,
                slot=record.slot,
            )
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    return graph


def _replacement(node: fx.Node) -> tuple[str, tuple[Any, ...]] | None:
    x, weight = node.args[:2] if len(node.args) > 1 else (None, None)
    match tint_name(node):
        case "linear_forward":
            return "onednn_product", (x, weight, argument(node, "bias"), None, False)
        case "linear_backward":
            return "onednn_product", (x, weight, None, None, True)
        case "linear_residual":
            return "onednn_product", tuple(node.args)
        case "low_rank":
            return "onednn_low_rank", tuple(node.args)
        case "linear_descent":
            return "onednn_descent", tuple(node.args)
        case "head_gradient" | "head_losses" | "head_logits" as name:
            return name, (*node.args[:-1], True)
    return None
