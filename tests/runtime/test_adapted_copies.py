"""An adapted simulator can be copied, pickled and handed to others, as a simulator can."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.runtime.test_copies import WAYS
from tests.support.adapted import (
    Loaded,
    adapted_of,
    context,
    own_simulator,
    prompts,
    with_config,
)
from tests.support.every import model_of
from tests.support.grid import grid
from tests.support.models import tokens
from tests.support.tolerances import SIMULATOR, error
from tintc.ir.errors import UsageError
from tintc.runtime.adapted import Adapted

IDS, MASK = prompts()
LIMIT = SIMULATOR[torch.float64]
CHANGED = "weights have changed, or moved"


def generated(adapted: Adapted) -> Tensor:
    found: Tensor = adapted.generate(IDS, attention_mask=MASK, max_new_tokens=4, do_sample=False)
    return found


@grid(together=1, form=["weights", "factors"], way=WAYS)
def test_a_copy_is_the_same_and_its_own(form: Any, way: str) -> None:
    adapted = own_simulator("opt").adapt(**context(), form=form).select([2, 0, 1])
    expected, texts = adapted(IDS, MASK).logits, generated(adapted)
    found = WAYS[way](adapted)  # type: ignore[arg-type]
    assert type(found) is Adapted
    assert (found.form, found.index, repr(found)) == (form, (2, 0, 1), repr(adapted))
    assert found.simulator is not adapted.simulator
    assert not found.simulator._programs._emitted, "programs are emitted anew"
    assert torch.equal(found(IDS, MASK).logits, expected)
    assert torch.equal(generated(found), texts)
    with torch.no_grad():
        next(found.simulator.prefix.parameters()).zero_()
    with pytest.raises(UsageError, match=CHANGED):
        found(IDS, MASK)
    assert torch.equal(adapted(IDS, MASK).logits, expected)


def test_a_pickle_does_not_grow_with_use() -> None:
    adapted = own_simulator("opt").adapt(**context())
    before = len(pickle.dumps(adapted))
    adapted(IDS, MASK)
    generated(adapted)
    assert len(pickle.dumps(adapted)) == before


@pytest.mark.parametrize("way", WAYS)
def test_the_transformer_back_end(way: str) -> None:
    adapted = adapted_of("gpt2", backend="transformer")
    found = WAYS[way](adapted)  # type: ignore[arg-type]
    assert torch.equal(found(IDS, MASK).logits, adapted(IDS, MASK).logits)


def test_a_cache_is_copied_for_several_ends_of_a_text() -> None:
    """As `copy.deepcopy` keeps a prompt's cache in transformers."""
    adapted = adapted_of("mistral", "factors")
    cache = adapted(IDS, MASK, use_cache=True).cache
    for seed in (1, 2):
        more = tokens(3, 5, 29, seed)
        seen = torch.cat([MASK, torch.ones_like(more)], 1)
        found = adapted(more, seen, cache=copy.deepcopy(cache)).logits
        expected = adapted(torch.cat([IDS, more], 1), seen).logits[:, 12:]
        assert error(found, expected) < LIMIT
    assert cache is not None and cache.get_seq_length() == 12
    again = pickle.loads(pickle.dumps(cache))
    assert error(adapted(more, seen, cache=again).logits, expected) < LIMIT


def test_state_dicts_load_into_models_and_simulators() -> None:
    """The model's, and the simulator's own, whose new weights then are those of the context."""
    adapted, other = with_config("opt"), own_simulator("opt")
    missing = copy.deepcopy(model_of("opt")).load_state_dict(adapted.state_dict(1))
    assert not missing.missing_keys and not missing.unexpected_keys
    own = {f"prefix.{name}": value for name, value in adapted.state_dict(1).items()}
    result = other.load_state_dict(own, strict=False)
    assert {*result.unexpected_keys} == {f"prefix.{alias}" for alias in other.program.aliases}
    assert all(name.removeprefix("prefix.") not in own for name in result.missing_keys)
    found = other.predict_initial(IDS, MASK)
    for row, context_row in enumerate((1, 1, 1)):
        expected = Loaded("opt", adapted).logits(context_row, IDS[row, MASK[row].bool()])
        assert error(found[row][MASK[row].bool()], expected) < LIMIT


class TestChangedWeights:
    """What was learned belongs to the weights that it was learned from."""

    @pytest.mark.parametrize("change", ["written", "loaded", "another dtype", "an outer step"])
    def test_are_refused(self, change: str) -> None:
        simulator = own_simulator("opt")
        adapted = simulator.adapt(**context())
        adapted(IDS, MASK)
        state = simulator.state_dict()
        if change == "written":
            with torch.no_grad():
                next(simulator.prefix.parameters()).add_(1)
        elif change == "loaded":
            simulator.load_state_dict({name: value * 1.5 for name, value in state.items()})
        elif change == "another dtype":
            simulator.float()
        else:
            optimizer = torch.optim.SGD(simulator.parameters(), lr=0.1)
            loss = simulator(**context(), labels=context()["input_ids"]).loss
            assert loss is not None
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        for use in (
            lambda: adapted(IDS),
            lambda: generated(adapted),
            lambda: pickle.dumps(adapted),
            lambda: copy.deepcopy(adapted),
        ):
            with pytest.raises(UsageError, match=CHANGED):
                use()
        assert simulator.adapt(**context())(IDS, MASK).logits.isfinite().all()

    def test_what_changes_no_weight_is_allowed(self) -> None:
        simulator = own_simulator("opt")
        adapted = simulator.adapt(**context())
        expected = adapted(IDS, MASK).logits
        simulator.train().eval().requires_grad_(False).zero_grad()
        simulator.to("cpu")
        simulator.inner_lr.data.zero_()
        simulator.optimizations = ()
        assert error(adapted(IDS, MASK).logits, expected) < LIMIT


@pytest.mark.parametrize("form", ["weights", "factors"])
def test_inference_mode_may_come_and_go(form: Any) -> None:
    simulator = own_simulator("opt")
    with torch.inference_mode():
        inside = simulator.adapt(**context(), form=form)
        first = inside(IDS, MASK, use_cache=True)
    outside = simulator.adapt(**context(), form=form)
    assert not outside(IDS, MASK).logits.requires_grad
    more, seen = IDS[:, -2:], torch.cat([MASK, MASK[:, -2:]], 1)
    expected = inside(more, seen, cache=first.cache).logits
    assert torch.equal(inside(IDS, MASK).logits, outside(IDS, MASK).logits)
    with torch.inference_mode():
        whole = outside(torch.cat([IDS, more], 1), seen).logits[:, 12:]
        assert torch.equal(generated(outside), generated(inside))
    assert error(expected, whole) < LIMIT


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_a_stream_goes_on_in_its_copy(way: str) -> None:
    stream, ids = own_simulator("opt").stream(1, chunk=3, context=5), tokens(1, 10, 28) + 1
    stream.step(ids[:, :4])
    found = WAYS[way](stream)  # type: ignore[arg-type]
    assert found.simulator is not stream.simulator
    assert torch.equal(found.step(ids[:, 4:7]).losses, stream.step(ids[:, 4:7]).losses)
    assert torch.equal(found.step(ids[:, 7:]).losses, stream.step(ids[:, 7:]).losses)
