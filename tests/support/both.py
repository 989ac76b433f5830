"""Simulators of one program on both back ends, of models whose dimensions divide nothing, and what
they must agree on.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.support.models import FAMILIES
from tests.support.nano import nano
from tests.support.once import capture_once, lower_once
from tests.support.tolerances import BACKENDS, error, measured
from tintc.compiler.driver import lower
from tintc.compiler.frontend.capture import Captured, capture
from tintc.ir.config import SimulatorConfig
from tintc.ir.program import Program
from tintc.runtime.simulator import Simulator

Both = dict[str, Simulator]
LIMIT = BACKENDS[torch.float64]


def odd_model(family: str, **more: Any) -> Any:
    """Dimensions that divide nothing."""
    sizes = {"vocab": 29, "hidden": 10, "heads": 2, "ffn": 13, "layers": 2, **more}
    return nano(**{**sizes, "positions": 16}) if family == "nano" else FAMILIES[family](**sizes)


@cache
def _captured_nano(**sizes: int) -> Captured:
    return capture(nano(**sizes))


def small_nano(config: SimulatorConfig, **sizes: int) -> Both:
    """Both back ends of a nano of these sizes, captured once a process."""
    captured = _captured_nano(**sizes)
    program = lower(captured.copy(), config)
    return {
        "fused": Simulator(program, captured.tensors),
        "none": Simulator(program, captured.tensors, backend="transformer"),
    }


@cache
def _lowered(
    family: str, preset: str, fields: tuple[tuple[str, Any], ...]
) -> tuple[Program, dict[str, Tensor]]:
    config = SimulatorConfig.preset(preset, **{"inner_lr": 0.01, "steps": 2, **dict(fields)})
    captured = capture_once(odd_model(family, **({"layers": 3} if config.layers else {})))
    return lower_once(captured, config), captured.tensors


@cache
def _simulator(share: str, *lowered: Any) -> Simulator:
    options = {} if share == "fused" else {"backend": "transformer", "share": share}
    return Simulator(*_lowered(*lowered), **options)  # type: ignore[arg-type]


def both(
    family: str, preset: str = "paper", shares: tuple[str, ...] = ("none",), **fields: Any
) -> Both:
    """`fused`, and the transformer back end once for each way of sharing, by its name. Made once a
    process: do not change them.
    """
    return {
        share: _simulator(share, family, preset, tuple(fields.items()))
        for share in ("fused", *shares)
    }


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest number."""
    assert found.shape == expected.shape
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def assert_equal_results(
    found: Simulator, expected: Simulator, inputs: dict[str, Tensor], *, limit: float = LIMIT
) -> None:
    """Everything that a simulator returns, both ways of running, and the state dict that it would
    give back.
    """
    kind = f"transformer against fused: {{}}, {str(found.dtype).removeprefix('torch.')}"
    labels = inputs["input_ids"]
    with torch.inference_mode():
        wanted, alone = (
            expected(**inputs, labels=labels, return_initial=True),
            found(**inputs, labels=labels),
        )
        initial = found(**inputs, labels=labels, return_initial=True)
        assert alone.initial_logits is None
        for logits in (alone.logits, initial.logits):
            assert measured(kind.format("logits"), relative(logits, wanted.logits)) < limit
        assert (
            measured(kind.format("logits"), relative(initial.initial_logits, wanted.initial_logits))
            < limit
        )
        assert (
            error(initial.loss, wanted.loss) < limit
            and error(initial.initial_loss, wanted.initial_loss) < limit
        )
        assert error(wanted.logits, wanted.initial_logits) > 1e-3, "the steps must count"
        ours, theirs = found.updates(**inputs), expected.updates(**inputs)
        assert list(ours) == list(theirs)
        for slot, value in theirs.items():
            assert measured(kind.format("updates"), error(ours[slot], value)) < limit, slot
        rest = {
            name: inputs[name]
            for name in ("input_ids", "attention_mask", "position_ids")
            if name in inputs
        }
        assert relative(found.predict(ours, **rest), wanted.logits) < limit
        assert relative(found.predict_initial(**rest), wanted.initial_logits) < limit
        index = len(labels) - 1
        state, right = (
            simulator.updated_state_dict(index=index, **inputs) for simulator in (found, expected)
        )
        assert list(state) == list(right)
        assert all(
            error(state[name], right[name]) < limit and state[name].dtype == right[name].dtype
            for name in right
        )
