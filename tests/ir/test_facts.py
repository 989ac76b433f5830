"""Where a module, and where a node of the program, stands."""

import pytest

from tintc.ir.facts import ModelFacts
from tintc.ir.lanes import is_last, lane


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("model.layers.0", 0),
        ("model.layers.11.mlp.up", 11),
        ("model.layers", None),
        ("model.layers.norm", None),
        ("model.layers.\u00b2.mlp", None),  # a digit, and no number
        ("model.layers2.0", None),
        ("other.model.layers.0", None),
        ("", None),
    ],
)
def test_block_of_a_module(path: str, block: int | None) -> None:
    assert ModelFacts(block_path="model.layers").block_of(path) == block
    assert ModelFacts().block_of(path) is None


def test_last_forward_pass_is_behind_all_steps() -> None:
    assert lane("forward", 2, 2) == "last forward" and is_last("forward", 2, 2)
    assert lane("forward", 0, 2) == "step 0 forward" and not is_last("forward", 0, 2)
    assert lane("backward", 2, 2) == "step 2 backward"
    assert lane("descent", None, 2) == "step 0 descent"
    assert lane(None, None, 2) == ""
    assert is_last("forward", None, 0)  # no step is taken
