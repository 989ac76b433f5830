"""Which slots' updates can leave a program as factors, and by which names.

    W' = W_0 - sum_s rates_s values_s keys_s^T,  s over the training tokens of all steps

Slots that read one activation share their keys; slots with one rate share that.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from torch import fx

from tintc.ir.builder import outputs
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import linear_forward, prefix
from tintc.passes.analysis.update_forms import Form, Forms, Number, Pairs, Term


class FactorNames(NamedTuple):
    """Of the three tensors of a slot: (B, S, I), (B, S, O) and (B, S)."""

    keys: str
    values: str
    rates: str


@dataclass(frozen=True)
class Factored:
    """A slot's newest value as factors."""

    node: fx.Node  # the value
    base: fx.Node  # W_0, as it is read
    terms: tuple[Term, ...]
    names: FactorNames


def factorable(graph: fx.Graph) -> dict[str, int]:
    """Slot -> steps, of those whose newest value is W_0 and factors, and is read by products
    alone.
    """
    forms = Forms(graph, with_rates=False)
    found = {}
    for slot, node in outputs(graph)["updates"].items():
        form = forms.of(node)
        if _is_product(node, form):
            found[slot] = len(form.terms)
    return found


def factored(graph: fx.Graph, slots: Collection[str], pairs: Pairs) -> dict[str, Factored]:
    """By slot, in the order of the graph's updates. Nodes for rates are put into the graph."""
    named: dict[tuple[str | Number | fx.Node | None, ...], str] = {}
    found = {}
    for slot, node in outputs(graph)["updates"].items():
        if slot not in slots:
            continue
        form = pairs.forms.of(node)
        assert form.base is not None
        inputs, rates = (term.x for term in form.terms), (term.rate for term in form.terms)
        names = FactorNames(
            named.setdefault(("keys", *inputs), f"{slot}/keys"),
            f"{slot}/values",
            named.setdefault(("rates", *rates), f"{slot}/rates"),
        )
        found[slot] = Factored(node, form.base, form.terms, names)
    return found


def _is_product(node: fx.Node, form: Form) -> bool:
    base, reads = form.base, [user for user in node.users if user.op != "output"]
    return (
        bool(form.terms)
        and base is not None
        and is_tint(base, prefix)
        and all(term.x is not None for term in form.terms)
        and all(is_tint(u, linear_forward) and argument(u, "weight") is node for u in reads)
        and len(info(node).shape) == 3
    )
