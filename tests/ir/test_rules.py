"""Rule tables: one rule for each operator that needs one, none for others."""

import pytest
import torch
from torch import Tensor, fx

from tintc.ir.dialect import declared, operator
from tintc.ir.errors import CompilerBug
from tintc.ir.ops import OPERATORS
from tintc.ir.ops.elementwise import multiply, residual
from tintc.ir.ops.linear import bias_descent, linear_descent, linear_forward
from tintc.ir.ops.norm import norm_descent
from tintc.ir.ops.shapes import same_shape
from tintc.ir.rules import RuleTable
from tintc.passes.train import build_backward, build_descent
from tintc.runtime.backends.transformer import rules


def table() -> RuleTable:  # type: ignore[type-arg]
    return RuleTable("toy", needed_by=lambda o: o in (linear_descent, bias_descent, norm_descent))


def test_a_missing_rule_is_named() -> None:
    toy = table()
    toy(linear_descent, bias_descent)(print)
    with pytest.raises(CompilerBug, match=r"^tint\.norm_descent has no toy rule$"):
        toy.complete()
    toy(norm_descent)(print)
    assert toy.complete() is toy


def test_a_rule_that_nothing_would_call() -> None:
    toy = table()
    toy(linear_descent, bias_descent, norm_descent, residual)(print)
    with pytest.raises(CompilerBug, match=r"^tint\.residual has a toy rule and needs none$"):
        toy.complete()


def test_two_rules_of_one_operator() -> None:
    toy = table()
    toy(norm_descent)(print)
    with pytest.raises(CompilerBug, match=r"tint\.norm_descent has two toy rules"):
        toy(norm_descent)(len)


def test_the_rule_of_a_node() -> None:
    toy, graph = table(), fx.Graph()
    toy(norm_descent)(print)
    x = graph.placeholder("x")
    nodes = [
        graph.call_function(called, (x,))
        for called in (norm_descent.target, multiply.target, torch.relu)
    ]
    assert [toy.of(node) for node in (x, *nodes)] == [None, print, None, None]


def test_every_table_is_complete() -> None:
    for checked in (build_backward.RULES, build_descent.RULES, rules.RULES):
        assert checked.complete() is checked


def test_an_operator_is_declared_once() -> None:
    def residual(x: Tensor) -> Tensor:
        return x

    with pytest.raises(CompilerBug, match=r"tint\.residual is declared twice"):
        operator("(Tensor x) -> Tensor", shape=same_shape, meaning="a second one")(residual)
    assert dict(declared()) == dict(OPERATORS)


def test_an_operator_is_its_implementation_and_names_its_weights() -> None:
    assert linear_forward.__doc__ == linear_forward.implementation.__doc__
    assert linear_forward.__module__ == "tintc.ir.ops.linear"
    for found in OPERATORS.values():
        arguments = {argument.name for argument in found.target._schema.arguments}
        assert set(found.weights) <= arguments
        assert f"tint.{found.name}" == repr(found)
