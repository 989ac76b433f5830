"""Writes in place become new values, whatever view they go through.

    y = unflatten(x, ...); mul_(y, 0.5); gelu(x)
      ->  y = view(x, ...); z = mul(y, 0.5); x' = view(z, ...); gelu(x')

torch does it: functionalization knows which operators return views. Of `unfold` it would fix the
sizes to those of the traced call; into pieces that do not overlap it is an `unflatten`. It also
drops the regions in which a model switches gradients off, so a graph that stops a gradient so is
left as it is, and `canonicalize` refuses it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind, OutputKind

from tintc.compiler.frontend.origin import module_path, source_line
from tintc.ir.builder import ancestors, gives_floats
from tintc.ir.errors import UnsupportedModelError
from tintc.ir.writes import writes_in_place

_aten = torch.ops.aten
_UNSAFE = (_aten.unsafe_chunk, _aten.unsafe_split, _aten.unsafe_split_with_sizes)


def functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program without writes in place; itself if it has none.

    Raises UnsupportedModelError for a model that changes its own buffers or inputs.
    """
    graphs = [
        module.graph
        for module in program.graph_module.modules()
        if isinstance(module, fx.GraphModule)
    ]
    if not any(writes_in_place(node) for graph in graphs for node in graph.nodes):
        return program
    if _stops_gradients(program):
        return program
    for graph in graphs:
        _refuse_unsafe(graph)
        _spell_views(graph)
    result: torch.export.ExportedProgram = program.run_decompositions({})
    for spec in result.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise UnsupportedModelError(
                f"its forward pass writes to {spec.target or 'its input'} in place; expected a "
                "model that changes nothing of its own"
            )
    return result


def _refuse_unsafe(graph: fx.Graph) -> None:
    """Raises UnsupportedModelError for a write into pieces that torch.autograd takes for copies."""
    for node in graph.nodes:
        written: Any = node
        while writes_in_place(node) and isinstance(written, fx.Node) and written.args:
            written = written.args[0]
            if getattr(getattr(written, "target", None), "overloadpacket", None) in _UNSAFE:
                raise UnsupportedModelError(
                    f"{node.target} in {module_path(node) or 'the model'} ({source_line(node)}) "
                    f"writes in place through {written.target}, whose pieces torch.autograd takes "
                    "for copies, so that its gradients are wrong; expected chunk, split or slices"
                )


def _spell_views(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=_aten.unfold.default):
        source, axis, size, step = node.args
        shape = source.meta["val"].shape
        last = axis % len(shape) == len(shape) - 1  # else the pieces would change places
        if last and size == step and isinstance(shape[-1], int) and shape[-1] % size == 0:
            node.target, node.args = _aten.unflatten.int, (source, -1, [shape[-1] // size, size])


def _stops_gradients(program: torch.export.ExportedProgram) -> bool:
    """Whether a region without gradients computes with a value that depends on a parameter."""
    weights = {
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.PARAMETER
    }
    regions = [
        node
        for node in program.graph.nodes
        if "wrap_with_set_grad_enabled" in str(node.target)
        and node.args[0] is False
        and gives_floats(node)
    ]
    return any(node.name in weights for node in ancestors(regions))
