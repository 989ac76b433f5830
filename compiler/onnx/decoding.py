"""A pair of models: one trains on a context, one decodes under what it gave. TINT.md section 9.

    adapt:   input_ids, train_mask, ..., inner_lr  ->  updates.SLOT (B, ...)
    decode:  input_ids, position_ids (R, T), attention_mask (R, P + T), updates.SLOT,
             past_key_values.N.key, .value (R, G, P, E), logits_to_keep ()
               ->  logits (R, K, V), present.N.key, .value (R, G, P + T, E)

Logits are those of the last K = logits_to_keep tokens; of all by default, or for 0. Row b of a call
reads the updates of sequence b. P is 0 at first. Biases of scores (ALiBi) are cached under the same
kind of name, (R, P, H). Attention in a window of w tokens sees as many keys as the caller gives:
all, or the last ones, w - 1 of them at least; the mask is of all tokens.

Both say in their metadata, under `tintc.pair`, what the other must be.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from tintc.compiler.onnx.graph import BATCH, PAST, Dim, Graph, Value
from tintc.compiler.onnx.inputs import add_inputs, check_inputs, decode_inputs, note_past
from tintc.compiler.onnx.model import Model, finished, metadata, new_graph
from tintc.compiler.onnx.trace import by_heads, side_by_side, trace_decode, trace_updates
from tintc.ir.builder import outputs
from tintc.ir.errors import UsageError
from tintc.ir.node_meta import info
from tintc.passes.stream.cached_keys import cached_dtype
from tintc.runtime.digest import digest_of
from tintc.runtime.onnx_pair import ABOUT, PAST_VALUE, PRESENT, UPDATE
from tintc.runtime.simulator import Simulator
from tintc.runtime.specialize.cached_layers import Entry
from tintc.runtime.uncached import uncached


@dataclass(frozen=True)
class Cached:
    """One cached value. name: behind `past_key_values.` and `present.`. heads: G; None for biases.
    width: E, or H of biases. window: how many tokens its attention sees; None for all.
    """

    name: str
    heads: int | None
    width: int
    window: int | None


def check_pair(simulator: Simulator) -> None:
    """Raises UsageError for what has no decode program."""
    if simulator.structure is not None:
        raise UsageError(
            "a pair needs the fused back end, which caches keys; this simulator's is transformer: "
            "compile it with backend=fused"
        )
    if uncached(simulator):
        raise UsageError(f"a pair caches keys: {uncached(simulator)}; export the simulator instead")


def cached(simulator: Simulator) -> dict[str, Cached]:
    """By the name of a cached value in the program; layers that share one name it once."""
    found: dict[str, Cached] = {}
    for number, layer in enumerate(simulator.layers):
        parts = {"key": layer.keys, "value": layer.values, "bias": layer.bias}
        for part, entry in parts.items():
            if entry is not None and entry.name not in found:
                found[entry.name] = _cached(f"{number}.{part}", entry)
    return found


def _cached(name: str, entry: Entry) -> Cached:
    return Cached(name, entry.heads, entry.width // (entry.heads or 1), entry.window)


def build_pair(simulator: Simulator, inputs: Collection[str], opset: int) -> tuple[Model, Model]:
    """(adapt, decode). Raises UsageError for a simulator, inputs or an opset that cannot be
    exported, UnsupportedModelError for an operator that has no standard form.
    """
    check_pair(simulator)
    about = pair_metadata(simulator)
    return (
        _adapt(simulator, check_inputs(inputs), new_graph(simulator, opset), about),
        _decode(simulator, new_graph(simulator, opset), about),
    )


def pair_metadata(simulator: Simulator) -> dict[str, str]:
    """What both files say; the tokenizer lies beside them."""
    said = {
        "weights": digest_of(simulator.prefix.tensors()),
        "cache": [asdict(each) for each in cached(simulator).values()],
    }
    plain = {name: value for name, value in metadata(simulator).items() if name != "tokenizer.json"}
    return {**plain, ABOUT: json.dumps(said)}


def _adapt(
    simulator: Simulator, names: tuple[str, ...], graph: Graph, about: dict[str, str]
) -> Model:
    with graph.scope("inputs"):
        given = add_inputs(
            graph, names, simulator.dtype, labels=False, whole=False, by_length=False
        )
    found = trace_updates(simulator, graph, given)
    return finished(graph, {f"{UPDATE}{slot}": value for slot, value in found.items()}, about)


def _decode(simulator: Simulator, graph: Graph, about: dict[str, str]) -> Model:
    described = cached(simulator)
    with graph.scope("inputs"):
        inputs = decode_inputs(graph)
        given = {
            slot: graph.input(f"{UPDATE}{slot}", _of_batch(info(node).shape), simulator.own_dtype)
            for slot, node in outputs(simulator.program.graph)["updates"].items()
        }
        past = {name: _past(simulator, graph, name, each) for name, each in described.items()}
    logits, cache = trace_decode(simulator, graph, inputs, {**given, **past})
    with graph.scope("outputs"):
        present = {
            f"{PRESENT}{described[name].name}": value
            if described[name].heads is None
            else by_heads(value, described[name].heads or 1)
            for name, value in cache.items()
        }
    return finished(graph, {"logits": logits, **present}, about)


def _past(simulator: Simulator, graph: Graph, name: str, each: Cached) -> Value:
    """The input, side by side as the program reads it."""
    held = PAST if each.window is None else f"{PAST}_{each.window}"
    dtype = cached_dtype(name, simulator.dtype)
    dims: tuple[Dim, ...] = (BATCH, held, each.width)
    if each.heads is not None:
        dims = (BATCH, each.heads, held, each.width)
    value = graph.input(f"{PAST_VALUE}{each.name}", dims, dtype)
    note_past(graph, value, len(dims) - 2)
    return value if each.heads is None else side_by_side(value)


def _of_batch(shape: Any) -> tuple[Dim, ...]:
    return (BATCH, *(int(size) for size in shape[1:]))
