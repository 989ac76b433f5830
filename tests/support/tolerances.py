"""Every tolerance that tests use, in one place.

All are relative to the largest number compared, or to 1 if that is smaller.
"""

import torch
from torch import Tensor

# Whole simulators against autograd, after some steps.
SIMULATOR = {torch.float64: 1e-9, torch.float32: 2e-4}
# The same against Hugging Face code that casts to float32 on its way (compiler/casts.py takes
# the casts out).
CASTS = 1e-6
# Logits of a model whose ALiBi is rounded to bfloat16 against those of one whose ALiBi is not.
ROUNDED_ALIBI_LOGITS = 5e-3
# The paper's own code in float64; 1e-12 was seen.
GOLDEN = 1e-9
# One primitive against autograd.
PRIMITIVE = {torch.float64: 1e-11, torch.float32: 2e-5}
# One module of the transformer back end against the primitive that it stands for, in float64.
MODULE = 1e-9
# Whole simulators on the transformer back end against the fused one.
BACKENDS = {torch.float64: 1e-9, torch.float32: 2e-4}
# Whole simulators with optimizations against the same without them. In float64 the paper's finite
# differences of activations, which are subtracted as they stand, turn 1e-16 into 1e-13 a layer.
OPTIMIZED = {torch.float64: 1e-10, torch.float32: 2e-4}
# A naive finite difference in float64 loses about N * 1e-16 of the function's value to
# cancellation.
NAIVE_DIFFERENCE = 1e-10
# The float32 forms of the differences against the naive difference in float64.
DIFFERENCE_FLOAT32 = 1e-5
# Half precision against float32: a few roundings of the result.
HALF = {torch.float16: 5e-3, torch.bfloat16: 4e-2}
# Logits of a whole half-precision simulator against float64.
HALF_LOGITS = {torch.float16: 3e-2, torch.bfloat16: 2e-1}
# Logits of an exported model in onnxruntime against torch: absolute; float16 against the same
# weights in float32. In float64 onnxruntime keeps scales of products as float32.
ONNX = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-2}
# Logits of a model beside a LoRA adapter of full rank against the model with the adapted weights.
ADAPTER = {torch.float64: 1e-9, torch.float32: 1e-5}
# Each weight's float32 update against its float64 update.
UPDATE_COSINE = 0.9999
# A whole simulator's update in half precision, and what it does to the logits, against those in
# float64.
UPDATE_COSINE_HALF = 0.99


# Largest figure of each kind that this process saw. `pytest` prints those of all its workers at its
# end.
MEASURED: dict[str, float] = {}


def measured(kind: str, value: float) -> float:
    """Notes a figure for the summary and returns it."""
    MEASURED[kind] = max(value, MEASURED.get(kind, 0.0))
    return value


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected number or to 1; infinite where a NaN is
    found or a shape differs.
    """
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.detach(), expected.detach()
    if found.numel() == 0:
        return 0.0
    difference = float((found.double() - expected.double()).abs().max())
    return (
        difference / max(1.0, float(expected.double().abs().max()))
        if difference == difference
        else float("inf")
    )


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two tensors seen as vectors, in float64."""
    a, b = a.detach().double().flatten(), b.detach().double().flatten()
    return float(a @ b / (a.norm() * b.norm()))
