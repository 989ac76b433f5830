"""What `ablation.run` is asked for by its user. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from tintc.ir.described import about
from tintc.ir.errors import UsageError

# What the variants of the grid are about: of SimulatorConfig, they set these themselves.
VARIED = (
    "inner_lr",
    "loss_gradient",
    "norm_gradient",
    "norm_update",
    "activation_gradient",
    "attention_gradient",
    "finite_difference_scale",
)


@dataclass(frozen=True)
class Options:
    """Every field says beside itself what it is for."""

    only: tuple[str, ...] = field(
        default=(),
        metadata=about(
            "Variants or patterns, as paper, norm-*; exact always runs, as others are compared "
            "with it. Default the whole grid.",
            metavar="NAME,...",
        ),
    )
    inner_lr: float | None = field(
        default=None, metadata=about("Inner learning rate of everyone; then none is chosen.")
    )
    error_sequences: int = field(
        default=2,
        metadata=about("Sequences whose updates are compared with the exact gradient."),
    )
    batch: int = field(
        default=4, metadata=about("Sequences of one call; results do not depend on it.")
    )


@dataclass(frozen=True)
class Sizes:
    """How much text is read. Every field says beside itself what it is for."""

    tokens: int = field(
        default=256,
        metadata=about("Tokens of a sequence; half of them are trained on."),
    )
    limit: int = field(default=16, metadata=about("Sequences to evaluate."))
    choosing: int = field(
        default=4,
        metadata=about("Sequences that each variant's learning rate is chosen on."),
    )

    def check(self) -> None:
        """Raises UsageError for what no text can have."""
        for name, least in (("tokens", 4), ("limit", 1), ("choosing", 1)):
            value = getattr(self, name)
            if value < least:
                raise UsageError(f"{name} is {value}; expected at least {least}")


@dataclass(frozen=True)
class Asked(Options, Sizes):
    """All that `tintc ablate` is asked for but the simulators and the texts."""

    def options(self) -> Options:
        return Options(self.only, self.inner_lr, self.error_sequences, self.batch)
