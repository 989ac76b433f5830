from torch import fx

from tests.support.stages import (
    NAMES,
    Stage,
    apply,
    assert_golden,
    assert_same_numbers,
    before,
    printed,
    stage,
)
from tintc.ir.builder import Builder
from tintc.ir.config import SimulatorConfig
from tintc.ir.node_meta import info
from tintc.ir.ops.activation import activation_forward
from tintc.ir.ops.elementwise import residual


def with_dead_chain(at: Stage) -> tuple[Stage, list[fx.Node]]:
    """Two calls after each other that nothing uses."""
    with at.graph.inserting_before(at.graph.output_node()):
        build = Builder(at.graph)
        first = build.call(
            residual, at.named("logits"), at.named("logits"), phase="forward", step=0
        )
        return at, [first, build.call(activation_forward, first, "tanh", phase="forward", step=0)]


def test_removes_chains_that_nothing_uses() -> None:
    alive = printed(stage("dead_code").graph)
    at, dead = with_dead_chain(before("dead_code"))
    assert all(node in at.graph.nodes for node in dead)
    assert printed(apply("dead_code", at).graph) == alive


def test_removes_parameters_that_nothing_reads() -> None:
    at = before("dead_code")
    with at.graph.inserting_before(next(iter(at.graph.nodes))):
        unused = at.graph.placeholder("unused")
    info(unused).role, info(unused).parameter = "parameter", "unused.weight"
    assert "unused" not in [n.name for n in apply("dead_code", at).graph.nodes]


def test_inputs_stay() -> None:
    """mean_embedding needs no logits, but every input of a lowered graph stays."""
    found = stage("dead_code", SimulatorConfig.exact(loss_gradient="mean_embedding"))
    inputs = {n.name for n in found.graph.nodes if info(n).role == "input"}
    assert inputs == {
        "input_ids",
        "position_ids",
        "attention_mask",
        "targets",
        "loss_mask",
        "inner_lr",
        "segment",
    }


def test_leaves_live_code_alone_and_keeps_the_numbers() -> None:
    at = before("dead_code")
    used = {n.name for n in at.graph.nodes if n.users or n.op == "output"}
    assert {n.name for n in apply("dead_code", at).graph.nodes} >= used
    assert_same_numbers("dead_code")
    assert NAMES.index("dead_code") > NAMES.index("unroll_steps")


def test_golden(update_golden: bool) -> None:
    assert_golden(
        "dead_code",
        printed(stage("dead_code", SimulatorConfig.paper(), layers=1).graph),
        update_golden,
    )
