"""From a caller's tokens to what a step of decoding reads: checked, with mask and positions.

Legend: R rows, T new tokens, P earlier ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tintc.ir.errors import InputError
from tintc.runtime.batch import Batch
from tintc.runtime.compiled import Compiled
from tintc.runtime.decoding.program import NewTokens
from tintc.runtime.inputs import check_tensor, prepare
from tintc.runtime.labels import kept_positions
from tintc.runtime.masks import past_mask


def new_tokens(
    simulator: Compiled,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    logits_to_keep: int | Tensor,
    seen: int,
) -> NewTokens:
    """seen: P. attention_mask: (R, P + T), 0 at padding. position_ids: (R, T); by default counted
    over tokens that are no padding. Raises InputError for what does not fit, and for more tokens
    than the model has positions.
    """
    check_tensor("input_ids", input_ids)
    if input_ids.ndim == 2:
        _check_room(simulator, seen, input_ids.shape[1])
    own = attention_mask
    if attention_mask is not None and seen:
        check_tensor("attention_mask", attention_mask)
        _check_whole(attention_mask, input_ids, seen)
        own = attention_mask[:, seen:]
    # Earlier tokens count for positions: those of the new ones alone are not asked about.
    positions = position_ids
    if seen and positions is None and input_ids.ndim == 2:
        positions = _positions(input_ids, attention_mask, seen)
    batch = Batch(input_ids, None, None, own, positions)
    inputs = prepare(simulator.program.facts, simulator.dtype, simulator.device, batch)
    mask = inputs.tensors["attention_mask"]
    if seen:
        mask = _with_past(attention_mask, mask, seen, input_ids)
    tokens = inputs.shape[1]
    kept = kept_positions(logits_to_keep, tokens, simulator.device)
    if kept is None:
        kept = torch.arange(tokens, device=simulator.device)
    ids, positions = inputs.tensors["input_ids"], inputs.tensors["position_ids"]
    return NewTokens(ids, positions, mask, kept)


def _positions(ids_RT: Tensor, mask_RC: Tensor | None, seen: int) -> Tensor:
    if mask_RC is None:
        first = torch.arange(seen, seen + ids_RT.shape[1], device=ids_RT.device)
        return first.expand(ids_RT.shape)
    return ((mask_RC != 0).to(torch.int64).cumsum(-1) - 1).clamp(min=0)[:, seen:]


def _with_past(mask_RC: Tensor | None, own: Tensor, seen: int, ids_RT: Tensor) -> Tensor:
    """(R or 1, 1, T, P + T)."""
    device, tokens = own.device, ids_RT.shape[1]
    if mask_RC is None:
        before = torch.ones(*own.shape[:-1], seen, dtype=torch.bool, device=device)
        return torch.cat([before, own], -1)
    given = (mask_RC != 0).to(device)
    return past_mask(given[:, :seen], given[:, seen:], torch.arange(tokens, device=device))


def _check_room(simulator: Compiled, seen: int, tokens: int) -> None:
    longest = simulator.program.facts.longest
    if longest is not None and seen + tokens > longest:
        raise InputError(
            f"there are {seen + tokens} tokens, {seen} of them in the cache; this model has "
            f"{longest} positions: begin anew with the last part of the text"
        )


def _check_whole(mask: Tensor, ids_RT: Tensor, seen: int) -> None:
    expected = (ids_RT.shape[0], seen + ids_RT.shape[1])
    if tuple(mask.shape) != expected:
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}; expected {expected}: the {seen} tokens "
            "in the cache and the new ones"
        )
