"""How many sequences run together, by the memory that activations may hold."""

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch

from tests.support.models import gpt2, opt, simulate
from tests.support.optimized import exact, paper, pruned
from tintc.compiler.cost import estimate
from tintc.evaluate.speed.workload import random_workload
from tintc.ir.calibration import fixed
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import MemoryLimitError, UsageError
from tintc.runtime import slices
from tintc.runtime.simulator import Simulator
from tintc.runtime.slices import Work, read_memory, slice_size
from tintc.runtime.specialize.lifetimes import Lifetime, bytes_held, lifetimes

WORK = random_workload(29, batch=6, tokens=11, trained=7)


def sizes_of(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences of each program that a call runs."""
    found: list[int] = []
    bound = simulator.bound
    with monkeypatch.context() as patch:
        patch.setattr(
            simulator, "bound", lambda call: (found.append(call.shape[0]), bound(call))[1]
        )
        with torch.inference_mode():
            simulator(WORK.ids_BT, WORK.train_mask)
    return found


def test_a_simulator_keeps_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    simulator = simulate(opt(), SimulatorConfig.exact(inner_lr=0.01))
    assert (simulator.memory, sizes_of(simulator, monkeypatch)) == ("auto", [6])
    simulator.memory = "lowest"
    assert sizes_of(simulator, monkeypatch) == [1] * 6
    with torch.inference_mode():
        one = simulator(WORK.ids_BT, WORK.train_mask).logits
    chosen: list[int] = []
    for budget in (30_000, 60_000, 100_000, 10**9):
        simulator.memory = budget
        chosen.append(sizes_of(simulator, monkeypatch)[0])
        with torch.inference_mode():
            assert torch.allclose(simulator(WORK.ids_BT, WORK.train_mask).logits, one, atol=1e-12)
    assert chosen == sorted(chosen) and chosen[0] < chosen[-1] == 6
    simulator.memory = "1kB"
    with pytest.raises(MemoryLimitError, match=r"one sequence of 11 tokens needs about .* bytes"):
        sizes_of(simulator, monkeypatch)
    simulator.optimizations = ()  # the whole batch, as asked for
    assert sizes_of(simulator, monkeypatch) == [6]


def test_copies_have_it() -> None:
    simulator = simulate(opt(), SimulatorConfig.paper())
    simulator.memory = "2MB"
    simulator.calibration = "off"  # type: ignore[assignment]
    for other in (copy.deepcopy(simulator), pickle.loads(pickle.dumps(simulator))):
        assert (other.memory, other.calibration) == (2_000_000, fixed("cpu"))
    made = Simulator(simulator.program, simulator.prefix.tensors(), memory="lowest")
    assert made.memory == "lowest"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        *(("auto", "auto"), ("lowest", "lowest"), (5, 5), ("5", 5), ("2GB", 2 * 10**9)),
        *(("1.5 MiB", 3 * 2**19), ("2kb", 2000)),
    ],
)
def test_how_it_is_written(given: Any, expected: Any) -> None:
    assert read_memory(given) == expected


@pytest.mark.parametrize("given", [0, -1, "much", "1e999GB", "nan", True, "2TB", "", "-3MB"])
def test_what_is_no_memory(given: Any) -> None:
    with pytest.raises(UsageError, match="expected auto, lowest, or bytes above 0"):
        read_memory(given)


def test_free_memory_limits_what_time_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "_free", lambda device: 1000)
    held = {n: 300 * n for n in range(1, 9)}.__getitem__
    assert slice_size(8, Work(16, held=held), fixed("cpu")) == 2  # 600 of 800
    assert slice_size(8, Work(16, held=lambda n: n), fixed("cpu")) == 8
    assert slice_size(8, Work(16, held=lambda n: 10**9), fixed("cpu")) == 1  # and it may well fail
    assert slice_size(8, Work(16, held=held), fixed("cpu"), 1000) == 3
    assert slice_size(8, Work(512, held=held), fixed("cpu"), 10**9) == 1  # time asks for no more
    with pytest.raises(MemoryLimitError):
        slice_size(8, Work(16, held=held), fixed("cpu"), 299)


@pytest.mark.parametrize(
    ("device", "trained", "expected"),
    [("cpu", 1300 << 20, 2), ("cpu", 0, 1), ("cpu", 5 << 30, 8), ("cuda", 650 << 20, 8)],
)
def test_a_processor_holds_half_of_a_loop_s_gradients(
    device: str, trained: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or 128 MiB."""
    monkeypatch.setattr(slices, "_free", lambda device: 1 << 40)
    work = Work(16, held=lambda n: n * 300 << 20, trained=trained)
    assert slice_size(8, work, fixed(device)) == expected
    small = dataclasses.replace(work, held=lambda n: n * 16 << 20)
    assert slice_size(8, small, fixed(device)) == 8


def test_what_lives_at_once() -> None:
    values = (Lifetime(("B", 4), 0, 3), Lifetime(("B", "T"), 1, 1), Lifetime(("2S",), 2, 3, 1))
    sizes = {"B": 2, "T": 5, "S": 3}
    assert bytes_held(values, sizes, 8) == max(64 + 80, 64 + 6)
    assert bytes_held((), sizes, 8) == 0


@pytest.mark.parametrize("build", [opt, gpt2])
@pytest.mark.parametrize("config", [exact(), paper(steps=2)], ids=["exact", "paper"])
def test_is_about_what_a_call_is_seen_to_hold(build: Any, config: SimulatorConfig) -> None:
    """Against the run on fake tensors that `tintc cost` makes, in which kernels hold theirs too."""
    model = build(hidden=48, ffn=96, vocab=64, positions=64)
    program = simulate(model, config).program
    for batch, tokens in ((1, 64), (4, 32)):
        segment = tokens // 2
        seen = estimate(
            program, "fused", torch.float64, batch=batch, tokens=tokens, segment=segment
        )
        at = pruned(config, model=model, longest=64)
        simulator = simulate(model, config)
        kind = simulator._usual(("logits",), differentiable=False)
        values = simulator._programs.get(kind).values
        found = bytes_held(values, {"B": batch, "T": tokens, "S": segment}, 8)
        assert 0.5 < found / seen.peak_bytes < 1.5
        assert lifetimes(at.graph)
