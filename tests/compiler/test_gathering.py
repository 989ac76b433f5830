"""Root mean squares of gradients over a text: against torch.autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.every import captured, model_of, simulator_of
from tests.support.models import tokens
from tests.support.tolerances import SIMULATOR, error
from tintc.compiler.casts import no_casts
from tintc.compiler.gathering import gather_statistics
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import InputError, UsageError
from tintc.runtime.simulator import Simulator

MODELS = ("opt", "gpt2", "llama")
VOCAB, LIMIT = 29, SIMULATOR[torch.float64]
TEXT = tokens(1, 24, VOCAB - 1)[0] + 1  # no token is the padding, 0


def made(name: str, **fields: Any) -> Simulator:
    return simulator_of(name, True, SimulatorConfig.exact(**fields))


def by_autograd(model: nn.Module, names: list[str], chunk: int, context: int) -> dict[str, Tensor]:
    """Written out: each chunk's loss on its own window, one backward pass each."""
    weights = {n: p for n, p in model.named_parameters() if n in names}
    sums = {n: torch.zeros_like(p) for n, p in weights.items()}
    count = 0
    first = 1
    while first + chunk <= len(TEXT):
        window = TEXT[max(0, first - 1 - context) : first + chunk - 1]
        with no_casts(), torch.enable_grad():
            logits = model(input_ids=window[None], use_cache=False).logits[0, -chunk:]
            loss = F.cross_entropy(logits, TEXT[first : first + chunk], reduction="sum")
            found = torch.autograd.grad(loss, list(weights.values()))
        for name, g in zip(weights, found, strict=True):
            sums[name] += g**2
        first, count = first + chunk, count + 1
    return {name: (total / count).sqrt() for name, total in sums.items()}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    largest = max(float(value.abs().max()) for value in wanted.values())
    for name, value in wanted.items():
        assert found[name].dtype == torch.float64
        assert float((found[name] - value).abs().max()) < LIMIT * largest, name
        if float(value.max()) > 1e-9 * largest:  # what is 0 but for rounding has no digits
            assert error(found[name], value) < LIMIT, name


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("chunk", "context", "batch"), [(5, 4, 1), (4, 9, 3), (6, 0, 2)])
def test_equals_autograd(name: str, chunk: int, context: int, batch: int) -> None:
    simulator = made(name, layers=1)
    found = gather_statistics(simulator, TEXT, chunk=chunk, context=context, batch=batch)
    learning = {s.parameter for s in simulator.program.layout.prefix.values() if s.updated}
    assert_equal(found.tensors, by_autograd(model_of(name), sorted(learning), chunk, context))
    assert found.about.chunks == (len(TEXT) - 1) // chunk


@pytest.mark.parametrize("name", MODELS)
def test_of_all_weights_tied_ones_included(name: str) -> None:
    """With `train`: embeddings and head, which OPT and GPT-2 tie; the rule changes nothing."""
    rule: dict[str, Any] = {"optimizer": "adam", "steps": 3, "lr_scale": {"*.0.*": 0.0}}
    simulator = made(name, train=("*",), **rule)
    names = [each for each, _ in model_of(name).named_parameters()]
    found = gather_statistics(simulator, TEXT, chunk=5, context=4)
    assert_equal(found.tensors, by_autograd(model_of(name), names, 5, 4))


def test_of_approximations_is_the_root_mean_square_of_their_own_steps() -> None:
    """The paper's gradients, from the updates of plain steps: W - W' at rate 1."""
    simulator = simulator_of("opt", True, SimulatorConfig.paper(inner_lr=1.0))
    before = captured("opt", True).tensors
    sums: dict[str, Tensor] = {}
    for window in (TEXT[:8], TEXT[5:15]):
        loss_mask = torch.zeros_like(window)
        loss_mask[-7:] = 1
        masks = {"train_mask": torch.ones_like(window)[None], "loss_mask": loss_mask[None]}
        after = simulator.updated_state_dict(window[None], **masks)
        for name, value in before.items():
            sums[name] = sums.get(name, torch.zeros(())) + (value - after[name]) ** 2
    found = gather_statistics(simulator, TEXT[:15], chunk=7, context=2)
    for name, value in found.tensors.items():
        assert error(value, (sums[name] / 2).sqrt()) < LIMIT, name
    learned = {name for name, total in sums.items() if float(total.abs().max())}
    assert learned <= set(found.tensors)
    assert not any(name.endswith(("q_proj.weight", "k_proj.weight")) for name in found.tensors)


def test_a_window_may_fill_all_positions() -> None:
    """The last target is no input: C + L is what the model takes, not C + L + 1."""
    simulator = made("gpt2", layers=1)
    longest = simulator.program.facts.longest
    assert longest is not None
    text = tokens(1, 2 * longest, VOCAB - 1)[0] + 1
    found = gather_statistics(simulator, text, chunk=longest // 2, context=longest - longest // 2)
    assert found.about.chunks >= 3
    with pytest.raises(UsageError, match=f"this model takes {longest}"):
        gather_statistics(simulator, text, chunk=longest, context=1)


def test_progress_counts_chunks() -> None:
    seen: list[tuple[int, int]] = []
    gather_statistics(
        made("opt"), TEXT, chunk=5, context=2, batch=2,
        progress=lambda text, done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen[0] == (0, 4)
    assert seen[-1] == (4, 4)


@pytest.mark.parametrize(
    ("sizes", "kind", "message"),
    [
        ({"chunk": 0, "context": 1}, UsageError, "chunk is 0; expected at least 1"),
        ({"chunk": 1, "context": -1}, UsageError, "context is -1; expected at least 0"),
        ({"chunk": 4, "context": 1, "batch": 0}, UsageError, "batch is 0"),
        ({"chunk": 24, "context": 0}, InputError, "24 tokens; expected at least 25"),
    ],
)
def test_refuses(sizes: dict[str, int], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        gather_statistics(made("opt"), TEXT, **sizes)  # type: ignore[arg-type]
