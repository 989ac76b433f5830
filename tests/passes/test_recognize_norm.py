import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.models import gpt2, opt
from tests.support.spelled import SDPA, agree, calls_of, merged, projections, refusal
from tests.support.stages import assert_golden, assert_same_numbers, printed, stage
from tests.support.toys import toy
from tintc.ir.dialect import argument, is_tint
from tintc.ir.errors import UnsupportedModelError
from tintc.ir.node_meta import info
from tintc.ir.ops.norm import norm_forward

FORMS = {
    "module": (lambda m, x, ids: m.norm(x), [True, True, 1e-5]),
    "gain only": (lambda m, x, ids: F.layer_norm(x, (6,), m.norm.weight), [True, False, 1e-5]),
    "shift only": (
        lambda m, x, ids: F.layer_norm(x, (6,), None, m.norm.bias, 0.5),
        [False, True, 0.5],
    ),
    "bare": (lambda m, x, ids: F.layer_norm(x, (6,), eps=0.01), [False, False, 0.01]),
}


@pytest.mark.parametrize("name", FORMS)
def test_fires(name: str) -> None:
    middle, (gain, shift, eps) = FORMS[name]
    model = toy(middle)
    found = stage("recognize_norm", model=model)
    (norm,) = [n for n in found.graph.nodes if is_tint(n, norm_forward)]
    assert [argument(norm, "gamma") is not None, argument(norm, "beta") is not None] == [
        gain,
        shift,
    ]
    assert argument(norm, "eps") == eps
    assert "aten.layer_norm.default" not in found.operators()
    assert_same_numbers("recognize_norm", model=model)


@pytest.mark.parametrize(
    "middle",
    [
        lambda m, x, ids: F.layer_norm(x, (6,), m.norm.weight * 2, m.norm.bias),
        lambda m, x, ids: F.layer_norm(x, (6,), m.norm.weight, m.scale * 2),
        lambda m, x, ids: F.layer_norm(x.view(*ids.shape, 2, 3), (2, 3)).flatten(2),
    ],
    ids=["computed gain", "computed shift", "two dimensions"],
)
def test_leaves_the_rest_alone_and_says_why(middle) -> None:  # type: ignore[no-untyped-def]
    found = stage("recognize_norm", model=toy(middle))
    (left,) = [n for n in found.graph.nodes if "layer_norm" in str(n.target)]
    assert (
        info(left).refused == "it normalises several dimensions, or its gain or shift is computed"
    )
    assert not [n for n in found.graph.nodes if is_tint(n, norm_forward)]


def test_a_norm_over_part_of_a_token_is_not_read_as_one_over_all() -> None:
    """Normalising each head by itself looks like a norm over the last dimension, of another
    width.
    """
    with pytest.raises(UnsupportedModelError):
        stage(
            "refuse_unsupported",
            model=toy(
                lambda m, x, ids: F.layer_norm(m.linear(x).view(*ids.shape, 2, 3), (3,)).flatten(2)
            ),
        )


def test_keeps_the_numbers_of_models() -> None:
    for model in (None, opt(vocab=19), gpt2(vocab=19)):
        assert_same_numbers("recognize_norm", model=model)


def test_golden(update_golden: bool) -> None:
    assert_golden("recognize_norm", printed(stage("recognize_norm", layers=1).graph), update_golden)


def test_other_operators_stay() -> None:
    model = toy(lambda m, x, ids: torch.softmax(m.linear(x), -1))
    assert printed(stage("recognize_norm", model=model).graph) == printed(
        stage("recognize_linear", model=model).graph
    )


def mean_square(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


EPS = 1e-3
WRITTEN = {  # spelling: kind, gain, shift, offset
    "rsqrt": (
        lambda m, x: m.scale * (x * torch.rsqrt(mean_square(x) + EPS)),
        "rms",
        True,
        False,
        0.0,
    ),
    "x * x": (
        lambda m, x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * m.scale,
        "rms",
        True,
        False,
        0.0,
    ),
    "square": (
        lambda m, x: x * torch.rsqrt(EPS + x.square().mean(-1, keepdim=True)) * m.scale,
        "rms",
        True,
        False,
        0.0,
    ),
    "one over a root": (
        lambda m, x: x * (1 / torch.sqrt(mean_square(x) + EPS)) * m.scale,
        "rms",
        True,
        False,
        0.0,
    ),
    "over a root": (
        lambda m, x: x / torch.sqrt(mean_square(x) + EPS) * m.scale,
        "rms",
        True,
        False,
        0.0,
    ),
    "over a power": (
        lambda m, x: x / (mean_square(x) + EPS) ** 0.5 * m.scale,
        "rms",
        True,
        False,
        0.0,
    ),
    "a negative power": (
        lambda m, x: x * (mean_square(x) + EPS).pow(-0.5) * m.scale,
        "rms",
        True,
        False,
        0.0,
    ),
    "through float32": (
        lambda m, x: m.scale * (x.float() * torch.rsqrt(mean_square(x.float()) + EPS)).to(x.dtype),
        "rms",
        True,
        False,
        0.0,
    ),
    "one operator": (lambda m, x: F.rms_norm(x, (6,), m.scale, EPS), "rms", True, False, 0.0),
    "without a gain": (
        lambda m, x: x * torch.rsqrt(mean_square(x) + EPS),
        "rms",
        False,
        False,
        0.0,
    ),
    "one plus a gain": (
        lambda m, x: x * torch.rsqrt(mean_square(x) + EPS) * (1.0 + m.scale),
        "rms",
        True,
        False,
        1.0,
    ),
    "a gain plus two": (
        lambda m, x: (m.scale + 2) * (x * torch.rsqrt(mean_square(x) + EPS)),
        "rms",
        True,
        False,
        2.0,
    ),
    "with a shift": (
        lambda m, x: x * torch.rsqrt(mean_square(x) + EPS) * m.scale + m.norm.bias,
        "rms",
        True,
        True,
        0.0,
    ),
    "centred": (
        lambda m, x: (
            centred(x) * torch.rsqrt(mean_square(centred(x)) + EPS) * m.scale + m.norm.bias
        ),
        "layer",
        True,
        True,
        0.0,
    ),
    "torch.var": (
        lambda m, x: (
            centred(x) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + EPS) * m.scale
        ),
        "layer",
        True,
        False,
        0.0,
    ),
    "correction 0": (
        lambda m, x: centred(x) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + EPS),
        "layer",
        False,
        False,
        0.0,
    ),
    "one operator, one plus a gain": (
        lambda m, x: F.layer_norm(x, (6,), m.scale + 1, m.norm.bias, EPS),
        "layer",
        True,
        True,
        1.0,
    ),
    "a learned scale": (lambda m, x: m.scale * m.linear(x), "scale", True, False, 0.0),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_spellings(name: str) -> None:
    form, kind, gain, shift, offset = WRITTEN[name]
    model = toy(lambda m, x, ids: form(m, x))
    found = stage("refuse_unsupported", model=model) if name == "through float32" else agree(model)
    (norm,) = calls_of(found, norm_forward)
    assert (argument(norm, "kind"), argument(norm, "heads"), argument(norm, "offset")) == (
        kind,
        1,
        offset,
    )
    assert (argument(norm, "gamma") is not None, argument(norm, "beta") is not None) == (
        gain,
        shift,
    )
    assert argument(norm, "eps") == (0.0 if kind == "scale" else EPS)


def test_a_gain_of_two_norms_is_one_slot() -> None:
    found = agree(toy(lambda m, x, ids: m.linear(x * m.scale) * m.scale))
    first, second = calls_of(found, norm_forward)
    assert argument(first, "gamma") is argument(second, "gamma")


def of_heads(form, by_token: bool):  # type: ignore[no-untyped-def]
    """An attention whose queries and keys pass through `form`, heads in front of tokens or
    behind.
    """

    def middle(m, x, ids):  # type: ignore[no-untyped-def]
        q, k, v = projections(m, x)
        q, k = (
            form(m, y.transpose(1, 2)).transpose(1, 2) if by_token else form(m, y) for y in (q, k)
        )
        return merged(SDPA(q, k, v, is_causal=True))

    return toy(middle)


@pytest.mark.parametrize("by_token", [False, True], ids=["heads first", "tokens first"])
@pytest.mark.parametrize(
    "form",
    [
        lambda m, q: F.rms_norm(q, (3,), None, EPS),
        lambda m, q: F.layer_norm(q, (3,), None, None, EPS),
        lambda m, q: q * torch.rsqrt(mean_square(q) + EPS) * (1 + m.three),
        lambda m, q: m.three * (q * torch.rsqrt(mean_square(q) + EPS)),
    ],
    ids=["rms", "layer", "offset", "written out"],
)
def test_norms_of_heads(form, by_token: bool) -> None:  # type: ignore[no-untyped-def]
    model = of_heads(form, by_token)
    model.three = torch.nn.Parameter(torch.tensor([1.1, 0.7, 0.4], dtype=torch.float64))
    norms = calls_of(agree(model), norm_forward)
    assert [argument(n, "heads") for n in norms] == [2, 2]
    assert [info(n).shape[-1] for n in norms] == [6, 6]


NO_NORMS = {
    "over tokens": lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS),
    "of other numbers": lambda m, x: m.linear(x) * torch.rsqrt(mean_square(x) + EPS),
    "unbiased": lambda m, x: centred(x) * torch.rsqrt(x.var(-1, keepdim=True) + EPS),
    "epsilon outside": lambda m, x: x / (mean_square(x).sqrt() + EPS),
    "no epsilon": lambda m, x: x * torch.rsqrt(mean_square(x)),
    "a cubed root": lambda m, x: x * (mean_square(x) + EPS).pow(-1 / 3),
    "fourth powers": lambda m, x: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + EPS),
    "half centred": lambda m, x: centred(x) * torch.rsqrt(mean_square(x) + EPS),
}


@pytest.mark.parametrize("name", NO_NORMS)
def test_other_quotients_are_refused(name: str) -> None:
    message = refusal(toy(lambda m, x, ids: NO_NORMS[name](m, x)))
    assert "aten.mean" in message or "aten.var" in message


def test_norms_of_parts_of_heads_are_refused() -> None:
    def part(m, q):  # type: ignore[no-untyped-def]
        return torch.cat([F.rms_norm(q[..., :2], (2,)), q[..., 2:]], -1)

    assert "scaled_dot_product_attention" in refusal(of_heads(part, False))
