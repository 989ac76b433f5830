"""The values that the fields of an inner rule take, read from what users write. TINT.md section 7.

Each function returns the value as `SimulatorConfig` keeps it, which can be hashed, or raises
UsageError.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from tintc.ir.errors import UsageError

Schedule = Literal["constant", "linear", "cosine"]
Normalize = Literal["none", "weight"]
Optimizer = Literal["sgd", "adam", "rms", "muon"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)
Factors = tuple[tuple[str, float], ...]
# Fields of a config that make up its inner rule.
RULE = (
    "train",
    "lr_scale",
    "schedule",
    "momentum",
    "nesterov",
    "clip_norm",
    "normalize",
    "decay",
    "max_drift",
    "optimizer",
    "betas",
    "eps",
)


def patterns(name: str, value: Any) -> tuple[str, ...]:
    """One pattern, or several. An empty list is none."""
    given = (value,) if isinstance(value, str) else value
    if not isinstance(given, Iterable) or isinstance(given, Mapping):
        raise UsageError(f"{name} is {value!r}; expected patterns of parameter names")
    found = tuple(given)
    if not all(isinstance(each, str) and each for each in found):
        raise UsageError(f"{name} is {value!r}; expected patterns of parameter names")
    return found


def factors(name: str, value: Any) -> Factors:
    """From a dict, pairs or `PATTERN=FACTOR` strings; in their order, since the last match wins."""
    pairs = value.items() if isinstance(value, Mapping) else value
    if isinstance(pairs, str):
        pairs = (pairs,)
    if not isinstance(pairs, Iterable):
        raise UsageError(f"{name} is {value!r}; expected a factor for each pattern")
    found: dict[str, float] = {}
    for pattern, factor in (_pair(name, each) for each in pairs):
        found.pop(pattern, None)  # given again, it is the last: a dict keeps the order of the first
        found[pattern] = factor
    return tuple(found.items())


def _pair(name: str, value: Any) -> tuple[str, float]:
    parts = value.rpartition("=")[::2] if isinstance(value, str) else value
    if (
        not isinstance(parts, Sequence)
        or len(parts) != 2
        or not (isinstance(parts[0], str) and parts[0])
    ):
        raise UsageError(f"{name} is {value!r}; expected PATTERN=FACTOR, as in '*.mlp.*=0.5'")
    pattern, factor = parts
    return pattern, number(f"{name} of {pattern}", factor)


def number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    expected: str = "a finite number",
) -> float:
    """A finite number from `low` to `high`, which `expected` says in words."""
    if isinstance(value, str):
        value = _read(value)
    fits = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and low <= value <= high
    )
    if not fits:
        raise UsageError(f"{name} is {value!r}; expected {expected}")
    return float(value)


def _read(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def schedule(value: Any, steps: int) -> str | tuple[float, ...]:
    """A name, or one factor for each step: a list, or text with commas."""
    if isinstance(value, str):
        if value in SCHEDULES:
            return value
        value = [_read(part.strip()) for part in value.split(",")]
    if not isinstance(value, Sequence) or any(isinstance(each, str) for each in value):
        raise UsageError(
            f"schedule is {value!r}; expected {', '.join(SCHEDULES)}, or a factor for each step"
        )
    found = tuple(number("a factor of schedule", each) for each in value)
    if len(found) != steps:
        raise UsageError(
            f"schedule has {len(found)} factors; expected one for each of the {steps} steps"
        )
    return found


def schedule_factor(value: str | tuple[float, ...], step: int, steps: int) -> float:
    """The factor of the inner learning rate at step k = 0 .. N-1."""
    if not isinstance(value, str):
        return value[step]
    if value == "linear":
        return 1 - step / steps
    if value == "cosine":
        return (1 + math.cos(math.pi * step / steps)) / 2
    return 1.0


def rule_text(rule: Mapping[str, Any]) -> str:
    """A rule in words, from those of its fields that are not at their defaults; of none `sgd`."""
    optimizer = rule.get("optimizer", "sgd")
    parts = [_said(name, rule[name]) for name in RULE if name in rule and name != "optimizer"]
    return ", ".join([optimizer, *parts])


def _said(name: str, value: Any) -> str:
    if value is True:
        return name
    if name == "lr_scale":
        value = [f"{pattern}={factor:g}" for pattern, factor in factors(name, value)]
    elif isinstance(value, float):
        value = f"{value:g}"
    parts = value if isinstance(value, (list, tuple)) else [value]
    return f"{name} {' '.join(f'{p:g}' if isinstance(p, float) else str(p) for p in parts)}"
