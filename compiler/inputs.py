"""The inputs of every lowered graph, by name: shape and kind. No parameter's placeholder may take one of these names."""

from __future__ import annotations

import re

from tintc.compiler.node_meta import DType, Shape

INPUTS: dict[str, tuple[Shape, DType]] = {
    "input_ids": (("B", "T"), "int"),
    "position_ids": (("B", "T"), "int"),
    "attention_mask": (("B", 1, "T", "T"), "bool"),
    "targets": (("B", "T"), "int"),
    "loss_mask": (("B", "T"), "float"),
    "inner_lr": ((), "float"),
    "segment": ((), "int"),
}

CODE = "position_code"


def is_reserved(label: str) -> bool:
    """Whether a placeholder of that name would be taken for an input, the position code or a page of prefix tokens."""
    return label in INPUTS or label == CODE or re.fullmatch(r"page_\d+", label) is not None
