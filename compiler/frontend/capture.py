"""nn.Module -> torch.fx graph, by torch.export with dynamic batch and sequence.

The graph has one placeholder per parameter, buffer and input and one output, the logits (B, T, V).
Nothing here knows a model family: later passes recognise operator patterns.
"""

from __future__ import annotations

import builtins
import copy
import dataclasses
import inspect
import math
import re
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export.graph_signature import InputKind

from tintc.compiler.frontend.experts import experts_looked_up
from tintc.compiler.frontend.functional import functional
from tintc.compiler.frontend.origin import ATTRIBUTE, module_path, source_line
from tintc.compiler.frontend.state import state_of
from tintc.compiler.frontend.untraceable import quietly, untraceable
from tintc.ir.errors import UnsupportedModelError, raise_if_interrupted
from tintc.ir.inputs import is_reserved
from tintc.ir.node_meta import KEY, info

_LENGTHS_TRIED = (
    4098  # guards are read up to this length: passes look at masks and positions up to 4096
)


@dataclass
class Captured:
    """graph: see above. tensors: every entry of the state dict once. aliases: further names of tied
    entries -> that name.
    constants: placeholder name -> value, for buffers and constants outside the state dict: masks,
    rotary frequencies, numbers.
    max_tokens: the longest sequence for which the graph stands, where the model's own code sets a
    limit."""

    graph: fx.Graph
    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    constants: dict[str, Tensor]
    max_tokens: int | None = None

    def copy(self) -> Captured:
        """The same with a graph of its own, since passes rewrite theirs."""
        graph = copy.deepcopy(self.graph)
        graph.owning_module = self.graph.owning_module
        for node in graph.nodes:
            if KEY in node.meta:
                node.meta[KEY] = copy.copy(node.meta[KEY])
        return dataclasses.replace(self, graph=graph)


class LogitsOnly(nn.Module):
    """Calls a model without a cache and returns its logits, whatever container they come in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.auxiliary = model
        takes_cache = "use_cache" in inspect.signature(model.forward).parameters
        self.options: dict[str, Any] = {"use_cache": False} if takes_cache else {}

    def kept_from_calls(self) -> bool:
        """Whether a module has tensors among its plain attributes, or in containers there."""
        kept = (v for m in self.auxiliary.modules() for n, v in vars(m).items() if n[:1] != "_")
        return any(
            isinstance(each, Tensor)
            for value in kept
            for each in (value if isinstance(value, (tuple, list)) else (value,))
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = _logits(self.auxiliary(input_ids, **self.options))
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            shape = (
                f"a tensor of {logits.ndim} dimensions"
                if isinstance(logits, Tensor)
                else f"a {type(logits).__name__}"
            )
            raise UnsupportedModelError(
                f"{type(self.auxiliary).__name__} returned {shape}; expected logits of shape "
                "(batch, tokens, vocabulary): "
                "tintc simulates causal language models, called as model(input_ids)"
            )
        return logits


def _logits(out: Any) -> Any:
    """What is called so in an output or a dict; the first of several values; else the value."""
    if isinstance(out, Mapping):
        return out.get("logits", out)
    if isinstance(out, (tuple, list)) and not hasattr(out, "logits"):
        return out[0] if out else out
    return getattr(out, "logits", out)


def capture(model: nn.Module) -> Captured:
    """Exports the model in eval mode and names what it holds.

    Raises UnsupportedModelError if torch.export cannot trace the model or its output is not (B, T,
    V).
    """
    with (
        evaluating(model),
        untouched(model),
        _weights_without_numbers(model),
        experts_looked_up(model),
    ):
        wrapper = LogitsOnly(model)
        program = _export(wrapper, _device(model))
        longest = _longest(program, wrapper)
        with quietly():
            program = functional(program)
    tensors, aliases = state_of(model)
    graph = program.graph_module.graph
    constants = _name_placeholders(graph, program, tensors, aliases)
    for node in graph.nodes:
        if node.op == "call_function":
            info(node).module, info(node).source = module_path(node), source_line(node)
    graph.lint()
    return Captured(graph, tensors, aliases, constants, max_tokens=longest)


@contextmanager
def _weights_without_numbers(model: nn.Module) -> Iterator[None]:
    """Of a model whose weights are on the meta device, puts fake ones of the CPU in their place,
    and back: what its buffers hold and its code makes keeps its numbers, which are all that masks,
    positions and constants are read from.
    """
    if _device(model).type != "meta":
        yield
        return
    places: list[tuple[dict[str, Any], str, Tensor]] = [
        (held, name, value)
        for module in model.modules()
        for held in (module._parameters, module._buffers)
        for name, value in held.items()
        if value is not None and value.is_meta
    ]
    fake: dict[Tensor, Tensor] = {}  # tied ones stay tied
    with FakeTensorMode(allow_non_fake_inputs=True):
        for _, _, value in places:
            empty = torch.empty(value.shape, dtype=value.dtype)
            is_weight = isinstance(value, nn.Parameter)
            fake.setdefault(value, nn.Parameter(empty, value.requires_grad) if is_weight else empty)
    for held, name, value in places:
        held[name] = fake[value]
    try:
        yield
    finally:
        for held, name, value in places:
            held[name] = value


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Puts every attribute of the modules back: a model that keeps tables from call to call would
    else keep those of the tracer, which have no numbers.
    """
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    held = [(m._buffers, dict(m._buffers)) for m in model.modules()]
    try:
        yield
    finally:
        for now, then in (*before, *held):
            now.clear()
            now.update(then)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode and every part of it back into the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _export(wrapper: LogitsOnly, device: torch.device) -> torch.export.ExportedProgram:
    try:
        return _exported(wrapper, torch.zeros(2, 8, dtype=torch.int64, device=device))
    except UnsupportedModelError as error:
        if not wrapper.kept_from_calls():
            raise
        try:  # what it kept of an earlier call may be of this very length
            return _exported(wrapper, torch.zeros(2, 11, dtype=torch.int64, device=device))
        except UnsupportedModelError:
            raise error from None


def _exported(wrapper: LogitsOnly, ids: Tensor) -> torch.export.ExportedProgram:
    dynamic = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    try:
        # With gradients on, as a user would train it, so that a model's own no_grad regions show in
        # the graph.
        with quietly(), torch.enable_grad():
            program = torch.export.export(
                wrapper, (), {"input_ids": ids}, dynamic_shapes=dynamic, strict=False
            )
    except UnsupportedModelError:
        raise
    except Exception as error:  # torch.export raises whatever the traced code or the tracer raises
        raise_if_interrupted(error)
        raise untraceable(wrapper, type(wrapper.auxiliary).__name__, ids, error) from error
    return program


def _longest(program: torch.export.ExportedProgram, wrapper: LogitsOnly) -> int | None:
    """The longest sequence up to which the captured graph stands for the model; None for no limit.

    A model that branches on the batch or the length was captured only along the branch of 2 x 8
    tokens. Lengths from some number on that leave the branch are a limit; if the graph computes the
    same at that number itself (a slice that happens to be whole), it is included. Raises
    UnsupportedModelError for any other branch.
    """
    (least, most), (shortest, longest) = _bounds(program)
    guards = [str(guard) for guard in getattr(program, "_guards_code", [])]
    compiled = [builtins.compile(guard, "<guard>", "eval") for guard in guards]
    numbers = {int(number) for guard in guards for number in re.findall(r"\d+", guard)}
    lengths = (
        sorted({*range(2, _LENGTHS_TRIED), *(n + d for n in numbers for d in (-1, 0, 1) if n > 2)})
        if guards
        else []
    )
    outside = [
        n
        for n in lengths
        if not all(_holds(guard, batch, n) for guard in compiled for batch in (1, 2, 3, 5))
    ]
    # A length by itself, such as one that a cache was made for, may be computed alike.
    while outside and (alone := _alone(outside, lengths)) is not None:
        if not _stands_at(alone, program, wrapper):
            break
        outside.remove(alone)
    broken = next(iter(outside), None)
    if least > 2 or most is not None or shortest > 2 or (broken or 9) < 9:
        found = [
            *guards,
            *(f"batch >= {n}" for n in (least,) if n > 2),
            *(f"batch <= {n}" for n in (most,) if n is not None),
        ]
        found = [*([f"tokens >= {shortest}"] if shortest > 2 else []), *found]
        loss = shortest == 3  # two tokens have one target, for which it is traced in another way
        raise UnsupportedModelError(
            f"{type(wrapper.auxiliary).__name__} computes different things for different batches "
            f"or lengths ({'; '.join(found[:3])}); expected one computation for all"
            + ("; if it computes a loss, have it return the logits alone" if loss else "")
        )
    if broken is not None:
        longest = (
            broken
            if broken < _LENGTHS_TRIED and _stands_at(broken, program, wrapper)
            else broken - 1
        )
    return longest


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


def _stands_at(length: int, program: torch.export.ExportedProgram, wrapper: LogitsOnly) -> bool:
    """Whether the captured graph gives the model's own logits at a length that its guards
    exclude.
    """
    ids = torch.arange(length, device=_device(wrapper))[None] % 2
    try:
        with torch.no_grad():
            expected, found = wrapper(ids), program.module(check_guards=False)(input_ids=ids)
    except Exception:  # the model, or the graph, cannot do it: whatever it raises
        return False
    return isinstance(expected, FakeTensor) or bool(
        torch.allclose(expected, found, rtol=1e-4, atol=1e-6)
    )


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


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return first.device if first is not None else torch.device("cpu")


def _name_placeholders(
    graph: fx.Graph,
    program: torch.export.ExportedProgram,
    tensors: dict[str, Tensor],
    aliases: dict[str, str],
) -> dict[str, Tensor]:
    """Gives each placeholder its role, merges tied ones, and returns the values of those outside
    the state dict."""
    specs = {getattr(spec.arg, "name", ""): spec for spec in program.graph_signature.input_specs}
    constants: dict[str, Tensor] = {}
    first: dict[str, fx.Node] = {}
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        spec = specs[node.name]
        record = info(node)
        if spec.kind == InputKind.USER_INPUT:
            record.role, record.shape, record.dtype = "input", ("B", "T"), "int"
            _rename(node, "input_ids")
            continue
        full_name = spec.target or ""
        name = full_name.removeprefix(ATTRIBUTE + ".")
        name = aliases.get(name, name)
        if name not in tensors:
            held = program.constants if full_name in program.constants else program.state_dict
            constants[node.name] = held[full_name]
            continue
        record.role, record.parameter, record.shape = "parameter", name, tuple(tensors[name].shape)
        record.buffer = spec.kind == InputKind.BUFFER
        if name in first:
            node.replace_all_uses_with(first[name])
            graph.erase_node(node)
        else:
            first[name] = node
            label = re.sub(r"\W", "_", name)
            _rename(node, f"{label}_weight" if is_reserved(label) else label)
    return constants


def _rename(placeholder: fx.Node, name: str) -> None:
    placeholder._rename(name)
    placeholder.target = placeholder.name
