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

from tests.support.models import opt
from tests.support.operators import FLOAT32, WITHOUT_DERIVATIVES, arguments, sample
from tests.support.optimized import pruned
from tests.support.shapes import Draw
from tests.support.spelled import angles, causal, heads, merged, rotated
from tests.support.stages import stage
from tintc.compiler.driver import lower
from tintc.compiler.frontend.capture import capture
from tintc.ir.builder import infer_shape
from tintc.ir.choices import Contexts
from tintc.ir.config import SimulatorConfig
from tintc.ir.dialect import argument, is_tint, tint_name
from tintc.ir.node_meta import KEY, NodeInfo, side_by_side, size_of
from tintc.ir.ops import OPERATORS
from tintc.ir.ops.elementwise import residual
from tintc.ir.ops.linear import linear_forward
from tintc.ir.ops.onednn import available
from tintc.passes.optimize.low_rank_updates import low_rank_updates
from tintc.passes.specializing import OPTIMIZATIONS


def by_rule(name: str, given_arguments: tuple[Any, ...], b: int, t: int) -> Any:
    """The rule's answer, with its symbols replaced by the sizes."""
    symbols = {"B": b, "T": t, "N": t, "S": (t + 1) // 2, "C": t + 2}
    shapes = tree_map_only(Tensor, lambda a: tuple(a.shape), given_arguments)
    if OPERATORS[name].__module__.endswith((".rates", ".states")):  # they tell B from sizes
        shapes = tree_map_only(
            Tensor, lambda a: tuple("B" if (i, n) == (0, b) else n for i, n in enumerate(a.shape)),
            given_arguments,
        )  # fmt: skip
    found = OPERATORS[name].shape(*shapes)
    replaced = fx.node.map_aggregate(found, lambda size: symbols.get(size, size))  # type: ignore[arg-type]
    return replaced


@pytest.mark.parametrize(
    ("sizes", "together"),
    [
        (["S", "S"], "2S"),
        (["2S", "S", "10S"], "13S"),
        ([3, 4], 7),
        (["S", "L", "S"], "2S+L"),
        ([3, "S", 4], "S+7"),
        (["2S+L", "S+L+2"], "3S+2L+2"),
    ],
)
def test_sizes_side_by_side(sizes: list[int | str], together: int | str) -> None:
    assert side_by_side(sizes) == together


@pytest.mark.parametrize(
    ("size", "number"),
    [(5, 5), ("B", 2), ("3S", 21), ("2S+L", 14 + 16), ("S+7", 14), ("L", 16), ("T-1", 16)],
)
def test_size_of(size: int | str, number: int) -> None:
    assert size_of(size, {"B": 2, "T": 16, "S": 7}) == number


@pytest.mark.parametrize("sizes", [["S", "T-1"], ["S", ""], ["S+", "S"]])
def test_sizes_without_a_sum(sizes: list[int | str]) -> None:
    with pytest.raises(ValueError, match="cannot be added"):
        side_by_side(sizes)


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
    result = OPERATORS[name].target(*given_arguments)
    shapes = (
        tuple(tuple(r.shape) for r in result)
        if isinstance(result, (tuple, list))
        else tuple(result.shape)
    )
    assert by_rule(name, given_arguments, b, t) == shapes
    number = torch.float32 if name in FLOAT32 else torch.float64
    kind = {"bool": torch.bool, "float": number, "int": torch.int64}[
        OPERATORS[name].dtype or "float"
    ]
    assert all(r.dtype == kind for r in (result if isinstance(result, (tuple, list)) else [result]))


@pytest.mark.parametrize(
    "name", [name for name in OPERATORS if name not in FLOAT32]
)  # torch has no fake kernels of oneDNN's
def test_operators_take_fake_tensors(name: str) -> None:
    real = sample(name, 2, 5, 3, 4, True, Draw(0))
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = tree_map_only(Tensor, mode.from_tensor, real)
        found = OPERATORS[name].target(*fake)
    expected = OPERATORS[name].target(*real)
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
        return OPERATORS[name].target(*tree_unflatten(filled, spec))

    assert torch.autograd.gradcheck(call, floats, eps=1e-6, atol=1e-5)


def test_names_and_arguments() -> None:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    call = graph.call_function(linear_forward.target, (x, w))
    other = graph.call_function(torch.relu, (call,))
    assert tint_name(call) == "linear_forward"
    assert tint_name(other) is tint_name(x) is None
    assert is_tint(call, residual, linear_forward)
    assert not is_tint(call, residual)
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


class Strange(nn.Module):
    """A block with an activation that no pass knows, scaled by a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.gain = (
            nn.Linear(8, 12),
            nn.Linear(12, 8),
            nn.Parameter(torch.ones(12)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.mish(self.up(x) * self.gain.exp()))


class Scaled(Turning):
    """The same, with frequencies that fall as the greatest position grows."""

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        frequency = torch.tensor([1.0, 0.1]).double() / (positions.max() + 1)
        angle = (positions[:, None] * frequency).repeat(1, 2)
        q, k, v = (heads(y) for y in self.wide(x).chunk(3, -1))
        q, k = (rotated(y, angle.cos(), angle.sin()) for y in (q, k))
        return x + self.out(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


def scaled() -> nn.Module:
    return nn.Sequential(nn.Embedding(19, 8), nn.Sequential(Scaled()), nn.Linear(8, 19)).double()


def strange() -> nn.Module:
    return nn.Sequential(nn.Embedding(19, 8), nn.Sequential(Strange()), nn.Linear(8, 19)).double()


# Kinds of calls that bring out every optimization.
CALLS: tuple[dict[str, Any], ...] = (
    {"outputs": ("losses",), "dtype": torch.float32},  # oneDNN, the head in chunks
    {"low_rank": frozenset(), "into": True},
    {"low_rank": frozenset(), "dtype": torch.float32},
    {"outputs": ("losses",), "differentiable": True},
    {"device": "cuda", "some_tokens": True},
)
# A window of a stream, with keys of earlier tokens.
WINDOW: dict[str, Any] = {
    "outputs": ("initial_losses", "updates", "states", "cache"),
    "from_states": True,
    "window": True,
    "cached": True,
    "causal": False,
}
# A step of decoding, of several rows for each context.
DECODING: dict[str, Any] = {
    "outputs": ("logits", "cache"),
    "from_updates": True,
    "cached": True,
    "contexts": Contexts.GROUPS,
    "causal": False,
}
# Inner rules that bring out every operator of theirs.
RULES: tuple[dict[str, Any], ...] = (
    {"momentum": 0.5, "schedule": "linear", "clip_norm": 1.0, "decay": 0.1, "max_drift": 0.1},
    {"optimizer": "adam", "normalize": "weight"},
    {"optimizer": "rms"},
    {"optimizer": "muon"},
)


def test_every_operator_occurs_and_says_what_it_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dialect holds nothing that neither the pipeline nor an optimization emits."""
    monkeypatch.delenv("TINTC_VERIFY")  # of some forty pipelines; it is not what this looks at
    seen: set[str] = set()
    for config, model in (
        (SimulatorConfig.exact(), None),
        (SimulatorConfig.paper(), None),
        (SimulatorConfig.paper(loss_gradient="mean_embedding"), turning()),
        (SimulatorConfig.exact(train="*"), None),
    ):
        seen |= {
            name
            for node in stage("verify", config, model=model, longest=32).graph.nodes
            if (name := tint_name(node))
        }
    for rule in RULES:
        found = pruned(SimulatorConfig.exact(steps=2, **rule), low_rank_updates)
        lowered = stage("verify", SimulatorConfig.exact(steps=2, **rule)).graph
        nodes = [*lowered.nodes, *found.graph.nodes]
        seen |= {name for node in nodes if (name := tint_name(node))}
    optimized = [pruned(SimulatorConfig.exact(steps=2), *OPTIMIZATIONS, **facts) for facts in CALLS]
    everything = SimulatorConfig.exact(steps=2, train="*")
    optimized.append(pruned(everything, *OPTIMIZATIONS, model=opt()))  # a tied head
    limited = SimulatorConfig.exact(steps=2, max_drift=0.1)
    optimized.append(pruned(limited, *OPTIMIZATIONS, dtype=torch.float32))
    optimized.append(pruned(limited, *OPTIMIZATIONS, dtype=torch.float16))
    optimized += [
        pruned(SimulatorConfig.exact(), *passes, model=turning(), longest=32, **kind)
        for passes, kind in ((OPTIMIZATIONS, WINDOW), ((), DECODING))
    ]
    for found in optimized:
        seen |= {name for node in found.graph.nodes if (name := tint_name(node))}
    for model in (strange(), scaled()):
        program = lower(capture(model), SimulatorConfig.exact())
        seen |= {name for node in program.graph.nodes if (name := tint_name(node))}
    assert seen == set(OPERATORS)
    assert all(operator.meaning for operator in OPERATORS.values())
