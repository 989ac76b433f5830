"""SimulatorConfig: every choice that changes what a simulator computes or how it is laid out."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

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
PRESETS = ("paper", "exact")


@dataclass(frozen=True, kw_only=True)
class SimulatorConfig:
    """What one simulator computes (names and formulas: TINT.md section 2) and how large its parts
    are.

    steps: inner gradient steps, at least 1. `initial_logits` are those of zero steps.
    layers: trained blocks, counted from the top; None trains all.
    inner_lr: learning rate of one step. Gradients are sums over training positions, so it does not
        depend on the length of the training segment. A negative one ascends.
    loss_gradient: `softmax` (p - 1_y), `mean_embedding` (1/V - 1_y) or `quadratic` (z - 1_y) at the
    logits.
    norm_gradient: `first_order` N (f(x + g/N) - f(x)) or `exact`.
    norm_update: `bias` leaves gamma alone, `all` trains it too.
    activation_gradient: `first_order` N (a(x + dy/N) - a(x)) or `exact`.
    attention_gradient: `value` holds the probabilities constant, `full` goes through the scores.
    finite_difference_scale: N above.
    prefix_tokens, sim_hidden, sim_heads: K, D_sim and H_sim of the prefix layout; None lets
        `assign_prefix_slots` solve for them.

    Raises UsageError for a value out of range.
    """

    steps: int = 1
    layers: int | None = None
    inner_lr: float = 1e-4
    loss_gradient: LossGradient = "softmax"
    norm_gradient: NormGradient = "first_order"
    norm_update: NormUpdate = "bias"
    activation_gradient: ActivationGradient = "first_order"
    attention_gradient: AttentionGradient = "value"
    finite_difference_scale: float = 1000.0
    prefix_tokens: int | None = None
    sim_hidden: int | None = None
    sim_heads: int | None = None

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
        known = [field.name for field in dataclasses.fields(cls)]
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
