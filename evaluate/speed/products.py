"""Where the time of a call goes: its products at the rates that they have alone, and its copies.

A call that did nothing but multiply, each product as fast as it is by itself, would take the sum of
FLOPs over rates; over the measured time that is the share that kernels explain. What is left is
copies, elementwise work and Python.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from tintc.runtime.calibrating import Shape, measure

SECONDS = 3.0  # for the products of a program
_COPIES = ("aten::copy_", "aten::cat", "aten::stack", "aten::_to_copy")
_aten: Any = torch.ops.aten
_LEAVES = (
    torch.ops.mkldnn._linear_pointwise,
    _aten.mm,
    _aten.addmm,
    _aten.bmm,
    _aten.baddbmm,
    _aten.baddbmm_,
)
_FORWARD, _BACKWARD = 2, 5  # products of (T, E) matrices in attention: scores and values; and back


class ProductsSeen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """counts: (kernel, rows, inner, columns) -> how often such a product ran under this mode."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[tuple[str, Shape]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket not in _LEAVES:  # in inference mode torch leaves `linear` whole
            with self:
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        out = func(*args, **(kwargs or {}))
        for kernel, shape, count in _products(func, args, out):
            self.counts[kernel, shape] += count
        return out


def _products(func: Any, args: Any, out: Any) -> Iterator[tuple[str, Shape, int]]:
    name = func.overloadpacket
    if name is torch.ops.mkldnn._linear_pointwise:
        yield "onednn", (out.shape[:-1].numel(), args[0].shape[-1], out.shape[-1]), 1
    elif name in (_aten.mm, _aten.addmm):
        a, b = args[-2:] if name is _aten.mm else args[1:3]
        yield "blas", (a.shape[0], a.shape[1], b.shape[1]), 1
    elif name in (_aten.bmm, _aten.baddbmm, _aten.baddbmm_):
        a, b = args[:2] if name is _aten.bmm else args[1:3]
        yield "blas", (a.shape[1], a.shape[2], b.shape[2]), a.shape[0]
    elif "scaled_dot_product" in str(name):
        back = "backward" in str(name)
        query, key = args[1:3] if back else args[:2]
        batch, tokens, width = query.shape[:-2].numel(), query.shape[-2], query.shape[-1]
        products = _BACKWARD if back else _FORWARD
        yield "blas", (tokens, width, key.shape[-2]), batch * products


@torch.inference_mode()
def seen(call: Callable[[], object]) -> Counter[tuple[str, Shape]]:
    """The products of a call."""
    with ProductsSeen() as mode:
        call()
    counts: Counter[tuple[str, Shape]] = mode.counts
    return counts


def product_facts(
    call: Callable[[], object], seconds: float, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """seconds: of the call. product_seconds: the sum over its products of FLOPs over the rate that
    each was measured to have now; share: of the call's seconds. flops: of these products.
    kernels: FLOPs by each. copies: share of the time of its operators that copies take.
    """
    counts = seen(call)
    shapes = sorted({shape for _, shape in counts}, key=lambda s: s[0] * s[1] * s[2])
    speed = measure(device, dtype, shapes, SECONDS) if shapes else None
    total, flops = 0.0, Counter[str]()
    for (kernel, shape), count in counts.items():
        assert speed is not None
        work = count * 2 * shape[0] * shape[1] * shape[2]
        flops[kernel] += work
        total += work / speed.rate(*shape, kernel)
    return {
        "flops": sum(flops.values()),
        "kernels": dict(flops),
        "product_seconds": total,
        "share": total / seconds,
        "copies": copies_share(call, device),
    }


def copies_share(call: Callable[[], object], device: str) -> float:
    """Of the time that torch's operators take in a call."""
    on_gpu = torch.device(device).type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it says on stderr that it starts and stops
    gpu = [ProfilerActivity.CUDA] if on_gpu else []
    with profile(activities=[ProfilerActivity.CPU, *gpu], acc_events=True) as recorded:
        call()
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    times = {event.key: float(getattr(event, name)) for event in recorded.key_averages()}
    total = sum(times.values())
    return sum(times.get(key, 0.0) for key in _COPIES) / total if total else 0.0
