"""What `language.run` is asked for, and what it shares with `stream.run`. Nothing here imports
torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tintc.ir.config import SimulatorConfig
from tintc.ir.described import about
from tintc.ir.errors import UsageError


@dataclass(frozen=True)
class Learning:
    """What both protocols are asked for: who learns, by which rule, and how that is chosen. Every
    field says beside itself what it is for.
    """

    tokens: int | None = field(
        default=None,
        metadata=about(
            "Tokens of a sequence, default the model's own length; of a stream's document at "
            "most, default all."
        ),
    )
    limit: int | None = field(
        default=None,
        metadata=about("Sequences of each seed; of a stream, the longest documents; default all."),
    )
    choosing: int = field(
        default=16,
        metadata=about("Sequences, or documents of a stream, that a learning rate is chosen on."),
    )
    inner_lr: float | None = field(
        default=None, metadata=about("Inner learning rate of everyone; then none is chosen.")
    )
    presets: tuple[str, ...] = field(
        default=("paper",),
        metadata=about("Of the simulators: paper, exact.", flag="preset", metavar="NAME,..."),
    )
    steps: int = field(default=1, metadata=about("Inner gradient steps."))
    layers: int | None = field(
        default=None, metadata=about("Trained blocks, counted from the top; default all.")
    )
    batch: int = field(
        default=1,
        metadata=about(
            "Sequences of one call; results do not depend on it, but for a stream that never "
            "resets."
        ),
    )
    momentums: tuple[float, ...] = field(
        default=(),
        metadata=about(
            "Momenta to choose from, as the rate is chosen, for every learner.", metavar="MU,..."
        ),
    )
    decays: tuple[float, ...] = field(
        default=(), metadata=about("Decays to choose from, likewise.", metavar="F,...")
    )
    changes: Mapping[str, Any] = field(
        default_factory=dict,
        metadata=about("Other fields of SimulatorConfig, over each preset."),
    )

    def check(self) -> None:
        """Raises UsageError for what no model can have."""
        self._check_lists("presets")
        for name, least in (("tokens", self._least), ("limit", 1), ("choosing", 1), ("batch", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} is {value}; expected at least {least}")
        self._check_choices()
        for preset in self.presets:
            self.rules(self.config(preset))

    _least: ClassVar[int] = 4  # tokens: two to train on, two to predict

    def _check_lists(self, *names: str) -> None:
        for name in names:
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UsageError(
                    f"{name} is {values}; expected at least one value, none of them twice"
                )

    def _check_choices(self) -> None:
        for name, chosen in (("momentums", "momentum"), ("decays", "decay")):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise UsageError(f"{name} are {values}; expected none of them twice")
            if values and self.inner_lr is not None:
                raise UsageError(
                    f"inner_lr is {self.inner_lr:g} and {name} are to be chosen from; expected "
                    "inner_lr=none, as the rate is chosen with them"
                )
            if values and chosen in self.changes:
                raise UsageError(f"{chosen} and {name} are both given; expected one of them")

    @property
    def candidates(self) -> int:
        """Rules that are chosen from, each with a rate of its own."""
        return max(1, len(self.momentums)) * max(1, len(self.decays))

    def rules(self, config: SimulatorConfig) -> list[SimulatorConfig]:
        """The config with each momentum and decay to choose from."""
        return [
            dataclasses.replace(config, momentum=momentum, decay=decay)
            for momentum in self.momentums or (config.momentum,)
            for decay in self.decays or (config.decay,)
        ]

    def config(self, preset: str) -> SimulatorConfig:
        rate = {} if self.inner_lr is None else {"inner_lr": self.inner_lr}
        budget = {"steps": self.steps, "layers": self.layers}
        return SimulatorConfig.preset(preset, **self.changes, **budget, **rate)


@dataclass(frozen=True)
class Settings(Learning):
    """Of the protocol `split`.

    Dynamic evaluation has the steps and the layers of the simulators, and trains the same
    parameters of norms.
    """

    fractions: tuple[float, ...] = field(
        default=(0.3, 0.5, 0.7, 0.9),
        metadata=about("Parts of a sequence to train on.", flag="train-fraction", metavar="F,..."),
    )
    seeds: tuple[int, ...] = field(
        default=(1, 2, 3), metadata=about("Each draws its own sequences.", metavar="N,...")
    )

    def check(self) -> None:
        """Raises UsageError for what no model can have."""
        self._check_lists("fractions", "seeds")
        for fraction in self.fractions:
            if not 0 < fraction < 1:
                raise UsageError(
                    f"a fraction to train on is {fraction}; expected a number between 0 and 1"
                )
        super().check()
