"""Sums, products and multiples of activations, coordinate by coordinate. Shapes: any, alike.

Source: TINT.md section 2, "Residual" and "Activation" (gated units).
"""

from torch import Tensor

from tintc.ir.dialect import operator
from tintc.ir.ops.shapes import alike, same_shape


@operator(
    "(Tensor x, Tensor y) -> Tensor",
    shape=alike,
    meaning="sum of two activations or gradients",
)
def residual(x: Tensor, y: Tensor) -> Tensor:
    """x + y: a residual connection, or the sum of two gradients where the forward pass branched."""
    return x + y


@operator(
    "(Tensor x, Tensor y) -> Tensor",
    shape=alike,
    meaning="product of two activations",
)
def multiply(x: Tensor, y: Tensor) -> Tensor:
    """x * y: what a gated unit does behind its activation. Backward: dx = dy * y, and the other way
    round, the same operator.
    """
    return x * y


@operator(
    "(Tensor x, float factor) -> Tensor",
    shape=same_shape,
    meaning="an activation times a constant",
)
def scale(x: Tensor, factor: float) -> Tensor:
    """factor * x: multipliers of embeddings, residual branches and logits. Backward: the same
    operator.
    """
    return x * factor
