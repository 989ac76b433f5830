"""What `classification.run` is asked for, and who learns how."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from tintc.evaluate.auxiliary import Auxiliary
from tintc.evaluate.learners import Learner
from tintc.evaluate.lessons import Form, Loss
from tintc.evaluate.tasks import find_task, load_tasks
from tintc.ir.config import PRESETS, SimulatorConfig
from tintc.ir.errors import UsageError

# Inner learning rates that are tried with all 12 layers, by what is trained on; l of 12 layers take
# (12 / l)^2 as much. Gradients are sums over targets, so few targets take a larger rate. Found on
# choosing items with SmolLM2-135M: on 32 label words all layers took 1e-5 to 1e-4, and the top
# quarter 1e-3, for every task that was tried: the gradient is large in the lower layers.
RATES: dict[str, tuple[float, ...]] = {
    "label": (1e-5, 6e-5, 2e-4),
    "context": (3e-6, 2e-5, 1e-4),
    "own context": (1e-4, 3e-4, 1e-3),
}
BUDGETS = ("12x1", "6x2", "3x4")
_DEPTH = 12  # of the model that budgets are written for


@dataclass(frozen=True)
class Settings:
    """Raises UsageError for what makes no sense.

    tasks: names or aliases. shots: numbers of demonstrations; 0 trains on each item's own context.
    seeds: of the demonstrations.
    loss: on the label words of demonstrations, or on all their tokens. form: demonstrations as one
    sequence, which prompts follow, or separate; then every demonstration and every prompt sees only
    itself. rates: that are tried with every budget; None for RATES, by how many layers a budget
    has. inner_lr: one rate for all, so that none is chosen. budgets: layers x steps of a model of
    12 layers; zero-shot, where every item is trained on by itself, only the first. in_context: also
    a row of the unmodified model that reads the demonstrations, where prompts otherwise do not.
    presets: of the simulators; dynamic evaluation trains the norm parameters that the first of them
    trains. limit: test items of a task; None for all. choose: training items that templates,
    calibration, rates and budgets are chosen on; zero-shot at most 16 of them for the learners.
    batch: sequences that are trained at once; changes nothing but time and memory. tokens: of the
    longest sequence. data_dir: of `<task>/{train,test}.jsonl`; None for the hub.
    """

    tasks: tuple[str, ...] = field(default_factory=lambda: tuple(load_tasks()))
    shots: tuple[int, ...] = (0, 32)
    seeds: tuple[int, ...] = (1, 2, 3)
    loss: Loss = "label"
    form: Form = "separate"
    rates: tuple[float, ...] | None = None
    inner_lr: float | None = None
    budgets: tuple[str, ...] = BUDGETS
    in_context: bool = True
    presets: tuple[str, ...] = ("paper",)
    limit: int | None = 200
    choose: int = 32
    batch: int = 8
    tokens: int = 4096
    data_dir: Path | None = None

    def __post_init__(self) -> None:
        for name in ("tasks", "shots", "seeds", "budgets", "presets"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise UsageError(
                    f"{name} are {', '.join(map(str, values)) or 'none'}; expected at least one, "
                    "each once"
                )
        names = [find_task(name).name for name in self.tasks]
        if len(set(names)) != len(names):
            raise UsageError(
                f"tasks are {', '.join(self.tasks)}; expected each once, by whatever name"
            )
        for name, value, least in (
            ("choose", self.choose, 2),
            ("batch", self.batch, 1),
            ("tokens", self.tokens, 16),
            ("limit", self.limit, 2),
        ):
            if value is not None and value < least:
                raise UsageError(f"{name} is {value}; expected a whole number of at least {least}")
        if min(self.shots) < 0:
            raise UsageError(
                f"shots are {', '.join(map(str, self.shots))}; expected 0 or more demonstrations"
            )
        for name, known in (("loss", get_args(Loss)), ("form", get_args(Form))):
            if getattr(self, name) not in known:
                raise UsageError(
                    f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}"
                )
        for preset in self.presets:
            if preset not in PRESETS:
                raise UsageError(f"preset is {preset!r}; expected one of {', '.join(PRESETS)}")
        for rate in (*(self.rates or ()), *(() if self.inner_lr is None else (self.inner_lr,))):
            if not (math.isfinite(rate) and rate > 0):
                raise UsageError(f"an inner learning rate is {rate}; expected a number above 0")
        if self.rates == ():
            raise UsageError("rates are none; expected at least one inner learning rate")
        for budget in self.budgets:
            parse_budget(budget)

    def rates_for(self, shots: int, budget: str) -> tuple[float, ...]:
        """Rates that are tried, from small to large."""
        if self.inner_lr is not None:
            return (self.inner_lr,)
        if self.rates is not None:
            return tuple(sorted(set(self.rates)))
        scale = (_DEPTH / parse_budget(budget)[0]) ** 2
        return tuple(
            float(f"{rate * scale:.2g}") for rate in RATES[self.loss if shots else "own context"]
        )

    def budgets_for(self, shots: int) -> tuple[str, ...]:
        """Budgets that are tried."""
        return self.budgets if shots else self.budgets[:1]

    def reads_in_context(self, shots: int) -> bool:
        """Whether there is a row of the unmodified model that reads the demonstrations; in one
        sequence `unmodified` does so anyway.
        """
        return self.in_context and shots > 0 and self.form == "separate"


def parse_budget(text: str) -> tuple[int, int]:
    """(layers of 12, steps) of "6x2". Raises UsageError for anything else."""
    layers, _, steps = text.partition("x")
    if not (
        layers.isdecimal() and steps.isdecimal() and 1 <= int(layers) <= _DEPTH and int(steps) >= 1
    ):
        raise UsageError(
            f"a budget is {text!r}; expected layers x steps, as 12x1, 6x2 or 3x4, with 1 to "
            f"{_DEPTH} layers (scaled to the model)"
        )
    return int(layers), int(steps)


@dataclass(frozen=True)
class Method:
    """Who learns, and how: `unmodified`, `dynamic evaluation` or `simulator`. layers: of this
    model; rate: negative to ascend.
    """

    kind: str
    preset: str | None = None
    budget: str | None = None
    layers: int | None = None
    steps: int | None = None
    rate: float | None = None

    def describe(self) -> dict[str, Any]:
        """What its results are stored under: all but the budget's name."""
        return {
            "kind": self.kind,
            "preset": self.preset,
            "layers": self.layers,
            "steps": self.steps,
            "rate": self.rate,
        }

    def learner(self, auxiliary: Auxiliary) -> Learner:
        if self.preset is None:
            return auxiliary.unmodified()
        config = SimulatorConfig.preset(
            self.preset, layers=self.layers, steps=self.steps, inner_lr=self.rate
        )
        return (
            auxiliary.simulated(config)
            if self.kind == "simulator"
            else auxiliary.dynamic_evaluation(config)
        )


UNMODIFIED = Method("unmodified")


def method(kind: str, preset: str, budget: str, rate: float, depth: int) -> Method:
    """layers = depth * budget's layers / 12, rounded, at least 1."""
    layers, steps = parse_budget(budget)
    return Method(kind, preset, budget, max(1, round(depth * layers / _DEPTH)), steps, rate)
