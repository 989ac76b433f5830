from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.models import gpt2, randomized
from tests.support.spelled import agree, calls_of, refusal
from tests.support.stages import assert_golden, assert_same_numbers, printed, stage
from tests.support.toys import Toy, toy
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.attention import attention_forward
from tintc.ir.ops.linear import linear_forward, prefix


def slots(found) -> list[str | None]:  # type: ignore[no-untyped-def]
    return [info(n).slot for n in found.graph.nodes if is_tint(n, prefix)]


def pieces(*widths: int):  # type: ignore[no-untyped-def]
    def middle(m, x, ids):  # type: ignore[no-untyped-def]
        parts = m.wide(x).split(list(widths), dim=-1)
        return torch.cat([p * (i + 1) for i, p in enumerate(parts)], -1) @ torch.ones(
            18, 6, dtype=torch.float64
        )

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


def test_a_split_along_tokens_is_no_split_of_a_layer() -> None:
    """Its guard excludes two tokens, where the graph stands all the same."""
    model = toy(
        lambda m, x, ids: torch.cat(
            [part * 2 for part in m.linear(x).split([1, ids.shape[1] - 1], dim=1)], 1
        )
    )
    found = stage("recognize_linear", model=model)
    assert len(calls_of(found, linear_forward)) == 2


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
    transposed = {
        info(n).slot: argument(n, "transpose") for n in found.graph.nodes if is_tint(n, prefix)
    }
    assert transposed["transformer.h.0.attn.c_attn.weight[12:24]"] is True
    assert transposed["transformer.h.0.attn.c_attn.bias[12:24]"] is False


def test_golden(update_golden: bool) -> None:
    assert_golden(
        "recognize_linear", printed(stage("recognize_linear", layers=1).graph), update_golden
    )


class Headed(Toy):
    """What a model does to its logits: `change` of the toy and of x."""

    def __init__(self, change: Callable[[Headed, Tensor], Tensor], tied: bool) -> None:
        super().__init__(lambda m, x, ids: x)
        self.change, self.shift = change, nn.Parameter(torch.ones(19))
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.change(self, self.linear(self.tokens(input_ids)))


HEADS: dict[str, Callable[[Headed, Tensor], Tensor]] = {
    "multiplied": lambda m, x: m.head(x) * 0.25,
    "divided": lambda m, x: m.head(x) / 4,
    "capped": lambda m, x: 3 * torch.tanh(m.head(x) / 3),
    "multiplied and capped": lambda m, x: 2 * torch.tanh(m.head(x * 0.5) * 3.0 / 2),
    "as a product": lambda m, x: x @ m.head.weight.t(),
    "with a shift": lambda m, x: m.head(x) + m.shift,
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", HEADS)
def test_heads_behind_multiples_and_caps_read_their_table(name: str, tied: bool) -> None:
    found = agree(randomized(Headed(HEADS[name], tied)).double())
    (head,) = [n for n in calls_of(found, linear_forward) if info(n).shape[-1] == 19]
    assert argument(head, "weight").op == "placeholder"
    assert info(argument(head, "weight")).parameter == ("tokens.weight" if tied else "head.weight")
    assert (argument(head, "bias") is not None) == (name == "with a shift")


def test_other_heads_are_refused_or_no_heads() -> None:
    assert "aten.log_softmax" in refusal(Headed(lambda m, x: m.head(x).log_softmax(-1), False))
    assert "its weight or bias is computed" in refusal(
        Headed(lambda m, x: F.linear(x, m.head.weight * 2), False)
    )
    agree(randomized(Headed(lambda m, x: m.head(x) + F.linear(x, m.tokens.weight), False)).double())
    agree(randomized(Headed(lambda m, x: m.head(x) * m.shift, False)).double())


LAYOUTS = {  # of a product of 18 rows: (q, k, v) as (B, H, T, 3); rows of each
    "GPT-NeoX, BLOOM": (
        lambda y: [part.transpose(1, 2) for part in y.view(*y.shape[:2], 2, 9).split(3, -1)],
        ["0:3", "3:6", "6:9"],
        9,
        2,
    ),
    "Falcon": (
        lambda y: (lambda g: [g[:, :, :-2], g[:, :, [-2]], g[:, :, [-1]]])(
            y.view(*y.shape[:2], 6, 3)
        ),
        ["0:12", "12:15", "15:18"],
        18,
        1,
    ),
    "Falcon's groups": (
        lambda y: (lambda g: [g[..., :1, :], g[..., [-2], :], g[..., [-1], :]])(
            y.view(*y.shape[:2], 2, 3, 3)
        ),
        ["0:3", "3:6", "6:9"],
        9,
        2,
    ),
    "one after another": (
        lambda y: [part.view(*y.shape[:2], 2, 3).transpose(1, 2) for part in y.chunk(3, -1)],
        ["0:6", "6:12", "12:18"],
        18,
        2,
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_products_that_hold_queries_keys_and_values(name: str) -> None:
    split, rows, period, groups = LAYOUTS[name]

    def middle(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
        q, k, v = split(m.wide(x))
        if name.startswith("Falcon"):
            q, k, v = (part.flatten(2, -2).transpose(1, 2) for part in (q, k, v))
        k, v = (part.expand(-1, q.shape[1], -1, -1) for part in (k, v))
        y = (
            F.scaled_dot_product_attention(q, k, v, is_causal=True)
            .transpose(1, 2)
            .reshape(*ids.shape, -1)
        )
        return y[..., :6] if y.shape[-1] == 6 else F.linear(y, m.up)

    model = toy(middle)
    model.up = nn.Parameter(torch.randn(6, 12, dtype=torch.float64))
    found = agree(model)
    part = "" if period == 18 else f" of {period}"
    expected = [f"wide.{kind}[{r}{part}]" for r in rows for kind in ("weight", "bias")]
    assert sorted(slot for slot in slots(found) if slot and slot.startswith("wide")) == sorted(
        expected
    )
    (attention,) = calls_of(found, attention_forward)
    assert argument(attention, "kv_heads") == groups


GROUPED = {
    "repeat_interleave": lambda y, n: y.repeat_interleave(n, 1),
    "expand and reshape": lambda y, n: (
        y[:, :, None].expand(-1, -1, n, -1, -1).reshape(y.shape[0], -1, *y.shape[2:])
    ),
    "stacked": lambda y, n: torch.stack([y] * n, 2).flatten(1, 2),
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", GROUPED)
def test_grouped_queries(name: str, groups: int) -> None:
    def middle(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
        y = m.wide(x)
        q, k, v = (
            y[..., a:b].unflatten(-1, (-1, 3)).transpose(1, 2)
            for a, b in ((0, 12), (12, 12 + 3 * groups), (18 - 3 * groups, 18))
        )
        k, v = (GROUPED[name](part, 4 // groups) for part in (k, v))
        return F.linear(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2), m.up
        )

    model = toy(middle)
    model.up = nn.Parameter(torch.randn(6, 12, dtype=torch.float64))
    (attention,) = calls_of(agree(model), attention_forward)
    assert (argument(attention, "heads"), argument(attention, "kv_heads")) == (4, groups)


def test_groups_that_take_turns_are_refused() -> None:
    def middle(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
        y = m.wide(x)
        q, k, v = (
            y[..., a:b].unflatten(-1, (-1, 3)).transpose(1, 2)
            for a, b in ((0, 12), (6, 12), (12, 18))
        )
        k, v = (part.repeat(1, 2, 1, 1) for part in (k, v))
        return F.linear(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2),
            m.wide.weight[:6, :].repeat(1, 2),
        )

    assert "scaled_dot_product_attention" in refusal(toy(middle))
