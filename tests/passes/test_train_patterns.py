"""What `train` and `lr_scale` select, what is computed for it, and what they refuse."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.models import opt, randomized
from tests.support.stages import Stage, stage
from tests.support.toys import toy
from tintc.ir.config import SimulatorConfig
from tintc.ir.dialect import argument
from tintc.ir.errors import UsageError
from tintc.ir.node_meta import info
from tintc.ir.selection import Selection, shortened


def exact(*patterns: str, **more: Any) -> SimulatorConfig:
    return SimulatorConfig.exact(train=patterns, **more)


def selected(config: SimulatorConfig, model: nn.Module | None = None) -> Stage:
    return stage("select_trainable", config, model=model)


def trained(at: Stage) -> set[str]:
    return {
        str(info(argument(n, "parameter")).parameter) for n in at.graph.nodes if info(n).trainable
    }


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (("blocks.1.down.*",), {"blocks.1.down.weight", "blocks.1.down.bias"}),
        (("*.norm_1.weight",), {"blocks.0.norm_1.weight", "blocks.1.norm_1.weight"}),
        (("ln_f.bias", "*.0.up.bias"), {"ln_f.bias", "blocks.0.up.bias"}),
        (("*.1.attention.*",), {f"blocks.1.attention.{n}" for n in
                                ("qkv.weight", "qkv.bias", "out.weight")}),
    ],
)  # fmt: skip
def test_what_matches_is_trained_and_nothing_else(
    patterns: tuple[str, ...], expected: set[str]
) -> None:
    for preset in (SimulatorConfig.paper, SimulatorConfig.exact):  # norm_update says nothing here
        assert trained(selected(preset(train=patterns))) == expected


def test_a_factor_of_zero_is_not_trained() -> None:
    last_wins = {"*": 0, "*.up.*": 0.5, "*.1.up.bias": 0.0}
    expected = {"blocks.0.up.weight", "blocks.0.up.bias", "blocks.1.up.weight"}
    assert trained(selected(SimulatorConfig.exact(lr_scale=last_wins))) == expected
    assert trained(selected(exact("*.1.*", lr_scale=last_wins))) == {"blocks.1.up.weight"}


def test_factors() -> None:
    config = SimulatorConfig(lr_scale={"a.*": 2, "*.bias": 0.5, "tied": -1})
    found = Selection(config, {"tied": "e.weight"})
    names = ("a.weight", "a.bias", "e.weight", "b")
    assert [found.factor(name) for name in names] == [2, 0.5, -1, 1]


def test_blocks_are_those_that_hold_a_trained_weight() -> None:
    facts = selected(exact("*.1.up.*", "ln_f.*")).context.facts
    assert (facts.blocks, facts.trained_blocks, facts.block_path) == (2, 1, "blocks")


def test_no_stack_of_blocks_is_needed() -> None:
    found = selected(exact("linear.*"), toy(lambda m, x, ids: m.linear(x)))
    assert trained(found) == {"linear.weight", "linear.bias"}
    facts = found.context.facts
    assert (facts.blocks, facts.block_path, facts.block_parts) == (1, "", (("linear",),))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"train": ("blocks.*.upp.weight",)},
            r"train has the pattern 'blocks\.\*\.upp\.weight', which matches no parameter of this "
            r"model; the nearest are blocks\.\*\.up\.weight",
        ),
        ({"train": ("*.up.*", "Ln_f.*")}, r"train has the pattern 'Ln_f\.\*', .* ln_f\."),
        ({"lr_scale": {"*.down.wieght": 0.5}}, r"lr_scale has the pattern '\*\.down\.wieght', .*"
         r"blocks\.\*\.down\.weight"),
    ],
)  # fmt: skip
def test_a_pattern_that_matches_nothing(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        selected(SimulatorConfig.exact(**config))


def test_nothing_is_left() -> None:
    with pytest.raises(UsageError, match=r"lr_scale gives every weight .* factor 0"):
        selected(SimulatorConfig.exact(lr_scale={"*": 0}))
    with pytest.raises(UsageError, match=r"train matches blocks\.\*\.up\.bias \(x2\) only"):
        selected(exact("*.up.bias", lr_scale={"*": 0}))
    with pytest.raises(UsageError, match=r"train matches scale only, which no operator reads"):
        selected(exact("scale"), toy(lambda m, x, ids: m.linear(x)))


def test_no_gradient_reaches() -> None:
    """Queries and keys under `value`, and nothing else matches."""
    model, config = opt(), SimulatorConfig.paper(train="*.q_proj.*")
    with pytest.raises(
        UsageError,
        match=r"no gradient reaches .*layers\.\*\.self_attn\.q_proj\.weight \(x2\).*value",
    ):
        stage("verify", config, model=model)
    # beside others they are left as they are
    stage("verify", SimulatorConfig.paper(train=("*.q_proj.*", "*.fc1.bias")), model=model)


class Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(19, 6), nn.Linear(6, 19)
        self.register_buffer("rows", torch.randn(12, 6))

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.tokens(ids) + self.rows[: ids.shape[1]])
        return logits


def test_buffers_are_no_parameters() -> None:
    model = randomized(Constants()).double()
    with pytest.raises(UsageError, match=r"'rows', which matches buffers only: rows"):
        selected(exact("rows"), model)


def work(at: Stage) -> Counter[tuple[str, str, str]]:
    """(phase, module, operator) of what the backward pass and descents do."""
    return Counter(
        (str(info(n).phase), info(n).module, n.target._schema.name.removeprefix("tint::"))  # type: ignore[union-attr]
        for n in at.graph.nodes
        if info(n).phase in ("backward", "descent") and hasattr(n.target, "_schema")
    )


def test_the_backward_pass_stops_at_the_lowest_trained_weight() -> None:
    found = work(stage("verify", exact("*.1.up.bias")))
    inside = {key: count for key, count in found.items() if key[1].startswith("blocks")}
    assert inside == {
        ("backward", "blocks.1.down", "linear_backward"): 1,
        ("backward", "blocks.1.act", "activation_backward"): 1,
        ("descent", "blocks.1.up", "bias_descent"): 1,
    }


def test_nothing_is_computed_for_queries_that_do_not_learn() -> None:
    """Of the lowest trained attention only v learns: nothing goes through its scores."""
    model, patterns = opt(), ("*.layers.0.self_attn.v_proj.weight",)
    operators = [operator for _, module, operator in work(
        stage("verify", exact(*patterns), model=model)
    ) if ".layers.0." in module]  # fmt: skip
    assert "attention_backward_value" in operators
    assert "attention_backward_full" not in operators


def test_a_second_step_repeats_no_block_below() -> None:
    at = stage("verify", exact("*.1.up.bias", steps=2))
    again = {
        info(n).module
        for n in at.graph.nodes
        if info(n).phase == "forward" and (info(n).step or 0) > 0
    }
    assert not [module for module in again if module.startswith("blocks.0")]


def test_lists_of_names() -> None:
    names = [f"h.{i}.mlp.weight" for i in range(3)] + ["e.weight"]
    assert shortened(names) == "h.*.mlp.weight (x3), e.weight"
    assert shortened([f"w_{i}" for i in "abcdefgh"], 2) == "w_a, w_b and 6 more"
