"""SimulatorConfig: every choice that changes what a simulator computes or how it is laid out."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from tintc.ir.described import about
from tintc.ir.errors import UsageError

LossGradient = Literal["softmax", "mean_embedding", "quadratic"]
NormGradient = Literal["first_order", "exact"]
NormUpdate = Literal["bias", "all"]
ActivationGradient = Literal["first_order", "exact"]
AttentionGradient = Literal["value", "full"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "loss_gradient": get_args(LossGradient),
    "norm_gradient": get_args(NormGradient),
    "norm_update": get_args(NormUpdate),
    "activation_gradient": get_args(ActivationGradient),
    "attention_gradient": get_args(AttentionGradient),
}
Preset = Literal["paper", "exact"]
PRESETS = get_args(Preset)


@dataclass(frozen=True, kw_only=True)
class SimulatorConfig:
    """What one simulator computes and how large its parts are. Names and formulas: TINT.md,
    section 2. Every field says beside itself what it is for.

    Raises UsageError for a value out of range.
    """

    steps: int = field(
        default=1,
        metadata=about("Inner gradient steps, at least 1. The initial logits are those of none."),
    )
    layers: int | None = field(
        default=None, metadata=about("Trained blocks, counted from the top; default all.")
    )
    inner_lr: float = field(
        default=1e-4,
        metadata=about(
            "Learning rate of one inner step. Gradients are sums over training positions, so it "
            "does not depend on how many there are. A negative one ascends."
        ),
    )
    loss_gradient: LossGradient = field(
        default="softmax",
        metadata=about(
            "At the logits z of softmax p: softmax is p - 1_y, mean_embedding 1/V - 1_y, "
            "quadratic z - 1_y."
        ),
    )
    norm_gradient: NormGradient = field(
        default="first_order",
        metadata=about("Through norms: first_order is N (f(x + g/N) - f(x))."),
    )
    norm_update: NormUpdate = field(
        default="bias",
        metadata=about("What norms learn: bias leaves their scale alone, all trains it too."),
    )
    activation_gradient: ActivationGradient = field(
        default="first_order",
        metadata=about("Through activations: first_order is N (a(x + g/N) - a(x))."),
    )
    attention_gradient: AttentionGradient = field(
        default="value",
        metadata=about(
            "Through attention: value holds the probabilities constant, full goes through the "
            "scores too."
        ),
    )
    finite_difference_scale: float = field(
        default=1000.0, metadata=about("N of the first-order differences, above 0.")
    )
    prefix_tokens: int | None = field(
        default=None,
        metadata=about("K of the prefix layout: prefix tokens of a page; default solved for."),
    )
    sim_hidden: int | None = field(
        default=None,
        metadata=about("D_sim of the prefix layout: width of a token; default solved for."),
    )
    sim_heads: int | None = field(
        default=None,
        metadata=about("H_sim of the prefix layout: attention heads; default solved for."),
    )

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UsageError(
                    f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}"
                )
        _check_count("steps", self.steps, "initial_logits are those of zero steps")
        for name in ("layers", "prefix_tokens", "sim_hidden", "sim_heads"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), "None leaves the choice to tintc")
        for name in ("inner_lr", "finite_difference_scale"):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not math.isfinite(value)
            ):
                raise UsageError(f"{name} is {value!r}; expected a finite number")
            object.__setattr__(self, name, float(value))
        if self.finite_difference_scale <= 0:
            raise UsageError(
                f"finite_difference_scale is {self.finite_difference_scale}; expected a number "
                "above 0 (the paper uses 1000)"
            )

    @classmethod
    def paper(cls, **overrides: Any) -> SimulatorConfig:
        """The approximations of the paper: first-order norms and activations, value-only attention,
        biases of norms only.
        """
        return cls.from_dict(overrides)

    @classmethod
    def exact(cls, **overrides: Any) -> SimulatorConfig:
        """No approximation: ordinary dynamic evaluation, equal to torch.autograd and SGD."""
        exact = {
            "norm_gradient": "exact",
            "norm_update": "all",
            "activation_gradient": "exact",
            "attention_gradient": "full",
        }
        return cls.from_dict({**exact, **overrides})

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> SimulatorConfig:
        """The preset called `name`, with any field overridden. Raises UsageError for an unknown
        name.
        """
        if name not in PRESETS:
            raise UsageError(f"preset is {name!r}; expected one of {', '.join(PRESETS)}")
        return cls.exact(**overrides) if name == "exact" else cls.paper(**overrides)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SimulatorConfig:
        """Builds a config from its fields. Raises UsageError for an unknown field or a bad
        value.
        """
        known = [each.name for each in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise UsageError(
                f"unknown config field {', '.join(unknown)}; the fields are {', '.join(known)}"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def exact_counterpart(self) -> SimulatorConfig:
        """Direct fine-tuning of the same layers for as many steps: what costs are compared with."""
        return SimulatorConfig.exact(steps=self.steps, layers=self.layers)

    @property
    def is_exact(self) -> bool:
        """Whether nothing is approximated, so that the result must equal torch.autograd and SGD."""
        fixed = (
            self.loss_gradient,
            self.norm_gradient,
            self.activation_gradient,
            self.attention_gradient,
            self.norm_update,
        )
        return fixed == ("softmax", "exact", "exact", "full", "all")


def _check_count(name: str, value: object, hint: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} is {value!r}; expected a whole number of at least 1 ({hint})")
