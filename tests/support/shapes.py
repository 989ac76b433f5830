"""Hypothesis strategies and small helpers that the operators' tests share. Dimensions need not
divide each other.
"""

import torch
from hypothesis import strategies as st
from torch import Tensor

batches = st.integers(1, 3)
lengths = st.integers(1, 7)
widths = st.integers(1, 9)
seeds = st.integers(0, 2**16)
shared = st.booleans()


class Draw:
    """Random float64 tensors that need gradients, all from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(
        self, *shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0
    ) -> Tensor:
        return (
            (scale * torch.randn(shape, generator=self.generator, dtype=torch.float64))
            .to(dtype)
            .requires_grad_()
        )

    def parameter(self, batch: int, is_shared: bool, *shape: int) -> Tensor:
        """(...) if shared by all sequences, else (B, ...)."""
        return self(*shape) if is_shared else self(batch, *shape)


def each(parameter: Tensor | None, batch: int, dimensions: int) -> list[Tensor | None]:
    """The parameter's value for every sequence."""
    if parameter is None:
        return [None] * batch
    return [parameter] * batch if parameter.ndim == dimensions else list(parameter)
