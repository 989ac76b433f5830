"""Turns the auxiliary model's graph into the simulator's first forward pass.

    input_ids, position_ids, attention_mask -> logits
      ->  the same, with inputs targets, loss_mask, inner_lr and segment for the passes that
          follow, and outputs {"logits", "initial_logits", "updates"}; every operator belongs to
          phase forward, step 0

A head that is cut to the vocabulary, which pads its table, leaves that many tokens; so does one of
as many columns as the model's own config names tokens, or a few less than the table has rows: the
others stand for pictures or a first token. `segment` is the number of leading tokens that a
training pass needs.
"""

from __future__ import annotations

from torch import fx

from tintc.ir.builder import Builder, logits_node
from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint
from tintc.ir.errors import UnsupportedModelError
from tintc.ir.inputs import INPUTS
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import linear_forward, prefix
from tintc.ir.pass_manager import graph_pass
from tintc.passes.analysis.last_layer import last_layer


@graph_pass(
    requires=("tint_only", "one_logits_output", "some_trainable"),
    ensures=("named_outputs", "phases_in_order"),
    writes=("vocab_size",),
)
def lower_forward(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines. Raises UnsupportedModelError if the output has fewer columns
    than there are tokens.
    """
    width, vocabulary = info(logits_node(graph)).shape[-1], context.facts.vocab_size
    if isinstance(width, int) and width < vocabulary:
        named = width == context.vocabulary
        if named or _is_cut(graph, vocabulary) or _predicts_most(graph, context):
            context.learn(vocab_size=width)
            return _lowered(graph)
        raise UnsupportedModelError(
            f"the model returns {width} numbers a position; expected logits over its {vocabulary} "
            "tokens"
        )
    return _lowered(graph)


def _is_cut(graph: fx.Graph, vocabulary: int) -> bool:
    """Whether these are the first columns of a head that has one for every row of the embedding:
    the rest pads the vocabulary.
    """
    logits = last_layer(graph)
    weight = argument(logits, "weight") if is_tint(logits, linear_forward) else None
    if weight is None or not is_tint(weight, prefix):
        return False
    return bool(argument(weight, "start") == 0 and argument(weight, "period") >= vocabulary)


def _predicts_most(graph: fx.Graph, context: Context) -> bool:
    """Whether the logits are a layer's own rows, and as many as nearly all tokens: then the last
    rows of the table stand for no token that follows, such as a blank in front of a text.
    """
    logits, tokens = last_layer(graph), context.facts.vocab_size
    if not is_tint(logits, linear_forward):
        return False
    width, hidden = (info(n).shape[-1] for n in (logits, argument(logits, "x")))
    return isinstance(width, int) and width != hidden and 10 * width >= 9 * tokens


def _lowered(graph: fx.Graph) -> fx.Graph:
    build = Builder(graph)
    for name in INPUTS:
        build.input(name)
    for node in graph.nodes:
        if node.op == "call_function" and not is_tint(node, prefix):
            info(node).phase, info(node).step = "forward", 0
    output = graph.output_node()
    logits = logits_node(graph)
    output.args = ({"logits": logits, "initial_logits": logits, "updates": {}},)
    return graph
