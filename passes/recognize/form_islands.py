"""What no pass recognised becomes islands, which torch differentiates.

    y = f(x, W), f any connected operators
      ->  y = tint.island_forward([x, tint.prefix(W)], mask, program)[0]
    x + f(z), x a value of f's kind and z recognised
      ->  tint.residual(x, f(z))

Safe because every program is compared with the region that it stands for, and its gradient with
torch.autograd's, when it is made (`passes/analysis/island_trace.py`). A region that looks at later
tokens, mixes sequences, draws random numbers or stops a gradient is no island: its nodes say why,
and `refuse_unsupported` names them. Regions that are the same in several layers are traced once.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from tintc.ir.builder import Builder, input_node, logits_node, short_label
from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_recognized, is_tint
from tintc.ir.inputs import table_name
from tintc.ir.island import OWN, OWN_COMPLEX, Kind, Port
from tintc.ir.layout import Rows
from tintc.ir.node_meta import copy_info, info
from tintc.ir.ops.elementwise import residual
from tintc.ir.ops.island import island_forward
from tintc.ir.ops.linear import linear_forward, prefix, slot_shape
from tintc.ir.pass_manager import graph_pass
from tintc.ir.precision import dtype_name
from tintc.ir.writes import writes_in_place
from tintc.passes.analysis.coordinates import Untraceable, remembered
from tintc.passes.analysis.evaluation import is_weight
from tintc.passes.analysis.frequencies import other_by_length
from tintc.passes.analysis.island_body import Body
from tintc.passes.analysis.island_trace import Barred, Source, Traced, traced
from tintc.passes.analysis.ordering import in_order
from tintc.passes.analysis.patterns import (
    LAYOUT,
    aten,
    binary,
    calls,
    is_of_tokens,
    last_size,
    sizes,
)
from tintc.passes.analysis.regions import Region, carried, learns, left, regions
from tintc.passes.analysis.slots import read_slot

_DETACH = (aten.detach, aten.detach_)


@graph_pass(
    requires=("well_formed", "one_logits_output"),
    ensures=("well_formed", "one_logits_output"),
    reads=("vocab_size", "min_tokens", "max_positions"),
    writes=("tables", "ordered", "max_tokens", "vocab_size"),
)
def form_islands(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines. Does nothing where islands are refused."""
    graph.eliminate_dead_code()
    if context.islands == "refuse" or not left(graph):
        return graph
    _learn_vocabulary(graph, context)
    _read_once(graph)
    in_order(graph)
    _take_sums(graph)
    makes = _Islands(graph, context)
    for region in regions(graph):
        makes.island(region)
    in_order(graph)  # an island stands before its first result, whatever the others need
    for node in reversed(left(graph)):  # torch takes attention for impure, and would keep it
        if not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return graph


def _learn_vocabulary(graph: fx.Graph, context: Context) -> None:
    """Of a model whose table of tokens an island reads: one for every logit. Where the table has
    fewer rows, the island says so when it is computed.
    """
    width = last_size(logits_node(graph))
    if not context.facts.vocab_size and width is not None:
        context.learn(vocab_size=width)


def _read_once(graph: fx.Graph) -> None:
    """Where one product is read whole and in parts, which have slots of their own, the parts are
    views of it: a weight that learns has one slot.
    """
    for whole in [n for n in graph.nodes if is_tint(n, linear_forward)]:
        weight = argument(whole, "weight")
        if not is_tint(weight, prefix) or not whole.users:
            continue
        every = Rows(*weight.args[1:4])
        for part in [n for n in argument(whole, "x").users if is_tint(n, linear_forward)]:
            read = argument(part, "weight")
            same = part is not whole and is_tint(read, prefix)
            if same and read.args[0] is weight.args[0] and read.args[4] == weight.args[4]:
                rows = Rows(*read.args[1:4])
                if (every.start, every.stop) == (0, every.period) and rows != every:
                    _as_view(graph, part, whole, rows)


def _as_view(graph: fx.Graph, part: fx.Node, whole: fx.Node, rows: Rows) -> None:
    with graph.inserting_before(part):
        pieces = graph.call_function(aten.unflatten.int, (whole, 2, [-1, rows.period]))
        cut = graph.call_function(aten.slice.Tensor, (pieces, 3, rows.start, rows.stop))
        view = graph.call_function(aten.flatten.using_ints, (cut, 2, 3))
    for node, shape in (
        (pieces, (*info(whole).shape[:2], int(info(whole).shape[2]) // rows.period, rows.period)),
        (cut, (*info(part).shape[:2], -1, rows.stop - rows.start)),
        (view, info(part).shape),
    ):
        copy_info(part, node, shape=shape)
    part.replace_all_uses_with(view)
    graph.erase_node(part)


def _take_sums(graph: fx.Graph) -> None:
    """Residual connections whose stream is not recognised: the other operand is no part of what
    the stream is computed from.
    """
    for node in list(graph.nodes):
        if not calls(node, aten.add) or not is_of_tokens(node):
            continue
        of_tokens = carried(graph)
        for x, y in binary(node, aten.add):
            alike = all(isinstance(v, fx.Node) and is_of_tokens(v) for v in (x, y))
            if not alike or last_size(x) != last_size(y) or not is_recognized(y):
                continue
            # A sum before may have made a recognised stream of this one's; what is made of the ids
            # alone is none.
            own = x in of_tokens and y not in _read_by(x, of_tokens) and learns(x)
            if is_recognized(x) or own:
                with graph.inserting_before(node):
                    label, shape = f"{short_label(info(node).module)}_residual", info(y).shape
                    new = Builder(graph).call(residual, x, y, like=node, label=label, shape=shape)
                node.replace_all_uses_with(new)
                graph.erase_node(node)
                break


def _read_by(node: fx.Node, of_tokens: set[fx.Node]) -> set[fx.Node]:
    """The recognised values that a value is computed from, without another between."""
    seen: set[fx.Node] = set()
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                (pending.append if source in of_tokens else found.add)(source)
    return found


class _Islands:
    """Makes islands; equal regions have one program."""

    def __init__(self, graph: fx.Graph, context: Context) -> None:
        self.graph, self.context, self.build = graph, context, Builder(graph)
        self.model = next(t.dtype for t in context.tensors.values() if t.is_floating_point())
        self._lengths = other_by_length(left(graph), context)
        self._traced: dict[Any, Traced | Untraceable] = {}
        self._replaced: dict[fx.Node, fx.Node] = {}  # results of regions -> those of islands

    def island(self, region: Region) -> None:
        """Replaces the region's results. One that can be no island is left, and says why."""
        region.inputs = [self._replaced.get(node, node) for node in region.inputs]
        if any(n.op == "call_function" and not is_recognized(n) for n in region.inputs):
            return  # a consequence: what it reads could be no island
        try:
            _refuse_barred(region)
            self._refuse_lengths(region)
            source = self._source(region)
            found = self._program(region, source)
        except Untraceable as reason:
            self._bar(region, reason)
            return
        self._replace(region, source, found)

    def _refuse_lengths(self, region: Region) -> None:
        reason = next((self._lengths[n] for n in region.nodes if n in self._lengths), None)
        if reason is not None:
            raise Untraceable(reason)

    def _bar(self, region: Region, why: Untraceable) -> None:
        reason = str(why)
        if isinstance(why, Barred) and why.node is not None:
            info(region.nodes[why.node]).barred = reason
            return
        said = [n for n in region.nodes if info(n).barred or f"{_packet(n)}." in reason]
        named = next(iter(said), None) or _first_that_computes(region)
        info(named).barred = info(named).barred or reason

    def _source(self, region: Region) -> Source:
        if not any(_kind(n) in ("tokens", "ids") for n in region.inputs):
            region.inputs.insert(0, input_node(self.graph, "input_ids"))
        ports, shapes, constants = [], [], []
        for node in region.inputs:
            kind, shape = _kind(node), tuple(sizes(node))
            value = self._constant(node) if kind == "constant" else None
            name = OWN if value is None else self._type_of(value)
            own = name == OWN
            port = {
                "tokens": shape[-1:],
                "ids": (),
                "weight": slot_shape(shape) if kind == "weight" else (),
                "constant": shape,
            }[kind]
            ports.append(Port(kind, port, name))
            shapes.append(() if kind in ("tokens", "ids") else shape)
            constants.append(None if value is None else value.to(torch.float64) if own else value)
        if not any(port.learns for port in ports):
            raise Untraceable("it reads no activation and no weight")
        facts, body = self.context.facts, Body(region, self.model)
        each = tuple(ports), tuple(shapes), tuple(constants)
        lengths = max(2, facts.min_tokens), facts.max_tokens
        return Source(body, *each, facts.vocab_size or 2, *lengths)

    def _type_of(self, constant: Tensor) -> str:
        """The island's own type also for one that is finer than the model's: where the model's code
        rounds what it computes with it is not in the program, which is traced in one type.
        """
        finer = self.model != torch.float64
        if constant.dtype == self.model or (finer and constant.dtype == torch.float64):
            return OWN
        if finer and constant.dtype == torch.complex128:
            return OWN_COMPLEX
        return dtype_name(constant.dtype)

    def _constant(self, node: fx.Node) -> Tensor:
        record = info(node)
        found = (
            self.context.tensors.get(record.parameter)
            if record.parameter
            else self.context.constants.get(node.name)
        )
        if found is None:
            found = self.context.tables.get(record.parameter or "")
        if found is None:
            raise Untraceable(f"{node.name} has no value")
        return found.cpu()

    def _program(self, region: Region, source: Source) -> Traced:
        names = [_named(node) for node in region.outputs]
        return remembered(self._traced, _key(region, source), lambda: traced(source, names))

    def _replace(self, region: Region, source: Source, found: Traced) -> None:
        first = region.outputs[0]
        named = next((n for n in region.nodes if info(n).module), first)
        with self.graph.inserting_before(first):
            mask = self.build.input("attention_mask") if found.ordered else None
            inputs = [
                self._input(node, port, first)
                for node, port in zip(region.inputs, source.ports, strict=True)
            ]
            shapes = tuple(("B", "T", width) for width in found.widths)
            island = self.build.call(
                island_forward, inputs, mask, found.text, like=named, shape=shapes,
                label=f"{short_label(info(named).module)}_island",
            )  # fmt: skip
        for index, node in enumerate(region.outputs):
            with self.graph.inserting_before(first):
                item = self.build.item(island, index, f"{island.name}_{index}")
            node.replace_all_uses_with(item)
            self._replaced[node] = item
        if found.longest is not None:
            self.context.limit_tokens(found.longest)
        if found.ordered and not self.context.facts.ordered:
            self.context.learn(ordered=info(named).module or "the model")

    def _input(self, node: fx.Node, port: Port, reader: fx.Node) -> fx.Node:
        if port.kind == "weight":
            rows = port.shape[0]
            return read_slot(self.build, reader, node, Rows(0, rows, rows), transpose=False)
        if port.kind == "constant" and info(node).parameter is None:
            name = table_name(len(self.context.tables), wide=True)
            self.context.add_table(name, self.context.constants[node.name].detach().cpu())
            record = info(node)
            record.role, record.parameter, record.buffer = "parameter", name, True
            record.shape = port.shape
        return node


def _packet(node: fx.Node) -> str:
    """`aten.histc`, however it is overloaded."""
    return str(getattr(node.target, "overloadpacket", node.target))


def _kind(node: fx.Node) -> Kind:
    if node.op != "placeholder":
        return "tokens"
    if info(node).role == "input":
        return "ids"
    return "weight" if is_weight(node) else "constant"


def _first_that_computes(region: Region) -> fx.Node:
    """What to name of a region: its result, or if that is a view the first operator that is none
    and computes with what the region is given.
    """
    if not calls(region.outputs[0], *LAYOUT):
        return region.outputs[0]
    given = {user for node in region.inputs for user in node.users}
    for node in region.nodes:
        if node in given and not calls(node, *LAYOUT):
            return node
        given |= {*node.users} if node in given else set()
    return region.outputs[0]


def _refuse_barred(region: Region) -> None:
    """Raises Untraceable for an operator that no island may hold, and says so on its node."""
    for node in region.nodes:
        reason = _barred(node)
        if reason:
            info(node).barred = reason
            raise Untraceable(reason)


def _barred(node: fx.Node) -> str:
    if calls(node, *_DETACH) or "wrap_with" in str(node.target):
        return info(node).refused or "it stops the gradient of a value that depends on weights"
    if writes_in_place(node):
        return info(node).refused or "it writes in place"
    tags = node.target.tags if isinstance(node.target, OpOverload) else ()
    if torch.Tag.dynamic_output_shape in tags and any(_is_counted(n) for n in sizes(node)):
        return (
            "how much it gives depends on the numbers that it reads: the sizes of an island's "
            "values depend on the number of tokens alone"
        )
    if torch.Tag.nondeterministic_seeded in tags and not calls(
        node, aten.scaled_dot_product_attention
    ):
        return "it draws random numbers"
    return ""


def _is_counted(size: Any) -> bool:
    """Whether torch would have to count to know a size: what it calls u0, u1, ..."""
    return bool(re.search(r"\bu\d+\b", str(size)))


def _key(region: Region, source: Source) -> Any:
    """The same for regions that compute the same; constants by their numbers."""
    number = {node: i for i, node in enumerate((*region.inputs, *region.nodes))}

    def frozen(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("node", number.get(value, tuple(map(str, sizes(value)))))
        if isinstance(value, (list, tuple)):
            return tuple(map(frozen, value))
        if isinstance(value, slice):
            return ("slice", frozen([value.start, value.stop, value.step]))
        return (type(value), str(value))

    def digest(value: Tensor | None) -> str:
        if value is None:
            return ""
        numbers = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(numbers).hexdigest()

    calls_made = tuple(
        (str(n.target), frozen(n.args), frozen(tuple(sorted(n.kwargs.items()))))
        for n in region.nodes
    )
    outputs = tuple(number[n] for n in region.outputs)
    return calls_made, outputs, source.ports, source.shapes, tuple(map(digest, source.constants))


def _named(node: fx.Node) -> str:
    where = ", ".join(part for part in (info(node).module, info(node).source) if part)
    return f"{node.target} ({where})" if where else str(node.target)
