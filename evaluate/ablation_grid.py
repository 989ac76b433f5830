"""The simulators that an ablation compares."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tintc.evaluate.ablation_settings import VARIED
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import UsageError
from tintc.ir.precision import dtype_name

SCALES = (10, 100, 1000, 10_000, 100_000)  # N of finite differences; the paper's is 1000
EXACT = "exact"
_FORMATS = (torch.bfloat16, torch.float16)
_PAPER: dict[str, Any] = {
    "norm_gradient": "first_order",
    "activation_gradient": "first_order",
    "attention_gradient": "value",
    "norm_update": "bias",
}


@dataclass(frozen=True)
class Variant:
    """A simulator of the grid: its config, at the default inner learning rate, and the type of its
    weights.
    """

    name: str
    config: SimulatorConfig
    dtype: torch.dtype

    @property
    def type_name(self) -> str:
        return dtype_name(self.dtype)


def grid(base: SimulatorConfig, dtype: torch.dtype = torch.float32) -> list[Variant]:
    """Every variant: each approximation alone, the paper's all together, the paper's with one of
    them otherwise, and other float formats.

    base: of it, all that no variant is about, as `steps` and `layers`.
    """
    plain = SimulatorConfig.exact()
    exact = dataclasses.replace(base, **{name: getattr(plain, name) for name in VARIED})

    def variant(name: str, dtype: torch.dtype = dtype, **changes: Any) -> Variant:
        return Variant(name, dataclasses.replace(exact, **changes), dtype)

    def at(name: str, gradient: str, scale: int) -> Variant:
        changes: dict[str, Any] = {gradient: "first_order", "finite_difference_scale": scale}
        return variant(f"{name}-n{scale}", **changes)

    alone = [
        variant("attention-value", attention_gradient="value"),
        *(at("norm", "norm_gradient", scale) for scale in SCALES),
        *(at("activation", "activation_gradient", scale) for scale in SCALES),
        variant("loss-mean-embedding", loss_gradient="mean_embedding"),
        variant("loss-quadratic", loss_gradient="quadratic"),
        # `train` says itself which parameters of norms learn
        *([] if base.train else [variant("norm-update-bias", norm_update="bias")]),
    ]
    together = [
        variant("paper", **_PAPER),
        variant("paper-attention-full", **{**_PAPER, "attention_gradient": "full"}),
        *(
            variant(f"paper-n{scale}", **_PAPER, finite_difference_scale=scale)
            for scale in (10, 100, 10_000)
        ),
    ]
    formats = [other for other in _FORMATS if other != dtype]
    rounded = [
        variant(f"{name}-{dtype_name(to)}", to, **changes)
        for name, changes in ((EXACT, {}), ("paper", _PAPER))
        for to in formats
    ]
    return [variant(EXACT), *alone, *together, *rounded]


def select(variants: Sequence[Variant], only: Sequence[str]) -> list[Variant]:
    """The variants of these names or patterns (`norm-*`), and always `exact`; all for no names.

    Raises UsageError for a name or a pattern that fits none.
    """
    names = [variant.name for variant in variants]
    for pattern in only:
        if not fnmatch.filter(names, pattern):
            raise UsageError(
                f"no variant is called {pattern!r}; expected some of {', '.join(names)}, or a "
                "pattern such as 'norm-*'"
            )
    wanted = {EXACT, *(name for pattern in only for name in fnmatch.filter(names, pattern))}
    return [variant for variant in variants if not only or variant.name in wanted]
