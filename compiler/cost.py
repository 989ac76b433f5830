"""FLOPs and peak memory of a program, from shapes alone: the emitted module is run on tensors
without numbers.

FLOPs count a multiplication and an addition as two and matrix products only (linear layers,
attention, the head): norms, activations and softmax are below 1 % of them, the transformer's split
maps 1 to 3 %. Peak memory is what the tensors of one call hold at its worst moment; weights, what a
kernel allocates inside and the Python process come on top. Only what the logits need counts.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    bmm_flop,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from tintc.ir.call_sizes import Predict
from tintc.ir.inputs import INPUTS, OPTIONAL_INPUTS
from tintc.ir.node_meta import info
from tintc.ir.ops.island import island_backward, island_forward
from tintc.ir.outputs import SLOTS, Output
from tintc.ir.program import Program
from tintc.passes.optimize.onednn_products import onednn_products
from tintc.runtime import slices
from tintc.runtime.apart import last_of
from tintc.runtime.backends.transformer.modules.parts import Place, Range
from tintc.runtime.call import Call
from tintc.runtime.simulator import Simulator
from tintc.runtime.specialize.optimize import check_names
from tintc.runtime.steps import Results, frozen_of


@dataclass(frozen=True)
class Cost:
    """flops: of one call. peak_bytes: the most that the call's own tensors hold at once; weights
    come on top. island_flops: those of the FLOPs that islands take.
    """

    flops: int
    peak_bytes: int
    island_flops: int = 0


def estimate(
    program: Program,
    backend: str,
    dtype: torch.dtype,
    *,
    optimize: bool | Collection[str] = True,
    batch: int,
    tokens: int,
    segment: int,
    predict: Predict = "all",
) -> Cost:
    """Cost of one call on a CPU without padding that returns the logits (not the initial ones),
    under torch.no_grad. segment: tokens that training passes see. predict: positions whose logits
    are wanted, those of the rest or all; the transformer has a head for all. optimize: with the
    optimizations of the fused back end, all or those named, but for the choice of kernels: oneDNN's
    cost the same. A batch that runs in slices (`runtime/slices.py`) costs the FLOPs of all of them
    and the memory of one, beside the whole inputs and logits. Raises UsageError for an unknown
    name.
    """
    names = [name for name in check_names(optimize) if name != onednn_products.name]
    with without_numbers(backend) as device, torch.no_grad():
        weights = weights_without_numbers(program, dtype)
        # Which modules share a copy changes no cost of a call, and one copy is the least to make.
        simulator = Simulator(
            program,
            weights,
            backend=backend,
            share="none" if backend == "fused" else "all",
            optimize=names,
            calibration="off",
        )
        size = (
            slices.slice_size(batch, slices.Work(tokens), simulator.calibration)
            if slices.NAME in simulator.optimizations
            else batch
        )
        full, rest = divmod(batch, size)
        calls = {
            n: _call(
                simulator,
                inputs_without_numbers(program, n, tokens, dtype, device),
                segment,
                predict,
            )
            for n in {size, rest} - {0}
        }
        inputs = sum(
            value.untyped_storage().nbytes()
            for value in inputs_without_numbers(program, batch, tokens, dtype, device).values()
        )
    one = calls[size]
    flops = full * one.flops + (calls[rest].flops if rest else 0)
    of_islands = full * one.island_flops + (calls[rest].island_flops if rest else 0)
    if size == batch:
        return Cost(flops, inputs + one.peak_bytes, of_islands)
    whole = one.result_bytes // size * batch  # made when the first slice has its logits
    later = one.peak_bytes if full > 1 else calls[rest].peak_bytes
    peak = inputs + max(one.peak_bytes, whole + max(one.result_bytes, later))
    return Cost(flops, peak, of_islands)


@dataclass(frozen=True)
class _Call:
    """result_bytes: of the logits, which are part of the peak."""

    flops: int
    peak_bytes: int
    result_bytes: int
    island_flops: int


def weights_without_numbers(program: Program, dtype: torch.dtype) -> dict[str, Tensor]:
    """An empty tensor for every weight that the program reads."""
    shapes = {
        record.parameter: record.shape
        for node in program.graph.nodes
        if (record := info(node)).parameter is not None
    }
    return {
        name: torch.empty([int(size) for size in shape], dtype=dtype)
        for name, shape in shapes.items()
    }


def inputs_without_numbers(
    program: Program, batch: int, tokens: int, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """An empty tensor for every input of a call on sequences without padding."""
    sizes = {"B": batch, "T": tokens}
    known = INPUTS | (OPTIONAL_INPUTS if program.facts.by_length else {})
    dtypes = {"int": torch.int64, "bool": torch.bool, "float": dtype}
    inputs = {
        name: torch.empty(
            [size if isinstance(size, int) else sizes[size] for size in shape],
            dtype=dtypes[kind],
            device=device,
        )
        for name, (shape, kind) in known.items()
        if shape
    }
    inputs["attention_mask"] = inputs["attention_mask"][
        :1
    ].clone()  # sequences without padding share the causal mask
    return inputs


def plain_call(inputs: dict[str, Tensor], segment: int, predict: Predict) -> Call:
    """A call for logits of sequences without padding, all trained alike."""
    ids = inputs["input_ids"]
    kept = torch.arange(segment, ids.shape[1], device=ids.device) if predict == "rest" else None
    return Call((Output.LOGITS,), inputs, segment, causal=True, kept=kept)


def _call(simulator: Simulator, inputs: dict[str, Tensor], segment: int, predict: Predict) -> _Call:
    call = plain_call(inputs, segment, predict)
    meter = Meter()
    if simulator.program.apart:
        training = simulator.training_of(call)
        run = _looped if simulator.config.looped else _run
        last = last_of(call, training, run(simulator, training, meter), simulator.program.facts)
        assert last is not None
        call = last
    logits = _run(simulator, call, meter)[Output.LOGITS].untyped_storage().nbytes()
    return _Call(meter.flops, meter.peak, logits, meter.island_flops)


def _looped(simulator: Simulator, training: Call, meter: Meter) -> Results:
    """What all steps give, as `runtime/steps.py` loops over them. All but the first cost alike: one
    of them runs, and counts as many times.
    """
    shared = (Output.FROZEN,) if simulator.shares_frozen else ()
    found = _run(simulator, replace(training, outputs=(*SLOTS, *shared)), meter)
    given, states = found[Output.UPDATES], found[Output.STATES]
    before, of_islands = meter.flops, meter.island_flops
    step = replace(training, given=given, states=states, frozen=frozen_of(found))
    found = {**found, **_run(simulator, replace(step, donated=True), meter)}
    meter.flops += (simulator.config.steps - 2) * (meter.flops - before)
    meter.island_flops += (simulator.config.steps - 2) * (meter.island_flops - of_islands)
    return found


def _run(simulator: Simulator, call: Call, meter: Meter) -> dict[str, Any]:
    module, arguments = simulator.bound(call)
    meter.leave_out((arguments, list(module.parameters())))
    with meter:
        found: dict[str, Any] = Walk(module, meter).run(*arguments)
    return found


@contextlib.contextmanager
def without_numbers(backend: str) -> Iterator[str]:
    """Fused programs run on fake CPU tensors, which choose the kernels of a CPU; the transformer
    writes out its attention and runs on the meta device, which is faster."""
    if backend == "fused":
        with FakeTensorMode():
            yield "cpu"
    else:
        with torch.device("meta"):
            yield "meta"


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Of all operators under this mode: FLOPs, bytes that they read and write, and bytes of the
    storages that they make, as long as they live.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.island_flops = self.moved = self.live = self.peak = 0
        self._known: set[int] = set()

    def leave_out(self, values: Any) -> None:
        """These do not count; those that do already go on counting."""
        self._known |= {
            value.untyped_storage()._cdata
            for value in tree_leaves(values)
            if isinstance(value, Tensor)
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = _product(func, args) if _is_onednn(func) else func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self._known:
                gc.collect(0)  # torch leaves cycles behind fake tensors, which hold what is over
                self._count(value.untyped_storage())
        self.peak = max(self.peak, self.live)
        self.flops += _flops(func, args, kwargs or {}, out)
        self.moved += _moved(func, (args, kwargs), out)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.live -= size
        self._known.discard(key)


_aten = torch.ops.aten


def _over_flops(weight: Any, left: Any, right: Any, **_: Any) -> int:
    return int(bmm_flop(left, right))


# Products that write over a weight (`ir/ops/in_place.py`), for FlopCounterMode: torch counts none
# that is in place.
WRITTEN_OVER: dict[Any, Any] = {_aten.baddbmm_: _over_flops}
# torch counts those of other devices only, and before 2.12 none with fewer heads of keys
_ATTENTION = (
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
)


def _is_onednn(func: Any) -> bool:
    """Whether it is oneDNN's product, of which torch knows neither shape nor FLOPs."""
    return func.overloadpacket is getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _product(func: Any, args: Any) -> Tensor:
    """The result of it, without numbers; W stands behind x, or behind the addend."""
    x, matrix = args[0], args[2 if func._overloadname == "binary" else 1]
    found: Tensor = x.new_empty(*x.shape[:-1], matrix.shape[0])
    return found


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    if func in _ATTENTION:
        query, key, value = (x.shape for x in args[:3])
        repeated = ((*x[:1], *query[1:-2], *x[-2:]) for x in (key, value))
        return int(sdpa_flop_count(query, *repeated))  # type: ignore[no-untyped-call]
    if func is _aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return int(sdpa_backward_flop_count(*(x.shape for x in args[:4])))  # type: ignore[no-untyped-call]
    if _is_onednn(func):
        return int(2 * out.numel() * args[0].shape[-1])
    packet = func.overloadpacket
    count = flop_registry.get(_aten.baddbmm if packet in WRITTEN_OVER else packet)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))


# These read as many numbers of a table as they write.
_LOOK_UPS = (torch.ops.aten.embedding, torch.ops.aten.index_select, torch.ops.aten.gather)


def _moved(func: Any, given: Any, out: Any) -> int:
    """Bytes that an operator reads and writes; a view moves none."""
    if func.is_view:
        return 0
    read, written = (sum(map(_held, tree_leaves(values))) for values in (given, out))
    return 2 * written if func.overloadpacket in _LOOK_UPS else read + written


def _held(value: object) -> int:
    """Bytes of a tensor's numbers; those that are repeated count once."""
    if not isinstance(value, Tensor):
        return 0
    return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())


_OF_ISLANDS = (island_forward.implementation, island_backward.implementation)


class Walk(fx.Interpreter):
    """Runs an emitted module node by node, and each of its layers once for each shape: layers alike
    cost alike.
    """

    def __init__(self, module: fx.GraphModule, meter: Meter) -> None:
        super().__init__(module)
        self.meter = meter
        # layer and shapes -> FLOPs, bytes moved, bytes above those that lived before, shape of the
        # result unless it is the first argument
        self._costs: dict[Any, tuple[int, int, int, torch.Size | None]] = {}

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        before = self.meter.flops
        found = super().call_function(target, args, kwargs)
        if target in _OF_ISLANDS:
            self.meter.island_flops += self.meter.flops - before
        return found

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        meter, key = self.meter, (target, _kind(args))
        if key in self._costs:
            flops, moved, inside, shape = self._costs[key]
            meter.flops += flops
            meter.moved += moved
            meter.peak = max(meter.peak, meter.live + inside)
            return (
                args[0]
                if shape is None
                else torch.empty(shape, dtype=args[0].dtype, device=args[0].device)
            )
        flops, moved, peak, live = meter.flops, meter.moved, meter.peak, meter.live
        meter.peak = live
        result = super().call_module(target, args, kwargs)
        self._costs[key] = (
            meter.flops - flops,
            meter.moved - moved,
            meter.peak - live,
            None if result is args[0] else result.shape,
        )
        meter.peak = max(meter.peak, peak)
        return result


def _kind(value: Any) -> Any:
    """What the cost of a layer depends on: the sizes of its arguments, not where in the stream or
    page they lie.
    """
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, Range):
        return value.stop - value.start, value.tokens
    if isinstance(value, Place):
        return value.last - value.first, value.stop - value.start
    return tuple(map(_kind, value)) if isinstance(value, (tuple, list)) else None
