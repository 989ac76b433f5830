"""tintc.compiler.frontend.rope: rotary modules of transformers, called in its context."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from tests.support.families import GROUPED, builder
from tests.support.long_rotary import LONG, tokens_of
from tintc.compiler.driver import lower
from tintc.compiler.frontend.capture import capture
from tintc.compiler.frontend.model_checks import build_without_weights
from tintc.compiler.frontend.rope import rope_of_each_call
from tintc.ir.config import SimulatorConfig

LENGTHS = (7, 24, 10, 11, 7)  # a module keeps what it computed for 24 tokens


@pytest.mark.parametrize("name", LONG)
def test_every_call_is_like_the_first(name: str) -> None:
    """To the bit, in whatever order they come; what the modules hold stays as it is."""
    model = LONG[name]()
    before = {key: value.clone() for key, value in model.named_buffers()}
    with torch.no_grad(), rope_of_each_call(model):
        for n in LENGTHS:
            ids = tokens_of(1, n)
            expected = copy.deepcopy(LONG[name]())(ids, use_cache=False).logits
            assert torch.equal(model(ids, use_cache=False).logits, expected)
    after = dict(model.named_buffers())
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_it_ends_where_a_model_fails() -> None:
    model = LONG["llama, dynamic"]()
    with pytest.raises(IndexError), rope_of_each_call(model):
        model(torch.tensor([[1000]]))
    assert not any("forward" in vars(module) for module in model.modules())


def test_modules_of_fixed_frequencies_compute_what_they_did() -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    model, ids = builder("llama", **GROUPED, rope_parameters=rope)(), tokens_of(1, 24)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        with rope_of_each_call(model):
            assert torch.equal(model(ids, use_cache=False).logits, expected)


def test_a_forward_pass_that_was_replaced_is_left_alone() -> None:
    """It is somebody's own."""
    model = LONG["llama, dynamic"]()
    rotary = next(m for m in model.modules() if hasattr(m, "original_inv_freq"))

    def own(*args: object, **options: object) -> object:
        raise ValueError("mine")

    rotary.forward = own
    with rope_of_each_call(model), pytest.raises(ValueError, match="mine"):
        model(tokens_of(1, 3), use_cache=False)
    assert vars(rotary)["forward"] is own


@pytest.mark.slow
def test_on_the_meta_device_too() -> None:
    """As checks before a download, and `tintc cost`, have a model: weights without numbers."""
    config = LONG["phi3, longrope"]().config
    model = build_without_weights(config, "phi3")
    captured = dataclasses.replace(capture(model), max_tokens=64)
    program = lower(captured, SimulatorConfig.exact())
    assert program.facts.by_length == "model.layers.0.self_attn"
    assert [len(table) for table in program.tables.values()] == [2, 1, 1]
