import pytest

from tests.support.stages import apply, assert_golden, before, flat, inputs, numbers, printed, stage
from tests.support.tolerances import error
from tintc.ir.config import SimulatorConfig
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import linear_descent
from tintc.ir.ops.rates import rate
from tintc.ir.ops.states import descend


def config(steps: int, layers: int | None = None) -> SimulatorConfig:
    return SimulatorConfig.exact(steps=steps, layers=layers, inner_lr=0.01)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_n_backward_passes_and_n_plus_one_forward_passes(steps: int) -> None:
    found = stage("unroll_steps", config(steps)).operators()
    assert found["tint.attention_forward"] == 2 * (steps + 1)
    assert found["tint.attention_backward_full"] == 2 * steps
    assert found["tint.loss_gradient"] == steps
    once = stage("build_descent", config(1)).operators()
    for name in ("tint.linear_descent", "tint.bias_descent", "tint.norm_descent"):
        assert found[name] == once[name] * steps
    assert found["tint.prefix"] == once["tint.prefix"]


def test_what_is_frozen_runs_once() -> None:
    """Embeddings, and the blocks below the trained ones, are shared by all passes."""
    found = stage("unroll_steps", config(3, layers=1))
    operators = found.operators()
    assert operators["tint.embedding"] == 2
    assert operators["tint.attention_forward"] == 1 + 4
    assert not [
        n.name for n in found.graph.nodes if n.name.startswith("blocks_0") and "_step" in n.name
    ]


def test_each_copy_reads_the_values_of_the_step_before() -> None:
    found = stage("unroll_steps", config(3))
    for step in (1, 2, 3):
        node = found.named(f"blocks_1_up_step{step}")
        weight = node.args[1]
        assert info(weight).slot == "blocks.1.up.weight"
        assert is_tint(weight, linear_descent)
        assert info(weight).step == step - 1
    assert (
        found.named("blocks_1_up_weight_1_updated_step2").args[0].name
        == "blocks_1_up_weight_1_updated_step1"
    )


def test_keeps_the_first_step() -> None:
    at, given = before("unroll_steps", config(1)), inputs()
    expected, text = flat(numbers(at, given)), printed(at.graph)
    found = apply("unroll_steps", at)
    result = flat(numbers(found, given))
    first = [line for line in printed(found.graph).splitlines() if "_step" not in line]
    assert first == [line for line in text.splitlines() if not line.startswith("output")]
    assert error(result["initial_logits"], expected["initial_logits"]) == 0
    assert all(
        error(result[name], value) == 0
        for name, value in expected.items()
        if name.startswith("updates")
    )
    assert error(result["logits"], result["initial_logits"]) > 1e-3


def test_three_steps_are_one_step_three_times() -> None:
    """Feeding the updated values back as weights, one sequence at a time."""
    given = inputs(batch=1)
    given["loss_mask"] = given["loss_mask"][:1]
    three = flat(numbers(stage("unroll_steps", config(3)), given))
    at = stage("unroll_steps", config(1))
    at.context.tensors = dict(at.context.tensors)
    for _ in range(3):
        once = flat(numbers(at, given))
        for name, value in once.items():
            if name.startswith("updates."):
                write(at.context.tensors, name.removeprefix("updates."), value[0])
    assert {
        name: e
        for name in three
        if name != "initial_logits" and (e := error(once[name], three[name])) > 1e-12
    } == {}


def write(tensors: dict, slot: str, value) -> None:  # type: ignore[no-untyped-def, type-arg]
    name, _, rows = slot.partition("[")
    start, stop = (int(row) for row in rows.rstrip("]").split(":")) if rows else (0, len(value))
    tensors[name] = tensors[name].clone()
    tensors[name][start:stop] = value


@pytest.mark.parametrize("schedule", [(0.5, 1.0), (1.0, 0.5), (0.5, 0.5), (1.0, 1.0)])
def test_each_step_has_its_own_rate(schedule: tuple[float, ...]) -> None:
    """Also what a step reads of eta alone, the rate of a scaled weight: a step of eta itself does
    not share the first one's. Where both are eta, they do.
    """
    scaled = SimulatorConfig.exact(
        steps=2, inner_lr=0.01, momentum=0.9, lr_scale=(("*", 2.0),), schedule=schedule
    )
    graph = stage("unroll_steps", scaled).graph
    values = {"inner_lr": 1.0}
    for node in graph.nodes:
        if is_tint(node, rate) and argument(node, "factor") is None:
            eta = values[node.args[0].name]
            values[node.name] = argument(node, "scale") * (eta if argument(node, "with_lr") else 1)
    used = {
        (info(node).step, values[argument(node, "rate").name])
        for node in graph.nodes
        if is_tint(node, descend)
    }
    assert used == {(step, 2 * factor) for step, factor in enumerate(schedule)}


def test_golden(update_golden: bool) -> None:
    assert_golden(
        "unroll_steps", printed(stage("unroll_steps", config(2), layers=1).graph), update_golden
    )
