"""Why torch.export could not trace a model: its own words, the loop over the tokens in its code, or
the operators that tintc does not simulate.

A recurrence is unrolled while it is traced, so it stands for one length only. At a fixed length it
can be traced nevertheless: what there is more of at a greater length stands in the loop.
"""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterator
from types import FrameType

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.sym_node import SymNode

from tintc.compiler.frontend.origin import in_model, line_outside, module_path, source_line
from tintc.ir.builder import ancestors
from tintc.ir.errors import UnsupportedModelError, raise_if_interrupted

Frames = list[tuple[FrameType, int]]  # outermost first, each with its line
_LONGER = 11  # tokens of the second length at which a model is looked at
_ORDINARY = """
    embedding linear addmm mm matmul bmm baddbmm scaled_dot_product_attention softmax
    layer_norm rms_norm add sub mul div pow square mean rsqrt sqrt tanh sigmoid gelu silu relu
    erf neg where masked_fill cos sin view reshape transpose permute t expand unsqueeze squeeze
    slice split split_with_sizes chunk unbind cat stack flatten unflatten contiguous clone to
    type_as alias detach dropout repeat repeat_interleave index _assert_tensor_metadata
    lift_fresh_copy
"""


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what torch.export says of models that it cannot trace: graphs on stderr, warnings,
    advice to its own developers.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def torch_export(
    wrapper: nn.Module, ids: Tensor, *, any_size: bool = True
) -> torch.export.ExportedProgram:
    """The wrapper traced on these ids, for every batch and length or for theirs alone. With
    gradients on, as a user would train it, so that a model's own no_grad regions show in the graph.
    Raises whatever the traced code or the tracer raises.
    """
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    dynamic = {"input_ids": sizes} if any_size else None
    with quietly(), torch.enable_grad():
        return torch.export.export(
            wrapper, (), {"input_ids": ids}, dynamic_shapes=dynamic, strict=False
        )


def untraceable(
    wrapper: nn.Module, name: str, ids: Tensor, error: Exception
) -> UnsupportedModelError:
    """The error to raise for a model that torch.export could not trace for every batch and
    length.
    """
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    reason = reason.removesuffix('! For more information, run with TORCH_LOGS="+dynamic".')
    if "Constraints violated" in reason:
        reason = (
            f"{reason}: its code makes a plain number of how many sequences or tokens there are, "
            "as len(x) does and x.shape[0] does not"
        )
    first = _fixed(wrapper, ids)
    loops = _loops(first, _fixed(wrapper, ids.new_zeros(ids.shape[0], _LONGER))) if first else []
    if loops:
        return UnsupportedModelError(
            f"cannot simulate {name}: its code loops over the tokens in Python, at "
            f"{'; '.join(loops[:3])}, so torch.export traces it for one length only ({reason}); "
            "expected a computation of the same operators for every length"
        )
    strange = _strange_operators(first) if first else []
    if strange:
        return UnsupportedModelError(
            f"cannot simulate {name}: {'; '.join(strange)}. It computes with operators that tintc "
            "does not simulate, and torch.export "
            f"traces it for one length only ({reason}); expected a decoder of linear layers, "
            "norms, attention and activations"
        )
    frames = list(traceback.walk_tb(error.__traceback__))
    place = _place(wrapper, frames) or _made_a_number(wrapper, ids)
    return UnsupportedModelError(
        f"torch.export cannot trace {name}: {reason}{place and f', at {place}'} (tintc needs "
        "model(input_ids) to run for any batch and length without control flow that depends on "
        "the data)"
    )


def _place(wrapper: nn.Module, frames: Frames) -> str:
    """`file:line in module` of the model's code among running frames; "" if none was."""
    names = {module: name for name, module in wrapper.named_modules()}
    inside = [frame.f_locals.get("self") for frame, _ in frames]
    paths = [names[m] for m in inside if isinstance(m, nn.Module) and m in names]
    line = line_outside([(frame.f_code.co_filename, line) for frame, line in frames])
    return f"{line} in {in_model(paths[-1]) or 'the model'}" if line and paths[1:] else ""


def _made_a_number(wrapper: nn.Module, ids: Tensor) -> str:
    """Where the model's code makes a Python number of the batch or the length, as `range` does:
    torch.export tells only which of them. "" where it does not.
    """
    found: list[str] = []
    before = SymNode.guard_int

    def noted(node: SymNode, file: str, line: int) -> int:
        if not found:
            found.append(_place(wrapper, list(traceback.walk_stack(None))[::-1]))
        return before(node, file, line)

    SymNode.guard_int = noted  # type: ignore[method-assign,assignment]
    try:
        torch_export(wrapper, torch.zeros_like(ids))  # a tensor without marks
    except Exception as error:  # the one that is being explained
        raise_if_interrupted(error)
    finally:
        SymNode.guard_int = before  # type: ignore[method-assign]
    return next(iter(found), "")


def _fixed(wrapper: nn.Module, ids: Tensor) -> fx.Graph | None:
    """The model traced at one length; None if it cannot be traced at all."""
    try:
        graph: fx.Graph = torch_export(wrapper, torch.zeros_like(ids), any_size=False).graph
        return graph
    except Exception as error:  # the model's or the tracer's: then there is nothing to name
        raise_if_interrupted(error)
        return None


def _loops(short: fx.Graph, longer: fx.Graph | None) -> list[str]:
    """`file:line in module (operators)` of the lines that run more often for more tokens."""
    if longer is None:
        return []
    before, after = _by_line(short), _by_line(longer)
    grown = [line for line, nodes in after.items() if len(nodes) > len(before.get(line, ()))]
    found = []
    for line in grown:
        node = after[line][0]
        names = list(dict.fromkeys(_name(each) for each in after[line]))
        found.append(f"{line} in {module_path(node) or 'the model'} ({', '.join(names[:4])})")
    return found


def _by_line(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    found: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_function" and source_line(node):
            found[source_line(node)].append(node)
    return found


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _strange_operators(graph: fx.Graph) -> list[str]:
    """`operator xN in module (source line)` of what computes with activations and is not
    ordinary.
    """
    groups: dict[tuple[str, str], list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if (
            node.op != "call_function"
            or node.target is operator.getitem
            or packet is None
            or packet.__name__ in _ORDINARY.split()
        ):
            continue
        if any(source.target is torch.ops.aten.embedding.default for source in ancestors([node])):
            groups[str(node.target), source_line(node)].append(node)
    return [
        f"{name} x{len(nodes)} in {module_path(nodes[0]) or 'the model'} ({line})"
        for (name, line), nodes in groups.items()
    ]
