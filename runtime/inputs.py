"""From a user's tensors to a lowered graph's inputs: checked, with masks and positions filled in.

Legend: B sequences, T tokens. All checks that look at values share one transfer to the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tintc.ir.errors import InputError
from tintc.ir.facts import ModelFacts
from tintc.ir.node_meta import info


@dataclass(frozen=True)
class Inputs:
    """tensors: by name, as `passes.lower_forward.INPUTS` lists them. segment: tokens that training
    passes need.
    untrained: sequences in which no position carries loss. causal: there is no attention mask but
    the causal one."""

    tensors: dict[str, Tensor]
    segment: int
    untrained: int
    causal: bool = False


def prepare(
    facts: ModelFacts,
    dtype: torch.dtype,
    device: torch.device,
    input_ids: Tensor,
    train_mask: Tensor | None,
    loss_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Inputs:
    """Checks and completes the inputs of TINT.md section 1. Raises InputError, one clear line, for
    any that does not fit.

    Without a train_mask nothing is trained. Position t carries loss iff token t+1 is in the
    training segment (and in loss_mask) and neither token is padding.
    """
    ids_BT = _integers("input_ids", input_ids, None).to(device)
    shape = (ids_BT.shape[0], ids_BT.shape[1])
    train_BT = (
        torch.zeros_like(ids_BT).bool()
        if train_mask is None
        else _mask("train_mask", train_mask, (shape,)).to(device)
    )
    narrowed_BT = (
        train_BT
        if loss_mask is None
        else train_BT & _mask("loss_mask", loss_mask, (shape,)).to(device)
    )
    attention = (
        None
        if attention_mask is None
        else _mask("attention_mask", attention_mask, (shape, (*shape, shape[1]))).to(device)
    )
    if (
        attention is not None
        and attention.ndim == 2
        and not torch.compiler.is_compiling()
        and bool(attention.all())
    ):
        attention = None  # nothing is padding: the causal mask is all there is, and kernels know it
    positions = (
        None if position_ids is None else _integers("position_ids", position_ids, shape).to(device)
    )

    allowed_BxTT, valid_BT = _allowed(attention, shape[1], device)
    if facts.max_tokens is not None and shape[1] > facts.max_tokens:
        raise InputError(
            f"the sequence has {shape[1]} tokens; this simulator takes {facts.max_tokens}, up to "
            "which its masks were looked at: cut it"
        )
    if positions is None:
        _check_length(shape[1], facts)
        positions = _positions(valid_BT, shape, device)
    targets_BT = torch.nn.functional.pad(ids_BT[:, 1:], (0, 1))
    carries_BT = torch.nn.functional.pad(narrowed_BT[:, 1:], (0, 1))
    if valid_BT is not None:
        carries_BT = carries_BT & valid_BT & torch.nn.functional.pad(valid_BT[:, 1:], (0, 1))
    segment, untrained = shape[1], 0
    if not torch.compiler.is_compiling():
        masks = {"train_mask": train_mask, "loss_mask": loss_mask, "attention_mask": attention_mask}
        segment, untrained = _check_values(facts, ids_BT, positions, carries_BT, masks)
    tensors = {
        "input_ids": ids_BT,
        "position_ids": positions,
        "attention_mask": allowed_BxTT,
        "targets": targets_BT,
        "loss_mask": carries_BT.to(dtype),
    }
    return Inputs(tensors, segment, untrained, causal=attention is None)


def _integers(name: str, value: Tensor, shape: tuple[int, int] | None) -> Tensor:
    check_tensor(name, value)
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise InputError(f"{name} has dtype {_short(value.dtype)}; expected whole numbers (int64)")
    if value.ndim != 2 or value.numel() == 0 or (shape is not None and tuple(value.shape) != shape):
        expected = "(batch, tokens), neither 0" if shape is None else f"{shape}, that of input_ids"
        raise InputError(f"{name} has shape {tuple(value.shape)}; expected {expected}")
    return value.to(torch.int64)


def _mask(name: str, value: Tensor, shapes: tuple[tuple[int, ...], ...]) -> Tensor:
    check_tensor(name, value)
    if value.dtype.is_complex:
        raise InputError(
            f"{name} has dtype {_short(value.dtype)}; expected 0 and 1 (bool, integer or float)"
        )
    if tuple(value.shape) not in shapes:
        expected = " or ".join(str(shape) for shape in shapes)
        raise InputError(
            f"{name} has shape {tuple(value.shape)}; expected {expected} to match input_ids"
        )
    return value != 0


def check_tensor(name: str, value: object) -> None:
    """Raises InputError unless the value is a tensor."""
    if not isinstance(value, Tensor):
        raise InputError(f"{name} is a {type(value).__name__}; expected a torch.Tensor")


def check_updates(
    updates: dict[str, Tensor], nodes: dict[str, fx.Node], batch: int, dtype: torch.dtype
) -> None:
    """Raises InputError unless the values are those of a program's updated slots, one for each
    sequence.
    """
    if set(updates) != set(nodes):
        wrong = sorted(set(updates) ^ set(nodes))[:3]
        raise InputError(
            f"the updates do not hold this simulator's slots: {', '.join(wrong)} on one side only"
        )
    for slot, node in nodes.items():
        expected = (batch, *info(node).shape[1:])
        if tuple(updates[slot].shape) != expected or updates[slot].dtype != dtype:
            got = f"{tuple(updates[slot].shape)}, {updates[slot].dtype}"
            raise InputError(
                f"the update of {slot} is {got}; expected {expected}, {dtype}: one a sequence of "
                "input_ids"
            )


def _check_length(tokens: int, facts: ModelFacts) -> None:
    """Raises InputError for a sequence without position_ids that is longer than the model's tables
    of positions.
    """
    if facts.max_positions is not None and tokens > facts.max_positions:
        raise InputError(
            f"the sequence has {tokens} tokens; this model has {facts.max_positions} positions: "
            "cut it, or pass position_ids that restart"
        )


def _allowed(
    attention: Tensor | None, tokens: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """((B or 1, 1, T, T) mask of who may look at whom, (B, T) mask of tokens that are no padding or
    None).

    A row that may look at nothing (padding) looks at itself instead: its result reaches no other
    row. Under a (B, T, T) mask, padding is what no position may look at.
    """
    causal_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    if attention is None:
        return causal_TT[None, None], None
    if attention.ndim == 2:
        valid_BT, allowed_BTT = attention, causal_TT & attention[:, None, :]
    else:
        allowed_BTT = causal_TT & attention
        valid_BT = allowed_BTT.any(-2)
    itself_TT = torch.eye(tokens, dtype=torch.bool, device=device)
    allowed_BTT = allowed_BTT | (itself_TT & ~allowed_BTT.any(-1, keepdim=True))
    return allowed_BTT[:, None], valid_BT


def _positions(valid_BT: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Positions counted over tokens that are no padding, so that padding on either side changes
    nothing.
    """
    if valid_BT is None:
        return torch.arange(shape[1], device=device).expand(shape)
    return (valid_BT.long().cumsum(-1) - 1).clamp(min=0)


def _check_values(
    facts: ModelFacts,
    ids_BT: Tensor,
    positions_BT: Tensor,
    carries_BT: Tensor,
    masks: dict[str, Tensor | None],
) -> tuple[int, int]:
    """(training segment's length, sequences without a target), after checking what only values
    show.
    """
    names = [name for name, mask in masks.items() if mask is not None and mask.dtype != torch.bool]
    binary = [
        ((mask != 0) & (mask != 1)).any().to(ids_BT.device)
        for name in names
        if (mask := masks[name]) is not None
    ]
    columns = torch.arange(1, ids_BT.shape[1] + 1, device=ids_BT.device)
    facts_read = [
        *(ids_BT.min(), ids_BT.max(), positions_BT.min(), positions_BT.max()),
        *((carries_BT * columns).max(), (~carries_BT.any(-1)).sum(), *binary),
    ]
    low, high, first, last, segment, untrained, *wrong = torch.stack(
        [value.long() for value in facts_read]
    ).tolist()
    if low < 0 or high >= facts.vocab_size:
        raise InputError(
            f"input_ids hold {low if low < 0 else high}; this model's tokens are 0 to "
            f"{facts.vocab_size - 1}"
        )
    if first < 0 or (facts.max_positions is not None and last >= facts.max_positions):
        raise InputError(
            f"position_ids hold {first if first < 0 else last}; this model's positions are 0 to "
            f"{(facts.max_positions or 0) - 1}"
        )
    for name, bad in zip(names, wrong, strict=True):
        if bad:
            raise InputError(f"{name} holds values other than 0 and 1")
    return max(segment, 1), untrained


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
