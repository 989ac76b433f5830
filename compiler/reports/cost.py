"""What `tintc cost` prints: parameters, FLOPs and peak memory of a simulator that is never built,
from a model's config.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tintc.compiler.cost import estimate, weights_without_numbers
from tintc.compiler.driver import lower
from tintc.compiler.frontend.capture import Captured, capture
from tintc.compiler.frontend.sources import load_without_weights
from tintc.compiler.reports.breakdown import breakdown
from tintc.compiler.reports.direct import direct_flops
from tintc.compiler.reports.parameters import parameter_report
from tintc.ir.call_sizes import Predict, call_sizes
from tintc.ir.config import SimulatorConfig
from tintc.ir.precision import dtype_name
from tintc.ir.program import Program
from tintc.passes.optimize.onednn_products import onednn_products
from tintc.passes.specializing import OPTIMIZATION_NAMES
from tintc.runtime.backends.transformer.structure import check_backend
from tintc.runtime.simulator import Simulator

STAGES = 5  # calls of `progress`
# oneDNN's products cost what they stand for, and hide whether they go forward or back
COUNTED = tuple(name for name in OPTIMIZATION_NAMES if name != onednn_products.name)


def cost_report(
    source: str,
    config: SimulatorConfig,
    *,
    backend: str = "fused",
    share: str = "none",
    batch: int = 1,
    tokens: int | None = None,
    train_fraction: float = 0.5,
    predict: Predict = "all",
    by_phase: bool = False,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[str], None] = lambda stage: None,
    **options: Any,
) -> dict[str, Any]:
    """Parameters, FLOPs and bytes of one call on `batch` sequences of `tokens`, the first
    `train_fraction` of each trained. predict: positions whose logits are wanted.

    Everything is computed on shapes alone (meta device): `parameters` is what
    `Simulator.parameter_report` would count, FLOPs count matrix products, a multiplication and an
    addition as two. `direct_flops` are those of the loop that one would write with
    torch.autograd over the same tokens, steps and layers (`reports/direct.py`). peak_bytes:
    weights and the most that the tensors of a call hold at once. options: of
    `load_without_weights`.

    Keys: source, config, dtype, blocks, trained_blocks, layout (K, D_sim, H_sim, pages,
    memory_width: coordinates of an input token), batch, tokens, trained_tokens, predict,
    parameters, flops, direct_flops, weight_bytes, peak_bytes. by_phase: also breakdown, FLOPs by
    phase and operator beside a lower bound (`reports/breakdown.py`).

    Raises SourceError, UnsupportedModelError and UsageError.
    """
    check_backend(backend, share)
    progress("read the config")
    loaded = load_without_weights(source, dtype=dtype, **options)
    progress("capture")
    captured = capture(loaded.model)
    progress("lower")
    program = lower(captured, config)
    sizes = call_sizes(program.facts, batch=batch, tokens=tokens, train_fraction=train_fraction)
    progress("count parameters")
    simulator = _without_numbers(program, captured, backend, dtype)
    with torch.device("meta"):
        parameters = parameter_report(simulator, share)
    progress("count FLOPs and bytes")
    cost = estimate(program, backend, dtype, predict=predict, **sizes)
    weight_bytes = (
        parameters["total"] - 1
    ) * dtype.itemsize + torch.float64.itemsize  # the learning rate is float64
    by = {}
    if by_phase:
        by["breakdown"] = breakdown(simulator, sizes, optimize=COUNTED, predict=predict)
    direct = by["breakdown"]["direct_flops"] if by else direct_flops(program, sizes)
    return {
        "source": loaded.description.name,
        "config": program.config.to_dict(),
        "dtype": dtype_name(dtype),
        "blocks": program.facts.blocks,
        "trained_blocks": program.facts.trained_blocks,
        "layout": {
            name: getattr(program.layout, name)
            for name in ("prefix_tokens", "sim_hidden", "sim_heads", "pages", "memory_width")
        },
        "batch": batch,
        "tokens": sizes["tokens"],
        "trained_tokens": sizes["segment"] + 1,
        "predict": predict,
        "parameters": parameters,
        "flops": cost.flops,
        "direct_flops": direct,
        "weight_bytes": weight_bytes,
        "peak_bytes": weight_bytes + cost.peak_bytes,
        **by,
    }


def _without_numbers(
    program: Program, captured: Captured, backend: str, dtype: torch.dtype
) -> Simulator:
    """On the meta device. What shares a copy is counted, not built."""
    one_copy = "all" if backend == "transformer" else "none"
    with torch.device("meta"):
        # what `rms` divides by is no weight of the model
        tensors = {**weights_without_numbers(program, dtype), **captured.tensors}
        return Simulator(program, tensors, backend=backend, share=one_copy)
