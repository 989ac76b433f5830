"""From a region of captured operators to an island's program, and what is checked of it.

The region is traced for one sequence, its gradient by torch.autograd, into core ATen operators with
a symbolic length. Then it is computed, with random numbers, at other lengths and batches: the
program is the region, its gradient is torch.autograd's, no sequence depends on another, no result
on a later token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from tintc.ir.errors import raise_if_interrupted
from tintc.ir.island import Port, batched, read, write, written
from tintc.ir.writes import writes_in_place
from tintc.passes.analysis.coordinates import Untraceable
from tintc.passes.analysis.island_body import TRACED, Body

R = TypeVar("R")

_OF_TOKENS = ("tokens", "ids")
_HINT = 19  # tokens of the sequence that is traced; fewer where the model takes no more
_LONG = 640  # how far it is looked at whether the length matters
_SIZES = ((2, 7), (3, _HINT), (1, 2))  # sequences and tokens at which it is compared
_LIMIT = 1e-6  # of differences, relative to the largest number: the region may round to float32
_SAME = 1e-9  # of what has to be the same computation


class Barred(Untraceable):
    """Why a region is no island. node: the number of the operator that is to blame, if known."""

    def __init__(self, reason: str, node: int | None = None) -> None:
        super().__init__(reason)
        self.node = node


@dataclass(frozen=True)
class Source:
    """A region with its inputs as ports. shapes: of weights as the model has them. constants: the
    values of those. vocabulary: ids are below. shortest, most: tokens that the model takes.
    """

    body: Body
    ports: tuple[Port, ...]
    shapes: tuple[tuple[int, ...], ...]
    constants: tuple[Tensor | None, ...]
    vocabulary: int
    shortest: int = 2
    most: int | None = None

    @property
    def hint(self) -> int:
        """Tokens of the sequence that is traced: not the most, where nothing would be padded."""
        most = _HINT if self.most is None else min(_HINT, self.most - 3)
        return max(self.shortest, most)

    @property
    def learning(self) -> list[int]:
        return [i for i, port in enumerate(self.ports) if port.learns]

    def sequence(self, *given: Tensor) -> tuple[Tensor, ...]:
        """(T, W) of one sequence's inputs, weights as their slots have them."""
        whole = [
            x[None] if port.kind in _OF_TOKENS else x.reshape(shape)
            for x, port, shape in zip(given, self.ports, self.shapes, strict=True)
        ]
        return tuple(y[0] for y in self.body.batch(whole))

    def gradients(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Of one sequence: gradients of the results, then inputs -> gradients of inputs."""
        dys, values = given[: -len(self.ports)], list(given[-len(self.ports) :])
        with torch.enable_grad():
            for i in self.learning:
                values[i] = values[i].detach().requires_grad_()
            leaves, results = [values[i] for i in self.learning], self.sequence(*values)
            pairs = [(y, dy) for y, dy in zip(results, dys, strict=True) if y.requires_grad]
            if not pairs:
                return tuple(torch.zeros_like(x) for x in leaves)
            ends, starts = zip(*pairs, strict=True)
            found: tuple[Tensor, ...] = torch.autograd.grad(
                ends, leaves, starts, allow_unused=True, materialize_grads=True
            )
        return found

    def sample(self, batch: int, tokens: int, seed: int, *, own: bool) -> list[Tensor]:
        """Random inputs of a batch; own: a weight for every sequence."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=TRACED) * 0.9 + 0.1

        found = []
        for port, constant in zip(self.ports, self.constants, strict=True):
            if constant is not None:
                found.append(constant)
            elif port.kind == "ids":
                shape = (batch, tokens)
                found.append(torch.randint(self.vocabulary, shape, generator=generator))
            elif port.kind == "tokens":
                found.append(2 * draw(batch, tokens, *port.shape) - 1)
            else:
                value = draw(*((batch, *port.shape) if own else port.shape))
                found.append(value * (torch.rand(value.shape, generator=generator) - 0.3).sign())
        return found


@dataclass(frozen=True)
class Traced:
    """A program. ordered: its results depend on where a token stands, or on earlier tokens.
    longest: the longest sequence that it takes; None for any.
    """

    text: str
    widths: tuple[int, ...]
    ordered: bool
    longest: int | None = None


def traced(source: Source, names: Sequence[str]) -> Traced:
    """The program of a region. names: of its results, for messages.

    Raises Untraceable, with the reason, for a region that can be no island.
    """
    with source.body.types(), torch.inference_mode(False), torch.no_grad():
        example = source.sample(1, source.hint, 0, own=False)
        values = [x[0] if p.kind in _OF_TOKENS else x
                  for x, p in zip(example, source.ports, strict=True)]  # fmt: skip
        results = _ran(lambda: source.sequence(*values))
        if any(y.ndim != 2 or not y.is_floating_point() for y in results):
            raise Untraceable("its result is no activation (batch, tokens, width)")
        widths = tuple(int(y.shape[-1]) for y in results)
        text = _ran(lambda: _program(source, values, widths))
        try:
            read(text)
        except ValueError as error:
            raise Untraceable(f"its traced form does not stand: {error}") from error
        _check_batches(source)
        _check_causal(source, names)
        _check_numbers(source, text)
        if not _is_ordered(source, text):
            return Traced(text, widths, ordered=False)
        return Traced(text, widths, ordered=True, longest=_longest(source))


def _ran(function: Callable[[], R]) -> R:
    try:
        return function()
    except Untraceable:
        raise
    except Exception as error:  # whatever torch raises for what cannot be traced
        raise_if_interrupted(error)
        said = str(error).strip().splitlines()
        raise Untraceable(f"torch cannot trace it ({said[0] if said else error!r})") from error


def _program(source: Source, values: Sequence[Tensor], widths: tuple[int, ...]) -> str:
    gradients = [torch.ones(source.hint, width, dtype=TRACED) for width in widths]
    ports = [*(Port("tokens", (width,)) for width in widths), *source.ports]
    parts = [
        _graph(source.sequence, values, source.ports),
        _graph(source.gradients, [*gradients, *values], ports),
    ]
    try:
        return write(source.ports, widths, *(written(part, TRACED) for part in parts))
    except ValueError as error:
        raise Untraceable(f"it needs {error}, which no island can hold") from error


def _graph(
    function: Callable[..., tuple[Tensor, ...]], values: Sequence[Tensor], ports: Sequence[Port]
) -> fx.Graph:
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fake = []
    for number, (value, port) in enumerate(zip(values, ports, strict=True)):
        sizes = [DimDynamic.STATIC] * value.ndim
        if port.kind in _OF_TOKENS:
            sizes[0] = DimDynamic.DUCK
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        name = ConstantSource(f"input_{number}")
        fake.append(mode.from_tensor(value, source=name, symbolic_context=context))
    with mode, enable_python_dispatcher():
        module = make_fx(function, decomposition_table=dict(core_aten_decompositions()))(*fake)
        if any(writes_in_place(node) for node in module.graph.nodes):  # in a decomposition
            module = make_fx(dispatch_functionalize(module))(*fake)
    module.graph.eliminate_dead_code()
    return module.graph


def _check_batches(source: Source) -> None:
    """No sequence of a batch depends on another."""
    given = source.sample(3, 7, 1, own=False)
    whole = _ran(lambda: source.body.batch(_shaped(source, given)))
    for b in range(3):
        for found, expected in zip(whole, source.sequence(*_one(source, given, b)), strict=True):
            if _differ(found[b], expected, _SAME):
                raise Untraceable("it mixes the sequences of a batch")


def _check_causal(source: Source, names: Sequence[str]) -> None:
    """No result depends on a later token; and it is the same twice."""
    for tokens, changed in ((7, range(1, 7)), (source.hint, (source.hint // 4, source.hint - 1))):
        given = _one(source, source.sample(1, tokens, 2, own=False), 0)
        before = source.sequence(*given)
        again = source.sequence(*given)
        if any(
            not torch.equal(x.nan_to_num(), y.nan_to_num())
            for x, y in zip(before, again, strict=True)
        ):
            raise Untraceable("it gives different numbers each time: it draws random ones")
        for t in changed:
            after = source.sequence(*_changed(source, given, t))
            for name, old, new in zip(names, before, after, strict=True):
                early = [i for i in range(t) if _differ(old[i], new[i], _SAME)]
                if early:
                    _blame(source, given, t)
                    raise Barred(
                        f"changing token {t} changed output {early[0]} of {name}: it is not causal"
                    )


def _blame(source: Source, given: Sequence[Tensor], t: int) -> None:
    """Raises Barred for the first operator whose value changes before token t, where its tokens
    are one axis.
    """
    tokens = next(len(x) for x, p in zip(given, source.ports, strict=True) if p.kind in _OF_TOKENS)
    runs = [
        source.body.values(_shaped(source, _alone(source, values)))
        for values in (given, _changed(source, given, t))
    ]
    for number, node in enumerate(source.body.region.nodes):
        before, after = (values[node] for values in runs)
        axes = [i for i, n in enumerate(getattr(before, "shape", ())) if n == tokens]
        if len(axes) != 1 or before.shape != after.shape:
            continue
        pairs = (x.movedim(axes[0], 0)[:t] for x in (before, after))
        early = [i for i, (x, y) in enumerate(zip(*pairs, strict=True)) if not torch.equal(x, y)]
        if early:
            reason = f"changing token {t} changed output {early[0]}: it is not causal"
            raise Barred(reason, number)


def _alone(source: Source, given: Sequence[Tensor]) -> list[Tensor]:
    """One sequence as a batch."""
    return [
        x[None] if p.kind in _OF_TOKENS else x for x, p in zip(given, source.ports, strict=True)
    ]


def _check_numbers(source: Source, text: str) -> None:
    """The program gives the region's numbers, and its gradients are torch.autograd's."""
    island = read(text)
    for seed, (batch, tokens) in enumerate(_SIZES):
        tokens = max(source.shortest, min(tokens, source.hint))
        given = source.sample(batch, tokens, seed, own=True)
        results = batched(island.forward, given, source.ports)
        widths = [Port("tokens", (width,)) for width in island.widths]
        dys = [torch.cos(3 * y + 1) for y in results]
        gradients = batched(island.backward, [*dys, *given], [*widths, *source.ports])
        for b in range(batch):
            one = _one(source, given, b)
            pairs = list(zip([y[b] for y in results], source.sequence(*one), strict=True))
            exact = source.gradients(*(dy[b] for dy in dys), *one)
            pairs += zip([g[b] for g in gradients], exact, strict=True)
            if any(_differ(found, expected, _LIMIT) for found, expected in pairs):
                raise Untraceable("what torch traces of it differs from the model's own code")


def _is_ordered(source: Source, text: str) -> bool:
    """Whether a token alone gives another result than the same token in a sequence."""
    given = source.sample(1, 7, 3, own=False)
    island = read(text)
    whole = batched(island.forward, given, source.ports)
    for t in (0, 3, 6):
        alone = [x[:, t : t + 1] if p.kind in _OF_TOKENS else x
                 for x, p in zip(given, source.ports, strict=True)]  # fmt: skip
        try:
            found = batched(island.forward, alone, source.ports)
        except (RuntimeError, IndexError, ValueError):
            return True
        if any(_differ(x[0], y[0, t : t + 1], _SAME) for x, y in zip(found, whole, strict=True)):
            return True
    return False


def _longest(source: Source) -> int | None:
    """The longest sequence that the region takes, up to the longest that is looked at.

    Raises Untraceable where a token's result depends on how many tokens follow: training passes see
    the first tokens alone.
    """
    most = limit = min(_LONG, source.most or _LONG)
    given = _one(source, source.sample(1, limit, 4, own=False), 0)
    if not _runs(source, given, most):
        least = source.shortest
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if _runs(source, given, middle) else (least, middle)
        most = least
    whole = source.sequence(*_first(source, given, most))
    few = range(source.shortest, min(64, most))
    for length in (*few, *(n for n in (96, 192, 384) if n < most)):
        cut = source.sequence(*_first(source, given, length))
        for found, expected in zip(cut, whole, strict=True):
            if _differ(found, expected[:length], _SAME):
                raise Untraceable(
                    f"it depends on the length of the sequence: with {length} tokens the first "
                    f"results are others than with {most}"
                )
    return None if most == limit else most


def _runs(source: Source, given: Sequence[Tensor], length: int) -> bool:
    try:
        source.sequence(*_first(source, given, length))
    except (RuntimeError, IndexError, ValueError):
        return False
    return True


def _first(source: Source, given: Sequence[Tensor], length: int) -> list[Tensor]:
    return [
        x[:length] if port.kind in _OF_TOKENS else x
        for x, port in zip(given, source.ports, strict=True)
    ]


def _shaped(source: Source, given: Sequence[Tensor]) -> list[Tensor]:
    return [
        x if port.kind in _OF_TOKENS else x.reshape(shape)
        for x, port, shape in zip(given, source.ports, source.shapes, strict=True)
    ]


def _one(source: Source, given: Sequence[Tensor], b: int) -> list[Tensor]:
    """The inputs of one sequence."""
    return [
        x[b] if p.kind in _OF_TOKENS or (p.kind == "weight" and x.ndim > len(p.shape)) else x
        for x, p in zip(given, source.ports, strict=True)
    ]


def _changed(source: Source, given: Sequence[Tensor], t: int) -> list[Tensor]:
    found = list(given)
    for i, port in enumerate(source.ports):
        if port.kind == "tokens":
            found[i] = given[i].clone()
            found[i][t] = 0.7 - 0.5 * found[i][t]
        elif port.kind == "ids":
            found[i] = given[i].clone()
            found[i][t] = (found[i][t] + 1) % source.vocabulary
    return found


def _differ(found: Tensor, expected: Tensor, limit: float) -> bool:
    if found.shape != expected.shape:
        return True
    scale = (
        expected.detach().nan_to_num(posinf=0, neginf=0).abs().amax().clamp(min=1.0)
        if expected.numel()
        else 1.0
    )
    return not torch.allclose(found / scale, expected / scale, rtol=0, atol=limit, equal_nan=True)
