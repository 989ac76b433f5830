"""nn.Module -> torch.fx graph, by torch.export with dynamic batch and sequence.

The graph has one placeholder per parameter, buffer and input and one output, the logits (B, T, V).
Nothing here knows a model family: later passes recognise operator patterns.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import InputKind

from tintc.compiler.frontend.experts import experts_looked_up
from tintc.compiler.frontend.functional import functional
from tintc.compiler.frontend.limits import limits
from tintc.compiler.frontend.origin import (
    ATTRIBUTE,
    lines_of_strings,
    module_path,
    region_line,
    source_line,
)
from tintc.compiler.frontend.rope import rope_of_each_call
from tintc.compiler.frontend.state import state_of
from tintc.compiler.frontend.untraceable import quietly, torch_export, untraceable
from tintc.ir.errors import UnsupportedModelError, raise_if_interrupted
from tintc.ir.inputs import is_reserved
from tintc.ir.node_meta import KEY, info

# What a forward pass takes to compute a loss, and often every token's logits only then.
_TARGETS = ("targets", "target", "labels")


@dataclass
class Captured:
    """graph: see above. tensors: every entry of the state dict once. aliases: further names of tied
    entries -> that name.
    constants: placeholder name -> value, for buffers and constants outside the state dict: masks,
    rotary frequencies, numbers.
    max_tokens: the longest sequence for which the graph stands, where the model's own code sets a
    limit. min_tokens: the shortest such; 0 for any.
    vocabulary: how many tokens the model's own config names; 0 where it names none."""

    graph: fx.Graph
    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    constants: dict[str, Tensor]
    max_tokens: int | None = None
    min_tokens: int = 0
    vocabulary: int = 0

    def copy(self) -> Captured:
        """The same with a graph of its own, since passes rewrite theirs."""
        graph = copy.deepcopy(self.graph)
        graph.owning_module = self.graph.owning_module
        for node in graph.nodes:
            if KEY in node.meta:
                node.meta[KEY] = copy.copy(node.meta[KEY])
        return dataclasses.replace(self, graph=graph)


class LogitsOnly(nn.Module):
    """Calls a model without a cache and returns its logits, whatever container they come in. One
    that gives the last token's alone is given targets as well.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.auxiliary = model
        takes = inspect.signature(model.forward).parameters
        self.options: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
        self.keeps = "logits_to_keep" in takes
        optional = (name for name in _TARGETS if name in takes and takes[name].default is None)
        self.targets = next(optional, None)
        self.given: set[str] = set()  # found when it is called; torch.export lets a set alone

    def kept_from_calls(self) -> bool:
        """Whether a module has tensors among its plain attributes, or in containers there."""
        kept = (v for m in self.auxiliary.modules() for n, v in vars(m).items() if n[:1] != "_")
        return any(
            isinstance(each, Tensor)
            for value in kept
            for each in (value if isinstance(value, (tuple, list)) else (value,))
        )

    def forward(self, input_ids: Tensor, first: int = 0) -> Tensor:
        """Logits (B, T, V) of the positions from `first` on; a head that can computes no others."""
        kept = {"logits_to_keep": input_ids.shape[1] - first} if first and self.keeps else {}
        logits = self._called(input_ids, kept)
        if _is_last_alone(logits, input_ids.shape[1] - (first if kept else 0)):
            if self.targets is None or self.given:
                raise UnsupportedModelError(
                    f"{type(self.auxiliary).__name__} returned logits of one token; expected those "
                    "of every token: let its forward pass compute them all when it is called as "
                    "model(input_ids)"
                )
            self.given.add(self.targets)
            logits = self._called(input_ids, kept)
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
        return logits[:, first:] if first and not kept else logits

    def _called(self, input_ids: Tensor, kept: dict[str, Any]) -> Any:
        targets = dict.fromkeys(self.given, input_ids)
        return _logits(self.auxiliary(input_ids, **self.options, **kept, **targets))


def _is_last_alone(logits: Any, tokens: Any) -> bool:
    """Whether these are of one token, of several: what generating needs, as nanoGPT computes it."""
    alone = isinstance(logits, Tensor) and logits.ndim == 3
    # The size of a traced axis is no int: asking for its number would be a guard.
    return bool(alone and type(logits.shape[1]) is int and logits.shape[1] == 1 and tokens != 1)


def _logits(out: Any) -> Any:
    """What is called so in an output or a dict; the first of several values that may be, as in
    (loss, logits); else the value.
    """
    if isinstance(out, Mapping):
        return out.get("logits", out)
    if isinstance(out, (tuple, list)) and not hasattr(out, "logits"):
        shaped = (each for each in out if isinstance(each, Tensor) and each.ndim == 3)
        return next(shaped, out[0]) if out else out
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
        rope_of_each_call(model),
    ):
        wrapper = LogitsOnly(model)
        program = _export(wrapper, _device(model))
        shortest, longest = limits(program, wrapper)
        with quietly():
            program = functional(program)
    tensors, aliases = state_of(model)
    graph = program.graph_module.graph
    constants = _name_placeholders(graph, program, tensors, aliases)
    for node in graph.nodes:
        if node.op == "call_function":
            info(node).module = module_path(node)
            info(node).source = source_line(node) or region_line(node)
    graph.lint()
    return Captured(graph, tensors, aliases, constants, longest, shortest, _vocabulary(model))


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
    """Puts every attribute of the modules back, and what their dicts and lists hold: a model that
    keeps tables from call to call would else keep those of the tracer, which have no numbers.
    """
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    inner = [value for _, held in before for value in held.values()]
    dicts = [(value, dict(value)) for value in inner if isinstance(value, dict)]
    lists = [(value, list(value)) for value in inner if isinstance(value, list)]
    try:
        yield
    finally:
        for now, then in (*before, *dicts):
            if list(now) != list(then) or any(now[name] is not then[name] for name in then):
                now.clear()
                now.update(then)
        for values, kept in lists:
            values[:] = kept


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
    before = set(wrapper.given)
    try:
        with lines_of_strings():
            program = torch_export(wrapper, ids)
        if wrapper.given != before:  # the first trace holds both calls
            return _exported(wrapper, ids)
    except UnsupportedModelError:
        raise
    except Exception as error:  # torch.export raises whatever the traced code or the tracer raises
        raise_if_interrupted(error)
        raise untraceable(wrapper, type(wrapper.auxiliary).__name__, ids, error) from error
    return program


def _vocabulary(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    return size if isinstance(size, int) else 0


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
