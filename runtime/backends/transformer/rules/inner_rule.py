"""The rate of a step is an input; inner rules beyond plain descent are not built yet."""

from __future__ import annotations

from torch import fx

from tintc.ir.dialect import argument, tint_name
from tintc.ir.errors import UnsupportedModelError
from tintc.ir.ops import rates, states
from tintc.runtime.backends.transformer.emitter import Emitter, transformer_rule


@transformer_rule(rates.rate)
def _rate(emitter: Emitter, node: fx.Node) -> None:
    inner_lr, factor = emitter.inputs(node, "inner_lr", "factor")
    how = argument(node, "scale"), argument(node, "with_lr")
    emitter.values[node] = emitter.function(
        rates.rate.implementation, inner_lr, factor, *how, name=node.name
    )


@transformer_rule(
    rates.total, rates.clip_factor, rates.normal_factor, rates.drift_share,
    states.zero_state, states.fade, states.descend, states.toward, states.gradient_square,
    states.change_square, states.original_square, states.linear_square, states.zero_count,
    states.next_count, states.moment, states.adam_descent, states.divide, states.orthogonal,
    states.rows,
)  # fmt: skip
def _refused(emitter: Emitter, node: fx.Node) -> None:
    raise UnsupportedModelError(
        f"the transformer back end has no module for {tint_name(node)}, which this inner rule "
        "needs; use backend fused, or plain sgd"
    )
