import pytest
import torch

from tests.support.stages import Stage, assert_golden, assert_same_numbers, inputs, printed, stage
from tests.support.tolerances import error
from tintc.ir.config import SimulatorConfig
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.activation import activation_backward
from tintc.ir.ops.linear import prefix
from tintc.ir.ops.norm import norm_backward


def backward(at: Stage) -> list[str]:
    return [n.name for n in at.graph.nodes if info(n).phase == "backward"]


def test_stops_at_the_lowest_trained_slot() -> None:
    """Nothing flows into the embeddings or into blocks below the trained ones, not even into the
    lowest norm's input.
    """
    found = backward(stage("build_backward", SimulatorConfig.exact(layers=1)))
    assert "blocks_1_attention_backward" in found
    assert "blocks_1_norm_1_gradient_1" in found  # the sum over q, k and v
    assert "blocks_1_norm_1_backward" not in found
    assert not [
        name for name in found if name.startswith(("blocks_0", "tokens", "positions", "model"))
    ]


def test_value_attention_reaches_no_query_and_no_key() -> None:
    found = stage("build_backward", SimulatorConfig.paper())
    operators = found.operators()
    assert operators["tint.attention_backward_value"] == 2
    assert "tint.attention_backward_full" not in operators
    assert not [name for name in backward(found) if "qkv_0_6" in name or "qkv_6_12" in name]


@pytest.mark.parametrize(
    ("field", "value"), [("norm_gradient", "first_order"), ("activation_gradient", "first_order")]
)
def test_approximations_come_from_the_config(field: str, value: str) -> None:
    found = stage(
        "build_backward", SimulatorConfig.exact(**{field: value, "finite_difference_scale": 77.0})
    )
    for operator, name in (
        (norm_backward, "norm_gradient"),
        (activation_backward, "activation_gradient"),
    ):
        calls = [n for n in found.graph.nodes if is_tint(n, operator)]
        assert calls
        assert {argument(n, "gradient") for n in calls} == {value if name == field else "exact"}
        assert {argument(n, "scale") for n in calls} == {77.0}


def test_mean_embedding_needs_no_logits() -> None:
    found = stage("build_backward", SimulatorConfig.exact(loss_gradient="mean_embedding"))
    assert found.operators()["tint.mean_embedding_gradient"] == 1
    assert found.operators()["tint.loss_gradient"] == 0
    assert not [n for n in found.named("logits").users if info(n).phase == "backward"]


def test_leaves_the_forward_pass_alone() -> None:
    before, after = stage("lower_forward"), stage("build_backward")
    forward = [line for line in printed(after.graph).splitlines() if "[backward" not in line]
    assert forward == printed(before.graph).splitlines()
    assert_same_numbers("build_backward")


def test_recorded_gradients_are_those_of_autograd() -> None:
    """Every forward value's recorded gradient equals autograd's gradient of the summed loss at that
    value.
    """
    at, given = stage("build_backward"), inputs()
    values: dict[str, torch.Tensor] = {}
    for node in at.graph.nodes:
        if node.op == "placeholder":
            parameter = info(node).parameter
            values[node.name] = (
                at.context.tensors[parameter] if parameter is not None else given[node.name]
            )
        elif node.op == "call_function":
            arguments = torch.fx.node.map_arg(node.args, lambda n: values[n.name])
            result = node.target(*arguments)
            if is_tint(node, prefix):
                result = result.detach().clone().requires_grad_()
            values[node.name] = result
    log_p = values["logits"].log_softmax(-1).gather(-1, given["targets"][..., None])[..., 0]
    loss = -(log_p * given["loss_mask"]).sum()
    recorded = [n for n in at.graph.nodes if info(n).gradient is not None]
    assert len(recorded) > 15
    expected = torch.autograd.grad(loss, [values[n.name] for n in recorded])
    for node, gradient in zip(recorded, expected, strict=True):
        assert error(values[info(node).gradient.name], gradient) < 1e-11, node.name


def test_golden(update_golden: bool) -> None:
    assert_golden("build_backward", printed(stage("build_backward", layers=1).graph), update_golden)
    paper = stage("build_backward", SimulatorConfig.paper(), layers=1)
    assert_golden("build_backward_paper", printed(paper.graph), update_golden)
