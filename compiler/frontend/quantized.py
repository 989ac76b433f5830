"""Weights that are codes of other numbers, in a checkpoint whose config does not say so.

transformers would take the codes for the numbers: an int8 matrix becomes one of floats between -128
and 127, and float8 weights lose the scales that stand beside them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import safetensors
import torch

from tintc.compiler.frontend.messages import listed
from tintc.ir.errors import SourceError

_INTEGERS = re.compile(r"[IU]\d+")  # types of safetensors: I8, U8, I32, ...
_SCALES = re.compile(
    r"[._](scale|scales|scale_inv|zero_point|zeros|qzeros|g_idx|absmax|quant_map|nested_absmax|SCB)$"
    r"|\.quant_state\."
)


def refuse_integers(files: Sequence[Path], name: str) -> None:
    """Raises SourceError for a weight matrix of whole numbers."""
    found = sorted(key for file in files for key in _integer_matrices(file))
    if found:
        raise SourceError(
            f"{name}: {listed(found)} hold whole numbers: a quantized checkpoint whose config.json "
            "has no quantization_config; expected floating-point weights"
        )


def refuse_scales(unexpected: Iterable[str], name: str) -> None:
    """Raises SourceError for what is left over of a quantized checkpoint."""
    found = sorted(key for key in unexpected if _SCALES.search(key))
    if found:
        raise SourceError(
            f"{name}: the model has no place for {listed(found)}: its weights are quantized, but "
            "its config.json has no quantization_config; expected floating-point weights"
        )


def _integer_matrices(file: Path) -> Iterator[str]:
    for key, is_integer, dimensions in _kinds(file):
        if is_integer and dimensions > 1 and key.endswith("weight"):
            yield key


def _kinds(file: Path) -> Iterator[tuple[str, bool, int]]:
    """(name, whether it holds whole numbers, dimensions) of each tensor; only that is read."""
    if file.suffix == ".safetensors":
        with safetensors.safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (no mapping)
                part = tensors.get_slice(key)
                yield key, bool(_INTEGERS.fullmatch(part.get_dtype())), len(part.get_shape())
        return
    try:
        state = torch.load(file, map_location="meta", weights_only=True)
    except Exception:  # transformers reads it next, and its failure is told there
        return
    for key, value in state.items() if isinstance(state, dict) else ():
        if isinstance(value, torch.Tensor):
            whole = not (value.is_floating_point() or value.is_complex())
            yield str(key), whole and value.dtype != torch.bool, value.ndim
