"""Names that users choose between, where they are more than a field of SimulatorConfig. Nothing
here imports torch.
"""

from __future__ import annotations

from typing import Literal

Backend = Literal["fused", "transformer"]
Share = Literal["none", "layers", "all"]
Number = Literal["float32", "float64", "bfloat16", "float16"]

Islands = Literal["allow", "refuse", "report"]  # of what no pass recognises
Check = Literal["forward", "step", "none"]  # what `compile` compares with the model itself

# of a graph, as `tintc inspect` and the page show it
Stage = Literal["captured", "canonical", "lowered", "optimized", "emitted"]

# Stages of a compile or an experiment that somebody acts on: while files are fetched, the hub's
# client may draw bars of its own.
FETCH, LOAD = "fetch", "load"
