"""Gives a model the kernels that a simulator uses for its products, so that a benchmark compares
what is computed and not who multiplies.

    y = W x + b;  dx = W^T dy;  dW = sum_t dy_t x_t^T;  db = sum_t dy_t

Legend: R rows (tokens of all sequences), I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tintc.ir.ops.onednn import available, onednn_product
from tintc.passes.optimize.onednn_products import onednn_products
from tintc.runtime.simulator import Simulator

# rows, inner size and columns of a product -> whether oneDNN computes it
Chosen = Callable[[int, int, int], bool]
_TRIED = 2  # rows on which a module is compared with a linear layer
_PLAIN = ("mm", "addmm")  # what a linear layer runs on, if nobody replaced it


def use_kernels(model: nn.Module, chosen: Chosen) -> int:
    """Has every linear layer of the model, in whatever class, multiply by the chosen kernels,
    forward and back. The number of those layers; 0 where torch has no oneDNN, or the weights are
    not float32 on a CPU.

    A module is a linear layer if it has a matrix `weight`, at most a `bias` beside it, and computes
    what such a layer does: that is tried, not told by its name.
    """
    if not available():
        return 0
    found = list(_linear_layers(model))
    for module, stored in found:
        kind: type[nn.Module] = type(module)
        module.__class__ = type(f"Same{kind.__name__}", (kind,), {"forward": _forward})
        module.__dict__.update(_stored=stored, _chosen=chosen)
    return len(found)


def simulator_kernels(simulator: Simulator) -> Chosen | None:
    """Those of a simulator's products; None where they are torch.matmul's."""
    takes = onednn_products.name in simulator.optimizations and available()
    if not takes or simulator.dtype != torch.float32 or simulator.device.type != "cpu":
        return None
    speed = simulator.calibration
    return lambda rows, inner, columns: speed.kernel(rows, inner, columns) == "onednn"


def _forward(self: Any, x: Tensor) -> Tensor:
    weight_OI = self.weight.mT if self._stored else self.weight
    of = (x.flatten(0, -2), weight_OI, getattr(self, "bias", None), self._chosen)
    y_RO: Tensor = _Product.apply(*of)  # type: ignore[no-untyped-call]
    return y_RO.view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """Differentiable once, as the kernels are not."""

    @staticmethod
    def forward(
        ctx: Any, x_RI: Tensor, weight_OI: Tensor, bias: Tensor | None, chosen: Chosen
    ) -> Tensor:
        ctx.save_for_backward(x_RI, weight_OI)
        ctx.chosen = chosen
        rows, inner = x_RI.shape
        if chosen(rows, inner, len(weight_OI)):
            return onednn_product(x_RI, weight_OI, bias, None, False)
        return F.linear(x_RI, weight_OI, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x_RI, weight_OI), (dy_RO,) = ctx.saved_tensors, gradients
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        return (
            _times(dy_RO, weight_OI, ctx.chosen) if for_x else None,
            _times(dy_RO.mT, x_RI, ctx.chosen) if for_weight else None,
            dy_RO.sum(0) if for_bias else None,
            None,
        )


def _times(a: Tensor, b: Tensor, chosen: Chosen) -> Tensor:
    if chosen(a.shape[0], a.shape[1], b.shape[1]):
        return onednn_product(a, b, None, None, True)
    return a @ b


def _linear_layers(model: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """Each with whether its weight is stored as (I, O)."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        names = {name for name, _ in module.named_parameters()}
        if (
            isinstance(weight, Tensor)
            and weight.ndim == 2
            and names <= {"weight", "bias"}
            and weight.dtype == torch.float32
            and weight.device.type == "cpu"
        ):
            for stored in (False, True):
                if _is_linear(module, weight.mT if stored else weight):
                    yield module, stored
                    break


@torch.no_grad()
def _is_linear(module: nn.Module, weight_OI: Tensor) -> bool:
    x = torch.randn(1, _TRIED, weight_OI.shape[1], generator=torch.Generator().manual_seed(0))
    try:
        expected = F.linear(x, weight_OI, getattr(module, "bias", None))
        found = module(x)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False  # an embedding, or sides that do not fit
    return (
        isinstance(found, Tensor)
        and found.shape == expected.shape
        and torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    )


def counted_products(call: Callable[[], object]) -> dict[str, int]:
    """FLOPs of a call, a multiplication and an addition as two. all: as torch's FlopCounterMode
    counts them. replaced: by oneDNN, which torch alone does not count. linear: of plain linear
    layers.
    """
    mkldnn = torch.ops.mkldnn._linear_pointwise
    with FlopCounterMode(display=False, custom_mapping={mkldnn: _onednn_flops}) as counter:
        call()
    found = counter.get_flop_counts()["Global"]
    plain = [getattr(torch.ops.aten, name) for name in _PLAIN]
    return {
        "all": counter.get_total_flops(),
        "replaced": found.get(mkldnn, 0),
        "linear": sum(found.get(operator, 0) for operator in plain),
    }


def _onednn_flops(x: Any, *others: Any, out_shape: Any = None, **_: Any) -> int:
    """x and the result say it all: R I O."""
    rows = torch.Size(out_shape).numel()
    return 2 * rows * int(x[-1])
