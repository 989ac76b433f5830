"""What a chain of descents amounts to: a slot's value as its first value and factors.

    W = base - sum_k rate_k dy_k x_k^T          (of a bias: base - sum_k rate_k dy_k)

Descents, momentum and decay are linear in weights and gradients, so every value that they lead to
has this form; a state has no base. Anything else is a base itself, without factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import fx

from tintc.ir.builder import Builder
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import bias_descent, linear_descent, prefix
from tintc.ir.ops.low_rank import concatenate
from tintc.ir.ops.rates import combine, product, spread
from tintc.ir.ops.states import descend, fade, toward, zero_state


class Number(NamedTuple):
    """factor * node, or the factor alone: what a rate is, before nodes are made for it."""

    factor: float
    node: fx.Node | None = None


@dataclass(frozen=True)
class Term:
    """rate dy x^T, or rate dy where x is None."""

    dy: fx.Node
    x: fx.Node | None
    rate: Number


@dataclass(frozen=True)
class Form:
    """base - sum of terms, oldest first; each (dy, x) stands once."""

    base: fx.Node | None
    terms: tuple[Term, ...] = ()


class Forms:
    """The forms of a graph's values, and the nodes that rates need, each made once. with_rates:
    else the graph is left alone, and only bases, dy and x mean something.
    """

    def __init__(self, graph: fx.Graph, *, with_rates: bool = True) -> None:
        self.build, self.with_rates = Builder(graph), with_rates
        self._forms: dict[fx.Node, Form] = {}
        self._made: dict[tuple[Any, ...], fx.Node] = {}

    def of(self, value: fx.Node) -> Form:
        """The form of a weight, bias or state. Nodes for rates are put in front of the value."""
        if value not in self._forms:
            rule = next((rule for operator, rule in _RULES if is_tint(value, operator)), None)
            self._forms[value] = Form(value) if rule is None else rule(self, value)
        return self._forms[value]

    # Sums and products of rates

    def times(self, a: Number, b: Number, at: fx.Node) -> Number:
        if a.node is None or b.node is None or not self.with_rates:
            return Number(a.factor * b.factor, a.node or b.node)
        first, second = sorted((a.node, b.node), key=lambda node: node.name)
        return Number(a.factor * b.factor, self._call(at, product, first, second))

    def plus(self, a: Number, b: Number, at: fx.Node) -> Number:
        if a.node is b.node or not self.with_rates:
            return Number(a.factor + b.factor, a.node)
        if a.node is None:
            a, b = b, a
        assert a.node is not None
        args = (a.node, b.node, a.factor, b.factor)
        return Number(1.0, self._call(at, combine, *args))

    def node(self, rate: Number, at: fx.Node) -> fx.Node:
        """The node of a rate."""
        assert rate.node is not None, "a rate depends on the learning rate or on a gradient"
        if rate.factor == 1:
            return rate.node
        return self._call(at, combine, rate.node, None, rate.factor, 0.0)

    def _call(self, at: fx.Node, operator: Any, *args: Any) -> fx.Node:
        """Made once, in front of the first node that asks: later ones stand behind it."""
        key = (operator, *args)
        if key not in self._made:
            with at.graph.inserting_before(at):
                self._made[key] = self.build.call(
                    operator, *args, phase="descent", step=info(at).step
                )
        return self._made[key]

    # Forms

    def scaled(self, form: Form, by: Number, at: fx.Node) -> tuple[Term, ...]:
        """Its terms, with their rates multiplied."""
        return tuple(Term(t.dy, t.x, self.times(t.rate, by, at)) for t in form.terms)

    def added(self, base: fx.Node | None, terms: tuple[Term, ...], at: fx.Node) -> Form:
        """The terms, those of one (dy, x) together."""
        found: dict[tuple[fx.Node, fx.Node | None], Term] = {}
        for term in terms:
            key = term.dy, term.x
            if key in found:
                term = Term(*key, self.plus(found[key].rate, term.rate, at))
            found[key] = term
        return Form(base, tuple(found.values()))


class Pairs:
    """Factors of several steps, each concatenation made once, from that of the steps before: so
    that factors need not be kept twice.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.build, self.forms = Builder(graph), Forms(graph)
        self._made: dict[tuple[fx.Node, ...], fx.Node] = {}

    def pair(self, terms: Sequence[Term], name: str) -> tuple[fx.Node, fx.Node]:
        """(x, dy) of all terms."""
        inputs = [term.x for term in terms if term.x is not None]
        keys = self._together(inputs, f"{name}_inputs")
        return keys, self._together([term.dy for term in terms], f"{name}_gradients")

    def rate(self, terms: Sequence[Term], at: fx.Node) -> fx.Node:
        """One for all terms where they agree, else that of each token."""
        nodes = [self.forms.node(term.rate, at) for term in terms]
        return nodes[0] if all(node is nodes[0] for node in nodes) else self.rates(terms, at)

    def rates(self, terms: Sequence[Term], at: fx.Node) -> fx.Node:
        """That of each token, (B, S + S + ...). Of factors only their tokens count, which are those
        of the last step: so that older ones need not be kept.
        """
        nodes, last = [self.forms.node(t.rate, at) for t in terms], terms[-1].dy
        alike = info(last).shape
        parts = [last if info(t.dy).shape == alike else t.dy for t in terms]
        key = (*nodes, *parts)
        if key not in self._made:
            self._made[key] = self.build.call(
                spread, nodes, parts, phase="descent", step=info(at).step
            )
        return self._made[key]

    def _together(self, parts: list[fx.Node], label: str) -> fx.Node:
        """A step's products read the factors of those before it, and are visited in this order."""
        key, last = tuple(parts), parts[-1]
        if len(parts) > 1 and key not in self._made:
            before = self._made.get(key[:-1])
            together = parts if before is None else [before, last]
            fields = {"phase": info(last).phase, "step": info(last).step}
            self._made[key] = self.build.call(
                concatenate, together, like=last, label=label, **fields
            )
        return self._made.get(key, last)


def _descent(forms: Forms, node: fx.Node) -> Form:
    linear = is_tint(node, linear_descent)
    before = forms.of(argument(node, "weight" if linear else "bias"))
    x = argument(node, "x") if linear else None
    term = Term(argument(node, "dy"), x, Number(1.0, argument(node, "rate")))
    return forms.added(before.base, (*before.terms, term), node)


def _fade(forms: Forms, node: fx.Node) -> Form:
    before = forms.of(argument(node, "state"))
    if before.base is not None:
        return Form(node)
    return Form(None, forms.scaled(before, Number(argument(node, "factor")), node))


def _descend(forms: Forms, node: fx.Node) -> Form:
    """W - rate v, v = -sum of its terms."""
    before, v = (forms.of(argument(node, name)) for name in ("value", "direction"))
    if v.base is not None:
        return Form(node)
    terms = forms.scaled(v, Number(-1.0, argument(node, "rate")), node)
    return forms.added(before.base, (*before.terms, *terms), node)


def _toward(forms: Forms, node: fx.Node) -> Form:
    """W + share (W_0 - W): what has changed is left by 1 - share."""
    before, anchor = forms.of(argument(node, "value")), argument(node, "anchor")
    if before.base is None or not same_rows(before.base, anchor):
        return Form(node)
    share, each = argument(node, "share"), argument(node, "each")
    left = (
        Number(1.0 - share) if each is None else forms.plus(Number(1.0), Number(-share, each), node)
    )
    return Form(before.base, forms.scaled(before, left, node))


def same_rows(value: fx.Node, other: fx.Node) -> bool:
    """Whether both read the same rows of one auxiliary weight."""
    return is_tint(value, prefix) and is_tint(other, prefix) and value.args == other.args


_RULES: tuple[tuple[Any, Callable[[Forms, fx.Node], Form]], ...] = (
    (linear_descent, _descent),
    (bias_descent, _descent),
    (fade, _fade),
    (descend, _descend),
    (toward, _toward),
    (zero_state, lambda forms, node: Form(None)),
)
