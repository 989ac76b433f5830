"""Half-precision rule: differences, norms and softmax of float16 and bfloat16 tensors run in
float32.
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


def narrow_like(y: Tensor, x: Tensor) -> Tensor:
    """y back in the dtype of x, where `wide` changed it."""
    return y.to(x.dtype) if x.dtype in HALF else y
