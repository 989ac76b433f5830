from tests.support.stages import apply, assert_golden, before, flat, inputs, numbers, printed, stage
from tests.support.tolerances import error
from tintc.ir.builder import input_node
from tintc.ir.dialect import is_tint
from tintc.ir.inputs import INPUTS
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import prefix


def test_adds_every_input_once() -> None:
    found = stage("lower_forward")
    names = [n.name for n in found.graph.nodes if n.op == "placeholder" and info(n).role == "input"]
    assert sorted(names) == sorted(INPUTS)
    for name, (shape, dtype) in INPUTS.items():
        assert (
            info(input_node(found.graph, name)).shape,
            info(input_node(found.graph, name)).dtype,
        ) == (shape, dtype)


def test_placeholders_come_first() -> None:
    kinds = [n.op for n in stage("lower_forward").graph.nodes]
    assert kinds == sorted(kinds, key=["placeholder", "call_function", "output"].index)


def test_every_call_is_of_the_first_forward_pass() -> None:
    for node in stage("lower_forward").graph.nodes:
        if node.op == "call_function":
            assert (info(node).phase, info(node).step) == (
                (None, None) if is_tint(node, prefix) else ("forward", 0)
            )


def test_keeps_the_numbers_and_the_operators() -> None:
    at, given = before("lower_forward"), inputs()
    operators, expected = at.operators(), numbers(at, given)
    found = apply("lower_forward", at)
    result = flat(numbers(found, given))
    assert found.operators() == operators
    assert set(result) == {"logits", "initial_logits"}
    assert error(result["logits"], expected) == error(result["initial_logits"], expected) == 0


def test_golden(update_golden: bool) -> None:
    assert_golden("lower_forward", printed(stage("lower_forward", layers=1).graph), update_golden)
