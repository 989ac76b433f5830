"""Inner rules on what patterns name: embeddings and head too, against torch.optim in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.compiler.test_train import matched, untied_opt
from tests.oracle.reference import reference
from tests.support.models import gpt2, opt, simulate, tokens
from tests.support.rules import ALONE, RATE
from tests.support.tolerances import SIMULATOR, error
from tintc.compiler.casts import no_casts
from tintc.ir.config import SimulatorConfig

LIMIT = SIMULATOR[torch.float64]
MODELS: dict[str, Any] = {
    "tied": (opt, ("lm_head.weight", "*.0.fc1.*")),
    "untied": (untied_opt, ("lm_head.weight", "*embed*", "*.1.fc1.weight")),
    "positions": (gpt2, ("*.wpe.weight", "*.ln_f.*")),
}
SCALES = {"tied": {"*embed_tokens*": 0.5}, "untied": {"*embed*": 0.5, "lm_head*": 2.0},
          "positions": {"*wpe*": 0.5}}  # fmt: skip
RULES = {name: rule for name, rule in ALONE.items() if "lr_scale" not in rule}


@pytest.fixture(autouse=True)
def _exact_reference() -> Iterator[None]:
    with no_casts():
        yield


def assert_follows(model: nn.Module, patterns: tuple[str, ...], **rule: Any) -> None:
    config = SimulatorConfig.exact(train=patterns, inner_lr=RATE, **rule)
    simulator = simulate(model, config)
    ids, mask = tokens(2, 9, 29), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    expected = reference(model, config, ids, mask, trained=matched(model, patterns))
    for optimize in (True, False):
        simulator.optimizations = optimize
        with torch.inference_mode():
            assert error(simulator(ids, mask).logits, expected.logits) < LIMIT
            for index, state in enumerate(expected.states):
                found = simulator.updated_state_dict(ids, mask, index)
                own = state.keys() - simulator.program.aliases.keys()
                wrong = {name for name in own if not error(found[name], state[name]) < LIMIT}
                assert wrong == set(), (optimize, index)


@pytest.mark.parametrize("steps", [2, 6])  # one program for each step, and one in a loop
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule(rule: str, model: str, steps: int) -> None:
    make, patterns = MODELS[model]
    assert_follows(make(), patterns, steps=steps, **RULES[rule])


@pytest.mark.parametrize("model", MODELS)
def test_factors_of_the_rate(model: str) -> None:
    make, patterns = MODELS[model]
    assert_follows(make(), patterns, steps=3, lr_scale=SCALES[model], momentum=0.5)
