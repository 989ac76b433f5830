"""Each property holds on a sound graph and names what is wrong on a broken one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.stages import Stage, stage
from tintc.ir.builder import outputs
from tintc.ir.config import SimulatorConfig
from tintc.ir.contracts import PROPERTIES, check_property
from tintc.ir.layout import Range
from tintc.ir.node_meta import info

# The stage at which a property first matters.
HOLDS_AT = dict.fromkeys(PROPERTIES, "verify") | {
    "one_logits_output": "refuse_unsupported",
    "some_trainable": "select_trainable",
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_holds_on_a_sound_graph(name: str) -> None:
    at = stage(HOLDS_AT[name])
    assert check_property(name, at.graph, at.context) == []
    assert PROPERTIES[name].__doc__


def out_of_order(at: Stage) -> None:
    at.named("logits").append(at.named("blocks_0_up"))


def two_outputs(at: Stage) -> None:
    at.graph.output_node().args = ((at.named("logits"), at.named("blocks_0_up")),)


def no_output(at: Stage) -> None:
    at.graph.output_node().args = ((1.0,),)


def wrong_shape(at: Stage) -> None:
    info(at.named("blocks_1_attention")).shape = ("B", "T", 7)


def wrong_rank(at: Stage) -> None:
    info(at.named("blocks_1_up_step1")).shape = ("B", "S", 10)


def nothing_trained(at: Stage) -> None:
    for node in at.graph.nodes:
        info(node).trainable = False


def trained_activation(at: Stage) -> None:
    info(at.named("blocks_0_up")).trainable = True


def no_step(at: Stage) -> None:
    info(at.named("blocks_0_up")).step = None


def missing_slot(at: Stage) -> None:
    assert at.context.layout is not None
    slots = {name: slot for name, slot in at.context.layout.prefix.items() if name != "ln_f.bias"}
    at.context.layout = dataclasses.replace(at.context.layout, prefix=slots)


def missing_tile(at: Stage) -> None:
    assert at.context.layout is not None
    slots = dict(at.context.layout.prefix)
    slots["ln_f.bias"] = dataclasses.replace(slots["ln_f.bias"], tiles=())
    at.context.layout = dataclasses.replace(at.context.layout, prefix=slots)


def outside(at: Stage) -> None:
    assert at.context.layout is not None
    at.context.layout = dataclasses.replace(at.context.layout, sim_hidden=3)


def no_layout(at: Stage) -> None:
    at.context.layout = None


def overlapping_memory(at: Stage) -> None:
    assert at.context.layout is not None
    first, second, *_ = at.context.layout.memory.values()
    moved = dataclasses.replace(
        second, coordinates=Range(first.coordinates.stop - 1, first.coordinates.stop + 5)
    )
    memory = {**at.context.layout.memory, second.name: moved}
    at.context.layout = dataclasses.replace(at.context.layout, memory=memory)


def forgotten_memory(at: Stage) -> None:
    assert at.context.layout is not None
    at.context.layout = dataclasses.replace(at.context.layout, memory={})


def shortened_memory(at: Stage) -> None:
    assert at.context.layout is not None
    memory = dict(at.context.layout.memory)
    name = next(iter(memory))
    memory[name] = dataclasses.replace(memory[name], last=name)
    at.context.layout = dataclasses.replace(at.context.layout, memory=memory)


def memory_of_a_weight(at: Stage) -> None:
    assert at.context.layout is not None
    slot = next(iter(at.context.layout.memory.values()))
    stray = dataclasses.replace(slot, name="blocks_1_up_weight_1_updated")
    at.context.layout = dataclasses.replace(
        at.context.layout, memory={**at.context.layout.memory, stray.name: stray}
    )


def narrowed_memory(at: Stage) -> None:
    assert at.context.layout is not None
    memory = dict(at.context.layout.memory)
    name, slot = next(iter(memory.items()))
    memory[name] = dataclasses.replace(
        slot, coordinates=Range(slot.coordinates.start, slot.coordinates.stop - 1)
    )
    at.context.layout = dataclasses.replace(at.context.layout, memory=memory)


def result_over_argument(at: Stage) -> None:
    """The lives of an operator's result and of what it reads last touch at one node, which is too
    close.
    """
    assert at.context.layout is not None
    memory = dict(at.context.layout.memory)
    name = "blocks_1_act_gelu_backward"
    node = at.named(name)
    source = next(
        n for n in node.all_input_nodes if n.name in memory and memory[n.name].last == name
    )
    assert memory[source.name].coordinates.size == memory[name].coordinates.size
    memory[name] = dataclasses.replace(memory[name], coordinates=memory[source.name].coordinates)
    at.context.layout = dataclasses.replace(at.context.layout, memory=memory)


BROKEN: list[tuple[str, Callable[[Stage], None], str]] = [
    ("well_formed", out_of_order, "blocks_0_up"),
    ("one_logits_output", two_outputs, "does not return one node"),
    ("one_logits_output", no_output, "does not return one node"),
    ("shapes_agree", wrong_shape, "blocks_1_attention has shape ('B', 'T', 7)"),
    ("shapes_agree", wrong_rank, "blocks_1_up_step1 has shape ('B', 'S', 10)"),
    ("some_trainable", nothing_trained, "no slot is trained"),
    ("some_trainable", trained_activation, "blocks_0_up is marked trainable"),
    ("phases_in_order", no_step, "blocks_0_up has no phase or step"),
    ("prefix_slots_disjoint", missing_slot, "slot ln_f.bias has no place"),
    ("prefix_slots_disjoint", missing_tile, "tiles of ln_f.bias hold 0 numbers; the slot has 6"),
    ("prefix_slots_disjoint", outside, "leaves page"),
    ("prefix_slots_disjoint", no_layout, "no layout"),
    ("memory_slots_disjoint", overlapping_memory, "share coordinates while both are live"),
    ("memory_slots_disjoint", forgotten_memory, "is an activation without a memory slot"),
    ("memory_slots_disjoint", shortened_memory, "has another size or last reader"),
    ("memory_slots_disjoint", narrowed_memory, "has another size or last reader"),
    (
        "memory_slots_disjoint",
        result_over_argument,
        "blocks_1_act_gelu_backward and blocks_1_down_backward share coordinates",
    ),
    (
        "memory_slots_disjoint",
        memory_of_a_weight,
        "blocks_1_up_weight_1_updated has a memory slot but is no activation",
    ),
    ("memory_slots_disjoint", no_layout, "no layout"),
]


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    BROKEN,
    ids=[f"{name}-{spoil.__name__}" for name, spoil, _ in BROKEN],
)
def test_finds_what_is_broken(name: str, spoil: Callable[[Stage], None], message: str) -> None:
    """The verify pass's own tests break the remaining properties."""
    at = stage(HOLDS_AT[name])
    spoil(at)
    problems = check_property(name, at.graph, at.context)
    assert any(message in problem for problem in problems), problems


def test_a_tile_counted_twice_is_found() -> None:
    """Two tiles that cover one half twice hold as many numbers as the slot, but not the slot."""
    at = stage("verify")
    assert at.context.layout is not None
    slots = dict(at.context.layout.prefix)
    slot = slots["ln_f.bias"]
    (tile,) = slot.tiles
    half = dataclasses.replace(tile, rows=Range(0, 3))
    slots["ln_f.bias"] = dataclasses.replace(
        slot, tiles=(half, dataclasses.replace(half, page=at.context.layout.pages))
    )
    at.context.layout = dataclasses.replace(at.context.layout, prefix=slots)
    assert check_property("prefix_slots_disjoint", at.graph, at.context)


def states(at: Stage, slot: str, **changes: Any) -> None:
    """Changes the place of a slot of the inner rule."""
    assert at.context.layout is not None
    slots = dict(at.context.layout.prefix)
    slots[slot] = dataclasses.replace(slots[slot], **changes)
    at.context.layout = dataclasses.replace(at.context.layout, prefix=slots)


def of_a_state_elsewhere(at: Stage) -> None:
    assert at.context.layout is not None
    slot = at.context.layout.prefix["ln_f.bias/momentum"]
    moved = dataclasses.replace(slot.tiles[0], tokens=Range(1, 2))
    states(at, slot.name, tiles=(moved,))


def of_another_weight(at: Stage) -> None:
    states(at, "ln_f.bias/momentum", beside="ln_f.bias/original")


def zero_weight(at: Stage) -> None:
    states(at, "ln_f.bias", zero=True)


def state_that_is_not_zero(at: Stage) -> None:
    states(at, "ln_f.bias/momentum", zero=False)


def state_of_another(at: Stage) -> None:
    info(outputs(at.graph)["states"]["ln_f.bias/momentum"]).slot = "ln_f.weight/momentum"


def state_of_another_shape(at: Stage) -> None:
    info(outputs(at.graph)["states"]["ln_f.bias/momentum"]).slot = "blocks.1.up.weight/momentum"


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("prefix_slots_disjoint", of_a_state_elsewhere, "lies in other places than ln_f.bias"),
        ("prefix_slots_disjoint", of_another_weight, "stands beside no slot of its weight"),
        ("prefix_slots_disjoint", zero_weight, "ln_f.bias is a weight without numbers"),
        ("slots_fit", state_that_is_not_zero, "ln_f.bias/momentum is not"),
        ("slots_fit", state_of_another, "mixes ln_f.bias and ln_f.weight"),
        ("slots_fit", state_of_another_shape, "has another shape than its slot"),
    ],
)
def test_finds_states_that_lie_wrong(
    name: str, spoil: Callable[[Stage], None], message: str
) -> None:
    at = stage("verify", SimulatorConfig.exact(momentum=0.9, decay=0.1))
    assert check_property(name, at.graph, at.context) == []
    spoil(at)
    problems = check_property(name, at.graph, at.context)
    assert any(message in problem for problem in problems), problems
