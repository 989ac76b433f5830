"""A simulator can be pickled, copied and handed to another process, as other modules can."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tintc
from tests.support.artifacts import source_directory
from tests.support.grid import grid
from tests.support.models import ragged_train_mask, tokens
from tintc.ir.config import SimulatorConfig
from tintc.runtime.simulator import Simulator

IDS, TRAIN = tokens(3, 11, 29), ragged_train_mask(3, 11)


def pickled(simulator: Simulator) -> Any:
    return pickle.loads(pickle.dumps(simulator))


def saved(simulator: Simulator) -> Any:
    file = io.BytesIO()
    torch.save(simulator, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Simulator], Any]] = {
    "pickle": pickled,
    "torch.save": saved,
    "deepcopy": copy.deepcopy,
}


def compiled(backend: str) -> Simulator:
    config = SimulatorConfig.paper(inner_lr=0.01)
    return tintc.compile(str(source_directory()), config, backend=backend, check="none")


def logits(simulator: Simulator) -> Tensor:
    with torch.inference_mode():
        return simulator(IDS, TRAIN).logits


@grid(together=1, backend=["fused", "transformer"], way=WAYS)
def test_a_copy_is_the_same_and_its_own(backend: str, way: str) -> None:
    simulator = compiled(backend)
    expected = logits(simulator)  # with a program that is there already
    found = WAYS[way](simulator)
    assert type(found) is Simulator
    assert torch.equal(logits(found), expected)
    assert repr(found) == repr(simulator)
    assert list(found.state_dict()) == list(simulator.state_dict())
    assert found.tokenizer("The river").input_ids == simulator.tokenizer("The river").input_ids
    found.inner_lr.data.zero_()
    assert not torch.equal(logits(found), expected)
    assert torch.equal(logits(simulator), expected)


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_keeps_what_was_set(way: str) -> None:
    simulator = compiled("fused").double().eval()
    simulator.optimizations = ("chunk_head",)
    simulator.prefix.requires_grad_(False)
    simulator.inner_lr.data.fill_(0.25)
    found = WAYS[way](simulator)
    assert (found.dtype, found.training, found.optimizations) == (
        torch.float64,
        False,
        ("chunk_head",),
    )
    assert float(found.inner_lr.detach()) == 0.25
    assert [p.requires_grad for p in found.parameters()] == [
        p.requires_grad for p in simulator.parameters()
    ]
    assert torch.equal(logits(found), logits(simulator))
    assert tintc.parameter_report(found) == tintc.parameter_report(simulator)


def test_a_pickle_of_a_transformer_holds_no_structural_constants() -> None:
    simulator = compiled("transformer")
    assert set(simulator.__getstate__()["_modules"]) == {"prefix"}
    assert set(pickled(simulator)._modules) == {"prefix", "structure"}


def _logits_elsewhere(simulator: Simulator, into: Any) -> None:
    into.put(logits(simulator).numpy())


@pytest.mark.slow  # another process imports torch
def test_another_process_computes_the_same() -> None:
    simulator, context = compiled("fused"), torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_logits_elsewhere, args=(simulator, results))
    process.start()
    found = torch.from_numpy(results.get(timeout=300))
    process.join(timeout=60)
    assert process.exitcode == 0
    assert torch.equal(found, logits(simulator))
