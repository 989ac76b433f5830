"""FLOPs of fine-tuning the auxiliary model directly: what a simulator's own are compared with."""

from __future__ import annotations

import torch

from tintc.compiler.cost import estimate
from tintc.compiler.exact import exact_program
from tintc.ir.call_sizes import CallSizes
from tintc.ir.program import Program


def direct_flops(program: Program, sizes: CallSizes) -> int:
    """FLOPs of one call that fine-tunes by exact gradients, as torch.autograd would: the same
    tokens, steps and layers, without optimizations, and a prediction with the result.

    A multiplication and an addition count as two, matrix products only. 0 where only the
    approximations of the program's config can be simulated.
    """
    exact = exact_program(program)
    if exact is None:
        return 0
    # In float32 whatever the program's type is: the number of products does not depend on it.
    return estimate(exact, "fused", torch.float32, **sizes, optimize=False).flops
