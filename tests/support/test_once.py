"""What is compiled once is what would have been compiled again."""

import pytest
import torch
from torch import nn

import tintc
from tests.support.families import FAMILIES
from tests.support.models import opt
from tests.support.once import _EXPORTED, capture_once, kind_of, lower_once
from tests.support.stages import printed
from tintc.compiler.casts import no_casts
from tintc.compiler.driver import lower
from tintc.compiler.frontend.capture import capture
from tintc.ir.config import SimulatorConfig

CONFIG = SimulatorConfig.paper(steps=2)


def test_the_program_is_the_same() -> None:
    model = opt(seed=1)
    capture_once(opt(seed=0))
    assert printed(capture_once(model).graph) == printed(capture(model).graph)
    expected, found = lower(capture(model), CONFIG), lower_once(capture_once(model), CONFIG)
    assert printed(found.graph) == printed(expected.graph)
    assert found.stages == expected.stages


def test_weights_are_the_models_own() -> None:
    capture_once(opt(seed=0))
    model = opt(seed=1)
    found = capture_once(model).tensors
    assert {name: value.data_ptr() for name, value in found.items()} == {
        name: value.data_ptr() for name, value in capture(model).tensors.items()
    }


def test_graphs_are_the_callers() -> None:
    first, second = (lower_once(capture_once(opt()), CONFIG).graph for _ in range(2))
    before = printed(second)
    first.erase_node(first.output_node())
    assert printed(second) == before == printed(lower_once(capture_once(opt()), CONFIG).graph)


def test_compile_does() -> None:
    tintc.compile(opt())
    before = len(_EXPORTED)
    tintc.compile(opt(seed=1))
    assert len(_EXPORTED) == before


def test_other_models_are_of_other_kinds() -> None:
    llama, changed = FAMILIES["llama"].build(), FAMILIES["llama"].build()
    assert kind_of(llama) == kind_of(FAMILIES["llama"].build(seed=1)) is not None
    changed.model.rotary_emb.inv_freq.mul_(2)
    replaced = FAMILIES["llama"].build()
    replaced.model.layers[0].mlp = nn.Identity()
    with no_casts():
        others = [kind_of(llama)]
    others += [kind_of(changed), kind_of(replaced), kind_of(llama.to(torch.float32))]
    assert len({*others, kind_of(FAMILIES["llama"].build())}) == 5


@pytest.mark.parametrize("change", ["forward", "hook", "no transformers model"])
def test_what_is_not_known_well_enough(change: str) -> None:
    model: nn.Module = opt()
    if change == "forward":
        model.get_submodule("model").forward = lambda *_, **__: None  # type: ignore[method-assign]
    elif change == "hook":
        model.get_submodule("lm_head").register_forward_hook(lambda *_: None)
    else:
        model = nn.Linear(2, 2)
    assert kind_of(model) is None
