"""Half-precision rule: differences, norms and softmax of float16 and bfloat16 tensors run in
float32, and what is learned stays in it.

A step changes a weight by less than half precision tells from it. So the own value of a slot, what
a descent makes, is in float32, and so are rates and states; a product of such a value sums in
float32 and is rounded once (`ops/wide.py`).
"""

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def wide(x: Tensor) -> Tensor:
    """x in float32 if it is float16 or bfloat16, else x itself."""
    return x.float() if x.dtype in HALF else x


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that `wide` gives."""
    return torch.promote_types(dtype, torch.float32)


def computed_dtype(stored: torch.dtype, device: str) -> torch.dtype:
    """The type that products and activations of such weights have. A CPU computes in float32 at
    least: its kernels for float16 take four times as long, and what is rounded in every layer
    would hide what a step changes.
    """
    return wide_dtype(stored) if device == "cpu" else stored


def narrow_like(y: Tensor, x: Tensor) -> Tensor:
    """y back in the dtype of x, where `wide` changed it."""
    return y.to(x.dtype) if x.dtype in HALF else y
