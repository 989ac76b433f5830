"""Descents that write over the own weights that they get, for the fused back end.

The same sums as the operators that they stand for, to the bit, without a second copy of every
sequence's weight. Only of weights that nothing else reads afterwards and no caller holds
(`runtime/specialize/written_over.py`), in calls that nobody differentiates.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from tintc.ir.dialect import AnyOperator
from tintc.ir.ops.linear import linear_descent
from tintc.ir.ops.onednn import onednn_descent, rows_of_descent
from tintc.ir.ops.rates import along
from tintc.ir.ops.states import descend
from tintc.ir.ops.wide import wide_linear
from tintc.ir.precision import HALF


def _linear_descent(weight: Tensor, dy_BTO: Tensor, x_BTI: Tensor, rate: Tensor) -> Tensor:
    """W - rate sum_t dy_t x_t^T."""
    if x_BTI.dtype in HALF:
        gradient_BOI: Tensor = wide_linear.target(dy_BTO.mT, x_BTI, None, True)
        return weight.sub_(gradient_BOI * along(rate, x_BTI, 2))
    return weight.baddbmm_((dy_BTO * -along(rate, dy_BTO, 2)).mT, x_BTI)


def _onednn_descent(weight: Tensor, dy_BTO: Tensor, x_BTI: Tensor, rate: Tensor) -> Tensor:
    """The same by oneDNN, one sequence's weight after the other."""
    for own, new in zip(weight, rows_of_descent(weight, dy_BTO, x_BTI, rate), strict=True):
        own.copy_(new)
    return weight


def _descend(value: Tensor, direction: Tensor, rate: Tensor) -> Tensor:
    """W - rate v."""
    return value.sub_(along(rate, direction, direction.ndim - 1) * direction)


IN_PLACE: Mapping[AnyOperator, Callable[..., Any]] = MappingProxyType(
    {linear_descent: _linear_descent, onednn_descent: _onednn_descent, descend: _descend}
)
