"""Where the numbers of a value come from: views, splits, transposes and rotations, followed back to
the activation they start from.

    y = sum over terms of
        coefficient * product of table entries * root[same sequence, same token, coordinate]

Layout operators are run, not matched: on the numbers of the root's coordinates instead of its
values. So a product that holds q, k and v side by side, head by head or group by group, and a
rotation spelled with slices, `neg` and `cat` or with complex numbers, end in one form.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from tintc.ir.builder import ancestors, operands
from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint, tint_name
from tintc.ir.node_meta import info
from tintc.ir.ops.elementwise import scale
from tintc.passes.analysis.evaluation import Evaluation, constant, is_positional
from tintc.passes.analysis.patterns import (
    LAYOUT,
    aten,
    calls,
    function_of,
    is_of_tokens,
    same_sizes,
    sizes,
    with_defaults,
)

BATCH, LENGTH = (
    2,
    5,
)  # at which coordinates are followed; every element is checked to stay in its sequence and token
_JOINS = (aten.cat, aten.stack)
K = TypeVar("K")
V = TypeVar("V")


class Untraceable(Exception):
    """Why a value is no rearrangement of one activation."""


def remembered(known: dict[K, V | Untraceable], key: K, make: Callable[[], V]) -> V:
    """What `make` gave the first time that this key was asked for. Raises the Untraceable that it
    raised then.
    """
    if key not in known:
        try:
            known[key] = make()
        except Untraceable as reason:
            known[key] = reason
    found = known[key]
    if isinstance(found, Untraceable):
        raise found
    return found


@dataclass(frozen=True)
class Term:
    """Tensors of the value's shape. index: of the root's number, flattened over sequences and
    tokens; -1 for none.
    factors: (node of a table, index of its number, flattened; -1 for 1)."""

    coefficient: Tensor
    index: Tensor
    factors: tuple[tuple[fx.Node, Tensor], ...] = ()

    def map(self, change: Callable[[Tensor], Any]) -> Term:
        """The same change of layout to all."""
        return Term(
            change(self.coefficient),
            change(self.index),
            tuple((node, change(index)) for node, index in self.factors),
        )


@dataclass(frozen=True)
class Trace:
    """root: the (B, T, D) activation. terms: see above; of a complex value the last axis holds real
    and imaginary part.
    """

    root: fx.Node
    terms: list[Term]
    is_complex: bool = False

    def part(self, index: int) -> Trace:
        """Of a complex value the real (0) or the imaginary (1) part."""
        return Trace(self.root, [term.map(lambda x: x[..., index]) for term in self.terms])


def trace(node: fx.Node, context: Context) -> Trace:
    """Follows a value back to its root. Raises Untraceable if it has several, or none."""
    found: Trace | list[Trace] = _Tracer(context).of(node)
    if isinstance(found, list):
        raise Untraceable("it is a tuple")
    return found


def is_rearrangement(node: fx.Node) -> bool:
    """Whether the node is a layout operator, so that its root is another node."""
    return calls(node, *LAYOUT) or calls(node, *_JOINS)


class _Tracer:
    def __init__(self, context: Context) -> None:
        self.sizes, self._context = Evaluation(BATCH, LENGTH, context), context
        self._known: dict[fx.Node, Any] = {}

    def of(self, node: Any) -> Any:
        """Trace, or a list of them for an operator with several results."""
        if node not in self._known:
            self._known[node] = self._compute(node)
        return self._known[node]

    def _compute(self, node: Any) -> Any:
        if not isinstance(node, fx.Node):
            raise Untraceable(f"it reads {node}")
        if is_tint(node, scale):
            return self._multiplied(self.of(argument(node, "x")), float(argument(node, "factor")))
        if tint_name(node):
            return self._root(node)
        if calls(node, *LAYOUT):
            return self._laid_out(node)
        if calls(node, *_JOINS):
            return self._joined(node)
        if calls(node, aten.view_as_complex, aten.view_as_real):
            found = self.of(node.args[0])
            return Trace(found.root, found.terms, is_complex=calls(node, aten.view_as_complex))
        if calls(node, aten.neg):
            return self._multiplied(self.of(node.args[0]), -1.0)
        if calls(node, aten.mul, aten.div) and len(node.args) == 2 and not node.kwargs:
            return self._product(node)
        if calls(node, aten.add, aten.sub) and len(node.args) == 2 and not node.kwargs:
            return self._sum(node)
        return self._root(node)

    def _root(self, node: fx.Node) -> Trace:
        if not is_of_tokens(node) or is_positional(node):
            raise Untraceable(
                f"it reads {node.target}; expected views, transposes and rotations of one (batch, "
                "tokens, width) activation"
            )
        width = sizes(node)[-1]
        index = torch.arange(BATCH * LENGTH * width).view(BATCH, LENGTH, width)
        return Trace(node, [Term(torch.ones(index.shape, dtype=torch.float64), index)])

    def _laid_out(self, node: fx.Node) -> Any:
        source = self.of(node.args[0])
        if node.target is operator.getitem:
            return source[node.args[1]]
        if not is_fixed(node):
            raise Untraceable(f"{node.target} rearranges by the length of the sequence")
        args, kwargs = self._sizes((operands(node)[1:], node.kwargs))
        target = function_of(node)

        def arranged(found: Trace) -> Any:
            return [term.map(lambda x: target(x, *args, **kwargs)) for term in found.terms]

        try:
            if source.is_complex:
                return _as_complex(*(Trace(source.root, arranged(source.part(i))) for i in (0, 1)))
            terms = arranged(source)
        except (RuntimeError, IndexError) as error:
            raise Untraceable(f"{node.target} cannot be followed ({error})") from error
        if not isinstance(terms[0].index, (list, tuple)):
            return Trace(source.root, terms)
        pick = range(len(terms[0].index))
        return [Trace(source.root, [term.map(lambda x: x[i]) for term in terms]) for i in pick]  # noqa: B023 (called at once)

    def _sizes(self, value: Any) -> Any:
        try:
            return self.sizes.of(value)
        except (TypeError, RuntimeError, KeyError, IndexError) as error:
            raise Untraceable(f"it is laid out by computed sizes ({error})") from error

    def _joined(self, node: fx.Node) -> Trace:
        parts, axis = with_defaults(operands(node), None, node.kwargs.get("dim", 0))
        traces: list[Trace] = [self.of(part) for part in parts]
        if len({found.root for found in traces}) != 1 or any(found.is_complex for found in traces):
            raise Untraceable("it joins parts of several activations")
        target: Any = node.target
        return _join(traces, lambda values: target(values, axis))

    def _product(self, node: fx.Node) -> Trace:
        x, y = operands(node)
        divided = calls(node, aten.div)
        if isinstance(x, fx.Node) and is_positional(x) and not divided:
            x, y = y, x
        if (factor := constant(y, self._context)) is not None:
            return self._multiplied(self.of(x), 1 / factor if divided else factor)
        if not isinstance(y, fx.Node) or not is_positional(y):
            return self._root(node)
        value = self._sizes(y)
        if divided:
            raise Untraceable("it divides by a table")
        found = self.of(x)
        if found.is_complex and value.is_complex():
            return self._turned(found, y, value)
        if found.is_complex or value.is_complex():
            raise Untraceable("it multiplies a complex value by a real one")
        return _by_table(found, y, torch.arange(value.numel()).view(value.shape))

    def _turned(self, found: Trace, table: fx.Node, value: Tensor) -> Trace:
        """(re + i im) (a + i b) = (a re - b im) + i (a im + b re)."""
        index = torch.arange(2 * value.numel()).view(*value.shape, 2)
        re, im = found.part(0), found.part(1)
        (a_re, b_re), (a_im, b_im) = (
            [_by_table(part, table, index[..., i]).terms for i in (0, 1)] for part in (re, im)
        )
        minus = self._multiplied(Trace(found.root, b_im), -1.0).terms
        return _as_complex(Trace(found.root, a_re + minus), Trace(found.root, a_im + b_re))

    def _multiplied(self, found: Trace, factor: float) -> Trace:
        return Trace(
            found.root,
            [Term(t.coefficient * factor, t.index, t.factors) for t in found.terms],
            found.is_complex,
        )

    def _sum(self, node: fx.Node) -> Trace:
        if not all(isinstance(x, fx.Node) for x in node.args) or len(sizes(node)) < 4:
            return self._root(node)  # a residual connection
        left, right = (self.of(x) for x in node.args)
        if left.root is not right.root or left.is_complex != right.is_complex:
            raise Untraceable("it adds two activations")
        if calls(node, aten.sub):
            right = self._multiplied(right, -1.0)
        return Trace(left.root, left.terms + right.terms, left.is_complex)


def _by_table(found: Trace, table: fx.Node, index: Tensor) -> Trace:
    """Multiplied by a table; index: of its numbers, in the shape of its value."""
    shape = (found.terms[0].index + index).shape
    terms = [term.map(lambda t: t.expand(shape)) for term in found.terms]
    return Trace(
        found.root,
        [Term(t.coefficient, t.index, (*t.factors, (table, index.expand(shape)))) for t in terms],
    )


def _as_complex(re: Trace, im: Trace) -> Trace:
    return Trace(
        re.root, _join([re, im], lambda values: torch.stack(values, -1)).terms, is_complex=True
    )


def _join(traces: list[Trace], join: Callable[[list[Tensor]], Tensor]) -> Trace:
    """Every term of every part, nothing where the other parts are."""

    def placed(at: int, value: Tensor, nothing: float) -> Tensor:
        blank = [torch.full(t.terms[0].index.shape, nothing, dtype=value.dtype) for t in traces]
        blank[at] = value
        return join(blank)

    terms = [
        Term(
            placed(i, term.coefficient, 0.0),
            placed(i, term.index, -1),
            tuple((table, placed(i, index, -1)) for table, index in term.factors),
        )
        for i, found in enumerate(traces)
        for term in found.terms
    ]
    return Trace(traces[0].root, terms)


def is_fixed(node: fx.Node) -> bool:
    """Whether a layout operator does the same at every length: what picks does so by plain numbers
    and constants, or is a slice of all.
    """
    if not calls(
        node,
        aten.index,
        aten.roll,
        aten.flip,
        aten.slice,
        aten.select,
        aten.repeat,
        aten.repeat_interleave,
    ):
        return True
    computed = any(
        n.op == "placeholder" and info(n).role == "input"
        for n in ancestors(node.all_input_nodes[1:])
    )
    return not computed or (calls(node, aten.slice) and same_sizes(node, node.args[0]))  # type: ignore[arg-type]
