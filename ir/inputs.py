"""The inputs of every lowered graph, by name: shape and kind. No parameter's placeholder may take
one of these names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from tintc.ir.node_meta import DType, Shape
from tintc.ir.outputs import Output

Value = TypeVar("Value")

INPUTS: dict[str, tuple[Shape, DType]] = {
    "input_ids": (("B", "T"), "int"),
    "position_ids": (("B", "T"), "int"),
    "attention_mask": (("B", 1, "T", "T"), "bool"),
    "targets": (("B", "T"), "int"),
    "loss_mask": (("B", "T"), "float"),
    "inner_lr": ((), "float"),
    "segment": ((), "int"),
}

# Of the graphs of some models: how many positions each sequence has. To train is a call of the
# training segment alone, so training passes get its length in place of the whole text's.
LENGTH, TRAINED_LENGTH = "text_length", "trained_length"
OPTIONAL_INPUTS: dict[str, tuple[Shape, DType]] = {LENGTH: (("B", 1), "int")}

# Of optimized graphs only: labels are those of the next token, kept are positions whose logits are
# wanted, scored those that carry loss in any sequence, the others take logits in.
FURTHER_INPUTS: dict[str, tuple[Shape, DType]] = {
    "labels": (("B", "T"), "int"),
    "kept": (("K",), "int"),
    "scored": (("L",), "int"),
    Output.LOGITS.into: (("B", "T", "V"), "float"),
    Output.INITIAL_LOGITS.into: (("B", "T", "V"), "float"),
}

CODE = "position_code"

_TABLE, _WIDE_TABLE = "tintc.table_", "tintc.wide_table_"
_STATISTICS = "tintc.rms."


def table_name(index: int, *, wide: bool = False) -> str:
    """Name, among a simulator's weights, of a table of positions that the passes computed: no part
    of the auxiliary state dict.
    """
    return f"{_WIDE_TABLE if wide else _TABLE}{index}"


def is_table(name: str) -> bool:
    """Whether a weight is such a table."""
    return name.startswith((_TABLE, _WIDE_TABLE))


def is_wide_table(name: str) -> bool:
    """Whether it is a table whose numbers grow with the position, so that it stays in float32 in a
    half-precision simulator.
    """
    return name.startswith(_WIDE_TABLE)


def statistics_name(parameter: str) -> str:
    """Name, among a simulator's weights, of what the optimizer `rms` divides a parameter's gradient
    by.
    """
    return f"{_STATISTICS}{parameter}"


def statistics_of(name: str) -> str | None:
    """The parameter whose gradient a weight of that name divides; None for any other weight."""
    return name.removeprefix(_STATISTICS) if name.startswith(_STATISTICS) else None


def is_models_own(name: str) -> bool:
    """Whether a simulator's weight of that name is the auxiliary model's: no table, and nothing
    that the optimizer `rms` divides by.
    """
    return not is_table(name) and statistics_of(name) is None


def of_training(inputs: Mapping[str, Value]) -> dict[str, Value]:
    """Those of a call of the training segments alone."""
    length = {LENGTH: inputs[TRAINED_LENGTH]} if TRAINED_LENGTH in inputs else {}
    return {**inputs, **length}


def is_reserved(label: str) -> bool:
    """Whether a placeholder of that name would be taken for an input, the position code or a page
    of prefix tokens.
    """
    return (
        label in INPUTS
        or label in OPTIONAL_INPUTS
        or label in FURTHER_INPUTS
        or label == CODE
        or re.fullmatch(r"page_\d+", label) is not None
    )
