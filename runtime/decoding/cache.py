"""Keys and values of earlier tokens, as a `transformers.Cache`.

`generate` reorders, repeats and crops it as it does its own. Legend: R rows, P tokens, G key/value
heads of E numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from tintc.ir.errors import InputError, UsageError
from tintc.runtime.specialize.cached_layers import Entry, Layer, Values, kept, nothing_cached


class AdaptedCache(Cache):  # type: ignore[misc]
    """What a decode program keeps: the last tokens of every row, a window's alone where attention
    sees no more. made_for: whose weights its keys and values belong to.
    """

    def __init__(
        self,
        layers: Iterable[Layer],
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
        made_for: Hashable = None,
    ) -> None:
        described = list(layers)
        first = nothing_cached(described, rows, dtype, device)
        super().__init__(layers=[_CachedLayer(layer, first) for layer in described])
        self.made_for = made_for

    @property
    def past(self) -> Values:
        """Name -> (R, P, ...), what a program reads."""
        return {name: value for layer in self.layers for name, value in layer.held.items()}

    @property
    def rows(self) -> int:
        """R."""
        return len(next(iter(self.layers[0].held.values())))

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens, of all layers or of none."""
        for layer in self.layers:
            layer.left(tokens_to_remove)
        super().crop(tokens_to_remove)

    def append(self, values: Values, tokens: int) -> None:
        """Takes what a program returned for so many new tokens."""
        for layer in self.layers:
            layer.append(values, tokens)


def checked(cache: object, made_for: Hashable, rows: int) -> AdaptedCache:
    """The cache, if R rows can go on from it. Raises InputError for another kind of cache, one of
    other weights, and one of another number of rows.
    """
    if not isinstance(cache, AdaptedCache):
        raise InputError(
            f"the cache is a {type(cache).__name__}; expected one that this adapted simulator made "
            "(new_cache, or the one that it returned)"
        )
    if cache.made_for != made_for:
        raise InputError(
            "the cache holds keys and values of other weights; expected one that this very choice "
            "of adapted sequences made: begin anew with the whole text"
        )
    if cache.rows != rows:
        raise InputError(f"the cache holds {cache.rows} rows; input_ids have {rows}")
    return cache


class _CachedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of it. held: name -> (R, P, ...). record_past: a window forgets nothing until the
    next `crop`, so that this can take back what was in it.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, layer: Layer, first: Values) -> None:
        self.layer, self.tokens, self.record_past = layer, 0, False
        super().__init__()  # sets keys and values to None
        self.held = {entry.name: first[entry.name] for entry in layer.entries}
        self.is_initialized = True

    @property
    def is_sliding(self) -> bool:
        return self.layer.window is not None

    @property
    def keys(self) -> Tensor | None:
        """(R, G, P, E), as transformers has them."""
        return self._by_heads(self.layer.keys)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._take(self.layer.keys, value)

    @property
    def values(self) -> Tensor | None:
        """(R, G, P, E)."""
        return self._by_heads(self.layer.values)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._take(self.layer.values, value)

    def append(self, values: Values, tokens: int) -> None:
        self.held = {entry.name: values[entry.name] for entry in self.layer.entries}
        self.tokens += tokens
        if not self.record_past:
            self._forget()

    def activate_past_recording(self) -> None:
        self.record_past = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing to do."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        raise UsageError("the decode program itself writes this cache; it takes no single layers")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = next(iter(self.held.values())).shape[1]
        return held + query_length, self.tokens - held

    def get_seq_length(self) -> int:
        """Tokens so far, those that a window forgot included."""
        return self.tokens

    def get_max_length(self) -> int:
        """None is known: -1."""
        return self.layer.window or -1

    get_max_cache_shape = get_max_length  # its older name

    def reset(self) -> None:
        self._change(lambda x: x[:, :0])
        self.tokens = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda x: x[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens. Older transformers give the length that is left instead."""
        left = self.left(tokens_to_remove)
        remove = self.tokens - left
        if remove:
            self._change(lambda x: x[:, : x.shape[1] - remove])
            self.tokens = left
        self._forget()

    def left(self, tokens_to_remove: int) -> int:
        """Tokens that `crop` leaves. Raises UsageError where a window no longer has them."""
        remove = -tokens_to_remove if tokens_to_remove <= 0 else self.tokens - tokens_to_remove
        if remove <= 0:
            return self.tokens
        left, held = self.tokens - remove, next(iter(self.held.values())).shape[1]
        if held - remove < min(left, (self.layer.window or left + 1) - 1):
            raise UsageError(
                f"a window of {self.layer.window} tokens has forgotten what stood in front of "
                "it; call activate_past_recording() before the tokens that crop takes back"
            )
        return left

    def _forget(self) -> None:
        """What no later token sees."""
        self.held = {entry.name: kept(entry, self.held[entry.name]) for entry in self.layer.entries}

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self.held = {name: change(value) for name, value in self.held.items()}

    def _by_heads(self, entry: Entry | None) -> Tensor | None:
        if entry is None or entry.name not in self.held:
            return None
        held = self.held[entry.name]
        return torch.unflatten(held, -1, (entry.heads or 1, -1)).transpose(1, 2)

    def _take(self, entry: Entry | None, value: Tensor | None) -> None:
        if entry is not None and value is not None:
            self.held[entry.name] = value.transpose(1, 2).flatten(-2)
