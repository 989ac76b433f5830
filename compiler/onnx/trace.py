"""Writes a simulator's program as ONNX: runs the code of either back end on `Value`s.

fused        each `tint` operator of the graph runs, as in `runtime/backends/fused.py`
transformer  each module of the emitted program runs as it is, over a `Stream` and `Page`s
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from tintc.compiler.onnx.elementwise import add
from tintc.compiler.onnx.graph import Dim, Graph, Value, Values
from tintc.compiler.onnx.islands import write_backward, write_forward
from tintc.compiler.onnx.shapes import cat, full_like, reshape
from tintc.compiler.onnx.steps import Inputs, after, looped, scheduled, steps_from
from tintc.compiler.onnx.stream import Page, Stream
from tintc.ir.builder import operands
from tintc.ir.builder import outputs as named_outputs
from tintc.ir.choices import Choices
from tintc.ir.config import UNROLLED
from tintc.ir.dialect import AnyOperator, is_tint, operator_of, tint_name
from tintc.ir.errors import UnsupportedModelError
from tintc.ir.inputs import CODE, of_training
from tintc.ir.node_meta import info
from tintc.ir.ops.attention import last_keys, own_tokens, with_past
from tintc.ir.ops.embedding import embedding
from tintc.ir.ops.head import token_losses
from tintc.ir.ops.island import island_backward, island_forward
from tintc.ir.ops.linear import prefix
from tintc.ir.ops.position import past_window_mask
from tintc.ir.ops.rates import gradient_products, token_products
from tintc.ir.ops.states import linear_square, orthogonal
from tintc.ir.ops.wide import wide_linear
from tintc.ir.outputs import SLOTS, Output, without_losses
from tintc.runtime.backends.transformer import emit as transformer
from tintc.runtime.backends.transformer.modules.parts import blank, copied
from tintc.runtime.backends.transformer.pages import PrefixPages
from tintc.runtime.simulator import Simulator
from tintc.runtime.specialize.optimize import optimize
from tintc.runtime.specialize.programs import Programs

# Those whose result is plain torch code that a runtime gains from.
OPTIMIZATIONS = ("low_rank_updates", "sparse_tables")


def _linear_square(dy_BTO: Value, x_BTI: Value) -> Any:
    """From products of tokens, however many there are."""
    dy: Any = dy_BTO
    x: Any = x_BTI
    return gradient_products(token_products(dy, dy), token_products(x, x), 1)[:, 0]


def _own_tokens(x_BCD: Value, own_BTD: Value) -> Value:
    """The last tokens, as many as `own` has: how many that is, the graph computes."""
    graph, bounds = x_BCD.graph, (x_BCD.dims[1], own_BTD.dims[1])
    first = graph.add("Sub", [graph.size(size) for size in bounds], (1,), torch.int64)
    inputs = [x_BCD, first, graph.size(x_BCD.dims[1]), graph.ints(1)]
    dims = (x_BCD.dims[0], own_BTD.dims[1], *x_BCD.dims[2:])
    return graph.add("Slice", inputs, dims, x_BCD.dtype)


def _past_window_mask(mask_BxTC: Value, window: int) -> Any:
    """Diagonals begin behind the past tokens, however many there are."""
    graph, (tokens, every) = mask_BxTC.graph, mask_BxTC.dims[-2:]
    sizes = [graph.size(size) for size in (every, tokens)]
    past = reshape(graph, graph.add("Sub", sizes, (1,), torch.int64), ())

    def triangle(x: Value, diagonal: Value, upper: int) -> Any:
        return graph.add("Trilu", [x, diagonal], x.dims, x.dtype, upper=upper)

    near_BxTC = triangle(mask_BxTC, add(graph, past, 1 - window), 1)
    itself_BxTC = triangle(triangle(full_like(graph, mask_BxTC), past, 1), past, 0)
    return near_BxTC | (itself_BxTC & ~near_BxTC.any(-1, keepdim=True))


def _last_keys(mask_BxTC: Value, k_BKD: Value) -> Value:
    """The last columns, as many as there are keys: how many that is, the graph computes."""
    graph, every, kept = mask_BxTC.graph, mask_BxTC.dims[-1], k_BKD.dims[1]
    first = graph.add("Sub", [graph.size(every), graph.size(kept)], (1,), torch.int64)
    inputs = [mask_BxTC, first, graph.size(every), graph.ints(3)]
    return graph.add("Slice", inputs, (*mask_BxTC.dims[:-1], kept), torch.bool)


def _with_past(past_BPD: Value, x_BTD: Value) -> Any:
    """Heads of the past that stand apart, (B, G, P, E) before somebody put them side by side, are
    joined as they are: the past is then copied once.
    """
    graph, past, x = past_BPD.graph, past_BPD, x_BTD
    apart = graph.source(past, "Reshape")
    if apart is None or apart.ndim != 4:
        return torch.cat([past, x], 1)  # type: ignore[list-item]
    joined = cat(graph, [by_heads(past, apart.dims[2]), by_heads(x, apart.dims[2])], 2)
    return side_by_side(joined)


def by_heads(x_BTD: Value, heads: Dim) -> Value:
    """(B, G, T, E), as attention splits it."""
    value: Any = x_BTD
    found: Value = torch.unflatten(value, -1, (heads, -1)).transpose(1, 2)  # type: ignore[arg-type, assignment]
    return found


def side_by_side(x_BGTE: Value) -> Value:
    """(B, T, G E): its inverse."""
    value: Any = x_BGTE
    found: Value = value.transpose(1, 2).flatten(-2)
    return found


# What the export writes of operators that emitted code calls whole, or that it has a better form
# of.
WRITTEN: dict[AnyOperator, Callable[..., Any]] = {
    linear_square: _linear_square,
    orthogonal: orthogonal,
    last_keys: _last_keys,
    own_tokens: _own_tokens,
    past_window_mask: _past_window_mask,
    with_past: _with_past,
    island_forward: write_forward,
    island_backward: write_backward,
    wide_linear: wide_linear.target,
}


@torch.no_grad()
def trace(
    simulator: Simulator,
    graph: Graph,
    inputs: Inputs,
    outputs: tuple[Output, ...],
) -> Values:
    """Adds the nodes of a program that computes the outputs; they come back by name. Raises
    UnsupportedModelError for what has no form in ONNX's standard operators."""
    if simulator.structure is None:
        return _fused(simulator, graph, inputs, outputs)
    found = _transformer(simulator, graph, inputs, without_losses(outputs))
    for kind in outputs:
        if kind.of_losses:
            with graph.scope(kind.value):
                logits: Any = found[kind.logits]
                labels: Any = inputs["labels"]
                losses: Any = token_losses(logits, labels)
                found[kind] = losses
    return found


def _fused(
    simulator: Simulator,
    graph: Graph,
    inputs: Inputs,
    outputs: tuple[Output, ...],
) -> Values:
    if not simulator.program.apart or all(kind.is_before for kind in outputs):
        found: Values = _run(simulator, graph, inputs, Choices(outputs))
        return found
    updates = trace_updates(simulator, graph, inputs)
    return _run(simulator, graph, inputs, Choices(outputs, from_updates=True), updates)


@torch.no_grad()
def trace_updates(simulator: Simulator, graph: Graph, inputs: Inputs) -> Values:
    """Slot -> what the inner steps make of it, for each sequence."""

    def run(*call: Any) -> dict[str, Any]:
        return _run(simulator, graph, *call)

    if not simulator.config.looped:
        return dict(run(of_training(inputs), Choices((Output.UPDATES,)))[Output.UPDATES])
    last = looped(simulator, graph, of_training(inputs), run)
    return {slot: last[slot] for slot in named_outputs(simulator.program.graph)["updates"]}


@torch.no_grad()
def trace_decode(
    simulator: Simulator, graph: Graph, inputs: Inputs, given: Values
) -> tuple[Value, Values]:
    """(logits at the kept tokens, by name keys and values of all tokens). given: updates by slot,
    keys and values of earlier tokens by name.
    """
    kind = Choices((Output.LOGITS, Output.CACHE), from_updates=True, cached=True, some_tokens=True)
    found = _run(simulator, graph, inputs, kind, given)
    return found[Output.LOGITS], found[Output.CACHE]


@torch.no_grad()
def trace_window(
    simulator: Simulator, graph: Graph, inputs: Inputs, slots: Values, past: Values | None
) -> tuple[Value, Values, Values]:
    """The program of one window of a stream: its losses at the kept tokens under the given slots,
    the slots after all steps, and the keys and values that later windows look at.

    past: keys and values of earlier tokens, by name; None where a window holds them all.
    """
    config = simulator.config
    kind = Choices(from_states=True, window=True, cached=past is not None)

    def run(given: Inputs, kind: Choices, before: Values) -> dict[str, Any]:
        return _run(simulator, graph, given, kind, {**before, **(past or {})})

    wanted = (Output.INITIAL_LOSSES, *SLOTS, *((Output.CACHE,) if past is not None else ()))
    given = inputs if not config.looped else scheduled(config, graph, inputs, graph.constant(0))
    found = run(given, replace(kind, outputs=wanted), slots)
    last = after(found, slots)
    if config.looped:
        last = steps_from(config, graph, inputs, run, kind, 1, last)
    return found[Output.INITIAL_LOSSES], last, found.get(Output.CACHE, {})


def _run(
    simulator: Simulator, graph: Graph, inputs: Inputs, kind: Choices, given: Values | None = None
) -> dict[str, Any]:
    """The outputs of one kind of call. given: slot -> its value, where that is an input of it."""
    lowered = optimize(simulator.program, _choices(simulator, kind))
    weights = simulator.prefix.direct()
    values: dict[fx.Node, Any] = {}
    for node in lowered.nodes:
        if node.op == "placeholder":
            name, slot = info(node).parameter, info(node).slot
            if name is not None:
                values[node] = graph.weight(name, weights[name])
            else:
                values[node] = inputs.get(node.name) if slot is None else (given or {})[slot]
        elif node.op == "call_function" and is_tint(node, prefix):
            values[node] = graph.weight(info(node).slot or node.name, _prefix(node, weights))
        elif node.target is operator.getitem:
            source, index = operands(node)
            values[node] = values[source][index]
        elif node.op == "call_function":
            called = operator_of(node)
            assert called is not None
            written = WRITTEN.get(called, None if called.whole else called)
            if written is None:
                raise UnsupportedModelError(
                    f"{node.name} is {called}, which only torch runs; nothing was exported"
                )
            with graph.scope(_scope(node)):
                values[node] = written(*fx.node.map_arg(node.args, values.__getitem__))
                if called is embedding:  # of an own table, which is wide
                    values[node] = values[node].to(simulator.dtype)
    found: Any = fx.node.map_arg(lowered.output_node().args[0], values.__getitem__)
    return dict(found)


def _prefix(node: fx.Node, weights: dict[str, Tensor]) -> Tensor:
    """The slot's first value: a view of the parameter."""
    source, *rest = operands(node)
    name = info(source).parameter
    assert name is not None
    return prefix(weights[name], *rest)


def _choices(simulator: Simulator, kind: Choices) -> Choices:
    """Updates stay factors where that is faster for the lengths that costs are told for."""
    enabled = [name for name in OPTIMIZATIONS if name in simulator.optimizations]
    weight = next(iter(simulator.prefix.parameters()))
    found = Programs(simulator.program, None, enabled).usual(kind, weight)
    return replace(found, dtype=found.stored)  # runtimes convert where their kernels need it


def _scope(node: fx.Node, kind: str = "") -> str:
    """`module/phase_step/operator` of a node, for the names of what it becomes."""
    described = info(node)
    place = f"{described.phase}_{described.step}" if described.phase else "inputs"
    return "/".join(
        part for part in (described.module, place, kind or tint_name(node) or node.name) if part
    )


def _transformer(
    simulator: Simulator,
    graph: Graph,
    inputs: Inputs,
    outputs: tuple[Output, ...],
) -> Values:
    structure, pages, steps = simulator.structure, simulator.prefix, simulator.config.steps
    if simulator.config.looped and not all(kind.is_before for kind in outputs):
        raise UnsupportedModelError(
            f"{steps} steps are a loop, which the export of the transformer back end does not "
            f"have; expected at most {UNROLLED} steps, or backend fused; nothing was exported"
        )
    assert structure is not None and isinstance(pages, PrefixPages)
    program = transformer.emit(simulator.program, structure, outputs)
    weights = {**pages.direct(), **pages.by_name()}
    lowered = {node.name: node for node in simulator.program.graph.nodes}
    names = {node.name: name for node in lowered.values() if (name := info(node).parameter)}
    places = _places(simulator)
    values: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        args: Any = fx.node.map_arg(node.args, values.__getitem__) if node.op != "output" else ()
        if node.op == "placeholder":
            name = str(node.target)
            if name == CODE:
                values[node] = graph.constant(structure.code)
            elif name.startswith("page_") and name in weights:
                values[node] = Page(
                    graph, weights[name], places.get(int(name.removeprefix("page_")), {})
                )
            else:
                values[node] = (
                    inputs[name]
                    if name in inputs
                    else graph.weight(names[name], weights[names[name]])
                )
        elif node.target is blank:
            values[node] = Stream(graph, args[2], simulator.dtype)
        elif node.target is copied:
            where = args[1]
            values[node] = args[0][:, : where.tokens, where.start : where.stop]
        elif node.op in ("call_function", "call_module"):
            with graph.scope(_transformer_scope(node, lowered, program)):
                run = (
                    program.get_submodule(str(node.target))
                    if node.op == "call_module"
                    else node.target
                )
                values[node] = run(*args)
    wanted: Any = program.graph.output_node().args[0]
    return {name: values[wanted[name]] for name in outputs}


def _transformer_scope(node: fx.Node, lowered: dict[str, fx.Node], program: fx.GraphModule) -> str:
    origin = lowered.get(re.sub(r"(_bias)?_tile_\d+$", "", node.name))
    kind = (
        type(program.get_submodule(str(node.target))).__name__ if node.op == "call_module" else ""
    )
    return node.name if origin is None else _scope(origin, kind)


def _places(simulator: Simulator) -> dict[int, dict[tuple[int, ...], str]]:
    """By page: the name of each place's slot."""
    found: dict[int, dict[tuple[int, ...], str]] = {}
    for slot in simulator.program.layout.prefix.values():
        for index, tile in enumerate(slot.tiles):
            place = (
                tile.tokens.start,
                tile.tokens.stop,
                tile.coordinates.start,
                tile.coordinates.stop,
            )
            found.setdefault(tile.page, {})[place] = (
                slot.name if len(slot.tiles) == 1 else f"{slot.name}.tile_{index}"
            )
    return found
