"""The operators that an island may hold, by name: an allow-list.

They are core ATen's, and a few more, which read tensors and make tensors: nothing random, nothing
that writes, nothing that reads files or memory. Arithmetic of sizes is Python's.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

_aten = torch.ops.aten

# Of what core ATen is not tagged with; `size` and `numel` are of torch's Python side.
_FURTHER = (
    *("reshape.default", "size", "numel", "detach.default", "unfold_copy.default"),
    *("view_as_complex.default", "view_as_real.default", "complex.default", "polar.default"),
    *("_conj.default", "_conj_physical.default", "real.default", "imag.default", "t.default"),
    *("linalg_vector_norm.default", "lift_fresh_copy.default", "softplus_backward.default"),
    *("gelu_backward.default", "silu_backward.default", "elu_backward.default"),
    *("_softmax_backward_data.default", "_log_softmax_backward_data.default"),
    *("native_layer_norm_backward.default", "convolution_backward.default"),
    *("embedding_dense_backward.default", "threshold_backward.default", "unfold_backward.default"),
    *("tanh_backward.default", "sigmoid_backward.default", "cumprod.default", "sort.default"),
    *("cummax.default", "cummin.default", "logcumsumexp.default", "mish_backward.default"),
    *("diagonal_scatter.default", "diagonal.default", "select_backward.default"),
    *("hardswish_backward.default", "leaky_relu_backward.default", "baddbmm.default"),
    *("_fft_r2c.default", "_fft_c2r.default", "_fft_c2c.default", "angle.default", "sgn.default"),
    *("_cdist_backward.default", "_euclidean_dist.default", "hypot.default", "lgamma.default"),
    *("_prelu_kernel.default", "_prelu_kernel_backward.default", "digamma.default"),
    "polygamma.default",
    *("erfinv.default", "bucketize.Tensor", "searchsorted.Tensor", "kthvalue.default"),
    *("__rshift__.Scalar", "__lshift__.Scalar", "__rshift__.Tensor", "__lshift__.Tensor"),
    *("bitwise_right_shift.Tensor_Scalar", "bitwise_left_shift.Tensor_Scalar"),
    *("bitwise_right_shift.Tensor", "bitwise_left_shift.Tensor", "linalg_inv_ex.default"),
    *("linalg_solve_triangular.default", "linalg_lu_factor_ex.default", "linalg_lu_solve.default"),
    *("_linalg_solve_ex.default", "linalg_cholesky_ex.default", "linalg_matrix_exp.default"),
    *("linalg_householder_product.default", "linalg_qr.default", "clamp_min.Tensor"),
    *("clamp_max.Tensor", "clamp.Tensor"),
)
_NEVER = ("empty.memory_format", "empty_strided.default", "as_strided.default")
_NUMBERS: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "getitem")
    },
    **{
        f"operator.{name}": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
    },
    **{f"torch.{name}": getattr(torch, name) for name in ("sym_max", "sym_min", "sym_float")},
    **{f"torch.{name}": getattr(torch, name) for name in ("sym_int", "sym_not", "sym_ite")},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
    **{f"builtins.{name}": getattr(builtins, name) for name in ("max", "min", "abs")},
}
_NAMES: dict[Any, str] = {function: name for name, function in _NUMBERS.items()}


def name_of(target: Any) -> str:
    if target is _aten.sym_size.int:
        return "size"
    if target is _aten.sym_numel.default:
        return "numel"
    name = _NAMES.get(target)
    if name is None and isinstance(target, OpOverload) and target.namespace == "aten":
        name = str(target).removeprefix("aten.")
    if name is None:
        raise ValueError(str(target))
    function_of_name(name)
    return name


def function_of_name(name: Any) -> Callable[..., Any]:
    """What a name of the allow-list calls. Raises ValueError for any other."""
    if name == "size":
        return _size
    if name == "numel":
        return _numel
    if name == "slice_scatter.default":
        return _put_slice
    if name == "copy.default":
        return _copied
    if name in _NUMBERS:
        return _NUMBERS[name]
    packet, _, overload = str(name).partition(".")
    found = getattr(getattr(_aten, packet, None), overload or "default", None)
    if not isinstance(found, OpOverload) or str(found) != f"aten.{name}":
        raise ValueError(f"aten.{name}")
    tags = found.tags
    known = torch.Tag.core in tags or name in _FURTHER
    random = torch.Tag.nondeterministic_seeded in tags
    if not known or random or name in _NEVER or found._schema.is_mutable:
        raise ValueError(f"aten.{name}")
    return found


def _size(x: Tensor, axis: int) -> int:
    return x.shape[axis]


def _copied(x: Tensor, numbers: Tensor) -> Tensor:
    """torch's copy, which it does not differentiate."""
    return numbers.to(x.dtype).expand(x.shape)


def _put_slice(
    x: Tensor, part: Tensor, axis: int = 0, start: int | None = None, end: int | None = None,
    step: int = 1,
) -> Tensor:  # fmt: skip
    """torch's slice_scatter, whose form without numbers takes no negative end."""
    size = x.shape[axis]
    if step != 1:
        stop = size if end is None else min(end, size)
        found: Tensor = _aten.slice_scatter.default(x, part, axis, start, stop, step)
        return found
    begin = min(max((start or 0) + (size if (start or 0) < 0 else 0), 0), size)
    stop = begin + part.shape[axis]
    pieces = [x.narrow(axis, 0, begin), part, x.narrow(axis, stop, size - stop)]
    return torch.cat([piece for piece in pieces if piece.shape[axis]] or [part], axis)


def _numel(x: Tensor) -> int:
    return x.numel()
