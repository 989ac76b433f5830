"""Losses without logits, and logits of some positions: what a full call gives, for both back ends
and with gradients on or off.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.families import FAMILIES as EVERY_FAMILY
from tests.support.grid import grid
from tests.support.models import FAMILIES, ragged_train_mask, simulate, tokens
from tests.support.tolerances import SIMULATOR, error
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import InputError
from tintc.runtime.simulator import Simulator

LIMIT = SIMULATOR[torch.float64]
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "gradients": contextlib.nullcontext,
}
CONFIGS = {
    "paper": SimulatorConfig.paper(inner_lr=0.01, steps=2),
    "exact, top block": SimulatorConfig.exact(inner_lr=0.01, layers=1),
}


@cache
def on_backend(family: str, config: str, backend: str) -> Simulator:
    """Made once: do not change it."""
    return simulate(FAMILIES[family](), CONFIGS[config], backend=backend)


def called(simulator: Simulator) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, train mask, labels of the rest, which differ in number between sequences)."""
    ids = tokens(3, 11, simulator.program.facts.vocab_size)
    train = ragged_train_mask(3, 11)
    return ids, train, ids.masked_fill(train.bool(), -100)


def expected_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """By the definition, position by position."""
    found = torch.zeros(labels.shape, dtype=logits.dtype)
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            if labels[b, t + 1] != -100:
                found[b, t] = -F.log_softmax(logits[b, t], -1)[labels[b, t + 1]]
    return found


@grid(family=FAMILIES, config=CONFIGS, mode=MODES, backend=["fused", "transformer"])
def test_losses(family: str, config: str, mode: str, backend: str) -> None:
    fused, simulator = on_backend(family, config, "fused"), on_backend(family, config, backend)
    ids, train, labels = called(simulator)
    whole = fused(ids, train, labels=labels, return_initial=True)
    with MODES[mode]():
        found = simulator.losses(ids, train, labels, return_initial=True)
        updated = simulator.losses(ids, train, labels)
    assert whole.initial_logits is not None and found.initial_losses is not None
    assert error(found.losses, expected_losses(whole.logits, labels)) < LIMIT
    assert error(found.initial_losses, expected_losses(whole.initial_logits, labels)) < LIMIT
    assert error(updated.losses, found.losses) < LIMIT
    assert updated.initial_losses is None
    assert error(found.loss, whole.loss) < LIMIT


@grid(kept=[1, 4, 11, torch.tensor([7, 0, 7])], mode=MODES, backend=["fused", "transformer"])
def test_logits_to_keep(kept: int | Tensor, mode: str, backend: str) -> None:
    fused, simulator = on_backend("opt", "paper", "fused"), on_backend("opt", "paper", backend)
    ids, train, labels = called(simulator)
    whole = fused(ids, train, labels=labels, return_initial=True)
    at = kept if isinstance(kept, Tensor) else torch.arange(11 - kept, 11)
    with MODES[mode]():
        found = simulator(ids, train, labels=labels, return_initial=True, logits_to_keep=kept)
        alone = simulator(ids, train, logits_to_keep=kept)
    for name in ("logits", "initial_logits"):
        assert error(getattr(found, name), getattr(whole, name)[:, at]) < LIMIT
    assert error(alone.logits, found.logits) < LIMIT
    assert error(found.loss, whole.loss) < LIMIT
    assert error(found.initial_loss, whole.initial_loss) < LIMIT


@pytest.mark.slow
def test_a_capped_and_scaled_head() -> None:
    """What stands behind the head is computed for the kept positions, and in the chunks of the
    losses.
    """
    simulator = simulate(EVERY_FAMILY["gemma2"].build(), SimulatorConfig.exact(inner_lr=0.01))
    ids, train, labels = called(simulator)
    whole = simulator(ids, train)
    with torch.inference_mode():
        kept = simulator(ids, train, logits_to_keep=2).logits
        losses = simulator.losses(ids, train, labels).losses
    assert error(kept, whole.logits[:, -2:]) < LIMIT
    assert error(losses, expected_losses(whole.logits, labels)) < LIMIT


def test_outer_gradients_of_losses() -> None:
    simulator = simulate(FAMILIES["opt"](), CONFIGS["paper"])
    ids, train, labels = called(simulator)
    rates = [
        torch.autograd.grad(loss, simulator.inner_lr)[0]
        for loss in (
            simulator.losses(ids, train, labels).loss,
            simulator(ids, train, labels=labels).loss,
        )
    ]
    assert rates[0] != 0
    assert error(*rates) < LIMIT


def test_no_logits_of_all_positions_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    from tintc.ir.ops import head

    monkeypatch.setitem(head.CHUNK_NUMBERS, "cpu", 3 * 29)
    simulator = simulate(FAMILIES["opt"](vocab=29), CONFIGS["paper"])
    ids, train, labels = called(simulator)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            nonlocal largest
            if (
                isinstance(out, Tensor)
                and out.ndim > 1
                and out.shape[-1] == 29
                and out.is_floating_point()
            ):
                largest = max(largest, out.numel() // 29)
            return out

    with torch.inference_mode(), Watch():
        simulator.losses(ids, train, labels)
    assert largest == 3


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        (-1, "logits_to_keep is -1; expected 0 for all, the last 1 to 11"),
        (12, "logits_to_keep is 12"),
        (True, "logits_to_keep is True"),
        ("last", "logits_to_keep is 'last'"),
        (torch.tensor([[1]]), "shape (1, 1)"),
        (torch.tensor([0.5]), "torch.float32"),
        (torch.tensor([], dtype=torch.int64), "at least one"),
        (torch.tensor([3, 11]), "holds [3, 11]; the sequence has positions 0 to 10"),
    ],
)
def test_bad_positions(kept: Any, words: str) -> None:
    simulator = on_backend("opt", "paper", "fused")
    ids, train, _ = called(simulator)
    with pytest.raises(InputError) as refused:
        simulator(ids, train, logits_to_keep=kept)
    assert words in str(refused.value)


def test_bad_labels() -> None:
    simulator: nn.Module = on_backend("opt", "paper", "fused")
    ids, train, labels = called(simulator)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="labels hold no target"):
        simulator.losses(ids, train, torch.full_like(labels, -100))
