"""Which of the auxiliary model's weights learn: what `layers` or the patterns of `train` select."""

from __future__ import annotations

from tintc.compiler.report_types import TrainedWeights
from tintc.ir.inputs import is_models_own
from tintc.ir.program import Program
from tintc.ir.selection import Selection


def trained_weights(program: Program, auxiliary: int) -> TrainedWeights:
    """How many weights learn, of so many parameters of the auxiliary model, and which of those that
    were selected no gradient reaches.
    """
    layout = program.layout
    learning = {slot.parameter for slot in layout.prefix.values() if slot.updated}
    numbers = layout.updated_numbers
    return {
        "weights": len(learning),
        "parameters": numbers,
        "share": numbers / auxiliary,
        "unreached": [name for name in selected(program) if name not in learning],
    }


def selected(program: Program) -> list[str]:
    """Names of the parameters that are to learn, whether a gradient reaches them or not."""
    if not program.config.train:
        return list(
            dict.fromkeys(s.parameter for s in program.layout.prefix.values() if s.trainable)
        )
    selection = Selection(program.config, program.aliases)
    named = [
        record.info["parameter"]
        for record in program.stages["canonical"]
        if record.kind == "parameter" and not record.info.get("buffer")
    ]
    return [name for name in named if is_models_own(name) and selection.chosen(name)]
