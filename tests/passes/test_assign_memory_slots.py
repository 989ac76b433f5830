import operator

import pytest
from torch import fx

from tests.support.stages import (
    Stage,
    apply,
    assert_golden,
    assert_same_numbers,
    before,
    printed,
    stage,
)
from tintc.ir.config import SimulatorConfig
from tintc.ir.dialect import argument, is_tint
from tintc.ir.layout import Layout
from tintc.ir.node_meta import info
from tintc.ir.ops.attention import attention_backward_full
from tintc.ir.ops.embedding import segment, segment_mask
from tintc.ir.ops.linear import prefix


def config(preset: str = "exact", **fields: int) -> SimulatorConfig:
    return SimulatorConfig.preset(preset, **fields)


def layout(at: Stage) -> Layout:
    assert at.context.layout is not None
    return at.context.layout


def source_of(node: fx.Node) -> fx.Node:
    """The activation behind a view of its first tokens."""
    while is_tint(node, segment):
        node = argument(node, "x")
    return node


def made(at: Stage) -> set[str]:
    """Everything that a forward or backward operator computes, by walking the graph: a tuple counts
    by its items.
    """
    calls = [
        node
        for node in at.graph.nodes
        if node.op == "call_function" and info(node).phase in ("forward", "backward")
    ]
    views = (segment, segment_mask, prefix, attention_backward_full)
    return {node.name for node in calls if not is_tint(node, *views)}


def kept(at: Stage) -> set[str]:
    """Forward activations that a backward or descent node reads, by walking the graph."""
    found = set()
    for node in at.graph.nodes:
        if info(node).phase in ("backward", "descent"):
            found |= {
                n.name
                for n in map(source_of, node.all_input_nodes)
                if info(n).phase == "forward" and len(info(n).shape) == 3
            }
    return found


@pytest.mark.parametrize("preset", ["paper", "exact"])
@pytest.mark.parametrize("steps", [1, 3])
def test_every_activation_has_a_place(preset: str, steps: int) -> None:
    at = stage("assign_memory_slots", config(preset, steps=steps))
    memory = layout(at).memory
    assert set(memory) == made(at)
    for name, slot in memory.items():
        assert slot.coordinates.size == info(at.named(name)).shape[-1]


@pytest.mark.parametrize("preset", ["paper", "exact"])
@pytest.mark.parametrize("steps", [1, 3])
def test_whatever_the_backward_pass_reads_is_kept(preset: str, steps: int) -> None:
    at = stage("assign_memory_slots", config(preset, steps=steps))
    memory = layout(at).memory
    assert {name for name, slot in memory.items() if slot.kept} == kept(at)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("preset", ["paper", "exact"])
def test_no_coordinate_is_taken_while_it_is_needed(preset: str, layers: int) -> None:
    """Played through: at each node, what it reads must still be what was written, and its result
    lies elsewhere.
    """
    at = stage("assign_memory_slots", config(preset, steps=3, layers=layers))
    memory = layout(at).memory
    owner: dict[int, str] = {}
    reads = 0
    for node in at.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem or is_tint(node, segment):
            continue
        items = [user for user in node.users if user.target is operator.getitem]
        written = [n for n in (node, *items) if n.name in memory]
        for source in map(source_of, node.all_input_nodes):
            if source.name in memory:
                place = memory[source.name].coordinates
                assert {owner[i] for i in range(place.start, place.stop)} == {source.name}, (
                    f"{node.name} reads {source.name}"
                )
                assert not any(memory[n.name].coordinates.overlaps(place) for n in written), (
                    f"{node.name} writes on {source.name}"
                )
                reads += 1
        for n in written:
            place = memory[n.name].coordinates
            owner |= dict.fromkeys(range(place.start, place.stop), n.name)
    assert reads > len(memory) / 2


def test_later_steps_reuse_coordinates() -> None:
    widths = [
        layout(stage("assign_memory_slots", config(steps=steps))).memory_width
        for steps in (1, 2, 5)
    ]
    assert widths[1] == widths[2]
    assert widths[1] <= 2 * widths[0]
    total = sum(
        slot.coordinates.size
        for slot in layout(stage("assign_memory_slots", config(steps=5))).memory.values()
    )
    assert widths[2] < total / 2


def test_frozen_blocks_keep_nothing() -> None:
    at = stage("assign_memory_slots", config(layers=1))
    names = {
        name
        for name, slot in layout(at).memory.items()
        if slot.kept and name.startswith("blocks_0")
    }
    assert names == {"blocks_0_residual_1"}, "the input of the lowest trained block"


def test_what_is_not_kept_is_soon_free() -> None:
    """The width of the stream grows with what is kept, not with the depth of the blocks that only
    run forward.
    """
    widths = [
        layout(stage("assign_memory_slots", config(layers=1), layers=layers)).memory_width
        for layers in (2, 4)
    ]
    assert widths[0] == widths[1]


def test_value_attention_does_not_keep_values() -> None:
    """With the probabilities held constant the backward pass needs q and k, but not v."""
    kept = {
        name: slot.kept
        for name, slot in layout(stage("assign_memory_slots", config("paper"))).memory.items()
    }
    assert kept["blocks_1_attention_qkv_0_6"] and kept["blocks_1_attention_qkv_6_12"]
    assert not kept["blocks_1_attention_qkv_12_18"]


def test_changes_no_node_and_keeps_the_numbers() -> None:
    at = before("assign_memory_slots")
    text, prefix = printed(at.graph), layout(at).prefix
    found = apply("assign_memory_slots", at)
    assert printed(found.graph) == text
    assert layout(found).prefix == prefix
    assert_same_numbers("assign_memory_slots")


def test_golden(update_golden: bool) -> None:
    memory = layout(stage("assign_memory_slots", config(steps=2), layers=1)).memory
    lines = [
        f"{slot.name} {slot.coordinates} until {slot.last}{' kept' if slot.kept else ''}"
        for slot in memory.values()
    ]
    assert_golden("assign_memory_slots", "\n".join(lines) + "\n", update_golden)
