"""Simulators of one program on both back ends, of models whose dimensions divide nothing."""

from functools import lru_cache
from typing import Any

from tests.models import FAMILIES, on_all_backends
from tests.nano import nano
from tintc.compiler.config import SimulatorConfig
from tintc.runtime.simulator import Simulator

Both = dict[str, Simulator]


def odd_model(family: str, **more: Any) -> Any:
    """Dimensions that divide nothing."""
    sizes = {"vocab": 29, "hidden": 10, "heads": 2, "ffn": 13, "layers": 2, **more}
    return nano(**{**sizes, "positions": 16}) if family == "nano" else FAMILIES[family](**sizes)


@lru_cache(maxsize=24)
def both(family: str, preset: str = "paper", shares: tuple[str, ...] = ("none",), **fields: Any) -> Both:
    """`fused`, and the transformer back end once for each way of sharing, by its name."""
    model = odd_model(family, **({"layers": 3} if fields.get("layers") else {}))
    return on_all_backends(model, SimulatorConfig.preset(preset, **{"inner_lr": 0.01, "steps": 2, **fields}), shares)
