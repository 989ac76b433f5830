"""Every operator's shape rule equals the shape of its result, and its results carry gradients from
outside.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from tests.support.optimized import pruned
from tests.support.shapes import Draw
from tests.support.spelled import angles, causal, heads, merged, rotated
from tests.support.stages import stage
from tintc.ir.builder import infer_shape
from tintc.ir.config import SimulatorConfig
from tintc.ir.dialect import OPERATORS, argument, is_tint, target, tint_name
from tintc.ir.node_meta import KEY, NodeInfo
from tintc.ir.ops.onednn import available
from tintc.passes import OPTIMIZATIONS


def arguments(name: str, b: int, t: int, d: int, o: int, own: bool, draw: Draw) -> tuple[Any, ...]:
    """Arguments for a call: B sequences, T tokens, D inputs, O outputs; own: each sequence has its
    own weights.
    """
    h, g, e = 4, 2, 3
    x, dx, dy, lr = (
        draw(b, t, d),
        draw(b, t, d),
        draw(b, t, o),
        torch.tensor(0.1, dtype=torch.float64),
    )
    weight, bias = draw.parameter(b, not own, o, d), draw.parameter(b, not own, o)
    gamma, beta = draw.parameter(b, not own, d), draw.parameter(b, not own, d)
    q, k, v, do = draw(b, t, h * e), draw(b, t, g * e), draw(b, t, g * e), draw(b, t, h * e)
    mask = torch.ones(b if own else 1, 1, t, t, dtype=torch.bool).tril()
    ids, loss_mask = (
        torch.randint(o, (b, t), generator=draw.generator),
        torch.ones(b, t, dtype=torch.float64),
    )
    cut = (t + 1) // 2
    bias_BTH = draw(b, t, h) if own else None
    return {
        "prefix": (draw(d, 2 * o), o // 2, o, o, True),
        "embedding": (draw(o + 2, d), ids, 2),
        "residual": (x, dx),
        "multiply": (x, dx),
        "scale": (x, 0.3),
        "rotary": (
            draw(b, t, h * 5),
            draw(b, t, 4),
            draw(b, t, 4),
            h,
            "interleaved" if own else "half",
            d % 2 == 0,
        ),
        "window_mask": (mask, 1 + o % 3),
        "segment": (x, cut),
        "segment_mask": (mask, cut),
        "linear_forward": (x, weight, bias if d % 2 else None),
        "linear_backward": (dy, weight),
        "linear_descent": (weight, dy, x, lr),
        "bias_descent": (bias, dy, lr),
        "norm_forward": (x, gamma, beta if d % 2 else None, 1e-5, "layer", 1, 0.0),
        "norm_backward": (
            draw(b, t, 2 * d),
            draw(b, t, 2 * d),
            gamma,
            1e-5,
            "rms",
            2,
            1.0,
            "first_order",
            1000.0,
        ),
        "norm_descent": (
            gamma,
            draw(b, t, 2 * d),
            draw(b, t, 2 * d),
            1e-5,
            "rms" if d % 2 else "layer",
            2,
            lr,
        ),
        "activation_forward": (x, "silu"),
        "activation_backward": (dx, x, "gelu", "exact", 1000.0),
        "attention_forward": (q, k, v, mask, bias_BTH, h, g, 0.5, 0.0),
        "attention_backward_value": (do, q, k, mask, bias_BTH, h, g, 0.5, 3.0),
        "attention_backward_full": (do, q, k, v, mask, bias_BTH, h, g, 0.5, 3.0),
        "low_rank": (draw(b, t, o), x, draw(b, cut, d), draw(b, cut, o), lr, own),
        "concatenate": ([x, dx],),
        "linear_residual": (x, weight, bias if d % 2 else None, dy, False),
        "onednn_product": (x, weight, bias if d % 2 else None, dy if own else None, False),
        "onednn_low_rank": (draw(b, t, o), x, draw(b, cut, d), draw(b, cut, o), lr, own),
        "onednn_descent": (weight, dy, x, lr),
        "flash_forward": (q, k, v, h, g, 0.5),
        "flash_backward": (do, q, k, v, do, draw(b, h, t), h, g, 0.5),
        "head_gradient": (
            x,
            draw(o, d),
            draw(o) if own else None,
            ids,
            loss_mask,
            "softmax",
            ["scale", "tanh"],
            [0.3, 1.0],
            False,
        ),
        "head_logits": (
            x,
            draw(o, d),
            draw(o) if own else None,
            ["scale"],
            [0.3],
            torch.empty(b, t, o, dtype=torch.float64),
            False,
        ),
        "head_losses": (x, draw(o, d), draw(o) if own else None, ids, ["scale"], [0.3], False),
        "token_losses": (dy, ids),
        "kept_tokens": (x, torch.arange(cut)),
        "stack_rows": ([draw(o, d), draw(d, d)],),
        "columns": (x, d // 2, d),
        "loss_gradient": (dy, ids, loss_mask, "softmax"),
        "mean_embedding_gradient": (draw(o, d), ids, loss_mask),
    }[name]


FLOAT32 = tuple(name for name in OPERATORS if name.startswith("onednn_"))  # in no other dtype
# Kernels and loops that serve calls nobody differentiates.
WITHOUT_DERIVATIVES = tuple(
    name for name, operator in OPERATORS.items() if operator.whole or name.startswith("flash_")
)


def sample(name: str, b: int, t: int, d: int, o: int, own: bool, draw: Draw) -> tuple[Any, ...]:
    """`arguments`, in the operator's dtype and detached where it has no derivative."""
    given_arguments = arguments(name, b, t, d, o, own, draw)
    if name in WITHOUT_DERIVATIVES:
        given_arguments = tree_map_only(Tensor, Tensor.detach, given_arguments)
    if name in FLOAT32:
        given_arguments = tree_map_only(Tensor, Tensor.float, given_arguments)
    return given_arguments


def by_rule(name: str, given_arguments: tuple[Any, ...], b: int, t: int) -> Any:
    """The rule's answer, with its symbols replaced by the sizes."""
    symbols = {
        "B": b,
        "T": t,
        "S": (t + 1) // 2,
        f"2{t}": 2 * t,
    }  # the last: two parts of t tokens each, side by side
    shapes = tree_map_only(Tensor, lambda a: tuple(a.shape), given_arguments)
    found = OPERATORS[name].shape(*shapes)
    replaced = fx.node.map_aggregate(found, lambda size: symbols.get(size, size))  # type: ignore[arg-type]
    return replaced


@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in FLOAT32 or available()])
@settings(max_examples=12)
@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 7),
    st.integers(1, 7),
    st.booleans(),
    st.integers(0, 99),
)
def test_shape_rule_equals_the_results_shape(
    name: str, b: int, t: int, d: int, o: int, own: bool, seed: int
) -> None:
    given_arguments = sample(name, b, t, d, o, own, Draw(seed))
    result = target(name)(*given_arguments)
    shapes = (
        tuple(tuple(r.shape) for r in result)
        if isinstance(result, (tuple, list))
        else tuple(result.shape)
    )
    assert by_rule(name, given_arguments, b, t) == shapes
    number = torch.float32 if name in FLOAT32 else torch.float64
    kind = {"bool": torch.bool, "float": number, "int": torch.int64}[OPERATORS[name].dtype]
    assert all(r.dtype == kind for r in (result if isinstance(result, (tuple, list)) else [result]))


@pytest.mark.parametrize(
    "name", [name for name in OPERATORS if name not in FLOAT32]
)  # torch has no fake kernels of oneDNN's
def test_operators_take_fake_tensors(name: str) -> None:
    real = sample(name, 2, 5, 3, 4, True, Draw(0))
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = tree_map_only(Tensor, mode.from_tensor, real)
        found = target(name)(*fake)
    expected = target(name)(*real)
    pairs = (
        zip(found, expected, strict=True)
        if isinstance(expected, (tuple, list))
        else [(found, expected)]
    )
    assert all(f.shape == r.shape and f.dtype == r.dtype for f, r in pairs)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, o in OPERATORS.items()
        if o.dtype == "float" and name not in WITHOUT_DERIVATIVES
    ],
)
def test_gradients_from_outside_pass_through(name: str) -> None:
    """The simulator's inner backward pass is differentiable itself: second derivatives, checked by
    gradcheck.
    """
    leaves, spec = tree_flatten(arguments(name, 2, 4, 3, 4, True, Draw(0)))
    floats = [
        a.detach().requires_grad_()
        for a in leaves
        if isinstance(a, Tensor) and a.is_floating_point()
    ]

    def call(*values: Tensor) -> Any:
        rest = iter(values)
        filled = [
            next(rest) if isinstance(a, Tensor) and a.is_floating_point() else a for a in leaves
        ]
        return target(name)(*tree_unflatten(filled, spec))

    assert torch.autograd.gradcheck(call, floats, eps=1e-6, atol=1e-5)


def test_names_and_arguments() -> None:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    call = graph.call_function(target("linear_forward"), (x, w))
    other = graph.call_function(torch.relu, (call,))
    assert tint_name(call) == "linear_forward"
    assert tint_name(other) is tint_name(x) is None
    assert is_tint(call, "residual", "linear_forward")
    assert not is_tint(call, "residual")
    assert (argument(call, "weight"), argument(call, "bias")) == (w, None)
    x.meta[KEY], w.meta[KEY] = NodeInfo(shape=("B", "T", 3)), NodeInfo(shape=(5, 3))
    assert infer_shape(call) == ("B", "T", 5)


class Turning(nn.Module):
    """A block with rotary positions, a window, a gate and a multiple."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(y) for y in self.wide(x).chunk(3, -1))
        q, k = (rotated(y, *angles(x)) for y in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=causal(x).triu(-2))
        return x + 0.5 * self.out(merged(y) * F.silu(x))


def turning() -> nn.Module:
    """Two of them."""
    return nn.Sequential(
        nn.Embedding(19, 8), nn.Sequential(Turning(), Turning()), nn.Linear(8, 19)
    ).double()


# Kinds of calls that bring out every optimization.
CALLS: tuple[dict[str, Any], ...] = (
    {"outputs": ("losses",), "dtype": torch.float32},  # oneDNN, the head in chunks
    {"low_rank": frozenset(), "into": True},
    {"low_rank": frozenset(), "dtype": torch.float32},
    {"outputs": ("losses",), "differentiable": True},
    {"device": "cuda", "some_tokens": True},
)


def test_every_operator_occurs_and_says_what_it_means() -> None:
    """The dialect holds nothing that neither the pipeline nor an optimization emits."""
    seen: set[str] = set()
    for config in (
        SimulatorConfig.exact(),
        SimulatorConfig.paper(),
        SimulatorConfig.paper(loss_gradient="mean_embedding"),
    ):
        for model in (None, turning()):
            seen |= {
                name
                for node in stage("verify", config, model=model, longest=32).graph.nodes
                if (name := tint_name(node))
            }
    for facts in CALLS:
        found = pruned(SimulatorConfig.exact(steps=2), *OPTIMIZATIONS, **facts)
        seen |= {name for node in found.graph.nodes if (name := tint_name(node))}
    assert seen == set(OPERATORS)
    assert all(operator.meaning for operator in OPERATORS.values())
