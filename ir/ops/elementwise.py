"""Sums, products and multiples of activations, coordinate by coordinate. Shapes: any, alike.

Source: TINT.md section 2, "Residual" and "Activation" (gated units).
"""

from torch import Tensor


def residual(x: Tensor, y: Tensor) -> Tensor:
    """x + y: a residual connection, or the sum of two gradients where the forward pass branched."""
    return x + y


def multiply(x: Tensor, y: Tensor) -> Tensor:
    """x * y: what a gated unit does behind its activation. Backward: dx = dy * y, and the other way
    round, the same operator.
    """
    return x * y


def scale(x: Tensor, factor: float) -> Tensor:
    """factor * x: multipliers of embeddings, residual branches and logits. Backward: the same
    operator.
    """
    return x * factor
