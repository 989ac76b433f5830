"""Strips what computes nothing and spells linear layers one way.

    dropout(x, p, False); contiguous(x); slice(x, everything)
      ->  x
    to(x, another float type) of an activation or weight
      ->  x: precision is the operators' business
    wrap_with_set_grad_enabled(False, body, *args); the same with autocast off
      ->  body(*args), inlined
    view(linear(view(x, [B*T, I]), W, b), [B, T, O])
      ->  linear(x, W, b)
    addmm(b, x, W); matmul(x, W); linear(x, t(W), b)
      ->  linear(x, t(W), b)
    matmul(x, t(W)); add(linear(x, W), b)
      ->  linear(x, W); linear(x, W, b)
    W[ids], and other reads of a table by token ids
      ->  embedding(W, ids)
    y = f(x); z = f(x)
      ->  y, twice
    y[m] = f(x[m]), and other work on some of the rows
      ->  where(m, f(x), y): `whole_rows.py`

A view that merges batch and tokens goes only if every operator until the view that restores them
works token by token. Safe in eval mode, which capture sets.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import fx

from tintc.ir.builder import gives_floats, operands
from tintc.ir.context import Context
from tintc.ir.node_meta import copy_info, info
from tintc.ir.pass_manager import graph_pass
from tintc.ir.writes import writes_in_place
from tintc.passes.analysis.evaluation import is_positional, reads_weights
from tintc.passes.analysis.patterns import (
    VIEWS,
    aten,
    binary,
    calls,
    is_parameter,
    last_size,
    same_sizes,
    sizes,
    with_defaults,
)
from tintc.passes.recognize.batch_first import batch_first
from tintc.passes.recognize.spell_embeddings import spell_embeddings
from tintc.passes.recognize.whole_rows import whole_rows

_DETACH = (aten.detach, aten.detach_)
_NO_OPS = (aten.alias, aten.contiguous, aten.clone, *_DETACH, aten.lift_fresh_copy)
_TOKENWISE = (
    *(
        aten.linear,
        aten.addmm,
        aten.mm,
        aten.matmul,
        aten.layer_norm,
        aten.add,
        aten.sub,
        aten.mul,
        aten.div,
        aten.pow,
    ),
    *(
        aten.relu,
        aten.gelu,
        aten.silu,
        aten.tanh,
        aten.sigmoid,
        aten.erf,
        aten.neg,
        aten.to,
        aten.dropout,
        *_NO_OPS,
    ),
)


@graph_pass(
    requires=("well_formed", "one_logits_output"), ensures=("well_formed", "one_logits_output")
)
def canonicalize(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines. Nothing that it does not recognise is touched."""
    _inline_regions(graph)
    for node in graph.nodes:
        if writes_in_place(node):  # `frontend/functional.py` left it
            info(node).refused = "it writes in place in a model that also stops gradients"
    for node in list(graph.nodes):
        if calls(
            node,
            aten._assert_tensor_metadata,
            aten.sym_constrain_range_for_size,
            aten._assert_scalar,
        ):
            graph.erase_node(node)
        elif _is_no_op(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    spell_embeddings(graph)
    _merge_repeated(graph)
    whole_rows(graph)
    for node in list(graph.nodes):
        if _merges_tokens(node):
            _unmerge(node)
    for node in list(graph.nodes):
        _spell_linear(graph, node)
    for node in list(graph.nodes):
        _take_bias(graph, node)
    batch_first(graph)
    graph.eliminate_dead_code()
    return graph


def _inline_regions(graph: fx.Graph) -> None:
    owner = graph.owning_module
    for node in list(graph.nodes):
        first = _body_argument(node)
        if first is None or owner is None:
            continue
        body: Any = getattr(owner, node.args[first].target)
        inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
        mapping: dict[fx.Node, Any] = dict(zip(inputs, node.args[first + 1 :], strict=True))
        with graph.inserting_before(node):
            results = graph.graph_copy(body.graph, mapping)
        for user in list(node.users):  # the body returns a tuple; its users pick items
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
        graph.erase_node(node)


def _body_argument(node: fx.Node) -> int | None:
    """Which argument of a region holds its body; None for what is no region to inline."""
    if "wrap_with_set_grad_enabled" in str(node.target):
        if node.args[0] is False and gives_floats(node) and reads_weights(node):
            info(node).refused = "it stops the gradient of a value that depends on weights"
            return None
        return 1
    if "wrap_with_autocast" in str(node.target):
        if node.args[2] is not False:
            info(node).refused = "it switches autocast on: precision is the simulator's business"
            return None
        return 4
    return None


def _is_no_op(node: fx.Node) -> bool:
    if calls(node, *_DETACH) and reads_weights(node):
        info(node).refused = "it stops the gradient of a value that depends on weights"
        return False
    if calls(node, *_NO_OPS):
        return True
    if calls(node, aten.dropout):
        probability, training = operands(node)[1:3]
        return training is False or probability == 0
    if calls(node, aten.to, aten._to_copy, aten.type_as):
        source, result = node.args[0].meta.get("val"), node.meta.get("val")  # type: ignore[union-attr]
        if source is None or result is None:
            return False
        casts = (
            source.dtype.is_floating_point
            and result.dtype.is_floating_point
            and not is_positional(node)
        )
        return source.dtype == result.dtype or casts
    if calls(node, aten.slice):
        _, _, start, stop, step = with_defaults(operands(node), None, 0, None, None, 1)
        return start in (0, None) and stop in (sys.maxsize, None) and step == 1
    return calls(node, *VIEWS, aten.expand) and same_sizes(node, node.args[0])  # type: ignore[arg-type]


def _merge_repeated(graph: fx.Graph) -> None:
    """Equal calls of equal arguments are one: layers repeat the arithmetic of masks, and norms that
    of means.
    """
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.is_impure() or info(node).refused:
            continue
        key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        kept = first.setdefault(key, node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            graph.erase_node(node)


def _frozen(value: Any) -> Any:
    """The same arguments as something that can be a key; 1, 1.0 and True are different."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((name, _frozen(item)) for name, item in sorted(value.items()))
    return (type(value), value)


def _merges_tokens(node: fx.Node) -> bool:
    """A view of (B, T, D) as (B*T, D)."""
    if not calls(node, *VIEWS):
        return False
    source: Any = node.args[0]
    ranks = len(sizes(source)), len(sizes(node))
    return (
        ranks == (3, 2) and last_size(source) is not None and last_size(source) == last_size(node)
    )


def _unmerge(view: fx.Node) -> None:
    """Removes the view and those that restore it, if all between works token by token on merged
    values and parameters.
    """
    merged, restoring = [view], []
    for node in merged:  # grows while it is walked
        for user in node.users:
            if calls(user, *VIEWS) and len(sizes(user)) == 3 and last_size(user) == last_size(node):
                restoring.append(user)
            else:
                also = (
                    user,
                    *(source for source in user.all_input_nodes if _merges_tokens(source)),
                )
                merged += [new for new in dict.fromkeys(also) if new not in merged]
    computed = [node for node in merged if not _merges_tokens(node)]
    known = {*merged}
    for node in computed:
        if not calls(node, *_TOKENWISE) or any(
            s not in known and not is_parameter(s) for s in node.all_input_nodes
        ):
            return
    whole = sizes(view.args[0])[:2]  # type: ignore[arg-type]
    for node in computed:
        node.meta["val"] = node.meta["val"].new_empty((*whole, last_size(node)))
    for node in (*(n for n in merged if n not in computed), *restoring):
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]


def _spell_linear(graph: fx.Graph, node: fx.Node) -> None:
    if calls(node, aten.addmm) and not node.kwargs and is_parameter(node.args[2]):
        bias, x, weight = node.args
    elif calls(node, aten.mm, aten.matmul) and is_parameter(_untransposed(node.args[1])):
        bias, (x, weight) = None, node.args
    else:
        return
    matrix = _untransposed(weight)
    if len(sizes(matrix)) != 2:
        return
    with graph.inserting_before(node):
        if matrix is weight:  # stored as (I, O)
            matrix = graph.call_function(aten.t.default, (weight,))
            matrix.meta["val"] = None
            info(matrix).shape = tuple(reversed(info(weight).shape))
        linear = graph.call_function(aten.linear.default, (x, matrix, bias))
    _take_place(graph, node, linear)


def _untransposed(weight: Any) -> Any:
    """W where the node is the transpose of a matrix W, in any spelling; else the node."""
    return weight.args[0] if _is_transpose(weight) else weight


def _is_transpose(node: Any) -> bool:
    if calls(node, aten.t, aten.numpy_T, aten.mT):
        return True
    if not isinstance(node, fx.Node) or len(sizes(node)) != 2:
        return False
    arguments = operands(node)
    if calls(node, aten.permute):
        return [axis % 2 for axis in arguments[1]] == [1, 0]
    return calls(node, aten.transpose) and sorted(axis % 2 for axis in arguments[1:]) == [0, 1]


def _take_bias(graph: fx.Graph, node: fx.Node) -> None:
    """A bias that is added behind its layer."""
    for linear, bias in binary(node, aten.add):
        without = (
            calls(linear, aten.linear)
            and len(linear.users) == 1
            and linear.args[2:] in ((), (None,))
        )
        if without and is_parameter(bias) and sizes(bias) == (last_size(linear),):
            with graph.inserting_before(node):
                new = graph.call_function(aten.linear.default, (*linear.args[:2], bias))
            new.meta["nn_module_stack"] = linear.meta.get("nn_module_stack")
            _take_place(graph, node, new)
            return


def _take_place(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    new.meta.update(old.meta)
    copy_info(old, new)
    old.replace_all_uses_with(new)
    graph.erase_node(old)
