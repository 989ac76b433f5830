"""What was chosen for a kind of call, for people: by which calibration, whose products, which
updates, how many sequences and tokens at a time.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from tintc.ir.calibration import Calibration
from tintc.ir.dialect import argument, is_tint, operator_of
from tintc.ir.ops.head import HEADS
from tintc.ir.ops.linear import linear_backward, linear_descent, linear_forward, linear_residual
from tintc.ir.ops.low_rank import low_rank, low_rank_of_scores
from tintc.ir.ops.rates import token_products

_BLAS = (
    *(linear_forward, linear_backward, linear_residual, linear_descent),
    *(low_rank, low_rank_of_scores, token_products),
)


def chosen(
    graph: fx.Graph, speed: Calibration, slots: int, factors: int, together: int
) -> dict[str, Any]:
    """graph: optimized. slots: weights whose updates can stay factors; factors: those that do.
    together: sequences of a slice. JSON values; chunk_tokens: 0 for as many as have a fixed number
    of logits.
    """
    called = [found for node in graph.nodes if (found := operator_of(node)) is not None]
    heads = [node for node in graph.nodes if is_tint(node, *HEADS)]
    own = [node for node in heads if argument(node, "onednn")]
    by_onednn = [each for each in called if each.family == "onednn"]
    return {
        "calibration": dict(speed.about),
        "measured": speed.measured,
        "products": {
            "onednn": len(by_onednn) + len(own),
            "blas": sum(each in _BLAS for each in called) + len(heads) - len(own),
        },
        "updates": {"factors": factors, "own_weights": slots - factors},
        "sequences_together": together,
        "chunk_tokens": max((int(argument(node, "rows")) for node in heads), default=0),
    }


def chosen_text(found: dict[str, Any]) -> str:
    """In one line."""
    about, products, updates = found["calibration"], found["products"], found["updates"]
    measured = f"measured, {about.get('from', 'given')}" if found["measured"] else "fixed"
    tokens = found["chunk_tokens"] or "a fixed number of"
    return (
        f"calibration {measured}; products: {products['onednn']} by oneDNN, {products['blas']} by "
        f"torch.matmul; updates: {updates['factors']} as factors, {updates['own_weights']} as own "
        f"weights; {found['sequences_together']} sequences together; head in chunks of {tokens} "
        f"{'tokens' if found['chunk_tokens'] else 'logits'}"
    )
