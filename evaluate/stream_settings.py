"""What `stream.run` is asked for. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import ClassVar

from tintc.evaluate.language_settings import Learning
from tintc.ir.config import SimulatorConfig
from tintc.ir.described import about
from tintc.ir.errors import UsageError
from tintc.runtime.stream_settings import StreamSettings

_MOMENTS = ("adam", "rms")  # optimizers that take no momentum


@dataclass(frozen=True)
class Settings(Learning):
    """Of the protocol `stream`: score a chunk, train on it, go on.

    Dynamic evaluation follows the config's own rule, in the same windows, on the same weights.
    """

    cut: StreamSettings = field(
        default_factory=StreamSettings, metadata=about("How documents are read.")
    )
    choosing_tokens: int | None = field(
        default=None,
        metadata=about("Stream: tokens of a document that rates are chosen on; default --tokens."),
    )
    rates: tuple[float, ...] = field(
        default=(),
        metadata=about(
            "Stream: inner learning rates to choose from; default any, by hill climbing.",
            metavar="RATE,...",
        ),
    )
    variants: tuple[str, ...] = field(
        default=(),
        metadata=about(
            "Stream: optimizers that the first preset is also measured with, as adam, muon.",
            metavar="NAME,...",
        ),
    )
    controls: bool = field(
        default=True,
        metadata=about("Stream: gradient ascent, and training on shuffled tokens."),
    )
    buckets: int = field(
        default=8, metadata=about("Stream: parts of the curve over the position in the text.")
    )
    _least: ClassVar[int] = 2  # tokens: the second is the first target

    def check(self) -> None:
        """Raises UsageError for what no model can have."""
        super().check()
        self.cut.check(None)
        for name, least in (("choosing_tokens", 2), ("buckets", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} is {value}; expected at least {least}")
        self._check_rates()
        own = self.config(self.presets[0]).optimizer
        if len({own, *self.variants}) <= len(self.variants):
            raise UsageError(
                f"variants are {', '.join(self.variants)}; expected optimizers other than the "
                f"config's own, {own}, none of them twice"
            )
        for variant in self.variants:
            self.variant(variant)

    def _check_rates(self) -> None:
        if any(not (math.isfinite(rate) and rate > 0) for rate in self.rates):
            raise UsageError(f"rates are {self.rates}; expected numbers above 0")
        if len(set(self.rates)) < len(self.rates):
            raise UsageError(f"rates are {self.rates}; expected none of them twice")
        if self.rates and self.inner_lr is not None:
            raise UsageError(
                f"inner_lr is {self.inner_lr:g} and rates are to be chosen from; expected one of "
                "them"
            )

    def variant(self, optimizer: str) -> SimulatorConfig:
        """The first preset's config with another optimizer, and without a momentum where that has
        moments of its own.
        """
        moments = {"momentum": 0.0, "nesterov": False} if optimizer in _MOMENTS else {}
        changes = {**self.changes, "optimizer": optimizer, **moments}
        return dataclasses.replace(self, changes=changes).config(self.presets[0])

    def rules(self, config: SimulatorConfig) -> list[SimulatorConfig]:
        """The config with each decay and momentum to choose from; a variant with moments of its
        own has no momentum.
        """
        own = self.config(self.presets[0]).optimizer
        if config.optimizer != own and config.optimizer in _MOMENTS:
            return super(Settings, dataclasses.replace(self, momentums=())).rules(config)
        return super().rules(config)
