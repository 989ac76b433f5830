"""A pass reads and writes the facts that it declares, and no others."""

import pytest
from torch import fx

from tests.support.stages import stage
from tintc.ir.config import SimulatorConfig
from tintc.ir.context import Access, Context
from tintc.ir.errors import CompilerBug
from tintc.ir.facts import ModelFacts, least
from tintc.ir.layout import Layout
from tintc.ir.pass_manager import graph_pass
from tintc.passes.lowering import DEFAULT_PIPELINE
from tintc.passes.specializing import DECODE, OPTIMIZATIONS, STREAM


def context() -> Context:
    return Context(SimulatorConfig(), facts=ModelFacts(vocab_size=7, max_positions=9))


@graph_pass(reads=("vocab_size",), writes=("blocks",))
def counts(graph: fx.Graph, context: Context) -> fx.Graph:
    context.learn(blocks=context.facts.vocab_size)
    return graph


@graph_pass()
def peeks(graph: fx.Graph, context: Context) -> fx.Graph:
    assert context.facts.vocab_size
    return graph


@graph_pass(reads=("max_positions",))
def peeks_at_a_property(graph: fx.Graph, context: Context) -> fx.Graph:
    assert context.facts.longest  # of max_positions and max_tokens
    return graph


@graph_pass(reads=("blocks",))
def writes_what_it_reads(graph: fx.Graph, context: Context) -> fx.Graph:
    context.learn(blocks=1)
    return graph


@graph_pass()
def places(graph: fx.Graph, context: Context) -> fx.Graph:
    context.place(Layout(1, 1, 1, 1))
    return graph


@graph_pass()
def adds_a_table(graph: fx.Graph, context: Context) -> fx.Graph:
    context.add_table("tintc.table_0", next(iter(context.tensors.values())))
    return graph


def test_declared_facts() -> None:
    given = context()
    counts(fx.Graph(), given)
    assert given.facts == ModelFacts(vocab_size=7, max_positions=9, blocks=7)
    assert type(given.facts) is ModelFacts  # nothing is guarded behind the pass


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (peeks, "pass peeks reads vocab_size, which it does not declare"),
        (peeks_at_a_property, "reads max_tokens, which it does not declare"),
        (writes_what_it_reads, "writes blocks, which it does not declare"),
        (places, "writes layout, which it does not declare"),
        (adds_a_table, "writes tables, which it does not declare"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_undeclared_facts(step: object, message: str) -> None:
    given = stage("verify").context
    given.learn(vocab_size=7)
    with pytest.raises(CompilerBug, match=message):
        step(fx.Graph(), given)  # type: ignore[operator]
    assert type(given.facts) is ModelFacts


def test_a_fact_that_there_is_not() -> None:
    with pytest.raises(CompilerBug, match="declares weight"):
        Access("p", writes=frozenset({"weight"}))


def test_limits_only_shrink() -> None:
    given = context()
    given.limit_positions(20)
    given.limit_tokens(5)
    given.limit_tokens(8)
    assert (given.facts.max_positions, given.facts.max_tokens, given.facts.longest) == (9, 5, 5)
    assert least(None, None) is None


def test_every_fact_has_a_writer() -> None:
    """Each field is written by a pass that says so, or known of the captured model; optimizations
    write none.
    """
    written = {name for step in DEFAULT_PIPELINE for name in step.access.writes}
    assert {*written, "min_tokens"} == {*ModelFacts.__dataclass_fields__, "tables", "layout"}
    assert not any(step.access.writes for step in (*STREAM, *DECODE, *OPTIMIZATIONS))
