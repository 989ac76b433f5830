"""One simulator, and one adapted one, in several threads and in workers of a DataLoader."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tests.support.adapted import context, own_simulator, prompts
from tintc.runtime.adapted import Adapted
from tintc.runtime.simulator import Simulator
from tintc.runtime.specialize.programs import Programs

IDS, MASK = prompts()
THREADS = 4


@pytest.fixture(autouse=True)
def _threads_take_turns_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(uses: list[Callable[[], Any]]) -> list[list[Any]]:
    """Each thread does all of it, from another place on; results in the order of the uses."""
    start = threading.Barrier(THREADS)

    def work(first: int) -> list[Any]:
        start.wait()
        found = {}
        for number in range(len(uses)):
            which = (first + number) % len(uses)
            found[which] = uses[which]()
        return [found[which] for which in range(len(uses))]

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, range(THREADS)))


def uses_of(simulator: Simulator) -> list[Callable[[], Tensor]]:
    inputs = context()

    def scored() -> Tensor:
        return simulator(**inputs).logits.detach()

    def inferred() -> Tensor:
        with torch.inference_mode():
            return simulator(**inputs).logits

    def learned() -> Tensor:
        return torch.cat([v.flatten() for v in simulator.updates(**inputs).values()]).detach()

    def factors() -> Tensor:
        return simulator.adapt(**inputs, form="factors")(IDS, MASK).logits

    def weights() -> Tensor:
        return simulator.adapt(**inputs, form="weights")(IDS, MASK).logits

    return [scored, inferred, learned, factors, weights]


def uses_of_adapted(adapted: Adapted) -> list[Callable[[], Tensor]]:
    options = {"attention_mask": MASK, "max_new_tokens": 5, "do_sample": False}

    def beams() -> Tensor:
        found: Tensor = adapted.generate(IDS, **options, num_beams=3)
        return found

    def greedy() -> Tensor:
        found: Tensor = adapted.generate(IDS, **options)
        return found

    return [
        lambda: adapted(IDS, MASK).logits,
        beams,
        greedy,
        lambda: adapted.select([2, 0, 2])(IDS, MASK).logits,
        lambda: adapted(IDS[:, :6], MASK[:, :6], use_cache=True).logits,
    ]


def assert_as_in_one_thread(uses: list[Callable[[], Tensor]], again: list[Any]) -> None:
    expected = [use() for use in again]
    for found in together(uses):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_threads_share_a_simulator() -> None:
    """None of whose programs is there yet."""
    assert_as_in_one_thread(uses_of(own_simulator("opt")), uses_of(own_simulator("opt")))


@pytest.mark.parametrize("form", ["weights", "factors"])
def test_threads_share_an_adapted_simulator(form: Any) -> None:
    one, other = (own_simulator("opt").adapt(**context(), form=form) for _ in range(2))
    assert_as_in_one_thread(uses_of_adapted(one), uses_of_adapted(other))


def _counted(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """Kinds of call and how often their program was emitted."""
    counted, emit = Counter[Any](), Programs._emit_fused

    def slowly(self: Programs, choices: Any) -> Any:
        counted[choices] += 1
        time.sleep(0.05)
        return emit(self, choices)

    monkeypatch.setattr(Programs, "_emit_fused", slowly)
    return counted


def test_each_program_is_emitted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, counted = own_simulator("opt"), _counted(monkeypatch)
    together([lambda: simulator.predict_initial(IDS).detach()])
    assert set(counted.values()) == {1}


def test_a_batch_that_runs_whole_needs_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one whose memory was asked for, before the slices were chosen, is the one that runs."""
    simulator, counted = own_simulator("opt"), _counted(monkeypatch)
    with torch.inference_mode():
        simulator(**context())
    assert list(counted.values()) == [1]


class _Scored(Dataset[Tensor]):
    """Rows under the weights of their own context."""

    def __init__(self, simulator: Simulator, adapted: Adapted) -> None:
        self.simulator, self.adapted = simulator, adapted

    def __len__(self) -> int:
        return 3

    def __getitem__(self, row: int) -> Tensor:
        inputs = {name: value[row : row + 1] for name, value in context().items()}
        trained = self.simulator(**inputs).logits.detach()
        used = self.adapted.select(row)(IDS[row : row + 1], MASK[row : row + 1]).logits
        return torch.cat([trained, used], 1)[0]


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_worker_of_a_data_loader(start: str) -> None:
    simulator = own_simulator("opt")
    rows = _Scored(simulator, simulator.adapt(**context()))
    expected = torch.stack([rows[row] for row in range(3)])
    loader = DataLoader(rows, batch_size=3, num_workers=1, multiprocessing_context=start)
    (found,) = loader
    assert torch.equal(found, expected)
