import pytest

from tests.passes.stages import Stage, apply, assert_golden, assert_same_numbers, before, printed, stage
from tintc.compiler.config import SimulatorConfig
from tintc.compiler.layout import Layout
from tintc.compiler.node_meta import info


def config(preset: str = "exact", **fields: int) -> SimulatorConfig:
    return SimulatorConfig.preset(preset, **fields)


def layout(at: Stage) -> Layout:
    assert at.context.layout is not None
    return at.context.layout


def kept(at: Stage) -> set[str]:
    """Forward activations that a backward or descent node reads, by walking the graph."""
    found = set()
    for node in at.graph.nodes:
        if info(node).phase in ("backward", "descent") and "loss_gradient" not in str(node.target):
            found |= {n.name for n in node.all_input_nodes if info(n).phase == "forward" and len(info(n).shape) == 3}
    return found


@pytest.mark.parametrize("preset", ["paper", "exact"])
@pytest.mark.parametrize("steps", [1, 3])
def test_whatever_the_backward_pass_reads_has_a_place(preset: str, steps: int) -> None:
    at = stage("assign_memory_slots", config(preset, steps=steps))
    assert set(layout(at).memory) == kept(at)
    for name, slot in layout(at).memory.items():
        assert slot.coordinates.size == info(at.named(name)).shape[-1]


@pytest.mark.parametrize("preset", ["paper", "exact"])
def test_no_coordinate_is_taken_while_it_is_needed(preset: str) -> None:
    """Played through: at each node, what it reads must still be what was written."""
    at = stage("assign_memory_slots", config(preset, steps=3))
    memory = layout(at).memory
    owner: dict[int, str] = {}
    for node in at.graph.nodes:
        if info(node).phase in ("backward", "descent"):
            for source in node.all_input_nodes:
                if source.name in memory and "loss_gradient" not in str(node.target):
                    place = memory[source.name].coordinates
                    assert {owner[i] for i in range(place.start, place.stop)} == {source.name}, f"{node.name} reads {source.name}"
        if node.name in memory:
            place = memory[node.name].coordinates
            owner |= dict.fromkeys(range(place.start, place.stop), node.name)


def test_later_steps_reuse_coordinates() -> None:
    widths = [layout(stage("assign_memory_slots", config(steps=steps))).memory_width for steps in (1, 2, 5)]
    assert widths[1] == widths[2]
    assert widths[1] <= 2 * widths[0]
    total = sum(slot.coordinates.size for slot in layout(stage("assign_memory_slots", config(steps=5))).memory.values())
    assert widths[2] < total / 2


def test_frozen_blocks_keep_nothing() -> None:
    at = stage("assign_memory_slots", config(layers=1))
    names = set(layout(at).memory)
    assert not [name for name in names if name.startswith("blocks_0") and name != "blocks_0_residual_1_segment"]


def test_value_attention_does_not_keep_values() -> None:
    """With the probabilities held constant the backward pass needs q and k, but not v."""
    names = set(layout(stage("assign_memory_slots", config("paper"))).memory)
    assert {"blocks_1_attention_qkv_0_6", "blocks_1_attention_qkv_6_12"} <= names
    assert "blocks_1_attention_qkv_12_18" not in names


def test_changes_no_node_and_keeps_the_numbers() -> None:
    at = before("assign_memory_slots")
    text, prefix = printed(at.graph), layout(at).prefix
    found = apply("assign_memory_slots", at)
    assert printed(found.graph) == text
    assert layout(found).prefix == prefix
    assert_same_numbers("assign_memory_slots")


def test_golden(update_golden: bool) -> None:
    memory = layout(stage("assign_memory_slots", config(steps=2), layers=1)).memory
    lines = [f"{slot.name} {slot.coordinates} until {slot.last}" for slot in memory.values()]
    assert_golden("assign_memory_slots", "\n".join(lines) + "\n", update_golden)
