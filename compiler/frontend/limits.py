"""For which lengths a captured graph stands for the model.

A model that branches on the batch or the length was captured only along the branch of 2 x 8
tokens; torch.export says so in guards. Guards that only bound the length are limits.
"""

from __future__ import annotations

import builtins
import math
import re
import types
from collections.abc import Callable
from functools import cache

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from tintc.ir.errors import UnsupportedModelError

_LENGTHS_TRIED = (
    4098  # guards are read up to this length: passes look at masks and positions up to 4096
)
_BATCHES = (1, 2, 3, 5)
_SURE = 9  # a branch that is left before this length is no limit


def limits(program: torch.export.ExportedProgram, wrapper: nn.Module) -> tuple[int, int | None]:
    """(shortest, longest) sequence for which the captured graph stands; 0 and None for no limit.

    Lengths from some number on that leave the branch are a limit; if the graph computes the same at
    that number itself (a slice that happens to be whole), it is included. So are short lengths at
    which it computes the same, though the tracer would have taken another way there. Raises
    UnsupportedModelError for any other branch.
    """
    (least, most), (shortest, longest) = _bounds(program)
    guards = [str(guard) for guard in getattr(program, "_guards_code", [])]
    lengths, graph = _lengths(guards), cache(lambda: _unguarded(program))
    outside, mixed = _outside(guards, lengths)
    few = [n for n in {*range(2, min(shortest, _SURE)), *outside} if n < _SURE - 1]
    outside = [n for n in outside if n not in few]
    fewest = 0
    if not mixed & set(few):
        fewest = next((n + 1 for n in sorted(few)[::-1] if not _stands_at(n, graph, wrapper)), 0)
        shortest = 2 if shortest < _SURE else shortest
    else:
        outside = few
    # A length by itself, such as one that a cache was made for, may be computed alike.
    while outside and (alone := _alone(outside, lengths)) is not None:
        if not _stands_at(alone, graph, wrapper):
            break
        outside.remove(alone)
    broken = next(iter(outside), None)
    many = broken is None or broken - fewest >= _SURE - 2
    if least > 2 or most is not None or shortest > 2 or not many:
        found = [
            *guards,
            *(f"batch >= {n}" for n in (least,) if n > 2),
            *(f"batch <= {n}" for n in (most,) if n is not None),
        ]
        found = [*([f"tokens >= {shortest}"] if shortest > 2 else []), *found]
        raise UnsupportedModelError(
            f"{_name(wrapper)} computes different things for different batches or lengths "
            f"({'; '.join(found[:3])}); expected one computation for all"
        )
    if broken is not None:
        included = broken < _LENGTHS_TRIED and _stands_at(broken, graph, wrapper)
        longest = broken if included else broken - 1
    return fewest, longest


def _name(wrapper: nn.Module) -> str:
    return type(wrapper.auxiliary).__name__


def _lengths(guards: list[str]) -> list[int]:
    """Those at which guards are read: all up to some length, and those near their own numbers."""
    if not guards:
        return []
    numbers = {int(number) for guard in guards for number in re.findall(r"\d+", guard)}
    near = (n + d for n in numbers for d in (-1, 0, 1) if n > 2)
    return sorted({*range(2, _LENGTHS_TRIED), *near})


def _outside(guards: list[str], lengths: list[int]) -> tuple[list[int], set[int]]:
    """(lengths at which some guard does not hold, those of them at which a batch decides it)."""
    compiled = [builtins.compile(guard, "<guard>", "eval") for guard in guards]
    outside, mixed = [], set()
    for length in lengths:
        held = [all(_holds(guard, batch, length) for guard in compiled) for batch in _BATCHES]
        if not all(held):
            outside.append(length)
            if any(held):
                mixed.add(length)
    return outside, mixed


def _alone(outside: list[int], lengths: list[int]) -> int | None:
    """The first length that leaves the branch, if the next one does not."""
    behind = [n for n in lengths if n > outside[0]]
    return outside[0] if behind and behind[0] not in outside else None


class _Sized(tuple[int, ...]):
    """Stands for a tensor in a guard, which asks for its sizes alone."""

    def size(self) -> tuple[int, ...]:
        return self


def _holds(guard: types.CodeType, batch: int, length: int) -> bool:
    """Whether a guard of torch.export, a Python expression in the sizes of the input, holds."""
    names = {
        "L": {"input_ids": _Sized((batch, length))},
        "max": max,
        "min": min,
        "math": math,
        "torch": torch,
    }
    try:
        return bool(eval(guard, {"__builtins__": {}}, names))
    except Exception:  # a kind of guard that is not known
        return False


def _stands_at(length: int, graph: Callable[[], fx.GraphModule], wrapper: nn.Module) -> bool:
    """Whether the captured graph gives the model's own logits at a length that its guards
    exclude. graph: makes it without them.
    """
    device = next((p.device for p in wrapper.parameters()), torch.device("cpu"))
    ids = torch.arange(length, device=device)[None] % 2
    try:
        with torch.no_grad():
            expected, found = wrapper(ids), graph().forward(input_ids=ids)
    except Exception:  # the model, or the graph, cannot do it: whatever it raises
        return False
    return isinstance(expected, FakeTensor) or bool(
        torch.allclose(expected, found, rtol=1e-4, atol=1e-6)
    )


def _unguarded(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """Its graph without what only asserts, and without what nobody reads: a loss beside logits.
    Its `forward` asks no hook for the range of lengths.
    """
    module = program.module(check_guards=False)
    for node in list(module.graph.nodes):
        if "_assert_scalar" in str(node.target) or "sym_constrain_range" in str(node.target):
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _bounds(program: torch.export.ExportedProgram) -> list[tuple[int, int | None]]:
    """(smallest, largest or None) batch and length for which the captured graph stands."""
    ids = next(
        n.meta["val"]
        for n in program.graph.nodes
        if n.op == "placeholder" and n.name == "input_ids"
    )
    ranges = {str(symbol): bounds for symbol, bounds in program.range_constraints.items()}
    found = [ranges.get(str(size)) for size in ids.shape]
    return [
        (0, None)
        if b is None
        else (int(b.lower), None if str(b.upper) == "int_oo" else int(b.upper))
        for b in found
    ]
