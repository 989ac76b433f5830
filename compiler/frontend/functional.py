"""Writes in place become new values, whatever view they go through.

    y = unflatten(x, ...); mul_(y, 0.5); gelu(x)
      ->  y = view(x, ...); z = mul(y, 0.5); x' = view(z, ...); gelu(x')

torch does it: functionalization knows which operators return views. It also drops the regions in
which a model switches gradients off, so a graph that stops a gradient so is left as it is, and
`canonicalize` refuses it.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.export.graph_signature import InputKind, OutputKind

from tintc.ir.builder import ancestors, gives_floats
from tintc.ir.errors import UnsupportedModelError
from tintc.ir.writes import writes_in_place


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
    result: torch.export.ExportedProgram = program.run_decompositions({})
    for spec in result.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise UnsupportedModelError(
                f"its forward pass writes to {spec.target or 'its input'} in place; expected a "
                "model that changes nothing of its own"
            )
    return result


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
