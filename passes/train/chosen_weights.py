"""Marks the weights that the patterns of `train` name, whatever reads them.

    embedding(E, ids)                  ->  embedding(tint.prefix(E), ids), trainable
    linear_forward(h, E, b)            ->  linear_forward(h, tint.prefix(E), tint.prefix(b))

Operators read tables and the head directly; a weight that learns is read through a slot, so that
its newest value can take its place. A slot is one for all its readers: of a head that is tied to
the embedding, both gradients reach it.
"""

from __future__ import annotations

from torch import fx

from tintc.ir.builder import Builder
from tintc.ir.dialect import argument, is_tint, operator_of
from tintc.ir.errors import UnsupportedModelError
from tintc.ir.inputs import is_table
from tintc.ir.layout import Rows
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import prefix
from tintc.ir.selection import Selection
from tintc.passes.analysis.slots import read_slot


def parameters(graph: fx.Graph, *, buffers: bool = False) -> dict[str, fx.Node]:
    """The placeholders of the model's parameters, or of its buffers, by name."""
    return {
        name: node
        for node in graph.nodes
        if node.op == "placeholder"
        and (name := info(node).parameter) is not None
        and not is_table(name)
        and info(node).buffer is buffers
    }


def mark_chosen(graph: fx.Graph, selection: Selection) -> None:
    """Marks every slot of the chosen weights. Raises UnsupportedModelError for one that an operator
    without a descent reads.
    """
    for name, parameter in parameters(graph).items():
        if not selection.chosen(name):
            continue
        for user in list(parameter.users):
            if not is_tint(user, prefix):
                read_through_slots(graph, user, parameter)
        for user in parameter.users:
            info(user).trainable = True


def read_through_slots(graph: fx.Graph, reader: fx.Node, parameter: fx.Node) -> None:
    """Lets an operator read its weights, all of them, through slots: a bias lies where its matrix
    does.
    """
    called = operator_of(reader)
    weights = called.weights if called is not None else ()
    if all(argument(reader, name) is not parameter for name in weights):
        raise UnsupportedModelError(
            f"{info(parameter).parameter} is to be trained, but {reader.name} "
            f"({info(reader).source or 'no source line'}) reads it by {called or reader.target}, "
            "which has no descent; leave it out of train"
        )
    for name in weights:
        weight = argument(reader, name)
        if weight is not None and weight.op == "placeholder":
            reader.replace_input_with(weight, _slot(graph, reader, weight))


def _slot(graph: fx.Graph, reader: fx.Node, parameter: fx.Node) -> fx.Node:
    shape = info(parameter).shape
    shape = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    if len(shape) not in (1, 2) or not isinstance(rows := shape[0], int):
        raise UnsupportedModelError(
            f"{info(parameter).parameter} is to be trained and has shape {shape}; expected a "
            "vector or a matrix; leave it out of train"
        )
    with graph.inserting_before(reader):
        return read_slot(Builder(graph), reader, parameter, Rows(0, rows, rows), False)
