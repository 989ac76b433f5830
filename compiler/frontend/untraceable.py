"""Why torch.export could not trace a model: its own words, and the operators that tintc does not
simulate.

A recurrence is unrolled while it is traced, so it stands for one length only. At a fixed length it
can be traced nevertheless, and then every operator can be named.
"""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import warnings
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from tintc.compiler.frontend.origin import module_path, source_line
from tintc.ir.builder import ancestors
from tintc.ir.errors import UnsupportedModelError, raise_if_interrupted

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


def untraceable(
    wrapper: nn.Module, name: str, ids: Tensor, error: Exception
) -> UnsupportedModelError:
    """The error to raise for a model that torch.export could not trace for every batch and
    length.
    """
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    reason = reason.removesuffix('! For more information, run with TORCH_LOGS="+dynamic".')
    strange = _strange_operators(wrapper, ids)
    if strange:
        return UnsupportedModelError(
            f"cannot simulate {name}: {'; '.join(strange)}. It computes with operators that tintc "
            "does not simulate, and torch.export "
            f"traces it for one length only ({reason}); expected a decoder of linear layers, "
            "norms, attention and activations"
        )
    return UnsupportedModelError(
        f"torch.export cannot trace {name}: {reason} (tintc needs model(input_ids) to run for any "
        "batch and length without control flow "
        "that depends on the data)"
    )


def _strange_operators(wrapper: nn.Module, ids: Tensor) -> list[str]:
    """`operator xN in module (source line)` of what computes with activations and is not ordinary,
    traced at one length.
    """
    try:
        with quietly(), torch.enable_grad():
            graph = torch.export.export(
                wrapper, (), {"input_ids": torch.zeros_like(ids)}, strict=False
            ).graph  # a tensor without marks
    except Exception as error:  # the model's or the tracer's: then there is nothing to name
        raise_if_interrupted(error)
        return []
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
