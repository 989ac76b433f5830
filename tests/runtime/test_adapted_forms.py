"""Own weights and factors: which rules have factors, which form decoding gets, what is shared, and
how sequences are chosen and put together.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.oracle.compare import assert_same_state
from tests.oracle.reference import reference
from tests.support.adapted import (
    EXACT,
    Loaded,
    adapted_of,
    by_chunks,
    context,
    prompts,
    rows_apart,
    with_config,
)
from tests.support.every import model_of, simulator_of
from tests.support.grid import some
from tests.support.rules import ALONE, RATE
from tests.support.tolerances import SIMULATOR, error
from tintc.compiler.casts import no_casts
from tintc.evaluate.speed.benchmark import updated_parameters
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import UsageError
from tintc.runtime.adapted import Adapted, stack
from tintc.runtime.decoding.form import factored_slots
from tintc.runtime.decoding.program import _Bound

LIMIT = SIMULATOR[torch.float64]
# Their directions are sums of products of tokens; those of the others are not.
SUMS = (
    *("momentum", "nesterov", "linear", "cosine", "clip", "normalize", "decay", "scales", "frozen"),
    *("drift", "clipped momentum"),
)
STEPS = 3
RULES = ["sgd", *ALONE]


def config_of(rule: str, steps: int = STEPS) -> SimulatorConfig:
    return SimulatorConfig.exact(inner_lr=RATE, steps=steps, **ALONE.get(rule, {}))


@some("rule", RULES, default=["sgd", "clipped momentum", "adam"])
def test_every_rule(rule: str) -> None:
    """Both forms give the weights of autograd and torch.optim, and one another's logits."""
    config, inputs = config_of(rule), context()
    simulator, (ids, mask) = simulator_of("llama", True, config), prompts()
    with no_casts():
        expected = reference(
            model_of("llama"), config, **inputs, trained=updated_parameters(simulator)
        )
    weights = simulator.adapt(**inputs, form="weights")
    found = [weights]
    if rule == "sgd" or rule in SUMS:
        found.append(simulator.adapt(**inputs, form="factors"))
        assert found[1].form == "factors" and found[1].with_form("weights").form == "weights"
        found.append(found[1].with_form("weights"))
    else:
        with pytest.raises(UsageError, match="no sum of products of tokens"):
            simulator.adapt(**inputs, form="factors")
    logits = weights(ids, mask).logits
    for adapted in found:
        for index in range(len(adapted)):
            assert_same_state(adapted.state_dict(index), expected, index, LIMIT)
        assert error(adapted(ids, mask).logits, logits) < LIMIT
        assert error(by_chunks(adapted, ids, mask, [6, 1]), logits) < LIMIT


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_a_loop_over_steps_keeps_weights(rule: str) -> None:
    config, inputs = config_of(rule, 6), context()
    assert config.looped
    simulator = simulator_of("opt", True, config)
    adapted = simulator.adapt(**inputs)
    assert adapted.form == "weights"
    with pytest.raises(UsageError, match="6 steps are a loop, which keeps own weights"):
        simulator.adapt(**inputs, form="factors")
    with no_casts():
        expected = reference(
            model_of("opt"), config, **inputs, trained=updated_parameters(simulator)
        )
    assert_same_state(adapted.state_dict(1), expected, 1, LIMIT)


def test_steps_and_truncated_blocks() -> None:
    """The paper's rule, and two steps of the top block alone."""
    for config in (
        SimulatorConfig.paper(inner_lr=RATE, steps=2),
        SimulatorConfig.exact(inner_lr=RATE, steps=2, layers=1),
    ):
        simulator, (ids, mask) = simulator_of("gpt2", True, config), prompts()
        for form in ("weights", "factors"):
            adapted = simulator.adapt(**context(), form=form)  # type: ignore[arg-type]
            loaded = Loaded("gpt2", adapted)
            for row, found in enumerate(rows_apart(adapted(ids, mask).logits, mask)):
                assert error(found, loaded.logits(row, ids[row, mask[row].bool()])) < LIMIT


@settings(max_examples=20)
@given(contexts=st.integers(1, 12), segment=st.integers(1, 40), steps=st.sampled_from((1, 2)))
def test_auto_reads_fewer_numbers(contexts: int, segment: int, steps: int) -> None:
    """Counted matrix by matrix: what one token of every context reads of weights and factors."""
    simulator = simulator_of("llama", True, config_of("sgd", steps))
    chosen = factored_slots(simulator, "auto", contexts, segment)
    possible = factored_slots(simulator, "factors", contexts, segment)
    assert possible
    for slot in possible:
        rows, columns = simulator.program.layout.prefix[slot].shape
        own = sum(rows * columns for _ in range(contexts))
        factors = rows * columns + sum(steps * segment * (rows + columns) for _ in range(contexts))
        assert (slot in chosen) == (factors < own)


def test_auto_holds_some_slots_as_factors() -> None:
    """Of 12 contexts with one target, every matrix; then numbers stay the same."""
    simulator, inputs = simulator_of("llama", True, EXACT), context(12, 9)
    inputs["train_mask"] = (inputs["attention_mask"].cumsum(-1) == 2).long()
    mixed, weights = (simulator.adapt(**inputs, form=form) for form in ("auto", "weights"))
    assert mixed.form == "factors"
    ids, mask = prompts(12)
    assert error(mixed(ids, mask).logits, weights(ids, mask).logits) < LIMIT
    assert "factors" in repr(mixed) and "12 sequences" in repr(mixed)


def apart(adapted: Adapted, index: list[int], ids: Tensor, mask: Tensor) -> Tensor:
    """Each row alone, under the weights of its sequence."""
    each = [
        adapted.select(context)(ids[row : row + 1], mask[row : row + 1]).logits
        for row, context in enumerate(index)
    ]
    return torch.cat(each)


@settings(max_examples=12)
@given(
    index=st.lists(st.integers(-3, 2), min_size=1, max_size=5),
    each=st.integers(1, 2),
    form=st.sampled_from(("weights", "factors")),
)
def test_select_takes_any_rows(index: list[int], each: int, form: Any) -> None:
    adapted = adapted_of("opt", form)
    chosen = adapted.select(index)
    assert len(chosen) == len(index)
    ids, mask = prompts(len(index) * each)
    wanted = [context for context in index for _ in range(each)]
    expected = apart(adapted, wanted, ids, mask)
    assert error(chosen(ids, mask).logits, expected) < LIMIT
    assert error(by_chunks(chosen, ids, mask, [5, 4, 1]), expected) < LIMIT
    again = chosen.select(torch.tensor([len(index) - 1, 0]))
    assert again.index == (index[-1] % 3, index[0] % 3)
    assert again.updates is adapted.updates, "nothing is copied"
    assert adapted.select(torch.tensor(1)).index == adapted.select(range(1, 2)).index == (1,)


@pytest.mark.parametrize("forms", list(itertools.product(("weights", "factors"), repeat=2)))
def test_stacks(forms: Any) -> None:
    """Of unequal numbers of training tokens, and of a choice of rows."""
    simulator, (ids, mask) = simulator_of("llama", True, EXACT), prompts(5)
    one = simulator.adapt(**context(3, 9), form=forms[0])
    two = simulator.adapt(**context(2, 6, seed=4), form=forms[1]).select([1, 0, 1])
    found = stack([one.select([2, 0]), two])
    assert len(found) == 5
    assert found.form == ("factors" if forms == ("factors", "factors") else "weights")
    expected = torch.cat(
        [one.select([2, 0])(ids[:2], mask[:2]).logits, two(ids[2:], mask[2:]).logits]
    )
    assert error(found(ids, mask).logits, expected) < LIMIT
    state, wanted = found.state_dict(2), two.state_dict(0)
    assert all(error(state[name], wanted[name]) < LIMIT for name in wanted)


def given_to_programs(
    monkeypatch: pytest.MonkeyPatch, adapted: Adapted, **options: Any
) -> dict[int, int]:
    """Storage -> bytes, of what `generate` gave to programs as weights or factors."""
    seen: dict[int, int] = {}
    run = _Bound._run

    def noted(self: _Bound, inputs: Any, past: Any) -> Any:
        found = run(self, inputs, past)
        for value in self._static or ():
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(_Bound, "_run", noted)
        ids, mask = prompts()
        adapted.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, **options)
    return seen


@pytest.mark.parametrize("form", ["weights", "factors"])
def test_memory_does_not_grow_with_beams(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams, several continuations and chosen rows read the very tensors that were learned."""
    adapted = with_config("opt", form)
    one = given_to_programs(monkeypatch, adapted)
    learned = {v.untyped_storage().data_ptr() for v in adapted.updates.values.values()}
    assert learned <= set(one)
    assert given_to_programs(monkeypatch, adapted, num_beams=8) == one
    sampled = {"do_sample": True, "num_return_sequences": 4}
    assert given_to_programs(monkeypatch, adapted.select([2, 0, 2]), num_beams=8) == one
    with torch.random.fork_rng():
        ids, mask = prompts()
        assert (
            adapted.generate(ids, attention_mask=mask, max_new_tokens=2, **sampled).shape[0] == 12
        )
