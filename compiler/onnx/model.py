"""The ONNX model of a simulator: nodes, weights and metadata, in memory.

Metadata (`metadata_props`): `tintc.version`, `tintc.config` (JSON), `tintc.source` (JSON: name,
kind, revision, sha256), `tintc.backend`, `tintc.inner_lr` (the compiled rate), `tintc.max_tokens`
and `tintc.eos_token_id` where there are any, `tintc.stream` of a stream's window (`streaming.py`),
and `tokenizer.json`: the tokenizer as the tokenizers library reads it, so that the model is one
file.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from tintc.compiler.onnx.graph import TYPES, Graph, Values
from tintc.compiler.onnx.inputs import add_inputs, check_inputs
from tintc.compiler.onnx.operators import OPERATORS
from tintc.compiler.onnx.trace import trace
from tintc.ir.errors import UnsupportedModelError, UsageError
from tintc.ir.outputs import Output
from tintc.runtime.simulator import Simulator
from tintc.version import __version__

OUTPUTS = (Output.LOGITS, Output.INITIAL_LOGITS, Output.LOSSES, Output.INITIAL_LOSSES)
OPSETS = range(18, 24)
DEFAULT_OPSET = 20
_DTYPES = (torch.float32, torch.float64, torch.float16)
_SMALL = 1024  # bytes; shapes, bounds and scalars stay where runtimes and checkers look for them
_LOCATION = "weights"


@dataclass
class Model:
    """proto: the model, whose larger weights are named but not held. weights: those, by name."""

    proto: onnx.ModelProto
    weights: dict[str, Tensor]

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.weights.values())


def build(
    simulator: Simulator, inputs: Collection[str], outputs: Collection[str], opset: int
) -> Model:
    """Writes the simulator's program in standard operators. Raises UsageError for inputs, outputs,
    a dtype or an opset that cannot be exported, UnsupportedModelError for an operator that has no
    standard form."""
    names, wanted = check_inputs(inputs), check_outputs(outputs)
    graph = new_graph(simulator, opset)
    whole, labels = any(kind.is_before for kind in wanted), any(kind.of_losses for kind in wanted)
    with graph.scope("inputs"):
        by_length = bool(simulator.program.facts.by_length)
        given = add_inputs(
            graph, names, simulator.dtype, labels=labels, whole=whole, by_length=by_length
        )
    found = trace(simulator, graph, given, wanted)
    return finished(graph, {kind.value: found[kind] for kind in wanted}, metadata(simulator))


def new_graph(simulator: Simulator, opset: int) -> Graph:
    """An empty one. Raises UsageError for a dtype or an opset that cannot be exported."""
    if simulator.dtype not in _DTYPES:
        raise UsageError(
            f"the simulator's dtype is {simulator.dtype}; ONNX runtimes compute in float32, "
            "float64 or float16: choose one"
        )
    if opset not in OPSETS:
        raise UsageError(f"opset is {opset}; expected one of {OPSETS.start} to {OPSETS.stop - 1}")
    return Graph(opset, OPERATORS)


def finished(graph: Graph, outputs: Values, about: dict[str, str]) -> Model:
    """The model with these outputs, by name, that says this of itself."""
    returned = [graph.rename(value, name) for name, value in outputs.items()]
    graph.prune(list(outputs))
    infos = [value.described() for value in returned]
    tensors = [_tensor(name, tensor) for name, tensor in graph.weights.items()]
    opsets = [helper.make_opsetid("", graph.opset)]
    proto = helper.make_model(
        helper.make_graph(graph.nodes, "simulator", graph.inputs, infos, tensors),
        producer_name="tintc",
        producer_version=__version__,
        opset_imports=opsets,
        ir_version=max(10, helper.find_min_ir_version_for(opsets)),
    )
    helper.set_model_props(proto, about)
    check_standard(proto)
    large = {tensor.name for tensor in tensors if tensor.data_location == TensorProto.EXTERNAL}
    return Model(proto, {name: tensor for name, tensor in graph.weights.items() if name in large})


def fold_constants(model: Model) -> None:
    """Folds constants and drops what nothing reads; larger weights are not touched."""
    try:
        from onnxscript import optimizer
    except ModuleNotFoundError as error:
        raise UsageError("optimize=True needs onnxscript; pip install 'tintc[onnx]'") from error
    optimizer.fold_constants(model.proto)
    optimizer.remove_unused_nodes(model.proto)
    check_standard(model.proto)


def check_outputs(names: Collection[str]) -> tuple[Output, ...]:
    """Outputs in their order. Raises UsageError for an unknown name or none."""
    unknown = [name for name in names if name not in OUTPUTS]
    if unknown or not names:
        got = ", ".join(map(str, unknown)) or "none"
        raise UsageError(f"outputs are {got}; expected some of {', '.join(OUTPUTS)}")
    return tuple(kind for kind in OUTPUTS if kind in names)


def check_standard(proto: onnx.ModelProto) -> None:
    """Raises UnsupportedModelError unless every operator is one of ONNX's own, and none of them
    holds a graph of its own, but for the Loop over steps.
    """
    strange = _strange(proto.graph) | {function.name for function in proto.functions}
    if strange:
        raise UnsupportedModelError(
            f"the export would need {', '.join(sorted(strange))}; expected standard operators; "
            "nothing was written"
        )


def _strange(graph: onnx.GraphProto) -> set[str]:
    found = set()
    for node in graph.node:
        bodies = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
        if node.domain not in ("", "ai.onnx") or (bodies and node.op_type != "Loop"):
            found.add(node.op_type)
        found = found.union(*map(_strange, bodies))
    return found


def metadata(simulator: Simulator) -> dict[str, str]:
    """What the file says of itself; see the module's first lines."""
    tokenizer = simulator.tokenizer
    end = getattr(tokenizer, "eos_token_id", None)
    said: dict[str, Any] = {
        "tintc.version": __version__,
        "tintc.config": json.dumps(simulator.config.to_dict()),
        "tintc.source": json.dumps(
            {name: value for name, value in simulator.source.items() if name != "config"}
        ),
        "tintc.backend": simulator.backend,
        "tintc.inner_lr": repr(float(simulator.inner_lr.detach())),
        "tintc.max_tokens": simulator.program.facts.longest,
        "tintc.eos_token_id": end,
        "tokenizer.json": tokenizer_json(tokenizer),
    }
    return {name: str(value) for name, value in said.items() if value is not None}


def tokenizer_json(tokenizer: Any) -> str | None:
    """A tokenizer as the tokenizers library reads it, without cuts and padding; None where there is
    none of that library behind it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    from tokenizers import Tokenizer

    copied = Tokenizer.from_str(backend.to_str())
    copied.no_truncation()
    copied.no_padding()
    text: str = copied.to_str()
    return text


def _tensor(name: str, tensor: Tensor) -> TensorProto:
    """Small numbers as they are; of larger ones name, type and shape."""
    proto = TensorProto(name=name, data_type=TYPES[tensor.dtype], dims=tensor.shape)
    if tensor.numel() * tensor.element_size() <= _SMALL:
        proto.raw_data = raw(tensor)
    else:
        refer(proto, _LOCATION, 0, tensor.numel() * tensor.element_size())
    return proto


def refer(proto: TensorProto, location: str, offset: int, length: int) -> None:
    """Says that a tensor's numbers lie in another file."""
    proto.data_location = TensorProto.EXTERNAL
    del proto.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        proto.external_data.add(key=key, value=str(value))


def raw(tensor: Tensor) -> bytes:
    """A tensor's numbers, dense, little-endian."""
    return tensor.detach().cpu().contiguous().numpy().tobytes()
