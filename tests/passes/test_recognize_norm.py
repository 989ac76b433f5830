import pytest
import torch
import torch.nn.functional as F

from tests.models import gpt2, opt
from tests.passes.stages import assert_golden, assert_same_numbers, printed, stage
from tests.passes.toys import toy
from tintc.compiler.dialect import argument, is_tint
from tintc.compiler.errors import UnsupportedModelError
from tintc.compiler.node_meta import info

FORMS = {
    "module": (lambda m, x, ids: m.norm(x), [True, True, 1e-5]),
    "gain only": (lambda m, x, ids: F.layer_norm(x, (6,), m.norm.weight), [True, False, 1e-5]),
    "shift only": (lambda m, x, ids: F.layer_norm(x, (6,), None, m.norm.bias, 0.5), [False, True, 0.5]),
    "bare": (lambda m, x, ids: F.layer_norm(x, (6,), eps=0.01), [False, False, 0.01]),
}


@pytest.mark.parametrize("name", FORMS)
def test_fires(name: str) -> None:
    middle, (gain, shift, eps) = FORMS[name]
    model = toy(middle)
    found = stage("recognize_norm", model=model)
    (norm,) = [n for n in found.graph.nodes if is_tint(n, "norm_forward")]
    assert [argument(norm, "gamma") is not None, argument(norm, "beta") is not None] == [gain, shift]
    assert argument(norm, "eps") == eps
    assert "aten.layer_norm.default" not in found.operators()
    assert_same_numbers("recognize_norm", model=model)


@pytest.mark.parametrize(
    "middle",
    [
        lambda m, x, ids: F.layer_norm(x, (6,), m.norm.weight + 1, m.norm.bias),
        lambda m, x, ids: F.layer_norm(x, (6,), m.norm.weight, m.scale * 2),
        lambda m, x, ids: F.layer_norm(x.view(*ids.shape, 2, 3), (2, 3)).flatten(2),
    ],
    ids=["computed gain", "computed shift", "two dimensions"],
)
def test_leaves_the_rest_alone_and_says_why(middle) -> None:  # type: ignore[no-untyped-def]
    found = stage("recognize_norm", model=toy(middle))
    (left,) = [n for n in found.graph.nodes if "layer_norm" in str(n.target)]
    assert info(left).refused == "it normalises several dimensions, or its gain or shift is computed"
    assert not [n for n in found.graph.nodes if is_tint(n, "norm_forward")]


def test_a_norm_over_part_of_a_token_is_not_read_as_one_over_all() -> None:
    """Normalising each head by itself looks like a norm over the last dimension, of another width."""
    with pytest.raises(UnsupportedModelError):
        stage("refuse_unsupported", model=toy(lambda m, x, ids: F.layer_norm(m.linear(x).view(*ids.shape, 2, 3), (3,)).flatten(2)))


def test_keeps_the_numbers_of_models() -> None:
    for model in (None, opt(vocab=19), gpt2(vocab=19)):
        assert_same_numbers("recognize_norm", model=model)


def test_golden(update_golden: bool) -> None:
    assert_golden("recognize_norm", printed(stage("recognize_norm", layers=1).graph), update_golden)


def test_other_operators_stay() -> None:
    model = toy(lambda m, x, ids: torch.softmax(m.linear(x), -1))
    assert printed(stage("recognize_norm", model=model).graph) == printed(stage("recognize_linear", model=model).graph)
