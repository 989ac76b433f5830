"""What the transformer back end makes of each operator, one file a family. A new family is imported
here.
"""

from tintc.runtime.backends.transformer.emitter import transformer_rule
from tintc.runtime.backends.transformer.rules import (
    activation,
    attention,
    elementwise,
    embedding,
    inner_rule,
    island,
    linear,
    loss,
    norm,
    position,
)

RULES = transformer_rule.complete()

__all__ = [
    "RULES",
    "activation",
    "attention",
    "elementwise",
    "embedding",
    "inner_rule",
    "island",
    "linear",
    "loss",
    "norm",
    "position",
]
