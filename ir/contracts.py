"""Properties that passes require and ensure. Each returns the problems it found; an empty list
means that it holds.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable

from torch import fx

from tintc.ir.builder import infer_shape
from tintc.ir.context import Context
from tintc.ir.dialect import is_tint, tint_name
from tintc.ir.layout import Layout, PrefixSlot, Range, first_overlap
from tintc.ir.node_meta import info
from tintc.ir.operands import operands_fit, slots_fit
from tintc.ir.ops.embedding import segment
from tintc.ir.ops.linear import prefix
from tintc.ir.ops.states import next_count, zero_count

Problems = list[str]


def check_property(name: str, graph: fx.Graph, context: Context) -> Problems:
    """Problems that keep the property from holding on this graph."""
    return PROPERTIES[name](graph, context)


def well_formed(graph: fx.Graph, context: Context) -> Problems:
    """fx's own check: topological order, unique names, no foreign nodes."""
    try:
        graph.lint()
    except (RuntimeError, ValueError) as error:
        return [str(error)]
    return []


def shapes_agree(graph: fx.Graph, context: Context) -> Problems:
    """Every tint node's recorded shape is what its operator's rule gives for its arguments."""
    problems = []
    for node in graph.nodes:
        reshaped = any(
            tint_name(n) is None and n.op == "call_function" for n in node.all_input_nodes
        )
        if tint_name(node) and not reshaped:
            try:
                given: object = infer_shape(node)
            except ValueError as error:
                given = f"no shape: {error}"
            if given != info(node).shape:
                problems.append(f"{node.name} has shape {info(node).shape}, its rule gives {given}")
    return problems


def tint_only(graph: fx.Graph, context: Context) -> Problems:
    """Every call is of a tint operator (or picks a result of one)."""
    return [
        f"{node.name} calls {node.target}"
        for node in graph.nodes
        if node.op == "call_function"
        and tint_name(node) is None
        and node.target is not operator.getitem
    ]


def one_logits_output(graph: fx.Graph, context: Context) -> Problems:
    """The graph returns one node."""
    returned = graph.output_node().args[0]
    single = isinstance(returned, tuple) and len(returned) == 1 and isinstance(returned[0], fx.Node)
    return [] if single else ["the graph does not return one node"]


def named_outputs(graph: fx.Graph, context: Context) -> Problems:
    """The graph returns {"logits": node, "initial_logits": node, "updates": {slot: node}}, and
    {"states": {slot: node}} where there are any.
    """
    returned = graph.output_node().args[0]
    names = {"logits", "initial_logits", "updates"}
    if not isinstance(returned, dict) or set(returned) not in (names, names | {"states"}):
        return ["the graph's outputs are not logits, initial_logits and updates"]
    values = [returned["logits"], returned["initial_logits"]]
    slots = [returned["updates"], returned.get("states", {})]
    if not all(isinstance(each, dict) for each in slots):
        return ["the graph does not return nodes by slot"]
    updates = {**slots[0], **slots[1]}
    if not all(isinstance(value, fx.Node) for value in (*values, *updates.values())):
        return ["the graph does not return nodes"]
    return [
        f"{slot} is given the value of {info(node).slot}"
        for slot, node in updates.items()
        if info(node).slot != slot
    ]


def phases_in_order(graph: fx.Graph, context: Context) -> Problems:
    """Every call but a prefix read has a phase and a step, and reads nothing of a later step."""
    problems = []
    for node in graph.nodes:
        if node.op != "call_function" or is_tint(node, prefix):
            continue
        record = info(node)
        if record.phase is None or record.step is None:
            problems.append(f"{node.name} has no phase or step")
            continue
        for source in node.all_input_nodes:
            step = info(source).step
            if step is not None and step > record.step:
                problems.append(
                    f"{node.name} of step {record.step} reads {source.name} of step {step}"
                )
    return problems


def some_trainable(graph: fx.Graph, context: Context) -> Problems:
    """At least one prefix slot is trained, and only prefix slots are."""
    marked = [node for node in graph.nodes if info(node).trainable]
    wrong = [f"{node.name} is marked trainable" for node in marked if not is_tint(node, prefix)]
    return wrong or ([] if marked else ["no slot is trained"])


def no_gradients_left(graph: fx.Graph, context: Context) -> Problems:
    """No node carries a gradient record any more."""
    return [
        f"{node.name} still records its gradient"
        for node in graph.nodes
        if info(node).gradient is not None
    ]


def no_dead_code(graph: fx.Graph, context: Context) -> Problems:
    """Every call has a user."""
    return [
        f"{node.name} has no user"
        for node in graph.nodes
        if node.op == "call_function" and not node.users
    ]


def prefix_slots_disjoint(graph: fx.Graph, context: Context) -> Problems:
    """Every slot of the graph has tiles in whole heads, they cover it once, and no two tiles of a
    page share a number.
    """
    layout = context.layout
    if layout is None:
        return ["no layout"]
    named = (node for node in graph.nodes if not is_tint(node, zero_count, next_count))
    read = {name for node in named if (name := info(node).slot) is not None}
    problems = [f"slot {name} has no place" for name in read - set(layout.prefix)]
    if layout.sim_heads < 2:
        return [f"a page has {layout.sim_heads} heads"]
    if layout.sim_hidden % layout.sim_heads or layout.prefix_tokens > layout.head_width:
        problems.append(
            f"{layout.prefix_tokens} tokens do not fit a head of {layout.sim_hidden} / "
            f"{layout.sim_heads} coordinates"
        )
    taken: dict[int, list[tuple[str, Range, Range]]] = {}  # by page
    for slot in layout.prefix.values():
        problems += _uncovered(slot) + _misplaced(slot, layout)
        for tile in slot.tiles:
            if (
                tile.page >= layout.pages
                or tile.coordinates.stop > layout.sim_hidden
                or tile.tokens.stop > layout.prefix_tokens
            ):
                problems.append(f"{slot.name} leaves page {tile.page}")
            whole = len(slot.shape) == 1 or tile.row_width % layout.head_width == 0
            if (
                not whole
                or tile.columns.size > tile.row_width
                or tile.coordinates.size != tile.groups * tile.row_width
            ):
                problems.append(f"{slot.name} is not cut into whole heads in page {tile.page}")
            taken.setdefault(tile.page, []).append((slot.name, tile.coordinates, tile.tokens))
    for page, tiles in taken.items():
        if pair := first_overlap(tiles):
            problems.append(f"{pair[1]} and {pair[0]} overlap in page {page}")
    return problems


def _uncovered(slot: PrefixSlot) -> Problems:
    """Why the tiles do not hold every number of the slot once: as many numbers, all inside, no two
    alike.
    """
    whole = Range(0, slot.shape[0]), Range(0, slot.shape[1] if len(slot.shape) == 2 else 1)
    covered = sum(tile.rows.size * tile.columns.size for tile in slot.tiles)
    problems = (
        []
        if covered == slot.numbers
        else [f"tiles of {slot.name} hold {covered} numbers; the slot has {slot.numbers}"]
    )
    for tile in slot.tiles:
        if tile.rows.stop > whole[0].stop or tile.columns.stop > whole[1].stop:
            problems.append(f"a tile of {slot.name} leaves the slot")
    if first_overlap((slot.name, tile.rows, tile.columns) for tile in slot.tiles):
        problems.append(f"two tiles of {slot.name} hold the same numbers")
    return problems


def _misplaced(slot: PrefixSlot, layout: Layout) -> Problems:
    """Why what the inner rule keeps does not lie as its weight does, on other pages."""
    if not slot.beside:
        return [f"{slot.name} is a weight without numbers"] if slot.zero else []
    weight = layout.prefix.get(slot.beside)
    if weight is None or weight.beside or (slot.zero and weight.parameter != slot.parameter):
        return [f"{slot.name} stands beside no slot of its weight"]
    places = [[dataclasses.replace(tile, page=0) for tile in each.tiles] for each in (slot, weight)]
    same = places[0] == places[1] and slot.shape == weight.shape
    return [] if same else [f"{slot.name} lies in other places than {slot.beside}"]


def is_activation(node: fx.Node) -> bool:
    """Whether the node makes numbers of its own for each input token: no view, no weight, no
    input.
    """
    shape = info(node).shape
    of_tokens = len(shape) == 3 and shape[1] in ("T", "S") and info(node).dtype == "float"
    return (
        node.op == "call_function"
        and info(node).phase != "descent"
        and of_tokens
        and not is_tint(node, segment)
    )


def activation_lives(graph: fx.Graph) -> dict[fx.Node, Range]:
    """(order of the node that makes it, order of its last reader) of every activation; a view's
    readers are its readers.

    What the graph returns is read where it is made.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    lives = {}
    for node in graph.nodes:
        if is_activation(node):
            made = node.args[0] if node.target is operator.getitem else node
            lives[node] = Range(
                order[made], max([order[node], *(order[user] for user in activation_readers(node))])
            )
    return lives


def activation_readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read an activation, directly or through a view of its first tokens."""
    views = [user for user in node.users if is_tint(user, segment)]
    return [user for read in (node, *views) for user in read.users if user.op == "call_function"]


def is_kept(node: fx.Node) -> bool:
    """Whether a backward or descent node reads this forward activation."""
    return info(node).phase == "forward" and any(
        info(user).phase in ("backward", "descent") for user in activation_readers(node)
    )


def memory_slots_disjoint(graph: fx.Graph, context: Context) -> Problems:
    """Every activation has a slot of its size until its last reader, and no two that live at the
    same time share a coordinate.
    """
    if context.layout is None:
        return ["no layout"]
    slots, lives, names = (
        context.layout.memory,
        activation_lives(graph),
        [node.name for node in graph.nodes],
    )
    living = {node.name for node in lives}
    problems = [
        f"{name} is an activation without a memory slot" for name in sorted(living - set(slots))
    ]
    problems += [
        f"{name} has a memory slot but is no activation" for name in sorted(set(slots) - living)
    ]
    if problems:
        return problems
    for node, life in lives.items():
        slot = slots[node.name]
        if slot.last != names[life.stop] or slot.coordinates.size != info(node).shape[-1]:
            problems.append(
                f"the slot of {slot.name} has another size or last reader than the activation"
            )
    # a slot is taken until its last reader has read
    boxes = (
        (node.name, Range(life.start, life.stop + 1), slots[node.name].coordinates)
        for node, life in lives.items()
    )
    if pair := first_overlap(boxes):
        problems.append(f"{pair[1]} and {pair[0]} share coordinates while both are live")
    return problems


PROPERTIES: dict[str, Callable[[fx.Graph, Context], Problems]] = {
    check.__name__: check
    for check in (
        well_formed,
        operands_fit,
        slots_fit,
        shapes_agree,
        tint_only,
        one_logits_output,
        named_outputs,
        phases_in_order,
        some_trainable,
        no_gradients_left,
        no_dead_code,
        prefix_slots_disjoint,
        memory_slots_disjoint,
    )
}
