"""What a decode program keeps of earlier tokens, layer by layer.

Legend: R rows, P earlier tokens, G key/value heads, E numbers of a head, H heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tintc.ir.choices import Choices
from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.attention import attention_forward, with_past
from tintc.ir.outputs import Output
from tintc.ir.program import Program
from tintc.passes.stream.cached_keys import cached_dtype
from tintc.runtime.specialize.optimize import optimize

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """One cached value, (R, P, width). heads: G; None for biases of scores, which are (R, P, H).
    window: how many tokens its attention sees, one's own included; None for all.
    """

    name: str
    width: int
    heads: int | None
    window: int | None


@dataclass(frozen=True)
class Layer:
    """What one attention layer caches; layers that share keys or values name them once."""

    keys: Entry | None
    values: Entry | None
    bias: Entry | None

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Those that there are."""
        return tuple(e for e in (self.keys, self.values, self.bias) if e is not None)

    @property
    def window(self) -> int | None:
        """How many tokens it sees; None for all."""
        return self.entries[0].window


def decode_graph(program: Program, factored: frozenset[str] = frozenset()) -> fx.Graph:
    """The graph of `tint` operators behind a decode program, without optimizations."""
    kind = Choices((Output.LOGITS, Output.CACHE), from_updates=True, cached=True, factored=factored)
    return optimize(program, kind)


def cached_layers(program: Program) -> tuple[Layer, ...]:
    """The layers of a program's decoding, in order."""
    found: dict[str, dict[str, Entry]] = {}
    for node in decode_graph(program).nodes:
        if not is_tint(node, attention_forward):
            continue
        for part in ("k", "v", "bias"):
            value = argument(node, part)
            if value is not None:
                assert is_tint(value, with_past)
                past = info(argument(value, "past"))
                heads = None if part == "bias" else int(argument(node, "kv_heads"))
                window = int(str(past.shape[1])[1:] or 0) or None
                entry = Entry(str(past.slot), int(past.shape[2]), heads, window)
                layer = entry.name.rpartition("/")[0]
                found.setdefault(layer, {}).setdefault(part, entry)
    return tuple(Layer(e.get("k"), e.get("v"), e.get("bias")) for e in found.values())


def nothing_cached(
    layers: Iterable[Layer], rows: int, dtype: torch.dtype, device: torch.device
) -> Values:
    """Name -> (R, 0, width)."""
    return {
        entry.name: torch.empty(
            rows, 0, entry.width, dtype=cached_dtype(entry.name, dtype), device=device
        )
        for layer in layers
        for entry in layer.entries
    }


def kept(entry: Entry, value: Tensor) -> Tensor:
    """What later tokens still see of (R, P, width): all, or the last of a window, less one."""
    if entry.window is None or value.shape[1] < entry.window:
        return value
    return value[:, value.shape[1] - (entry.window - 1) :]
