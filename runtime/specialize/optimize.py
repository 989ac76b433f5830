"""From the lowered graph to the one that the fused back end emits: only what a kind of call wants,
then the optimizations.

    lowered graph, choices  ->  its copy, pruned to the wanted outputs
      ->  each enabled pass of `passes.OPTIMIZATIONS`

No optimization changes what is computed, up to rounding; each can be switched off.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from torch import fx

from tintc.ir.builder import Builder, before_step, further_input, infer_shape, reinfer
from tintc.ir.builder import outputs as named_outputs
from tintc.ir.choices import Choices, Contexts
from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint, operator_of
from tintc.ir.errors import UsageError
from tintc.ir.node_meta import KEY, copy_info, info
from tintc.ir.ops.activation import activation_forward
from tintc.ir.ops.elementwise import scale
from tintc.ir.ops.embedding import kept_tokens
from tintc.ir.ops.head import token_losses
from tintc.ir.ops.linear import linear_forward
from tintc.ir.ops.low_rank import low_rank, low_rank_of_scores
from tintc.ir.ops.wide import wide_linear
from tintc.ir.outputs import SLOTS, Output
from tintc.ir.pass_manager import Pass, run_passes
from tintc.ir.program import Program
from tintc.passes.decode.factored_updates import factored_updates
from tintc.passes.decode.given_updates import given_updates
from tintc.passes.decode.grouped_rows import grouped_rows
from tintc.passes.optimize.dead_code import dead_code
from tintc.passes.specializing import OPTIMIZATION_NAMES, OPTIMIZATIONS
from tintc.passes.stream.cached_keys import cached_keys
from tintc.passes.stream.loss_at_kept import loss_at_kept
from tintc.passes.stream.whole_segment import whole_segment
from tintc.runtime.specialize.frozen import frozen_names, give_frozen, named


def optimize(program: Program, choices: Choices) -> fx.Graph:
    """The graph of one kind of call. Its output is a dict of the wanted ones."""
    context = Context(program.config, facts=program.facts, layout=program.layout, choices=choices)
    graph = run_passes(copy_graph(program.graph), context, _updates(choices))
    asked = choices.frozen or Output.FROZEN in choices.outputs
    _keep(graph, choices, frozen_names(program.graph) if asked else ())
    return run_passes(
        graph,
        context,
        [
            *_specializations(choices),
            dead_code,
            *(step for step in OPTIMIZATIONS if step.name in choices.enabled),
        ],
    )


def _updates(choices: Choices) -> list[Pass]:
    """How updated values come into a program, or leave it, of the whole lowered graph."""
    if choices.from_updates:
        return [given_updates]
    return [factored_updates] if choices.factored else []


def _specializations(choices: Choices) -> list[Pass]:
    """What a kind of call asks for, whether optimizations are on or not."""
    if choices.window:
        window = [whole_segment, loss_at_kept]
        return [*window, cached_keys] if choices.cached else window
    if not choices.cached:
        return []
    grouped = [grouped_rows] if choices.contexts is Contexts.GROUPS else []
    return [dead_code, cached_keys, *grouped]  # the keys are those of the forward pass that is left


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy whose nodes have records of their own."""
    copied = copy.deepcopy(graph)
    for node in copied.nodes:
        if KEY in node.meta:
            node.meta[KEY] = copy.copy(node.meta[KEY])
    return copied


def _keep(graph: fx.Graph, choices: Choices, frozen: tuple[str, ...]) -> None:
    """Returns the wanted outputs only; slot values become inputs where they are given."""
    if choices.from_states:
        _start_from_given(graph)
    if choices.frozen:
        give_frozen(graph, frozen)
    output = graph.output_node()
    returned: dict[str, Any] = dict(named_outputs(graph))
    with graph.inserting_before(output):
        returned[Output.FROZEN] = named(graph, frozen)
        wanted = {kind.value: _wanted(graph, kind, returned, choices) for kind in choices.outputs}
        output.args = (wanted,)


def _start_from_given(graph: fx.Graph) -> None:
    """The step starts from given values of its slots. What reads a weight for its shape, or as it
    was before all steps, still reads the auxiliary one.
    """
    build = Builder(graph)
    for node in before_step(graph).values():
        shape = info(node).shape
        given = build.placeholder(f"{node.name}_given", shape if "B" in shape else ("B", *shape))
        copy_info(node, given, role="input", shape=info(given).shape, wide=True)
        node.replace_all_uses_with(given, delete_user_cb=_takes_values)
    reinfer(graph)


def _takes_values(user: fx.Node) -> bool:
    called = operator_of(user)
    return called is None or called.kind != "read"


def _wanted(
    graph: fx.Graph, kind: Output, returned: dict[str, Any], choices: Choices
) -> fx.Node | dict[str, fx.Node]:
    """The node, or nodes, of one output."""
    if kind in (*SLOTS, Output.CACHE, Output.FROZEN):  # the pass cached_keys says what is cached
        values: dict[str, fx.Node] = returned.get(kind, {})
        return values
    logits: fx.Node = returned[kind.logits]
    if kind.of_losses:
        labels = further_input(graph, "labels")
        if choices.some_losses:
            logits = _some_tokens(graph, logits)
            labels = _kept(graph, labels, logits)[labels]
        place: dict[str, Any] = {"phase": "forward", "step": info(logits).step}
        return Builder(graph).call(
            token_losses, logits, labels, like=logits, label=kind.value, **place
        )
    return _some_tokens(graph, logits) if choices.some_tokens else logits


def _some_tokens(graph: fx.Graph, logits: fx.Node) -> fx.Node:
    """The same logits at the kept positions: the head, and what stands behind it, once more on
    these.
    """
    if is_tint(logits, linear_forward, wide_linear):
        kept = _kept(graph, argument(logits, "x"), logits)
    elif is_tint(logits, low_rank_of_scores):  # a head whose update is held as factors
        y = argument(logits, "y")
        kept = {y: _some_tokens(graph, y)} | _kept(graph, argument(logits, "scores"), logits)
    elif is_tint(logits, low_rank):
        y = argument(logits, "y")
        kept = {y: _some_tokens(graph, y)} | _kept(graph, argument(logits, "x"), logits)
    elif is_tint(logits, scale, activation_forward):
        x = argument(logits, "x")
        kept = {x: _some_tokens(graph, x)}
    else:  # an island's, of all tokens
        return _kept(graph, logits, logits)[logits]
    copied = graph.node_copy(logits, lambda n: kept.get(n, n))
    copy_info(logits, copied)
    info(copied).shape = infer_shape(copied)
    return copied


def _kept(graph: fx.Graph, x: fx.Node, logits: fx.Node) -> dict[fx.Node, fx.Node]:
    """An activation -> the same at the kept positions."""
    fields: dict[str, Any] = {"phase": "forward", "step": info(logits).step}
    positions = further_input(graph, "kept")
    return {x: Builder(graph).call(kept_tokens, x, positions, like=x, **fields)}


def check_names(names: bool | Collection[str]) -> tuple[str, ...]:
    """Names of the optimizations that are on, in their order: all, none or the given ones. Raises
    UsageError for an unknown one.
    """
    wanted = OPTIMIZATION_NAMES if names is True else () if names is False else tuple(names)
    unknown = [name for name in wanted if name not in OPTIMIZATION_NAMES]
    if unknown:
        raise UsageError(
            f"there is no optimization {', '.join(map(str, unknown))}; they are "
            f"{', '.join(OPTIMIZATION_NAMES)}"
        )
    return tuple(name for name in OPTIMIZATION_NAMES if name in wanted)
