"""SimulatorConfig: every choice that changes what a simulator computes or how it is laid out."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from tintc.ir.described import about
from tintc.ir.errors import UsageError
from tintc.ir.rule_values import (
    RULE,
    Factors,
    Normalize,
    Optimizer,
    factors,
    number,
    patterns,
    schedule,
    schedule_factor,
)

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
    "normalize": get_args(Normalize),
    "optimizer": get_args(Optimizer),
}
Preset = Literal["paper", "exact"]
UNROLLED = 4  # steps that a graph holds at most; more run the program of one step in a loop
PRESETS = get_args(Preset)
_ABOVE_0, _BELOW_1 = math.nextafter(0, 1), math.nextafter(1, 0)
_SHARE = "a number from 0 to below 1"


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
    train: tuple[str, ...] = field(
        default=(),
        metadata=about(
            "Patterns over the model's parameter names, as '*.mlp.*': what matches is trained and "
            "nothing else, in place of layers and norm_update. Repeatable.",
            metavar="PATTERN",
        ),
    )
    lr_scale: Factors = field(
        default=(),
        metadata=about(
            "Factors of the learning rate for parameters whose names match, as '*.bias=0.5'; the "
            "last match wins, and what has factor 0 is not trained. Repeatable.",
            metavar="PATTERN=FACTOR",
        ),
    )
    schedule: str | tuple[float, ...] = field(
        default="constant",
        metadata=about(
            "Factor of the learning rate at step k of N: constant, linear (1 - k/N), cosine "
            "((1 + cos(pi k/N))/2), or N numbers with commas between them.",
            metavar="NAME|F,F,...",
        ),
    )
    momentum: float = field(
        default=0.0, metadata=about("mu of v = mu v + g, from 0 to below 1; steps follow v.")
    )
    nesterov: bool = field(
        default=False, metadata=about("Steps follow g + mu v instead of v; needs momentum.")
    )
    clip_norm: float | None = field(
        default=None,
        metadata=about("Largest 2-norm of a sequence's gradient over all trained weights."),
    )
    normalize: Normalize = field(
        default="none",
        metadata=about("weight divides each weight's gradient by its root mean square."),
    )
    decay: float = field(
        default=0.0,
        metadata=about(
            "Share, 0 to 1, of the way back to the original weights that each step ends with."
        ),
    )
    max_drift: float | None = field(
        default=None,
        metadata=about("Largest norm of a weight's whole change, as a part of its own norm."),
    )
    optimizer: Optimizer = field(
        default="sgd",
        metadata=about(
            "sgd; adam; rms: by root mean squares gathered before (tintc statistics); muon: "
            "orthogonal steps of the matrices of linear layers, sgd for the rest."
        ),
    )
    betas: tuple[float, float] = field(
        default=(0.9, 0.999), metadata=about("Of adam.", metavar="B1,B2")
    )
    eps: float = field(default=1e-8, metadata=about("Of adam and rms, above 0."))
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
        self._set(
            train=patterns("train", self.train),
            lr_scale=factors("lr_scale", self.lr_scale),
            schedule=schedule(self.schedule, self.steps),
            momentum=number("momentum", self.momentum, 0, _BELOW_1, _SHARE),
            decay=number("decay", self.decay, 0, 1, "a number from 0 to 1"),
            betas=_betas(self.betas),
            eps=number("eps", self.eps, _ABOVE_0, expected="a number above 0"),
        )
        for name in ("clip_norm", "max_drift"):
            if (limit := getattr(self, name)) is not None:
                expected = "a number above 0"
                self._set(**{name: number(name, limit, _ABOVE_0, expected=expected)})
        if not isinstance(self.nesterov, bool):
            raise UsageError(f"nesterov is {self.nesterov!r}; expected true or false")
        self._refuse_contradictions()

    def _set(self, **values: Any) -> None:
        """Fields as they are kept: this is frozen only for others."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _refuse_contradictions(self) -> None:
        """TINT.md section 7. The presets set norm_update, so `train` leaves it at any value."""
        contradictions = (
            (bool(self.train) and self.layers is not None, "train and layers", "one of them"),
            (self.nesterov and not self.momentum, "nesterov without momentum", "momentum above 0"),
            (
                self.clip_norm is not None and self.normalize != "none",
                "clip_norm and normalize",
                "one of them: the scale of a gradient cancels",
            ),
            (
                self.clip_norm is not None and self.optimizer == "muon",
                "clip_norm and optimizer muon",
                "one of them: the scale of a gradient cancels",
            ),
            (
                self.momentum != 0 and self.optimizer in ("adam", "rms"),
                f"momentum and optimizer {self.optimizer}",
                "sgd or muon, or no momentum",
            ),
        )
        for holds, found, expected in contradictions:
            if holds:
                raise UsageError(f"the config has {found}; expected {expected}")

    @classmethod
    def paper(cls, **overrides: Any) -> SimulatorConfig:
        """The approximations of the paper: first-order norms and activations, value-only attention,
        biases of norms only.
        """
        _refuse_both(overrides)
        return cls.from_dict(overrides)

    @classmethod
    def exact(cls, **overrides: Any) -> SimulatorConfig:
        """No approximation: ordinary dynamic evaluation, equal to torch.autograd and SGD."""
        _refuse_both(overrides)
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
        """Every field, of JSON's types."""
        found = dataclasses.asdict(self)
        found |= {name: list(found[name]) for name in ("train", "betas")}
        found["lr_scale"] = dict(self.lr_scale)
        if not isinstance(self.schedule, str):
            found["schedule"] = list(self.schedule)
        return found

    @property
    def looped(self) -> bool:
        """Whether the steps run one compiled step in a loop: the graph has one then."""
        return self.steps > UNROLLED

    @property
    def unrolled_steps(self) -> int:
        """Steps in the lowered graph."""
        return 1 if self.looped else self.steps

    def schedule_factor(self, step: int) -> float:
        """The factor of the inner learning rate at a step, counted from 0."""
        return schedule_factor(self.schedule, step, self.steps)

    @property
    def rule(self) -> dict[str, Any]:
        """The fields of the inner rule that are not at their defaults, of JSON's types; none where
        it is plain sgd on the weights of `layers`.
        """
        found, plain = self.to_dict(), SimulatorConfig().to_dict()
        return {name: found[name] for name in RULE if found[name] != plain[name]}

    def described(self) -> dict[str, Any]:
        """Every field, but the rule's only where they are not at their defaults: what results are
        kept under, so that those of plain sgd are found which were kept before there were rules.
        """
        fields = {name: value for name, value in self.to_dict().items() if name not in RULE}
        return fields | self.rule

    def by_plain_sgd(self) -> SimulatorConfig:
        """The same weights, trained without any rule."""
        plain = SimulatorConfig()
        changed = {name: getattr(plain, name) for name in RULE if name != "train"}
        return dataclasses.replace(self, **changed)

    def exact_counterpart(self) -> SimulatorConfig:
        """Direct fine-tuning of the same weights for as many steps, all at one rate: what costs are
        compared with.
        """
        learns = tuple((pattern, float(factor != 0)) for pattern, factor in self.lr_scale)
        return SimulatorConfig.exact(
            steps=self.steps, layers=self.layers, train=self.train, lr_scale=learns
        )

    @property
    def is_exact(self) -> bool:
        """Whether nothing is approximated, so that the result must equal torch.autograd and SGD."""
        fixed = (
            self.loss_gradient,
            self.norm_gradient,
            self.activation_gradient,
            self.attention_gradient,
        )
        everything = self.norm_update == "all" or bool(self.train)
        return everything and fixed == ("softmax", "exact", "exact", "full")


def _check_count(name: str, value: object, hint: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} is {value!r}; expected a whole number of at least 1 ({hint})")


def _refuse_both(overrides: dict[str, Any]) -> None:
    """The presets choose a norm_update; `train` takes its place, and a caller may not give both."""
    if overrides.get("train") and overrides.get("norm_update") is not None:
        raise UsageError("train and norm_update are both given; expected one of them")


def _betas(value: Any) -> tuple[float, float]:
    given = value.split(",") if isinstance(value, str) else value
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise UsageError(f"betas is {value!r}; expected two numbers from 0 to below 1")
    first, second = (number("one of betas", each, 0, _BELOW_1, _SHARE) for each in given)
    return first, second
