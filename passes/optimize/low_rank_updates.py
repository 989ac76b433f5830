"""Leaves updates as factors, so that no sequence needs a copy of a weight.

    linear_forward(x, linear_descent(W, dy_s, x_s, rate), b)
      ->  low_rank(linear_forward(x, W, b), x, x_s, dy_s, rate)
    linear_backward(dy, linear_descent(W, dy_s, x_s, rate))
      ->  low_rank(linear_backward(dy, W), dy, dy_s, x_s, rate)
    gradient_square, change_square of such values
      ->  sum_square(rates, [gradient_products(dy_s . dy_r, x_s . x_r), ...])
    and low_rank of a training step, where there is a change_square, or of several layers that read
    one activation (queries, keys and values; gate and up)
      ->  low_rank_of_scores(y, x . x_s, dy_s, rate), whose scores that or these read too

In half precision the shared product is a wide_linear, which low_rank rounds with what it adds.

The product with W is shared by all sequences, the rest is linear attention over the training tokens
(`ir/ops/low_rank.py`). After k steps a slot has k pairs of factors; they are concatenated, each
with the rate that momentum, decay and the rest of the inner rule leave it (`update_forms.py`). A
bias that descended with the same gradients is one more coordinate of the scores. Safe because it is
the same sum in another order. Only slots in `choices.low_rank`, which
`runtime/specialize/cost_model.py` picks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import fx

from tintc.ir.builder import remove_dead
from tintc.ir.context import Context
from tintc.ir.dialect import AnyOperator, argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import linear_backward, linear_forward
from tintc.ir.ops.low_rank import low_rank, low_rank_of_scores
from tintc.ir.ops.rates import gradient_products, sum_square, token_products
from tintc.ir.ops.states import change_square, gradient_square
from tintc.ir.ops.wide import wide_linear
from tintc.ir.pass_manager import graph_pass
from tintc.ir.precision import HALF
from tintc.passes.analysis.update_forms import Form, Forms, Pairs, Term, same_rows


@graph_pass(requires=("well_formed",), ensures=("well_formed", "shapes_agree"))
def low_rank_updates(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    half, slots = context.choices.dtype in HALF, context.choices.low_rank
    factors = _Factors(graph, half=half)
    if not half:  # where scores for several are made in float32
        factors.shared = _shared(graph, slots)
    for node in list(graph.nodes):
        if is_tint(node, linear_forward, linear_backward):
            form = factors.forms.of(argument(node, "weight"))
            if _stays(form, slots):
                _rewrite(node, form, factors)
        elif is_tint(node, change_square, gradient_square):
            _rewrite_square(node, factors, slots)
    remove_dead(graph)
    return graph


def _stays(form: Form, slots: frozenset[str]) -> bool:
    """Whether a weight of this form stays factors."""
    return bool(form.terms) and form.base is not None and info(form.base).slot in slots


def _shared(graph: fx.Graph, slots: frozenset[str]) -> set[fx.Node]:
    """Products of one value with weights that descended on one value: one set of scores."""
    forms = Forms(graph, with_rates=False)
    alike: dict[tuple[fx.Node | None, ...], list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if not is_tint(node, linear_forward, linear_backward):
            continue
        form = forms.of(argument(node, "weight"))
        if _stays(form, slots):
            forward = is_tint(node, linear_forward)
            keys = [term.x if forward else term.dy for term in form.terms]
            alike[argument(node, "x" if forward else "dy"), *keys].append(node)
    return {node for found in alike.values() if len(found) > 1 for node in found}


class _Factors(Pairs):
    """Also products of tokens, each made once. half: the weights are of half precision, so that
    what factors are added to must not be rounded before.
    """

    def __init__(self, graph: fx.Graph, *, half: bool) -> None:
        super().__init__(graph)
        self.half = half
        self.once: dict[tuple[AnyOperator | fx.Node | int | None, ...], fx.Node] = {}
        # Products with factors in training passes give scores that sums of squares read again.
        self.share_scores = any(is_tint(node, change_square) for node in graph.nodes)
        self.shared: set[fx.Node] = set()  # products whose scores are those of others

    def squares(self, terms: Sequence[Term], at: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
        """<g_k, g_k> of each term, and of all but the first its products with those before it.
        Later steps ask for those of earlier ones again, with other rates: each is made once.
        """
        own = [self._products(term, term.x, term.dy, 1, at) for term in terms]
        earlier = []
        for k in range(1, len(terms)):
            keys, values = self.pair(terms[:k], at.name)
            earlier.append(self._products(terms[k], keys, values, k, at))
        return own, earlier

    def _products(
        self, term: Term, keys: fx.Node | None, values: fx.Node, count: int, at: fx.Node
    ) -> fx.Node:
        of_values = self.scores(term.dy, values, at)
        return self._once(gradient_products, at, of_values, self.scores(term.x, keys, at), count)

    def scores(self, x: fx.Node | None, keys: fx.Node | None, at: fx.Node) -> fx.Node:
        """x_t . keys_s: the same for all layers that read x, and for a product with factors and a
        sum of squares.
        """
        return self._once(token_products, at, x, keys)

    def _once(self, operator: AnyOperator, at: fx.Node, *args: fx.Node | int | None) -> fx.Node:
        key = (operator, *args)
        if key not in self.once:
            fields: dict[str, Any] = {"phase": info(at).phase, "step": info(at).step}
            self.once[key] = self.build.call(operator, *args, like=at, **fields)
        return self.once[key]


def _rewrite(node: fx.Node, form: Form, factors: _Factors) -> None:
    base, forward = form.base, is_tint(node, linear_forward)
    x: fx.Node = argument(node, "x" if forward else "dy")
    assert base is not None
    fields: dict[str, Any] = {"phase": info(node).phase, "step": info(node).step}
    with node.graph.inserting_before(node):
        keys, values = factors.pair(form.terms, base.name)
        rate = factors.rate(form.terms, node)
        if forward:
            bias, with_bias = _bias(argument(node, "bias"), form, factors)
        else:
            bias, with_bias, keys, values = None, False, values, keys
        called: tuple[Any, ...] = (linear_backward, x, base)
        if factors.half:
            called = (wide_linear, x, base, bias, not forward)
        elif forward:
            called = (linear_forward, x, base, bias)
        y = factors.build.call(*called, like=node, label=f"{node.name}_shared", **fields)
        operator: AnyOperator = low_rank
        of: tuple[fx.Node, ...] = (x, keys)
        of_squares = info(x).shape[1] == info(form.terms[0].dy).shape[1]
        if node in factors.shared or (factors.share_scores and of_squares):
            operator, of = low_rank_of_scores, (factors.scores(x, keys, node),)
        new = factors.build.call(
            operator, y, *of, values, rate, with_bias, like=node,
            label=f"{node.name}_low_rank", **fields,
        )  # fmt: skip
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _bias(bias: fx.Node | None, form: Form, factors: _Factors) -> tuple[fx.Node | None, bool]:
    """(what the shared product adds, whether the bias's own descent is that of the weight's
    factors).
    """
    if bias is None:
        return None, False
    own = factors.forms.of(bias)
    same = [(t.dy, t.rate) for t in own.terms] == [(t.dy, t.rate) for t in form.terms]
    alone = own.base is not None and info(own.base).shape == info(bias).shape[1:]
    return (own.base, True) if own.terms and same and alone else (bias, False)


def _rewrite_square(node: fx.Node, factors: _Factors, slots: frozenset[str]) -> None:
    """Of a gradient, or of what a weight has changed by."""
    form = factors.forms.of(operand := node.args[0])  # type: ignore[arg-type]
    changed = is_tint(node, change_square)
    if changed and (form.base is None or not same_rows(form.base, argument(node, "anchor"))):
        return
    if not changed and form.base is not None:
        return
    if not form.terms or any(term.x is None for term in form.terms):
        return
    base = form.base
    if base is not None and info(base).slot not in slots:
        return
    assert isinstance(operand, fx.Node)
    fields: dict[str, Any] = {"phase": info(node).phase, "step": info(node).step}
    with node.graph.inserting_before(node):
        rates = [factors.forms.node(term.rate, node) for term in form.terms]
        squares = factors.squares(form.terms, node)
        new = factors.build.call(sum_square, rates, *squares, like=node, **fields)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
