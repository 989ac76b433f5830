"""Every operator of the dialect, declared once: schema, implementation, shape rule and meaning.

One file a family: forward, backward and descent of one kind of layer stand side by side. A new
family is imported here, so that the table below is complete for whoever sees it.
"""

from collections.abc import Mapping

from tintc.ir.dialect import AnyOperator, declared
from tintc.ir.ops import (
    activation,
    attention,
    elementwise,
    embedding,
    head,
    island,
    linear,
    loss,
    low_rank,
    norm,
    onednn,
    position,
    rates,
    sparse,
    states,
    wide,
)

OPERATORS: Mapping[str, AnyOperator] = declared()  # by name

__all__ = [
    "OPERATORS",
    "activation",
    "attention",
    "elementwise",
    "embedding",
    "head",
    "island",
    "linear",
    "loss",
    "low_rank",
    "norm",
    "onednn",
    "position",
    "rates",
    "sparse",
    "states",
    "wide",
]
