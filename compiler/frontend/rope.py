"""Rotary frequencies that depend on the call's length, as one computation, while a model is traced.

transformers decorates the forward pass of its rotary modules with `dynamic_rope_update`: it looks
at the greatest position of the call, branches on it, and writes other frequencies into the module,
where the next call finds them. Here they follow from the position alone and nothing is written, so
every call gets what it would get as the module's first.

    self.inv_freq = f(max(position_ids) + 1), if that is longer than any before; forward(self, ...)
      ->  forward(self with inv_freq = where(max(position_ids) + 1 > original, f(...), original))

f is the library's own: the public table ROPE_INIT_FUNCTIONS, by the `rope_type` of a config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_LIBRARY = "transformers.modeling_rope_utils"
_KINDS = "ROPE_INIT_FUNCTIONS"


@contextmanager
def rope_of_each_call(model: nn.Module) -> Iterator[None]:
    """Rotary modules of transformers compute their frequencies from each call's own positions, and
    keep nothing; afterwards they are as they were.
    """
    changed = []
    for module in model.modules():
        if "forward" not in vars(module) and (found := _decorated(type(module))) is not None:
            vars(module)["forward"] = MethodType(_by_length(found), module)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            vars(module).pop("forward", None)


class _Decorated(NamedTuple):
    plain: Callable[..., Any]  # the forward pass behind the decorator
    kinds: dict[str, Callable[..., Any]]  # rope_type -> what computes its frequencies


def _decorated(kind: type[nn.Module]) -> _Decorated | None:
    """Of a class whose forward pass is decorated, by whatever else too."""
    forward: Any = kind.forward
    while (plain := getattr(forward, "__wrapped__", None)) is not None:
        known = getattr(forward, "__globals__", {})
        if known.get("__name__") == _LIBRARY and _KINDS in known:
            return _Decorated(plain, known[_KINDS])
        forward = plain
    return None


def _by_length(found: _Decorated) -> Callable[..., Any]:
    @torch.no_grad()
    def forward(self: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        kind = self.rope_type if layer_type is None else self.rope_type[layer_type]
        of_layer = {} if layer_type is None else {"layer_type": layer_type}
        if "dynamic" not in kind and kind != "longrope":
            return found.plain(self, x, position_ids, **of_layer)
        name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
        kept = self._buffers[name]
        length = position_ids.amax() + 1
        self._buffers[name] = _frequencies(self, found.kinds[kind], kind, length, x, layer_type)
        try:
            return found.plain(self, x, position_ids, **of_layer)
        finally:
            self._buffers[name] = kept

    return forward


def _frequencies(
    module: Any,
    compute: Callable[..., Any],
    kind: str,
    length: Tensor,
    x: Tensor,
    layer_type: str | None,
) -> Tensor:
    """Those of a fresh call of so many positions."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    original = getattr(module, f"{prefix}original_inv_freq").to(x.device)
    most, seen = module.original_max_seq_len, length
    if kind == "longrope":
        rules = module.config.rope_parameters
        rules = rules if layer_type is None else rules[layer_type]
        most = rules["original_max_position_embeddings"]
        seen = most + 1  # there is one other set, whatever the length is
    other, _ = compute(module.config, x.device, seq_len=seen, layer_type=layer_type)
    if kind == "longrope":
        other = other.to(original.dtype)  # it is written into the other's place
    return torch.where(length > most, other, original)
