import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.models import gpt2, opt
from tests.support.stages import assert_golden, assert_same_numbers, inputs, numbers, printed, stage
from tests.support.tolerances import error
from tests.support.toys import Toy, toy
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.attention import attention_forward

SDPA = F.scaled_dot_product_attention


def heads(x: Tensor, count: int = 2) -> Tensor:
    return x.view(x.shape[0], x.shape[1], count, x.shape[2] // count).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def attend(m: Toy, x: Tensor, ids: Tensor, **options: Any) -> Tensor:
    q, k, v = (heads(y) for y in m.wide(x).split(6, dim=-1))
    return merged(SDPA(q, k, v, **{"is_causal": True, **options}))


def causal(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()


def scaled(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    q, k, v = (heads(y) for y in m.wide(x).split(6, dim=-1))
    return merged(SDPA(q * 0.3, k / 2.0, v, is_causal=True, scale=0.7))


def grouped(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    k, v = (
        heads(m.linear(x)[..., :3] @ torch.eye(3, dtype=x.dtype), 1),
        heads(x @ m.linear.weight[:, :3], 1),
    )
    return merged(SDPA(heads(x), k, v, is_causal=True, enable_gqa=True))


def permuted(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    q, k, v = (y.view(*ids.shape, 2, 3).permute(0, 2, 1, 3) for y in m.wide(x).split(6, dim=-1))
    return SDPA(q, k, v, is_causal=True).permute(0, 2, 1, 3).reshape(*ids.shape, 6)


ACCEPTED: dict[str, tuple[Any, float]] = {
    "causal flag": (attend, 1 / math.sqrt(3)),
    "boolean mask": (
        lambda m, x, ids: attend(m, x, ids, is_causal=False, attn_mask=causal(x)),
        1 / math.sqrt(3),
    ),
    "additive mask": (
        lambda m, x, ids: attend(
            m, x, ids, is_causal=False, attn_mask=torch.where(causal(x), 0.0, -math.inf).double()
        ),
        1 / math.sqrt(3),
    ),
    "scale given": (lambda m, x, ids: attend(m, x, ids, scale=0.25), 0.25),
    "scaled operands": (scaled, 0.7 * 0.3 / 2.0),
    "permuted": (permuted, 1 / math.sqrt(3)),
    "the same for all keys": (
        lambda m, x, ids: attend(
            m, x, ids, is_causal=False, attn_mask=torch.where(causal(x), 0.5, -math.inf).double()
        ),
        1 / math.sqrt(3),
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_fires(name: str) -> None:
    middle, scale = ACCEPTED[name]
    model = toy(middle)
    found = stage("recognize_attention", model=model)
    (node,) = [n for n in found.graph.nodes if is_tint(n, attention_forward)]
    assert argument(node, "scale") == pytest.approx(scale, rel=1e-12)
    assert (argument(node, "heads"), argument(node, "kv_heads")) == (2, 2)
    assert argument(node, "mask").name == "attention_mask"
    assert not {op for op in found.operators() if op.startswith("aten")}
    assert_same_numbers("recognize_attention", model=model)


def test_masks_are_the_callers() -> None:
    found = stage("recognize_attention", model=toy(attend))
    given, block = inputs(length=6), torch.arange(6) // 3
    given["attention_mask"] = given["attention_mask"] & (block[:, None] == block)
    alone = {**inputs(length=6)}
    alone = {
        name: value[:, 3:] if name in ("input_ids", "position_ids") else value
        for name, value in alone.items()
    }
    alone["attention_mask"] = alone["attention_mask"][..., :3, :3]
    assert error(numbers(found, given)[:, 3:], numbers(found, alone)) < 1e-12


REFUSED: dict[str, tuple[Any, str]] = {
    "not causal": (lambda m, x, ids: attend(m, x, ids, is_causal=False), "not causal"),
    "rolled": (
        lambda m, x, ids: attend(
            m, x, ids, is_causal=False, attn_mask=causal(x) & causal(x).T.roll(3, 0)
        ),
        "not the causal one",
    ),
    "anticausal": (
        lambda m, x, ids: attend(m, x, ids, is_causal=False, attn_mask=causal(x).T),
        "not the causal one",
    ),
    "learned bias": (
        lambda m, x, ids: attend(
            m, x, ids, is_causal=False, attn_mask=torch.where(causal(x), m.scale[0], -math.inf)
        ),
        "depends on a weight",
    ),
    "dropout": (lambda m, x, ids: attend(m, x, ids, dropout_p=0.5), "drops probabilities"),
    "rotated": (
        lambda m, x, ids: merged(SDPA(heads(x).cos(), heads(x), heads(x), is_causal=True)),
        "it reads aten.cos",
    ),
    "merged otherwise": (
        lambda m, x, ids: (
            SDPA(heads(x), heads(x), heads(x), is_causal=True)
            .permute(0, 2, 3, 1)
            .reshape(*ids.shape, 6)
        ),
        "its heads are not merged into (batch, tokens, heads * width)",
    ),
    "scaled values": (
        lambda m, x, ids: merged(SDPA(heads(x), heads(x), heads(x) * 2.0, is_causal=True)),
        "its values are scaled by 2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_leaves_the_rest_alone_and_says_why(name: str) -> None:
    middle, reason = REFUSED[name]
    found = stage("recognize_attention", model=toy(middle))
    (left,) = [n for n in found.graph.nodes if "scaled_dot_product" in str(n.target)]
    assert reason in info(left).refused
    assert not [n for n in found.graph.nodes if is_tint(n, attention_forward)]


def test_a_masks_dependence_on_token_ids_is_seen() -> None:
    """A mask that hides, say, a padding token is causal only as long as the token does not
    occur.
    """
    model = toy(
        lambda m, x, ids: attend(
            m, x, ids, is_causal=False, attn_mask=causal(x) & (ids != 7)[:, None, None, :]
        )
    )
    found = stage("recognize_attention", model=model)
    assert not [n for n in found.graph.nodes if is_tint(n, attention_forward)]


def test_each_layer_is_asked_whether_it_is_causal() -> None:
    """Two layers without a mask, the second of which is bidirectional."""
    found = stage(
        "recognize_attention",
        model=toy(lambda m, x, ids: attend(m, attend(m, x, ids), ids, is_causal=False)),
    )
    (left,) = [n for n in found.graph.nodes if "scaled_dot_product" in str(n.target)]
    assert "not causal" in info(left).refused


def test_a_mask_vouches_for_the_lengths_at_which_it_was_evaluated() -> None:
    """A window of 5000 would not show in 4096 tokens, so longer sequences are not accepted."""
    masked = stage(
        "recognize_attention",
        model=toy(lambda m, x, ids: attend(m, x, ids, is_causal=False, attn_mask=causal(x))),
    )
    assert masked.context.facts.max_tokens == 4096
    assert stage("recognize_attention", model=toy(attend)).context.facts.longest is None


@pytest.mark.parametrize("model", [opt(vocab=19), gpt2(vocab=19)], ids=["opt", "gpt2"])
def test_keeps_the_numbers_of_models(model) -> None:  # type: ignore[no-untyped-def]
    found = stage("recognize_attention", model=model)
    assert found.operators()["tint.attention_forward"] == 2
    assert_same_numbers("recognize_attention", model=model)


def test_golden(update_golden: bool) -> None:
    assert_golden(
        "recognize_attention", printed(stage("recognize_attention", layers=1).graph), update_golden
    )
