"""The passes of adapting and decoding: what they change, and that they change no number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.models import gpt2
from tests.support.optimized import LIMIT, calls, exact, optimized
from tests.support.stages import Stage, assert_golden, inputs, numbers, printed, stage
from tests.support.tolerances import error
from tintc.ir.builder import outputs
from tintc.ir.choices import Choices, Contexts
from tintc.ir.config import SimulatorConfig
from tintc.ir.context import Context
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import linear_forward, prefix
from tintc.ir.outputs import Output
from tintc.ir.program import Program
from tintc.passes.analysis.factored import factorable
from tintc.passes.decode.factored_updates import factored_updates
from tintc.passes.decode.given_updates import given_updates
from tintc.passes.decode.grouped_rows import grouped_rows
from tintc.runtime.specialize.optimize import optimize

CONFIGS = {
    "exact": exact(),
    "3 steps with momentum": exact(steps=3, momentum=0.9, decay=0.1),
    "clipped": exact(clip_norm=0.5),
}


def lowered(config: SimulatorConfig | None = None, **choices: Any) -> Stage:
    """The whole lowered graph, with every slot's updates as factors unless `choices` say which."""
    at = stage("verify", config or exact(), model=choices.pop("model", None))
    old = at.context
    known = {"factored": frozenset(factorable(at.graph)), **choices}
    context = Context(
        old.config, old.tensors, old.constants, old.facts, old.tables, old.layout, Choices(**known)
    )
    return Stage(at.graph, context)


def before_all(at: Stage) -> Any:
    return numbers(at, inputs(batch=3, vocab=at.context.facts.vocab_size))


def given_values(at: Stage, values: dict[str, Tensor]) -> dict[str, Any]:
    """Every input by name; those that are updates by their slot."""
    found = dict(inputs(batch=3, vocab=at.context.facts.vocab_size))
    for node in at.graph.find_nodes(op="placeholder"):
        if (slot := info(node).slot) is not None and info(node).parameter is None:
            found[node.name] = values[slot]
    return found


class TestFactoredUpdates:
    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
    def test_factors_are_the_updates(self, config: SimulatorConfig) -> None:
        """W' = W_0 - sum of rates values keys^T, of every weight of a linear layer."""
        at = lowered(config)
        after = optimized(factored_updates, at)
        expected, found = before_all(at)["updates"], before_all(after)["updates"]
        assert at.context.choices.factored and set(found) != set(expected)
        named = outputs(at.graph)["updates"]
        keys = [name for name in found if name.endswith("/keys")]
        rates = [name for name in found if name.endswith("/rates")]
        assert len(keys) < len(at.context.choices.factored), "layers share what they read"
        assert len(rates) == 1, "one learning rate"
        for slot in at.context.choices.factored:
            values = found[f"{slot}/values"]
            own = [found[name] for name in keys if fits(found[name], values, expected[slot])]
            weight = starts_at(at, slot)
            wanted = [
                weight - torch.einsum("bs,bso,bsi->boi", found[rates[0]], values, each)
                for each in own
            ]
            assert min(error(each, expected[slot]) for each in wanted) < LIMIT
        rest = set(named) - at.context.choices.factored
        assert rest and all(torch.equal(found[slot], expected[slot]) for slot in rest)

    def test_leaves_the_rest_alone(self) -> None:
        at = lowered(factored=frozenset())
        assert printed(optimized(factored_updates, at).graph) == printed(at.graph)
        one = next(iter(factorable(at.graph)))
        found = outputs(optimized(factored_updates, lowered(factored=frozenset({one}))).graph)
        kept = outputs(at.graph)
        assert {*kept["updates"], f"{one}/keys", f"{one}/values", f"{one}/rates"} == {
            *found["updates"], one
        }  # fmt: skip
        assert [found["logits"].name, found["initial_logits"].name] == [
            kept["logits"].name,
            kept["initial_logits"].name,
        ]

    def test_which_slots_have_factors(self) -> None:
        """Weights that products read; no biases, no norms, no embeddings, nothing of Adam's."""
        at = lowered(exact(steps=2))
        assert set(factorable(at.graph).values()) == {2}
        assert all(
            len(info(outputs(at.graph)["updates"][s]).shape) == 3 for s in factorable(at.graph)
        )
        assert not factorable(lowered(exact(optimizer="adam")).graph)
        tied = lowered(exact(train="*"), model=gpt2())
        assert not [slot for slot in factorable(tied.graph) if "wte" in slot or "wpe" in slot]

    def test_golden(self, update_golden: bool) -> None:
        at = optimized(factored_updates, lowered())
        assert_golden("factored_updates", printed(at.graph), update_golden)


def fits(keys: Tensor, values: Tensor, weight: Tensor) -> bool:
    return keys.shape[1] == values.shape[1] and keys.shape[2] == weight.shape[2]


def starts_at(at: Stage, slot: str) -> Tensor:
    """W_0, as products read it."""
    assert at.context.layout is not None
    where = at.context.layout.prefix[slot]
    value = at.context.tensors[where.parameter]
    value = value.t() if where.transpose else value
    rows = value.unflatten(0, (-1, where.rows.period))[:, where.rows.start : where.rows.stop]
    return rows.flatten(0, 1)


class TestGivenUpdates:
    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
    @pytest.mark.parametrize("form", ["weights", "factors"])
    def test_the_same_logits(self, config: SimulatorConfig, form: str) -> None:
        """Of the values that the steps gave."""
        choices = {} if form == "factors" else {"factored": frozenset[str]()}
        at = lowered(config, **choices)
        expected = before_all(at)
        learned = before_all(optimized(factored_updates, at))["updates"]
        after = optimized(given_updates, at)
        found = numbers(after, given_values(after, learned))
        assert error(found["logits"], expected["logits"]) < LIMIT
        assert error(found["initial_logits"], expected["initial_logits"]) < LIMIT
        assert error(expected["initial_logits"], expected["logits"]) > 1e-4

    def test_every_slot_is_an_input(self) -> None:
        at = lowered(factored=frozenset())
        after = optimized(given_updates, at)
        slots = {
            slot: node
            for node in after.graph.find_nodes(op="placeholder")
            if (slot := info(node).slot) is not None and node not in set(at.graph.nodes)
            and node.name.endswith("_given")
        }  # fmt: skip
        assert set(slots) == set(outputs(at.graph)["updates"])
        assert all(info(node).shape[0] == "B" for node in slots.values())

    def test_one_context_has_no_batch(self) -> None:
        """All rows read it; the numbers are those of the first sequence's weights."""
        at = lowered(factored=frozenset(), contexts=Contexts.ONE)
        after = optimized(given_updates, at)
        learned = before_all(at)["updates"]
        alike = {slot: value[:1].expand_as(value) for slot, value in learned.items()}
        wide = optimized(given_updates, lowered(factored=frozenset()))
        each = numbers(wide, given_values(wide, alike))
        found = numbers(after, given_values(after, {s: v[0] for s, v in learned.items()}))
        assert error(found["logits"], each["logits"]) < LIMIT
        given = [n for n in after.graph.find_nodes(op="placeholder") if n.name.endswith("_given")]
        assert given and all("B" not in info(node).shape for node in given)

    def test_products_with_the_shared_weight_and_factors(self) -> None:
        at = lowered(exact())
        after = optimized(given_updates, at)
        products = calls(after, "low_rank_of_scores")
        assert len(products) == len(at.context.choices.factored)
        for node in products:
            shared = argument(node, "y")
            assert is_tint(shared, linear_forward) and is_tint(argument(shared, "weight"), prefix)
        scores = calls(after, "token_products")
        assert len(scores) < len(products), "layers that read one activation share their scores"

    def test_golden(self, update_golden: bool) -> None:
        graph = optimize(program(at := lowered()), decoding(at, Contexts.EACH))
        assert_golden("given_updates", printed(graph), update_golden)


def program(at: Stage) -> Program:
    assert at.context.layout is not None
    return Program(at.graph, at.context.config, at.context.facts, at.context.layout)


def decoding(at: Stage, contexts: Contexts, **changes: Any) -> Choices:
    """A step of decoding, without optimizations."""
    kind = (Output.LOGITS, Output.CACHE)
    factored = at.context.choices.factored
    known = {"factored": factored, "dtype": torch.float64, "differentiable": False, **changes}
    return Choices(kind, from_updates=True, cached=True, contexts=contexts, **known)


class TestGroupedRows:
    @staticmethod
    def stages(form: str = "factors") -> tuple[Stage, Stage]:
        """(before, after) the pass."""
        factored = {} if form == "factors" else {"factored": frozenset[str]()}
        at = lowered(**factored)
        choices = decoding(at, Contexts.EACH)
        old = at.context
        context = Context(
            old.config, old.tensors, old.constants, old.facts, old.tables, old.layout, choices
        )
        before = Stage(optimize(program(at), choices), context)
        return before, optimized(grouped_rows, before)

    def test_rows_stand_apart_for_attention_alone(self) -> None:
        before, after = self.stages()
        layers = len(calls(before, "attention_forward"))
        assert len(calls(after, "split_rows")) == 3 * layers
        assert len(calls(after, "join_rows")) == layers
        for node in calls(after, "attention_forward"):
            assert info(node).shape[0] == "R"
            assert {user.name for user in node.users} == {
                join.name for join in calls(after, "join_rows") if node in join.all_input_nodes
            }
        added = {"tint.split_rows", "tint.join_rows"}
        now = {name: count for name, count in after.operators().items() if name not in added}
        assert now == dict(before.operators())

    @pytest.mark.parametrize("form", ["weights", "factors"])
    def test_rows_of_a_context_are_rows_alone(self, form: str) -> None:
        """Two rows of each of three contexts, behind a cache of four tokens."""
        before, after = self.stages(form)
        generator = torch.Generator().manual_seed(5)
        contexts, n, past, tokens = 3, 2, 4, 3
        rows = contexts * n

        def drawn(*size: Any) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        wide: dict[str, Tensor] = {}
        for node in before.graph.find_nodes(op="placeholder"):
            if info(node).parameter is None and info(node).slot is not None:
                sizes = {"B": contexts, "F": 5, "P": past}
                shape = [sizes.get(size, size) for size in info(node).shape]
                if "P" in info(node).shape:
                    shape[0] = rows
                wide[node.name] = drawn(*shape)
        ids = torch.randint(19, (rows, tokens), generator=generator)
        positions = torch.arange(past, past + tokens).expand(rows, tokens)
        mask = torch.ones(tokens, past + tokens, dtype=torch.bool).tril(past)
        common = {**inputs(), "attention_mask": mask.expand(rows, 1, tokens, past + tokens)}
        found = numbers(after, {
            **wide, **common, "input_ids": ids.reshape(contexts, -1),
            "position_ids": positions.reshape(contexts, -1),
        })  # fmt: skip
        each = {
            name: value if len(value) == rows else value.repeat_interleave(n, 0)
            for name, value in wide.items()
        }
        alone = numbers(before, {**each, **common, "input_ids": ids, "position_ids": positions})
        assert error(found["logits"].reshape(rows, tokens, -1), alone["logits"]) < LIMIT
        assert found["cache"] and set(found["cache"]) == set(alone["cache"])
        for name, value in alone["cache"].items():
            assert error(found["cache"][name], value) < LIMIT

    def test_golden(self, update_golden: bool) -> None:
        assert_golden("grouped_rows", printed(self.stages()[1].graph), update_golden)
