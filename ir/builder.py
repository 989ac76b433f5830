"""Creates `tint` nodes whose shape, phase and origin are known from the start."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Collection, Iterable
from typing import Any, NotRequired, TypedDict

from torch import SymInt, Tensor, fx

from tintc.ir.dialect import AnyOperator, operator_of
from tintc.ir.inputs import FURTHER_INPUTS, INPUTS, OPTIONAL_INPUTS, is_reserved
from tintc.ir.node_meta import KEY, NodeInfo, Shape, info


def operands(node: fx.Node) -> tuple[Any, ...]:
    """The node's arguments, without fx's union of everything that an argument can be."""
    return tuple(node.args)


def infer_shape(node: fx.Node) -> Any:
    """Shape of a `tint` call or of an item of one, by its operator's rule; a tuple of shapes for
    several results.
    """
    if node.target is operator.getitem:
        source, index = operands(node)
        return infer_shape(source)[index]
    called = operator_of(node)
    assert called is not None, f"{node.name} is not a tint operator"
    return called.shape(*fx.node.map_arg(node.args, lambda n: info(n).shape))


def short_label(path: str) -> str:
    """A node name from a module path: from the first numbered part's container on, else its last
    two parts.

    `model.decoder.layers.0.fc1` -> `layers_0_fc1`; `model.decoder.final_layer_norm` ->
    `decoder_final_layer_norm`.
    """
    parts = path.split(".") if path else ["model"]
    numbered = [i for i, part in enumerate(parts) if part.isdigit() and i > 0]
    kept = parts[numbered[0] - 1 :] if numbered else parts[-2:]
    return re.sub(r"\W", "_", "_".join(kept))


class Builder:
    """Appends nodes at the graph's insertion point; `like` names the node whose module and source
    line they inherit.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph

    def call(
        self,
        called: AnyOperator,
        *args: Any,
        like: fx.Node | None = None,
        label: str | None = None,
        **changes: Any,
    ) -> fx.Node:
        """A call of an operator; `changes` are fields of its NodeInfo. A label that is an input's
        name gets a suffix.
        """
        if label is not None and is_reserved(label):
            label = f"{label}_call"
        node = self.graph.create_node("call_function", called.target, args, name=label)
        origin = info(like) if like is not None else NodeInfo()
        # A caller may give the shape where the argument came from torch.export and has no rule of
        # its own.
        shape = changes.pop("shape", None)
        dtype = called.dtype or info(args[0]).dtype
        node.meta[KEY] = NodeInfo(module=origin.module, source=origin.source, dtype=dtype)
        node.meta[KEY].shape = shape if shape is not None else infer_shape(node)
        node.meta[KEY] = dataclasses.replace(node.meta[KEY], **changes)
        return node

    def item(self, node: fx.Node, index: int, label: str | None = None, **changes: Any) -> fx.Node:
        """Result `index` of an operator with several."""
        item = self.graph.create_node("call_function", operator.getitem, (node, index), name=label)
        origin = info(node)
        item.meta[KEY] = dataclasses.replace(
            origin, shape=infer_shape(item), gradient=None, **changes
        )
        return item

    def input(self, name: str) -> fx.Node:
        """The placeholder of one of INPUTS or OPTIONAL_INPUTS; put behind the existing ones if the
        graph has none yet.
        """
        for node in self.graph.nodes:
            if node.op == "placeholder" and node.name == name:
                found: fx.Node = node
                return found
        shape, dtype = (INPUTS | OPTIONAL_INPUTS)[name]
        return self.placeholder(name, shape, role="input", dtype=dtype)

    def placeholder(self, label: str, shape: Shape, **fields: Any) -> fx.Node:
        """A graph input after the existing ones."""
        first = next((n for n in self.graph.nodes if n.op != "placeholder"), None)
        with self.graph.inserting_before(first):
            node = self.graph.placeholder(label)
        node.target = node.name  # the name that is given, where the label is taken
        node.meta[KEY] = NodeInfo(shape=shape, **fields)
        return node


def input_node(graph: fx.Graph, name: str) -> fx.Node:
    """The placeholder of one of INPUTS."""
    found: fx.Node = next(n for n in graph.nodes if n.op == "placeholder" and n.name == name)
    return found


def further_input(graph: fx.Graph, name: str) -> fx.Node:
    """The placeholder of one of FURTHER_INPUTS; made if the graph has none yet."""
    found: fx.Node | None = next(
        (n for n in graph.nodes if n.op == "placeholder" and n.name == name), None
    )
    if found is not None:
        return found
    shape, dtype = FURTHER_INPUTS[name]
    return Builder(graph).placeholder(name, shape, role="input", dtype=dtype)


def ancestors(wanted: Iterable[fx.Node], stop: Collection[fx.Node] = ()) -> set[fx.Node]:
    """The wanted nodes and all that they depend on; nothing behind the nodes of `stop`."""
    found: set[fx.Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [] if node in stop else node.all_input_nodes
    return found


def gives_floats(region: fx.Node) -> bool:
    """Whether a captured region gives numbers that have gradients: no places, masks or counts."""
    values = [user.meta.get("val") for user in region.users]
    return not values or any(
        value.is_floating_point() or value.is_complex()
        if isinstance(value, Tensor)
        else not isinstance(value, (int, SymInt))
        for value in values
    )


def remove_dead(graph: fx.Graph) -> None:
    """Erases calls that nobody reads.

    For graphs of `tint` operators, whose one effect is their value: torch's `eliminate_dead_code`
    looks up for each whether it has another, and checks the whole graph, each time.
    """
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def descendants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """All that depends on the nodes, without them."""
    found: set[fx.Node] = set()
    stack = [user for node in nodes for user in node.users]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.users
    return found


class Outputs(TypedDict):
    """What a lowered graph returns. updates: slot -> its newest value. states: the same of the
    slots that belong to the inner rule, where it has any.
    """

    logits: fx.Node
    initial_logits: fx.Node
    updates: dict[str, fx.Node]
    states: NotRequired[dict[str, fx.Node]]


def outputs(graph: fx.Graph) -> Outputs:
    """The named outputs of a lowered graph."""
    returned: Any = graph.output_node().args[0]
    found: Outputs = returned
    return found


def before_step(graph: fx.Graph) -> dict[str, fx.Node]:
    """Slot -> the node that reads it before the first step, of all that a step makes anew."""
    returned = outputs(graph)
    made = {**returned["updates"], **returned.get("states", {})}
    found: dict[str, fx.Node] = {}
    for node in graph.nodes:
        slot = info(node).slot
        if slot in made and node.op == "call_function":
            found.setdefault(slot, node)
    return found


def reinfer(graph: fx.Graph) -> fx.Graph:
    """Computes all shapes anew: where weights were shared, they may be one a sequence now."""
    for node in graph.nodes:
        if node.op == "call_function":
            info(node).shape = infer_shape(node)
    return graph


def logits_node(graph: fx.Graph) -> fx.Node:
    """The one output of a graph that is not lowered yet."""
    returned: Any = graph.output_node().args[0]
    node: fx.Node = returned[0]
    return node
