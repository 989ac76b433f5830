"""Models of one kind are exported once a process, and lowered once for each config.

Most of a toy's compile is torch.export and the passes, and tests compile the same toys again and
again. A kind is all that a graph depends on: code, config, modules, dtype, device, buffers and tied
weights. Weights, the source, the check and whatever comes after are each test's own. Models that
are no Hugging Face model, or whose forward is replaced or hooked, are captured every time; so is
every first one, whatever runs in a process of its own, and what tests of `capture` call.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tintc.compiler import driver
from tintc.compiler.casts import casts_removed
from tintc.compiler.driver import lower
from tintc.compiler.frontend.capture import Captured, capture
from tintc.compiler.frontend.state import state_of
from tintc.compiler.reports import cost
from tintc.evaluate import auxiliary
from tintc.ir.config import SimulatorConfig
from tintc.ir.named import Islands
from tintc.ir.program import Program
from tintc.runtime.specialize.optimize import copy_graph

MOST = 128
_LOG = logging.getLogger("tintc.passes")
_EXPORTED: OrderedDict[Hashable, Captured] = OrderedDict()
_LOWERED: OrderedDict[Hashable, Program] = OrderedDict()


@dataclasses.dataclass
class Known(Captured):
    """kind: of the model. Whoever makes a `Captured` of other parts has none."""

    kind: Hashable = None


@contextmanager
def compiling_once() -> Iterator[None]:
    """For `compile`, `cost` and the experiments."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (driver, cost, auxiliary):
            patch.setattr(module, "capture", capture_once)
            patch.setattr(module, "lower", lower_once)
        yield


def capture_once(model: nn.Module) -> Captured:
    """`capture`; the graph is the caller's."""
    kind = kind_of(model)
    if kind is None:
        return capture(model)
    if kind not in _EXPORTED:
        _put(_EXPORTED, kind, dataclasses.replace(capture(model), tensors={}))
    kept = _EXPORTED[kind].copy()
    limits = kept.max_tokens, kept.min_tokens, kept.vocabulary
    return Known(kept.graph, *state_of(model), dict(kept.constants), *limits, kind)


def lower_once(captured: Captured, config: SimulatorConfig, islands: Islands = "allow") -> Program:
    """`lower`; the program's graph is the caller's."""
    if not isinstance(captured, Known) or _LOG.isEnabledFor(logging.INFO):  # passes are logged
        return lower(captured, config, islands)
    key = (captured.kind, config, islands, os.environ.get("TINTC_VERIFY"))
    if key not in _LOWERED:
        _put(_LOWERED, key, lower(captured, config, islands))
    kept = _LOWERED[key]
    return dataclasses.replace(kept, graph=copy_graph(kept.graph))


def kind_of(model: nn.Module) -> Hashable:
    """None for a model that is not known well enough."""
    if not isinstance(model, transformers.PreTrainedModel) or _is_changed(model):
        return None
    tensors, aliases = state_of(model)
    config = {**model.config.to_dict(), "_name_or_path": ""}  # a directory of its own for each
    return (
        *(type(model), repr(config), model.config._attn_implementation, repr(model)),
        *(casts_removed(), tuple(aliases.items())),
        tuple((name, value.shape, value.dtype, value.device) for name, value in tensors.items()),
        tuple((name, _numbers(value)) for name, value in model.named_buffers()),
    )


def _numbers(value: torch.Tensor) -> bytes:
    if value.is_meta:
        return b""
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _put(kept: OrderedDict[Hashable, Any], key: Hashable, value: Any) -> None:
    kept[key] = value
    if len(kept) > MOST:
        kept.popitem(last=False)


def _is_changed(model: nn.Module) -> bool:
    return any(
        "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
        for module in model.modules()
    )
