"""What `classification.run` is asked for, and who learns how. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from tintc.evaluate.tasks import find_task, load_tasks
from tintc.ir.config import SimulatorConfig
from tintc.ir.described import about
from tintc.ir.errors import UsageError

if TYPE_CHECKING:
    from tintc.evaluate.auxiliary import Auxiliary
    from tintc.evaluate.learners import Learner

Form = Literal["sequence", "separate"]
Loss = Literal["label", "context"]

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
DEPTH = 12  # of the model that budgets are written for


@dataclass(frozen=True)
class Settings:
    """Every field says beside itself what it is for. Raises UsageError for what makes no sense.

    The layers and steps of a simulator come from its budget, and all other fields of its config
    from `changes`, over each preset. With `train` among them, only the steps do.
    """

    tasks: tuple[str, ...] = field(
        default_factory=lambda: tuple(load_tasks()),
        metadata=about(
            "sst2, mr, cr, mpqa, amazon, agnews, subj, or an alias; default all seven.",
            flag="task",
            metavar="NAME,...",
        ),
    )
    shots: tuple[int, ...] = field(
        default=(0, 32),
        metadata=about(
            "Numbers of demonstrations; 0 trains on each item's own context.", metavar="N,..."
        ),
    )
    seeds: tuple[int, ...] = field(
        default=(1, 2, 3),
        metadata=about("Each draws its own demonstrations.", metavar="N,..."),
    )
    loss: Loss = field(
        default="label",
        metadata=about("Of demonstrations: on their label words, or on the whole context."),
    )
    form: Form = field(
        default="separate",
        metadata=about(
            "Demonstrations: separate (every one and every prompt sees only itself) or one "
            "sequence, which prompts follow."
        ),
    )
    rates: tuple[float, ...] | None = field(
        default=None,
        metadata=about(
            "Inner learning rates tried with every budget; default by what is trained on and by "
            "how many layers.",
            metavar="RATE,...",
        ),
    )
    inner_lr: float | None = field(
        default=None, metadata=about("One inner learning rate for all; then none is chosen.")
    )
    budgets: tuple[str, ...] = field(
        default=BUDGETS,
        metadata=about(
            "Layers of 12 x steps, scaled to the model; zero-shot, only the first.",
            metavar="LxS,...",
        ),
    )
    in_context: bool = field(
        default=True,
        metadata=about(
            "Also a row of the unmodified model that reads the demonstrations, where prompts "
            "otherwise do not."
        ),
    )
    presets: tuple[str, ...] = field(
        default=("paper",),
        metadata=about(
            "Of the simulators: paper, exact. Dynamic evaluation trains the norm parameters that "
            "the first one trains.",
            flag="preset",
            metavar="NAME,...",
        ),
    )
    limit: int | None = field(default=200, metadata=about("Test items of each task."))
    choosing: int = field(
        default=32,
        metadata=about(
            "Training items that templates, calibration, rates and budgets are chosen on; "
            "zero-shot at most 16 of them for the learners."
        ),
    )
    batch: int = field(
        default=8, metadata=about("Sequences of one call; results do not depend on it.")
    )
    tokens: int = field(default=4096, metadata=about("Tokens of the longest sequence."))
    data_dir: Path | None = field(
        default=None,
        metadata=about(
            "Holds TASK/{train,test}.jsonl of {text, label} and TASK/task.json; default the hub.",
            metavar="DIR",
        ),
    )
    changes: Mapping[str, Any] = field(
        default_factory=dict, metadata=about("Fields of SimulatorConfig over each preset.")
    )

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
            ("choosing", self.choosing, 2),
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
        for rate in (*(self.rates or ()), *(() if self.inner_lr is None else (self.inner_lr,))):
            if not (math.isfinite(rate) and rate > 0):
                raise UsageError(f"an inner learning rate is {rate}; expected a number above 0")
        if self.rates == ():
            raise UsageError("rates are none; expected at least one inner learning rate")
        for budget in self.budgets:
            layers, steps = parse_budget(budget)
            for preset in self.presets:
                _config(preset, self.changes, layers, steps)

    def rates_for(self, shots: int, budget: str) -> tuple[float, ...]:
        """Rates that are tried, from small to large."""
        if self.inner_lr is not None:
            return (self.inner_lr,)
        if self.rates is not None:
            return tuple(sorted(set(self.rates)))
        scale = (DEPTH / parse_budget(budget)[0]) ** 2
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
        layers.isdecimal() and steps.isdecimal() and 1 <= int(layers) <= DEPTH and int(steps) >= 1
    ):
        raise UsageError(
            f"a budget is {text!r}; expected layers x steps, as 12x1, 6x2 or 3x4, with 1 to "
            f"{DEPTH} layers (scaled to the model)"
        )
    return int(layers), int(steps)


def _config(
    preset: str, changes: Mapping[str, Any], layers: int | None, steps: int
) -> SimulatorConfig:
    """Of a budget. What `train` selects is trained in any case: then its layers only scale the
    rates that are tried.
    """
    budget = {"steps": steps, **({} if changes.get("train") else {"layers": layers})}
    return SimulatorConfig.preset(preset, **changes, **budget)


@dataclass(frozen=True)
class Method:
    """Who learns, and how: `unmodified`, `dynamic evaluation` or `simulator`. layers: of this
    model; rate: negative to ascend; changes: other fields of the config, over the preset's.
    """

    kind: str
    preset: str | None = None
    budget: str | None = None
    layers: int | None = None
    steps: int | None = None
    rate: float | None = None
    changes: tuple[tuple[str, Any], ...] = ()

    def describe(self) -> dict[str, Any]:
        """What its results are stored under: all but the budget's name."""
        return {
            "kind": self.kind,
            "preset": self.preset,
            "layers": self.layers,
            "steps": self.steps,
            "rate": self.rate,
            **({"changes": dict(self.changes)} if self.changes else {}),
        }

    def learner(self, auxiliary: Auxiliary) -> Learner:
        if self.preset is None:
            return auxiliary.unmodified()
        assert self.steps is not None and self.rate is not None
        config = _config(self.preset, dict(self.changes), self.layers, self.steps)
        config = dataclasses.replace(config, inner_lr=self.rate)
        return (
            auxiliary.simulated(config)
            if self.kind == "simulator"
            else auxiliary.dynamic_evaluation(config)
        )


UNMODIFIED = Method("unmodified")


def method(
    kind: str,
    preset: str,
    budget: str,
    rate: float,
    depth: int,
    changes: Mapping[str, Any] | None = None,
) -> Method:
    """layers = depth * budget's layers / 12, rounded, at least 1."""
    layers, steps = parse_budget(budget)
    found = max(1, round(depth * layers / DEPTH))
    return Method(kind, preset, budget, found, steps, rate, tuple((changes or {}).items()))
