import dataclasses
from collections.abc import Callable

import pytest

from tests.support.stages import (
    Stage,
    apply,
    assert_golden,
    assert_same_numbers,
    before,
    printed,
    stage,
)
from tintc.ir.errors import CompilerBug
from tintc.ir.layout import Range
from tintc.ir.node_meta import info


def test_accepts_a_sound_graph_without_a_change() -> None:
    at = before("verify")
    text = printed(at.graph)
    assert printed(apply("verify", at).graph) == text
    assert_same_numbers("verify")


def wrong_shape(at: Stage) -> None:
    info(at.named("blocks_0_up")).shape = ("B", "T", 11)


def reads_a_later_step(at: Stage) -> None:
    info(at.named("blocks_0_residual_1_step1")).step = 2


def no_phase(at: Stage) -> None:
    info(at.named("blocks_0_up")).phase = None


def left_gradient(at: Stage) -> None:
    info(at.named("blocks_0_up")).gradient = at.named("logits")


def dead(at: Stage) -> None:
    returned = at.graph.output_node().args[0]
    at.graph.output_node().args = ({**returned, "logits": at.named("logits")},)  # type: ignore[dict-item]


def foreign(at: Stage) -> None:
    at.named("blocks_0_residual").target = max


def wrong_output(at: Stage) -> None:
    at.graph.output_node().args = ({"logits": at.named("logits")},)


def misplaced_update(at: Stage) -> None:
    returned = dict(at.graph.output_node().args[0])  # type: ignore[call-overload]
    updates = dict(returned["updates"])
    updates["ln_f.bias"], updates["ln_f.weight"] = updates["ln_f.weight"], updates["ln_f.bias"]
    at.graph.output_node().args = ({**returned, "updates": updates},)


def shared_memory(at: Stage) -> None:
    assert at.context.layout is not None
    slots = at.context.layout.memory
    memory = {
        name: dataclasses.replace(slot, coordinates=Range(0, slot.coordinates.size))
        for name, slot in slots.items()
    }
    at.context.layout = dataclasses.replace(at.context.layout, memory=memory)


def shared_prefix(at: Stage) -> None:
    assert at.context.layout is not None
    slots = dict(at.context.layout.prefix)
    first, second = "blocks.0.up.weight", "blocks.0.up.bias"
    slots[second] = dataclasses.replace(
        slots[second],
        tiles=(
            dataclasses.replace(
                slots[second].tiles[0], coordinates=slots[first].tiles[0].coordinates
            ),
        ),
    )
    at.context.layout = dataclasses.replace(at.context.layout, prefix=slots)


BROKEN: dict[str, tuple[Callable[[Stage], None], str]] = {
    "shapes_agree": (wrong_shape, "blocks_0_up has shape"),
    "phases_in_order": (
        reads_a_later_step,
        "ln_f_step1 of step 1 reads blocks_0_residual_1_step1 of step 2",
    ),
    "phases_in_order, none": (no_phase, "blocks_0_up has no phase or step"),
    "no_gradients_left": (left_gradient, "blocks_0_up still records its gradient"),
    "no_dead_code": (dead, "logits_step1 has no user"),
    "tint_only": (foreign, "blocks_0_residual calls"),
    "named_outputs": (wrong_output, "outputs are not logits, initial_logits and updates"),
    "named_outputs, swapped": (misplaced_update, "ln_f.bias is given the value of ln_f.weight"),
    "memory_slots_disjoint": (shared_memory, "share coordinates while both are live"),
    "prefix_slots_disjoint": (shared_prefix, "overlap in page"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_finds_what_is_broken(name: str) -> None:
    spoil, message = BROKEN[name]
    at = before("verify", layers=1)
    spoil(at)
    with pytest.raises(
        CompilerBug,
        match=f"pass verify requires {name.split(',')[0]}, which does not hold: .*{message}",
    ):
        apply("verify", at)


def test_golden(update_golden: bool) -> None:
    assert_golden("verify", printed(stage("verify", layers=1).graph), update_golden)
