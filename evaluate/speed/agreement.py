"""Whether the sides of a benchmark agree: a simulator with itself without optimizations, with what
it is timed against, and a loop with itself on other kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tintc.compiler.onnx.comparison import TOLERANCE as EXPORTED
from tintc.compiler.verification import ROUNDED_TOLERANCE, Rounding
from tintc.evaluate.speed import benchmark
from tintc.evaluate.speed.benchmark import variant
from tintc.evaluate.speed.rivals import Kind, Rival
from tintc.evaluate.speed.workload import Workload, simulate
from tintc.ir.errors import NumericalError
from tintc.ir.precision import dtype_name
from tintc.runtime.simulator import Simulator


def check(simulator: Simulator, rival: Rival, work: Workload, kind: Kind) -> list[dict[str, Any]]:
    """Differences of logits, relative to the largest: the simulator to itself without
    optimizations, and to what it is timed against.

    tolerance: None for an approximating config, whose difference to fine-tuning is the
    approximation's, and for adapters, which learn something else: no errors. Raises NumericalError
    if another exceeds its tolerance:
    `_limit`, but in float64 that of `tintc verify` where the model's own code rounds to float32.
    """
    found, plain_logits = simulate(simulator, work), simulate(variant(simulator, ()), work)
    limit = _limit(simulator, work, plain_logits)
    plain = _compared(
        "optimizations",
        "the simulator without optimizations",
        found,
        plain_logits,
        limit,
    )
    with Rounding() as rounding:
        expected = rival(work)
    name, tolerance = "loop", max(limit, ROUNDED_TOLERANCE) if rounding.found else limit
    if kind.computes == "simulator":
        name, tolerance = kind.title, max(limit, EXPORTED[simulator.dtype])
    elif kind.computes == "adapters":
        return [plain, _compared("adapters", kind.named, found, expected, None)]
    elif not simulator.config.is_exact:
        return [plain, _compared("approximation", kind.named, found, expected, None)]
    return [plain, _compared(name, kind.named, found, expected, tolerance)]


def check_kernels(
    simulator: Simulator, work: Workload, logits: Sequence[Tensor], own: Sequence[Tensor]
) -> dict[str, Any]:
    """Of a loop on the simulator's kernels, beside itself on those of torch.matmul: `own`. Raises
    NumericalError.
    """
    limit = _limit(simulator, work, own)
    return _compared(
        "kernels", "the loop on its own kernels", logits, own, limit, who="the loop on the others"
    )


@torch.inference_mode()
def _limit(simulator: Simulator, work: Workload, logits: Sequence[Tensor] | Tensor) -> float:
    """Largest difference that counts as none: `benchmark.TOLERANCE` of the largest logit, and in
    float32 a part of what training changes, which grows with the learning rate as rounding does.
    """
    limit = benchmark.TOLERANCE[simulator.dtype]
    if simulator.dtype is not torch.float32:
        return limit
    initial = simulator.predict_initial(work.ids_BT)[:, work.first :]
    changed = benchmark.relative_difference(initial, logits)
    return limit + benchmark.ROUNDED_UPDATE * changed if math.isfinite(changed) else limit


def _compared(
    name: str,
    reference: str,
    found: Sequence[Tensor] | Tensor,
    expected: Sequence[Tensor] | Tensor,
    tolerance: float | None,
    who: str = "the simulator",
) -> dict[str, Any]:
    dtype = found[0].dtype
    difference = benchmark.relative_difference(found, expected)
    if tolerance is not None and not difference <= tolerance:
        hint = (
            ""
            if dtype == torch.float64
            else "; dtype=float64 tells an error from rounding, which grows with inner_lr"
        )
        hint = "; pass a smaller inner_lr" if math.isnan(difference) else hint
        raise NumericalError(
            f"{who} differs from {reference} by {difference:.1e} of the largest logit "
            f"(limit {tolerance:.0e}, "
            f"{dtype_name(dtype)}){hint}"
        )
    return {
        "name": name,
        "reference": reference,
        "sequences": len(found),
        "difference": difference,
        "tolerance": tolerance,
    }
