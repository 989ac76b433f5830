"""A region of captured operators as a function of its inputs, for one sequence or a batch.

Types: the region runs in a float type of our choice. Wherever the model names its own type, or a
half-precision one, that is meant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from tintc.ir.node_meta import info
from tintc.ir.precision import HALF
from tintc.passes.analysis.evaluation import SIZE_ONLY, sizes_at
from tintc.passes.analysis.patterns import aten, calls, function_of
from tintc.passes.analysis.regions import Region

TRACED = torch.float64  # the type that regions are traced and checked in


class Body:
    """Calls a region. model: the float type of the model's weights."""

    def __init__(self, region: Region, model: torch.dtype) -> None:
        self.region, self.model = region, model

    def batch(self, given: Sequence[Tensor]) -> list[Tensor]:
        """Results (B, T, W) of inputs as the captured graph has them; weights are shared."""
        values = self.values(given)
        batch, tokens = self._sizes(given)
        return [values[n].expand(batch, tokens, values[n].shape[-1]) for n in self.region.outputs]

    def values(self, given: Sequence[Tensor]) -> dict[fx.Node, Any]:
        """The value of every node."""
        values: dict[fx.Node, Any] = dict(zip(self.region.inputs, given, strict=True))
        batch, tokens = self._sizes(given)
        for node in self.region.nodes:
            values[node] = self._call(node, values, batch, tokens)
        return values

    def _sizes(self, given: Sequence[Tensor]) -> Any:
        first = next(
            x for x, n in zip(given, self.region.inputs, strict=True) if not _is_parameter(n)
        )
        return first.shape[:2]

    def _call(self, node: fx.Node, values: dict[fx.Node, Any], batch: Any, tokens: Any) -> Any:
        args: Any = list(node.args)
        kwargs: Any = dict(node.kwargs)
        if calls(node, *SIZE_ONLY) and args[0] not in values:
            source: Any = args[0]
            shape = sizes_at(source, batch, tokens)
            if calls(node, aten.sym_size):
                return shape[args[1]]
            value = source.meta.get("val")  # none of what a pass made
            args[0] = torch.empty(
                shape, dtype=self._type(value.dtype if value is not None else TRACED)
            )
        args, kwargs = fx.node.map_arg((args, kwargs), values.__getitem__)
        args, kwargs = fx.node.map_aggregate((args, kwargs), self._leaf)
        if calls(node, aten.copy):  # what a write in place is; torch does not differentiate it
            return torch.broadcast_to(args[1].to(args[0].dtype), args[0].shape)
        if calls(node, aten._weight_norm):  # fused, it has a gradient that torch.vmap does not take
            return _weight_norm(*args)
        if calls(node, aten.index_put) and _fills(*args):
            return torch.where(args[1][0], args[2].to(args[0].dtype), args[0])
        return function_of(node)(*args, **kwargs)

    def _leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return torch.device("cpu")
        return self._type(leaf) if isinstance(leaf, torch.dtype) else leaf

    def _type(self, dtype: torch.dtype) -> torch.dtype:
        return TRACED if dtype == self.model or dtype in HALF else dtype

    @contextmanager
    def types(self) -> Iterator[None]:
        """While it runs: what has torch's default type has ours, if the model's is the default;
        attention is computed by plain products.
        """
        before = torch.get_default_dtype()
        if self.model == before or self.model in HALF:
            torch.set_default_dtype(TRACED)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch.set_default_dtype(before)


def _weight_norm(v: Tensor, g: Tensor, kept: int = 0) -> Tensor:
    """g v / |v|, |v| over all axes but one; for -1 over all."""
    axes = [axis for axis in range(v.ndim) if axis != kept]
    length: Tensor = torch.linalg.vector_norm(v, dim=axes, keepdim=True)
    return v * (g / length)


def _fills(x: Tensor, places: Any, value: Tensor, accumulate: bool = False) -> bool:
    """Whether one number is put where a mask says: torch.vmap takes no mask as places."""
    masks = len(places) == 1 and places[0].dtype == torch.bool
    return masks and places[0].shape == x.shape and value.numel() == 1 and not accumulate


def _is_parameter(node: fx.Node) -> bool:
    return node.op == "placeholder" and info(node).role != "input"
