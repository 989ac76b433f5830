"""`compile`, `cost` and the experiments export and lower models of one kind once a process.

Most of a toy's compile is torch.export and the passes, and tests of commands compile the same few
toys again and again. A kind of model is all that its graph depends on: its code, config, modules,
dtype, device and tied weights. Weights, the source, the check and whatever comes after are each
test's own. Models that are no Hugging Face model, or whose forward was replaced or hooked, are
captured every time; so is every first one, and all that run in a process of their own.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
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
from tintc.ir.program import Program
from tintc.runtime.specialize.optimize import copy_graph

MOST = 64
_EXPORTED: OrderedDict[Any, Captured] = OrderedDict()
_LOWERED: OrderedDict[Any, Program] = OrderedDict()


@dataclasses.dataclass
class Known(Captured):
    """kind: of the model. Whoever makes another one of its parts loses it."""

    kind: Any = None


@pytest.fixture(autouse=True, scope="module")
def _compiled_once() -> Iterator[None]:
    """For every test of a folder whose conftest imports it."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (driver, cost, auxiliary):
            patch.setattr(module, "capture", capture_once)
            patch.setattr(module, "lower", lower_once)
        yield


def capture_once(model: nn.Module) -> Captured:
    if not isinstance(model, transformers.PreTrainedModel) or _is_changed(model):
        return capture(model)
    tensors, aliases = state_of(model)
    config = {**model.config.to_dict(), "_name_or_path": ""}  # a directory of its own for each
    kind = (
        *(type(model), repr(config), model.config._attn_implementation, repr(model)),
        *(casts_removed(), tuple(aliases.items())),
        tuple((name, value.shape, value.dtype, value.device) for name, value in tensors.items()),
    )
    if kind not in _EXPORTED:
        _put(_EXPORTED, kind, dataclasses.replace(capture(model), tensors={}))
    kept = _EXPORTED[kind].copy()
    return Known(kept.graph, tensors, aliases, dict(kept.constants), kept.max_tokens, kind)


def lower_once(captured: Captured, config: SimulatorConfig) -> Program:
    kind = getattr(captured, "kind", None)
    if kind is None:
        return lower(captured, config)
    if (kind, config) not in _LOWERED:
        _put(_LOWERED, (kind, config), lower(captured, config))
    kept = _LOWERED[kind, config]
    return dataclasses.replace(kept, graph=copy_graph(kept.graph))


def _put(kept: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    kept[key] = value
    if len(kept) > MOST:
        kept.popitem(last=False)


def _is_changed(model: nn.Module) -> bool:
    return any(
        "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
        for module in model.modules()
    )
