"""From a user's tensors to a lowered graph's inputs: checked, with masks and positions filled in.

Legend: B sequences, T tokens. All checks that look at values share one transfer to the host.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, fx

from tintc.ir.errors import InputError, UsageError
from tintc.ir.facts import ModelFacts
from tintc.ir.node_meta import info
from tintc.ir.precision import dtype_name
from tintc.runtime.batch import Batch
from tintc.runtime.masks import Completed, complete, rest_begins, segment_length

# Part of the segment below which training passes take the loss at the positions that carry it alone
SCORED = 0.75
NO_TORCHSCRIPT = (
    "TorchScript (torch.jit.trace, torch.jit.script) takes no simulator, whose program depends on "
    "the kind of call; use torch.export.export(simulator, (input_ids, train_mask)), or "
    "tintc.export_onnx for ONNX"
)


@dataclass(frozen=True)
class Inputs:
    """What a batch becomes."""

    tensors: dict[str, Tensor]  # by name, as `ir/inputs.py` lists them
    segment: int  # tokens that training passes need
    untrained: int  # sequences in which no position carries loss
    # (L,) positions that carry loss in any sequence, if they are few of the segment
    scored: Tensor | None = None
    rest: int | None = None  # where what is not trained on is predicted from; None if unknown
    causal: bool = False  # there is no attention mask but the causal one

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        batch, tokens = self.tensors["input_ids"].shape
        return batch, tokens


class _Counts(NamedTuple):
    """segment: the training segment's length. untrained: sequences without a target. rest: where
    what is not trained on is predicted from. scored: how many positions carry loss in any sequence.
    """

    segment: int
    untrained: int
    rest: int
    scored: int


def prepare(facts: ModelFacts, dtype: torch.dtype, device: torch.device, batch: Batch) -> Inputs:
    """Checks and completes the inputs of TINT.md section 1 (`runtime/masks.py`). Without a
    train_mask nothing is trained. Raises InputError, one clear line, for any that does not fit,
    and UsageError where TorchScript traces.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise UsageError(NO_TORCHSCRIPT)
    plain = _plain(batch, device)
    tokens = plain.input_ids.shape[1]
    if facts.max_tokens is not None and tokens > facts.max_tokens:
        raise InputError(
            f"the sequence has {tokens} tokens; this simulator takes {facts.max_tokens}, up to "
            "which its masks were looked at: cut it"
        )
    if tokens < facts.min_tokens:
        raise InputError(
            f"the sequence has {tokens} tokens; this model computes something else below "
            f"{facts.min_tokens}: expected at least as many"
        )
    if plain.position_ids is None:
        _check_length(tokens, facts)
    columns_T = torch.arange(tokens, device=device)
    completed = complete(plain, columns_T, dtype, by_length=bool(facts.by_length))
    if facts.ordered:
        _check_order(facts.ordered, plain, columns_T, dtype)
    causal = plain.attention_mask is None
    if not has_values(completed.carries_BT):
        return Inputs(completed.tensors, tokens, 0, causal=causal)
    assert plain.train_mask is not None
    rest = rest_begins(plain.train_mask != 0, completed.valid_BT, columns_T)
    counts = _check_values(facts, batch, completed, columns_T, rest)
    few = 0 < counts.scored <= SCORED * counts.segment
    scored = completed.carries_BT.any(0).nonzero()[:, 0] if few else None
    return Inputs(
        completed.tensors, counts.segment, counts.untrained, scored, counts.rest, causal=causal
    )


def _check_order(island: str, batch: Batch, columns_T: Tensor, dtype: torch.dtype) -> None:
    """An island that looks at other tokens, or at positions, has masks and positions of its own."""
    given = batch.attention_mask
    if given is not None and given.ndim == 3:
        raise InputError(
            f"attention_mask is (batch, tokens, tokens); the island in {island} decides by itself "
            "who looks at whom: expected a mask of padding, (batch, tokens)"
        )
    if batch.position_ids is not None:
        counted = complete(replace(batch, position_ids=None), columns_T, dtype)
        own = counted.tensors["position_ids"]
        if has_values(own) and not torch.equal(
            own.expand_as(batch.position_ids), batch.position_ids
        ):
            raise InputError(
                f"position_ids restart or skip; the island in {island} counts positions by itself, "
                "over tokens that are no padding: leave them out"
            )


def _plain(batch: Batch, device: torch.device) -> Batch:
    """The same on the device, ids and positions as int64, after checking types and shapes. A mask
    without padding is left out: the causal mask is all there is then, and kernels know it.
    """
    ids_BT = placed("input_ids", _integers("input_ids", batch.input_ids, None), device)
    shape = (ids_BT.shape[0], ids_BT.shape[1])

    def mask(name: str, value: Tensor | None, *more: tuple[int, ...]) -> Tensor | None:
        return None if value is None else placed(name, _mask(name, value, (shape, *more)), device)

    train = mask("train_mask", batch.train_mask)
    loss = mask("loss_mask", batch.loss_mask)
    attention = mask("attention_mask", batch.attention_mask, (*shape, shape[1]))
    if attention is not None and attention.ndim == 2 and _is_all_true(attention):
        attention = None
    positions = batch.position_ids
    if positions is not None:
        positions = placed("position_ids", _integers("position_ids", positions, shape), device)
    train = torch.zeros_like(ids_BT, dtype=torch.bool) if train is None else train
    return Batch(ids_BT, train, loss, attention, positions)


def _is_all_true(mask: Tensor) -> bool:
    return has_values(mask) and bool(mask.all())


def _integers(name: str, value: Tensor, shape: tuple[int, int] | None) -> Tensor:
    check_tensor(name, value)
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise InputError(
            f"{name} has dtype {dtype_name(value.dtype)}; expected whole numbers (int64)"
        )
    if value.ndim != 2 or value.numel() == 0 or (shape is not None and tuple(value.shape) != shape):
        expected = "(batch, tokens), neither 0" if shape is None else f"{shape}, that of input_ids"
        raise InputError(f"{name} has shape {tuple(value.shape)}; expected {expected}")
    return value.to(torch.int64)


def _mask(name: str, value: Tensor, shapes: tuple[tuple[int, ...], ...]) -> Tensor:
    check_tensor(name, value)
    if value.dtype.is_complex:
        raise InputError(
            f"{name} has dtype {dtype_name(value.dtype)}; expected 0 and 1 (bool, integer or float)"
        )
    if tuple(value.shape) not in shapes:
        expected = " or ".join(str(shape) for shape in shapes)
        raise InputError(
            f"{name} has shape {tuple(value.shape)}; expected {expected} to match input_ids"
        )
    return value


def check_tensor(name: str, value: object) -> None:
    """Raises InputError unless the value is a tensor."""
    if not isinstance(value, Tensor):
        raise InputError(f"{name} is a {type(value).__name__}; expected a torch.Tensor")


def has_values(tensor: Tensor) -> bool:
    """Whether numbers can be looked at: not on the meta device, nor while torch traces."""
    return not tensor.is_meta and not torch.compiler.is_compiling()


def placed(name: str, value: Tensor, device: torch.device) -> Tensor:
    """The tensor on the simulator's device. Raises InputError for one without numbers where there
    must be some.
    """
    if value.is_meta and device.type != "meta":
        raise InputError(
            f"{name} is on the meta device, where tensors have no numbers; this simulator is on "
            f"{device}: pass numbers, or move the simulator to meta for shapes alone"
        )
    return value.to(device)


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


def _check_values(
    facts: ModelFacts, batch: Batch, completed: Completed, columns_T: Tensor, rest: Tensor
) -> _Counts:
    """After checking what only values show."""
    ids, positions = (completed.tensors[name] for name in ("input_ids", "position_ids"))
    binary = {
        name: ((mask != 0) & (mask != 1)).any().to(ids.device)
        for name in ("train_mask", "loss_mask", "attention_mask")
        if (mask := getattr(batch, name)) is not None and mask.dtype != torch.bool
    }
    carries_BT = completed.carries_BT
    facts_read = [
        *(ids.min(), ids.max(), positions.min(), positions.max()),
        *(segment_length(carries_BT, columns_T), (~carries_BT.any(-1)).sum(), rest),
        carries_BT.any(0).sum(),
        *binary.values(),
    ]
    low, high, first, last, segment, untrained, begins, scored, *wrong = torch.stack(
        [value.long() for value in facts_read]
    ).tolist()
    _check_range("input_ids", "tokens", low, high, facts.vocab_size)
    _check_range("position_ids", "positions", first, last, facts.max_positions)
    for name, bad in zip(binary, wrong, strict=True):
        if bad:
            raise InputError(f"{name} holds values other than 0 and 1")
    needed = min(facts.min_tokens, ids.shape[1])  # tokens further on carry no loss
    return _Counts(max(segment, needed), untrained, begins, scored)


def _check_range(name: str, kind: str, low: int, high: int, size: int | None) -> None:
    """Raises InputError unless 0 <= low and high < size."""
    if low < 0 or (size is not None and high >= size):
        raise InputError(
            f"{name} hold {low if low < 0 else high}; this model's {kind} are 0 to "
            f"{(size or 0) - 1}"
        )
