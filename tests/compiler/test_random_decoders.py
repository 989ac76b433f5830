"""Random decoders: one exact step is that of torch.autograd and SGD on every weight, or the model
is refused in one line. `pytest` says at its end how many of each there were.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tintc
from tests.support.counted import counted
from tests.support.random_decoders import VOCAB, Decoder, decoder
from tests.support.tolerances import SIMULATOR, error
from tintc.ir.errors import UnsupportedModelError

LIMIT = SIMULATOR[torch.float64]
RATE = 0.5
NAME = "random decoders"


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(ids)
    logits: Tensor = out[0] if isinstance(out, tuple) else out
    return logits


def step(model: Decoder, ids: Tensor, train: Tensor, top: int) -> float:
    """One step of SGD on one sequence; returns the largest gradient. What learns: all of the top
    blocks, and the last norm. Parameters of one memory are one weight.
    """
    owners = [*model.blocks[len(model.blocks) - top :], model.norm]
    learn = {p.data_ptr(): p for owner in owners for p in owner.parameters()}
    logits, carries = logits_of(model, ids[None])[0], train[1:].bool()
    F.cross_entropy(logits[:-1][carries], ids[1:][carries], reduction="sum").backward()
    scale = 0.0
    with torch.no_grad():
        for memory, weight in learn.items():
            gradients = [
                p.grad for p in model.parameters() if p.data_ptr() == memory and p.grad is not None
            ]
            if gradients:
                total = torch.stack(gradients).sum(0)
                weight.sub_(RATE * total)
                scale = max(scale, float(total.abs().max()))
    return scale


def differences(seed: int, config: tintc.SimulatorConfig) -> list[str]:
    """What a simulator of the seed's decoder gets wrong. Raises what `compile` raises."""
    # Two of one kind: a copy would not share the memory that the model's weights share.
    (model, _), (expected, _) = decoder(seed), decoder(seed)
    simulator = tintc.compile(model, config, check="none")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (2, 7), generator=generator)
    train = (torch.rand(2, 7, generator=generator) < 0.7).long()
    train[:, 2] = 1
    scale = step(expected, ids[1], train[1], config.layers or 2)
    with torch.inference_mode():
        out = simulator(ids, train, return_initial=True)
        found = simulator.updated_state_dict(ids, train, 1)
        before, after = logits_of(model, ids), logits_of(expected, ids[1:])
    assert out.initial_logits is not None
    wrong = [] if error(out.initial_logits, before) < LIMIT else ["initial logits"]
    wanted = expected.state_dict()
    wrong += [f"names {sorted(set(found) ^ set(wanted))}"] if set(found) != set(wanted) else []
    for name, value in wanted.items():
        off = float((found[name] - value).abs().max()) / RATE
        if not off <= LIMIT * scale + 1e-13:
            wrong.append(f"{name} by {off / scale if scale else off:.1e}")
    return wrong + ([] if error(out.logits[1:], after) < LIMIT else ["logits"])


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=[pytest.mark.slow] * (n >= 15)) for n in range(300)]
)
def test_a_step_is_exact_or_refused(seed: int) -> None:
    config = tintc.SimulatorConfig.exact(inner_lr=RATE, layers=1 if seed % 3 == 2 else None)
    try:
        wrong = differences(seed, config)
    except UnsupportedModelError as refusal:
        lines = str(refusal).splitlines()
    except BaseException:
        counted(NAME, "crashed")
        raise
    else:
        counted(NAME, "wrong" if wrong else "compiled")
        assert not wrong, decoder(seed)[1]
        return
    assert len(lines) == 1
    counted(NAME, "refused", lines[0])


@pytest.mark.parametrize("seed", [151, 159])
def test_a_block_used_twice_goes_back_from_scored_positions_in_its_upper_use(seed: int) -> None:
    """So that its weights' factors have rows for all positions, and rows for the scored ones."""
    assert differences(seed, tintc.SimulatorConfig.exact(inner_lr=RATE)) == []
