"""What the machine gives back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from tests.support.models import opt, simulate, tokens
from tintc.ir.config import SimulatorConfig
from tintc.runtime import compiled, machine, slices
from tintc.runtime.machine import hand_back_freed


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


@pytest.mark.skipif(machine._heap() is None, reason="another C library than glibc")
def test_freed_pieces_are_given_back() -> None:
    """Pieces between others that live, which no allocator could give back from the end alone."""
    pieces = [torch.ones(100_000 // 4) for _ in range(3000)]  # 300 MB, below glibc's own mappings
    between = pieces[::2]
    del pieces
    before = resident()
    assert hand_back_freed()
    assert before - resident() > 100e6
    assert all(bool((piece == 1).all()) for piece in between)


def test_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: None) -> Any:
        return SimpleNamespace()

    monkeypatch.setattr(machine.ctypes, "CDLL", without)
    assert machine._heap.__wrapped__() is None
    monkeypatch.setattr(machine, "_heap", lambda: None)
    assert not hand_back_freed()


@pytest.mark.parametrize("held", [1 << 20, 1 << 27])
def test_between_slices(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of much: before each but the first. What the last one freed is the caller's matter."""
    seen: list[Any] = []
    monkeypatch.setattr(slices, "hand_back_freed", lambda: seen.append("back"))

    def run(part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(len(part["x"]))
        return {"y": part["x"] + 1}

    x = torch.arange(5)
    found = slices.run_in_slices(run, {"x": x}, 5, 2, held=held)
    assert seen == ([2, "back", 2, "back", 1] if held > slices._MUCH else [2, 2, 1])
    assert torch.equal(found["y"], x + 1)


def test_a_simulator_says_what_a_slice_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the estimate by which it chooses the slice."""
    seen: list[int] = []

    def noted(*arguments: Any) -> Any:
        seen.append(arguments[-1])
        return slices.run_in_slices(*arguments)

    monkeypatch.setattr(compiled, "run_in_slices", noted)
    simulator = simulate(opt(), SimulatorConfig.exact())
    simulator.memory = "lowest"
    ids = tokens(3, 8, 29)
    with torch.inference_mode():
        simulator(ids, torch.ones_like(ids))
        simulator(tokens(3, 16, 29), torch.ones(3, 16, dtype=torch.int64))
    assert 0 < seen[0] < seen[1] < 1e6
