import pytest
import torch
import torch.nn.functional as F

from tests.models import gpt2
from tests.passes.stages import assert_golden, assert_same_numbers, printed, stage
from tests.passes.toys import toy
from tintc.compiler.dialect import argument, is_tint
from tintc.compiler.errors import UnsupportedModelError
from tintc.compiler.node_meta import info


def slots(found) -> list[str | None]:  # type: ignore[no-untyped-def]
    return [info(n).slot for n in found.graph.nodes if is_tint(n, "prefix")]


def pieces(*widths: int):  # type: ignore[no-untyped-def]
    def middle(m, x, ids):  # type: ignore[no-untyped-def]
        parts = m.wide(x).split(list(widths), dim=-1)
        return torch.cat([p * (i + 1) for i, p in enumerate(parts)], -1) @ torch.ones(18, 6, dtype=torch.float64)

    return middle


def test_reads_weight_and_bias_through_slots() -> None:
    model = toy(lambda m, x, ids: m.linear(x))
    found = stage("recognize_linear", model=model)
    assert slots(found) == ["linear.weight", "linear.bias"]
    assert found.operators()["tint.linear_forward"] == 2
    assert_same_numbers("recognize_linear", model=model)


def test_the_head_reads_its_table() -> None:
    """Never trained, so no prefix slot: it would double the memory of a tied embedding."""
    found = stage("recognize_linear")
    head = found.named("logits")
    assert argument(head, "weight").op == argument(head, "bias").op == "placeholder"
    assert not {slot for slot in slots(found) if slot is not None and slot.startswith("head")}


@pytest.mark.parametrize("widths", [(6, 6, 6), (1, 4, 13), (17, 1)], ids=str)
def test_a_split_product_becomes_one_layer_a_piece(widths: tuple[int, ...]) -> None:
    model = toy(pieces(*widths))
    found = stage("recognize_linear", model=model)
    stops = [sum(widths[: i + 1]) for i in range(len(widths))]
    ranges = [f"[{stop - width}:{stop}]" for stop, width in zip(stops, widths, strict=True)]
    assert slots(found) == [f"wide.{name}{part}" for part in ranges for name in ("weight", "bias")]
    assert "aten.split_with_sizes.default" not in found.operators()
    assert_same_numbers("recognize_linear", model=model)


def test_a_split_whose_whole_is_used_too_is_read_whole_and_in_parts() -> None:
    def middle(m, x, ids):  # type: ignore[no-untyped-def]
        whole = m.wide(x)
        a, b, c = whole.split(6, dim=-1)
        return a + b * c + whole.sum(-1, keepdim=True)

    model = toy(middle)
    assert slots(stage("recognize_linear", model=model))[:2] == ["wide.weight", "wide.bias"]
    assert_same_numbers("recognize_linear", model=model)


def test_a_split_along_tokens_is_refused_at_capture() -> None:
    """It fixes a length, so it never comes as far as the pieces of a fused layer."""
    model = toy(lambda m, x, ids: torch.cat([part * 2 for part in m.linear(x).split([1, ids.shape[1] - 1], dim=1)], 1))
    with pytest.raises(UnsupportedModelError, match="different things for different batches or lengths"):
        stage("recognize_linear", model=model)


def test_a_layer_used_twice_has_one_slot() -> None:
    model = toy(lambda m, x, ids: m.linear(m.linear(x)))
    found = stage("recognize_linear", model=model)
    assert slots(found) == ["linear.weight", "linear.bias"]
    assert found.operators()["tint.linear_forward"] == 3
    assert_same_numbers("recognize_linear", model=model)


@pytest.mark.parametrize(
    "middle",
    [
        lambda m, x, ids: F.linear(x, m.linear.weight * 2),
        lambda m, x, ids: F.linear(x, m.linear.weight, m.linear.bias + 1),
        lambda m, x, ids: F.linear(x, m.wide.weight[:6]),
    ],
    ids=["computed weight", "computed bias", "sliced weight"],
)
def test_leaves_computed_weights_alone_and_says_why(middle) -> None:  # type: ignore[no-untyped-def]
    found = stage("recognize_linear", model=toy(middle))
    (left,) = [n for n in found.graph.nodes if "aten.linear" in str(n.target)]
    assert info(left).refused == "its weight or bias is computed, not a parameter of the model"


def test_keeps_the_numbers_of_models() -> None:
    assert_same_numbers("recognize_linear")
    model = gpt2(vocab=19)
    assert_same_numbers("recognize_linear", model=model)
    found = stage("recognize_linear", model=model)
    transposed = {info(n).slot: argument(n, "transpose") for n in found.graph.nodes if is_tint(n, "prefix")}
    assert transposed["transformer.h.0.attn.c_attn.weight[12:24]"] is True
    assert transposed["transformer.h.0.attn.c_attn.bias[12:24]"] is False


def test_golden(update_golden: bool) -> None:
    assert_golden("recognize_linear", printed(stage("recognize_linear", layers=1).graph), update_golden)
