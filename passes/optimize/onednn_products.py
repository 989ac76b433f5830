"""Takes oneDNN's kernels for the products of a float32 call on a CPU that nobody differentiates.

    linear_forward, linear_backward, linear_residual  ->  onednn_product
    low_rank, linear_descent                          ->  onednn_low_rank, onednn_descent
    token_products, low_rank_of_scores                ->  the same by oneDNN
    head_gradient, head_losses, head_logits           ->  the same with oneDNN inside

The same sums in another order. Why: `ir/ops/onednn.py`. Where torch.matmul was measured to be
clearly faster (`choices.calibration`), a product stays there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from tintc.ir.builder import Builder
from tintc.ir.choices import Choices
from tintc.ir.context import Context
from tintc.ir.dialect import AnyOperator, argument, is_tint, operator_of
from tintc.ir.node_meta import Shape, info, size_of
from tintc.ir.ops.head import HEADS
from tintc.ir.ops.linear import linear_backward, linear_descent, linear_forward, linear_residual
from tintc.ir.ops.low_rank import low_rank, low_rank_of_scores
from tintc.ir.ops.onednn import (
    available,
    onednn_descent,
    onednn_low_rank,
    onednn_low_rank_of_scores,
    onednn_product,
    onednn_token_products,
)
from tintc.ir.ops.rates import token_products
from tintc.ir.pass_manager import graph_pass

_SAME_ARGUMENTS: dict[AnyOperator | None, AnyOperator] = {
    linear_residual: onednn_product,
    low_rank: onednn_low_rank,
    low_rank_of_scores: onednn_low_rank_of_scores,
    token_products: onednn_token_products,
    linear_descent: onednn_descent,
}


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
        if replacement is None or not _is_faster(node, choices):
            continue
        operator, args = replacement
        record = info(node)
        with graph.inserting_before(node):
            new = build.call(
                operator,
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


def _is_faster(node: fx.Node, choices: Choices) -> bool:
    """Whether oneDNN computes this product, or the first of two, on this machine."""
    if (always := choices.calibration.one_kernel) is not None:
        return always == "onednn"
    sizes = dict(choices.sizes)
    shape = tuple(
        math.prod(size_of(size, sizes) for size in sizes_of_one) for sizes_of_one in _shape(node)
    )
    return choices.calibration.kernel(*shape) == "onednn"


def _shape(node: fx.Node) -> tuple[Shape, Shape, Shape]:
    """Rows, inner size and columns of a product, each as what it is the product of."""
    if is_tint(node, linear_descent):
        weight, _, x = (info(argument(node, name)).shape for name in ("weight", "dy", "x"))
        return weight[-2:-1], x[1:2], weight[-1:]
    if is_tint(node, low_rank):
        x, keys = (info(argument(node, name)).shape for name in ("x", "keys"))
        return x[1:2], x[2:], keys[1:2]
    if is_tint(node, low_rank_of_scores):
        scores, values = (info(argument(node, name)).shape for name in ("scores", "values"))
        return scores[1:2], scores[2:], values[2:]
    if is_tint(node, token_products):
        x, y = (info(argument(node, name)).shape for name in ("x", "y"))
        return x[1:2], x[2:], y[1:2]
    x, weight = (info(each).shape for each in node.args[:2])  # type: ignore[arg-type]
    rows = x[:-1] if len(weight) == 2 else x[1:-1]
    return rows, x[-1:], weight[-2:-1] if x[-1] == weight[-1] else weight[-1:]


def _replacement(node: fx.Node) -> tuple[AnyOperator, tuple[Any, ...]] | None:
    x, weight = node.args[:2] if len(node.args) > 1 else (None, None)
    operator = operator_of(node)
    if operator is linear_forward:
        return onednn_product, (x, weight, argument(node, "bias"), None, False)
    if operator is linear_backward:
        return onednn_product, (x, weight, None, None, True)
    if operator in _SAME_ARGUMENTS:
        return _SAME_ARGUMENTS[operator], tuple(node.args)
    if operator is not None and is_tint(node, *HEADS):
        return operator, (*node.args[:-1], True)
    return None
