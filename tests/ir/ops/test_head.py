"""tintc.ir.ops.head against torch.autograd through the whole head, whatever the size of its
chunks.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.shapes import Draw, batches, lengths, seeds, widths
from tests.support.tolerances import HALF, PRIMITIVE, error
from tintc.ir.ops import head
from tintc.ir.ops.head import (
    head_gradient,
    head_losses,
    head_losses_and_gradient,
    token_losses,
)
from tintc.ir.ops.onednn import available

LIMIT = PRIMITIVE[torch.float64]
# What stands between the head and the loss: nothing, a multiple, and Gemma 2's soft-cap.
BEHIND: list[tuple[list[str], list[float]]] = [
    ([], []),
    (["scale"], [0.5]),
    (["scale", "tanh", "scale"], [0.4, 1.0, 2.5]),
]


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """`problems` sets the size of chunks; it is as it was after each test."""
    monkeypatch.setitem(head.CHUNK_NUMBERS, "cpu", head.CHUNK_NUMBERS["cpu"])


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """A head with hidden states, targets, a mask with holes, and chunks of one token, of some, or
    of all.
    """
    random, b, t, d, v = (
        Draw(draw(seeds)),
        draw(batches),
        draw(lengths),
        draw(widths),
        draw(st.integers(1, 11)),
    )
    head.CHUNK_NUMBERS["cpu"] = draw(st.sampled_from([1, v, 3 * v, 3 * v + 1, 10**6]))
    behind, factors = draw(st.sampled_from(BEHIND))
    return {
        "h": random(b, t, d),
        "weight": random(v, d),
        "bias": random(v) if draw(st.booleans()) else None,
        "targets": torch.randint(v, (b, t), generator=random.generator),
        "mask": (torch.rand(b, t, generator=random.generator) < 0.6).double(),
        "behind": behind,
        "factors": factors,
        "rows": draw(st.sampled_from([0, 1, 4])),  # 0: by the number of logits
    }


def logits(p: dict[str, Any]) -> Tensor:
    """Written out; nothing is shared with the primitive."""
    z: Tensor = p["h"] @ p["weight"].T
    z = z if p["bias"] is None else z + p["bias"]
    for name, factor in zip(p["behind"], p["factors"], strict=True):
        z = z * factor if name == "scale" else torch.tanh(z)
    return z


def behind(p: dict[str, Any]) -> tuple[Any, ...]:
    return p["behind"], p["factors"], p.get("rows", 0)


def found_gradient(p: dict[str, Any], kind: str) -> Tensor:
    names = ("h", "weight", "bias", "targets", "mask")
    return head_gradient(*(p[name] for name in names), kind, *behind(p), False)


@given(problems(), st.sampled_from(["softmax", "quadratic"]))
def test_gradient(p: dict[str, Any], kind: str) -> None:
    z = logits(p)
    if kind == "softmax":
        per_token = F.cross_entropy(
            z.flatten(0, 1), p["targets"].flatten(), reduction="none"
        ).view_as(p["targets"])
    else:  # |z|^2 / 2 - z_y, whose gradient is z - 1_y
        per_token = z.square().sum(-1) / 2 - z.gather(-1, p["targets"][..., None])[..., 0]
    (expected,) = torch.autograd.grad((per_token * p["mask"]).sum(), p["h"])
    assert error(found_gradient(p, kind), expected) < LIMIT


@given(problems(), st.booleans())
def test_losses(p: dict[str, Any], some_ignored: bool) -> None:
    labels = p["targets"].masked_fill(p["mask"] == 0, -100) if some_ignored else p["targets"]
    z = logits(p)
    expected = F.cross_entropy(
        z.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100
    ).view_as(labels)
    assert (
        error(
            head_losses(
                p["h"],
                p["weight"],
                p["bias"],
                labels,
                p["behind"],
                p["factors"],
                p.get("rows", 0),
                False,
            ),
            expected,
        )
        < LIMIT
    )
    assert error(token_losses(z, labels), expected) < LIMIT
    assert bool((token_losses(z, labels)[labels == -100] == 0).all())


@given(problems(), st.sampled_from(["softmax", "quadratic"]))
def test_both_are_the_two(p: dict[str, Any], kind: str) -> None:
    labels = p["targets"].masked_fill(p["mask"] == 0, -100)
    z = logits(p)
    per_token = F.cross_entropy(
        z.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100
    ).view_as(labels)
    losses, gradient = head_losses_and_gradient(
        p["h"], p["weight"], p["bias"], labels, p["targets"], p["mask"], kind, *behind(p), False,
    )  # fmt: skip
    assert error(losses, per_token) < LIMIT
    if kind == "softmax":
        (expected,) = torch.autograd.grad(per_token.sum(), p["h"])
        assert error(gradient, expected) < LIMIT
    assert torch.equal(gradient, found_gradient(p, kind))


def example(dtype: torch.dtype) -> dict[str, Any]:
    draw = Draw(0)
    ids = torch.randint(33, (2, 9), generator=draw.generator)
    mask = torch.ones(2, 9, dtype=dtype)
    tensors = {
        "h": draw(2, 9, 8).to(dtype),
        "weight": draw(33, 8).to(dtype),
        "bias": draw(33).to(dtype),
    }
    return {
        **tensors,
        "targets": ids,
        "mask": mask,
        "behind": ["scale", "tanh", "scale"],
        "factors": [0.4, 1.0, 2.5],
    }


def in_double(p: dict[str, Any]) -> dict[str, Any]:
    return {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in p.items()
    }


@pytest.mark.parametrize("kind", ["softmax", "quadratic"])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_stays(dtype: torch.dtype, kind: str) -> None:
    p = example(dtype)
    found = found_gradient(p, kind)
    assert found.dtype == dtype
    assert error(found, found_gradient(in_double(p), kind)) < HALF[dtype]
    losses = head_losses(
        p["h"],
        p["weight"],
        p["bias"],
        p["targets"],
        p["behind"],
        p["factors"],
        p.get("rows", 0),
        False,
    )
    assert losses.dtype == token_losses(logits(p), p["targets"]).dtype == torch.float32
    assert error(losses, token_losses(logits(in_double(p)), p["targets"])) < HALF[dtype]


@pytest.mark.skipif(not available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("chunk", [33, 5 * 33, 10**6])
def test_onednn_inside(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.CHUNK_NUMBERS, "cpu", chunk)
    p = {
        name: x.detach() if isinstance(x, Tensor) else x
        for name, x in example(torch.float32).items()
    }
    names, limit = ("h", "weight", "bias", "targets", "mask"), PRIMITIVE[torch.float32]
    found = head_gradient(*(p[name] for name in names), "softmax", *behind(p), True)
    assert error(found, found_gradient(in_double(p), "softmax")) < limit
    losses = head_losses(p["h"], p["weight"], p["bias"], p["targets"], *behind(p), True)
    assert error(losses, token_losses(logits(in_double(p)), p["targets"])) < limit


def test_chunks_bound_what_exists_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product is larger than a chunk; chunks are as few as fit, and of one size."""
    monkeypatch.setitem(head.CHUNK_NUMBERS, "cpu", 5 * 33)
    sizes, product = [], head._product

    def noted(x: Tensor, *rest: Any) -> Tensor:
        sizes.append(len(x))
        return product(x, *rest)

    monkeypatch.setattr(head, "_product", noted)
    p = example(torch.float64)
    found_gradient(p, "softmax")
    assert sizes == [5, 5, 5, 5, 5, 5, 3, 3]  # forward and back, 18 tokens in 4 chunks
    sizes.clear()
    found_gradient({**p, "rows": 9}, "softmax")
    assert sizes == [9, 9, 9, 9]
