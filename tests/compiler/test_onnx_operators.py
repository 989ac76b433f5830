"""Every operator that an export can hold has a form in ONNX's standard operators, with the numbers
that it has in torch: nothing of it is found missing by a user.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from tests.support.operators import sample
from tests.support.optimized import pruned
from tests.support.rules import ALONE
from tests.support.shapes import Draw
from tests.support.tolerances import ONNX, error
from tintc.compiler.onnx.graph import TYPES, Graph, Value
from tintc.compiler.onnx.operators import OPERATORS as FUNCTIONS
from tintc.compiler.onnx.trace import OPTIMIZATIONS as ALLOWED
from tintc.compiler.onnx.trace import WRITTEN
from tintc.ir.config import SimulatorConfig
from tintc.ir.dialect import AnyOperator, operator_of
from tintc.ir.ops import (
    OPERATORS,
    activation,
    attention,
    embedding,
    head,
    low_rank,
    norm,
    position,
    rates,
    sparse,
)
from tintc.passes.specializing import OPTIMIZATIONS

# Of the optimizations' operators: those of `trace.OPTIMIZATIONS`, of losses as an output and of
# windows of a stream.
SPECIAL = (
    low_rank.low_rank,
    low_rank.low_rank_of_scores,
    low_rank.concatenate,
    sparse.same_rows,
    sparse.rows_of_factors,
    sparse.scattered_scores,
    sparse.gathered_scores,
    rates.combine,
    rates.product,
    rates.spread,
    rates.token_products,
    rates.gradient_products,
    rates.sum_square,
    head.token_losses,
    embedding.kept_tokens,
    embedding.spread_tokens,
    embedding.kept_queries,
    attention.with_past,
    attention.own_tokens,
    attention.last_keys,
    position.past_window_mask,
)
EXPORTED = [o for o in OPERATORS.values() if o.kind != "optimization" or o in SPECIAL]


def in_onnxruntime(operator: AnyOperator, args: tuple[Any, ...], opset: int = 20) -> list[Tensor]:
    """What the operator's implementation writes, run on these arguments."""
    graph = Graph(opset, FUNCTIONS)
    fed: dict[str, Tensor] = {}

    def given(tensor: Tensor) -> Value:
        name = f"input_{len(fed)}"
        fed[name] = tensor.detach()
        return graph.input(name, tensor.shape, tensor.dtype)

    written = WRITTEN.get(operator, operator)
    with graph.scope(operator.name):
        results, _ = tree_flatten(written(*tree_map_only(Tensor, given, args)))
    returned = [graph.rename(value, f"output_{i}") for i, value in enumerate(results)]
    proto = helper.make_graph(
        graph.nodes,
        operator.name,
        graph.inputs,
        [helper.make_tensor_value_info(v.name, TYPES[v.dtype], list(v.dims)) for v in returned],
        [numpy_helper.from_array(w.cpu().numpy(), name) for name, w in graph.weights.items()],
    )
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    feed = {name: tensor.contiguous().numpy() for name, tensor in fed.items()}
    return [torch.from_numpy(array) for array in session.run(None, feed)]


def assert_same(operator: AnyOperator, args: tuple[Any, ...]) -> None:
    wanted, _ = tree_flatten(operator(*args))
    found = in_onnxruntime(operator, args)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert error(one.double(), other.detach().double()) < ONNX[torch.float64]


@pytest.mark.parametrize("own", [False, True], ids=["shared weights", "own weights"])
@pytest.mark.parametrize("operator", EXPORTED, ids=repr)
def test_every_operator(operator: AnyOperator, own: bool) -> None:
    for size in (3, 4):  # odd and even: the samples' options depend on it
        assert_same(operator, sample(operator.name, 2, 5, size, 6, own, Draw(0)))


@pytest.mark.parametrize("kind", activation.KINDS)
def test_every_activation(kind: str) -> None:
    x, dy = (Draw(seed)(2, 5, 4) for seed in (0, 1))
    assert_same(activation.activation_forward, (x, kind))
    for gradient in ("exact", "first_order"):
        assert_same(activation.activation_backward, (dy, x, kind, gradient, 1000.0))


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", norm.KINDS)
def test_every_norm(kind: str, heads: int) -> None:
    draw = Draw(0)
    x, dy, gamma = draw(2, 5, 6), draw(2, 5, 6), draw(6 // heads)
    rate = torch.tensor(0.1, dtype=torch.float64)
    assert_same(norm.norm_forward, (x, gamma, None, 1e-5, kind, heads, 1.0))
    assert_same(norm.norm_descent, (gamma, dy, x, 1e-5, kind, heads, rate))
    for gradient in ("exact", "first_order"):
        how = (gradient, 1000.0)
        assert_same(norm.norm_backward, (dy, x, gamma, 1e-5, kind, heads, 0.0, *how))


def test_no_other_operator_reaches_the_export() -> None:
    """What `trace` lets the optimizer do emits the operators above alone."""
    steps = [step for step in OPTIMIZATIONS if step.name in ALLOWED]
    rules = ({}, {"train": ("*",)}, *ALONE.values())
    for outputs in (("logits", "initial_logits"), ("losses", "initial_losses")):
        for rule in rules:
            config = SimulatorConfig.exact(steps=2, **rule)
            found = pruned(config, *steps, outputs=outputs, differentiable=True)
            called = {operator_of(node) for node in found.graph.nodes} - {None}
            assert called <= set(EXPORTED)
            assert {o for o in called if o and o.whole} <= set(WRITTEN)
