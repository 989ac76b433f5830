"""The inputs of every lowered graph, by name: shape and kind. No parameter's placeholder may take one of these names."""

from __future__ import annotations

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
