import pytest

from tests.support.models import gpt2
from tests.support.stages import apply, assert_golden, assert_same_numbers, before, printed, stage
from tintc.ir.config import SimulatorConfig
from tintc.ir.dialect import is_tint
from tintc.ir.layout import Layout
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import prefix


def layout(**fields: int) -> Layout:
    found = stage("assign_prefix_slots", SimulatorConfig.exact(**fields)).context.layout  # type: ignore[arg-type]
    assert found is not None
    return found


def test_every_slot_that_is_read_has_a_place() -> None:
    at = stage("assign_prefix_slots")
    reads = {info(n).slot: n for n in at.graph.nodes if is_tint(n, prefix)}
    assert at.context.layout is not None
    slots = at.context.layout.prefix
    assert set(slots) == set(reads)
    for name, slot in slots.items():
        assert slot.shape == info(reads[name]).shape
        assert slot.trainable == info(reads[name]).trainable
        assert (slot.rows.start, slot.rows.stop, slot.rows.period, slot.transpose) == reads[
            name
        ].args[1:]
        assert slot.parameter == info(reads[name].args[0]).parameter


def test_transposed_and_split_slots_say_where_they_come_from() -> None:
    found = stage("assign_prefix_slots", model=gpt2(vocab=19)).context.layout
    assert found is not None
    slot = found.prefix["transformer.h.0.attn.c_attn.weight[12:24]"]
    assert (slot.parameter, slot.rows.start, slot.rows.stop, slot.transpose) == (
        "transformer.h.0.attn.c_attn.weight",
        12,
        24,
        True,
    )
    assert slot.shape == (12, 12)


@pytest.mark.parametrize(
    "fields",
    [
        {"prefix_tokens": 3},
        {"sim_hidden": 30},
        {"sim_heads": 3},
        {"prefix_tokens": 5, "sim_hidden": 24, "sim_heads": 4},
    ],
    ids=str,
)
def test_given_sizes_are_kept(fields: dict[str, int]) -> None:
    found = layout(**fields)
    assert {name: getattr(found, name) for name in fields} == fields


def test_changes_no_node_and_keeps_the_numbers() -> None:
    at = before("assign_prefix_slots")
    text = printed(at.graph)
    assert printed(apply("assign_prefix_slots", at).graph) == text
    assert_same_numbers("assign_prefix_slots")


def test_golden(update_golden: bool) -> None:
    found = stage("assign_prefix_slots", layers=1).context.layout
    assert found is not None
    lines = [
        f"K {found.prefix_tokens} D_sim {found.sim_hidden} H_sim {found.sim_heads} pages "
        f"{found.pages}"
    ]
    for slot in found.prefix.values():
        kind = "trained" if slot.trainable else "frozen"
        lines.append(f"{slot.name} {slot.shape} {kind}")
        for t in slot.tiles:
            place = (
                f"tokens {t.tokens} coordinates {t.coordinates}, {t.groups} a token, {t.row_width} "
                "wide"
            )
            lines.append(f"  page {t.page} rows {t.rows} columns {t.columns} in {place}")
    assert_golden("assign_prefix_slots", "\n".join(lines) + "\n", update_golden)
