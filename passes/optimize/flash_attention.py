"""Goes back through the scores by torch's fused kernel, which never holds a (T, T) matrix and skips
what lies above the diagonal.

    attention_forward(q, k, v, None), attention_backward_full(do, q, k, v, None)
      ->  o, l = flash_forward(q, k, v); dq, dk, dv = flash_backward(do, q, k, v, o, l)

l is the logarithm of each row's sum of exponentials. For calls on a CPU that nobody differentiates
(the kernel has no derivative), under the causal mask alone, with heads of v as wide as those of q
and k (the kernel takes no others). Value-only attention recomputes its probabilities, which was
measured to be as fast as keeping them and faster than this kernel, which cannot leave out dq and
dk.
"""

from __future__ import annotations

from torch import fx

from tintc.ir.builder import Builder
from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.attention import (
    attention_backward_full,
    attention_forward,
    flash_backward,
    flash_forward,
)
from tintc.ir.pass_manager import graph_pass


@graph_pass(requires=("well_formed",), ensures=("well_formed", "shapes_agree"))
def flash_attention(graph: fx.Graph, context: Context) -> fx.Graph:
    """See the module's first lines."""
    if context.choices.differentiable or context.choices.device != "cpu":
        return graph
    build = Builder(graph)
    for backward in [n for n in graph.nodes if is_tint(n, attention_backward_full)]:
        same = [argument(backward, name) for name in _SHARED]
        forward = next(
            (
                n
                for n in same[0].users
                if is_tint(n, attention_forward) and [argument(n, name) for name in _SHARED] == same
            ),
            None,
        )
        if (
            forward is not None
            and argument(backward, "mask") is None
            and argument(backward, "softcap") == 0
            and _one_size(backward)
        ):
            _replace(build, forward, backward)
    return graph


def _one_size(backward: fx.Node) -> bool:
    """Whether a head of v is as wide as one of k, and so of q."""
    return bool(info(argument(backward, "k")).shape[-1] == info(argument(backward, "v")).shape[-1])


_SHARED = ("q", "k", "v", "mask", "bias", "heads", "kv_heads", "scale", "softcap")


def _replace(build: Builder, forward: fx.Node, backward: fx.Node) -> None:
    operands = [argument(backward, name) for name in ("q", "k", "v")]
    how = [argument(backward, name) for name in ("heads", "kv_heads", "scale")]
    fields = {"phase": info(forward).phase, "step": info(forward).step}
    with build.graph.inserting_before(forward):
        both = build.call(
            flash_forward, *operands, *how, like=forward, label=f"{forward.name}_flash", **fields
        )
        o, sums = (
            build.item(both, i, f"{forward.name}_{name}")
            for i, name in enumerate(("output", "sums"))
        )
    forward.replace_all_uses_with(o)
    build.graph.erase_node(forward)
    fields = {"phase": info(backward).phase, "step": info(backward).step}
    with build.graph.inserting_before(backward):
        do = argument(backward, "do")
        new = build.call(
            flash_backward,
            do,
            *operands,
            o,
            sums,
            *how,
            like=backward,
            label=f"{backward.name}_flash",
            **fields,
        )
    backward.replace_all_uses_with(new)
    build.graph.erase_node(backward)
