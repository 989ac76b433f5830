"""Mixtures of experts are captured with the implementation that looks their weights up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.support.toy_types import toy_model
from tintc.compiler.frontend.capture import capture
from tintc.compiler.frontend.experts import experts_looked_up


class Wrapped(nn.Module):
    """A module of one's own around a model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.inner(input_ids, use_cache=False).logits
        return logits


def test_experts_are_captured_and_the_model_is_left_as_it_was() -> None:
    model = toy_model("mixtral")
    before = model.get_experts_implementation()
    graph = capture(Wrapped(model)).graph
    called = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert "aten.topk.default" in called
    assert not {"aten.nonzero.default", "aten.histc.default"} & called
    assert model.get_experts_implementation() == before == {"": "eager"}


def test_both_implementations_agree() -> None:
    model = toy_model("mixtral")
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        looped = model(ids).logits
        with experts_looked_up(model):
            assert model.get_experts_implementation() == {"": "batched_mm"}
            torch.testing.assert_close(model(ids).logits, looped, rtol=1e-12, atol=1e-12)


def test_an_error_switches_back() -> None:
    model = toy_model("mixtral")
    with pytest.raises(KeyError), experts_looked_up(model):
        raise KeyError
    assert model.get_experts_implementation() == {"": "eager"}
