"""A trained head that is untied is a product like any other: its update may be held as factors."""

import torch

import tintc
from tests.support.families import FAMILIES
from tests.support.models import ragged_train_mask, tokens
from tests.support.tolerances import SIMULATOR, error
from tintc.ir.config import SimulatorConfig


def test_scores_as_own_weights_do() -> None:
    config = SimulatorConfig.exact(inner_lr=0.05, train=("*",))
    simulator = tintc.compile(FAMILIES["llama"].build(), config, check="none")
    ids, mask = tokens(3, 9, 19, seed=3), ragged_train_mask(3, 9, seed=2)
    factors = simulator.adapt(ids, mask, form="factors")
    weights = simulator.adapt(ids, mask, form="weights")
    assert "lm_head.weight" in factors.updates.factored
    for rows, index in ((ids, [0, 1, 2]), (ids, [1]), (ids.repeat(2, 1), [0, 1])):
        found = factors.select(index)(rows, logits_to_keep=2).logits
        expected = weights.select(index)(rows).logits[:, -2:]
        assert error(found, expected) < SIMULATOR[torch.float64]
