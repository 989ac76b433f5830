"""Labels, and the losses that are reported of them. Legend: B sequences, T tokens, V vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tintc.ir.call_sizes import Predict
from tintc.ir.errors import InputError
from tintc.ir.precision import wide
from tintc.runtime.inputs import Inputs, check_tensor, has_values, placed


def language_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean cross-entropy of token t + 1 at position t over the labels that are not -100, in at
    least float32.
    """
    return F.cross_entropy(
        wide(logits_BTV[:, :-1]).flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=-100
    )


def mean_loss(losses_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """The same from the losses of all tokens."""
    return losses_BT.sum() / (labels_BT[:, 1:] != -100).sum()


def check_labels(labels: Tensor, input_ids: Tensor, vocab_size: int) -> Tensor:
    """The labels as int64. Raises InputError for labels that do not fit the tokens, or hold
    none.
    """
    check_tensor("labels", labels)
    if labels.shape != input_ids.shape or labels.dtype.is_floating_point:
        raise InputError(
            f"labels have shape {tuple(labels.shape)}, {labels.dtype}; expected whole numbers of "
            f"shape {tuple(input_ids.shape)}"
        )
    if not has_values(labels):
        return labels.long()
    if not bool((labels[:, 1:] != -100).any()):
        raise InputError(
            "labels hold no target: all of them are -100 (the first column never counts)"
        )
    wrong = labels[(labels != -100) & ((labels < 0) | (labels >= vocab_size))]
    if wrong.numel():
        raise InputError(
            f"labels hold {int(wrong[0])}; expected -100 or a token from 0 to {vocab_size - 1}"
        )
    return labels.long()


def predicted_positions(
    predict: Predict, logits_to_keep: int | Tensor, inputs: Inputs, device: torch.device
) -> Tensor | None:
    """Positions that predict what is asked for, (K,); None for all. Raises InputError for another
    `predict`, for two ways to say it, and for masks whose numbers cannot be seen.
    """
    tokens = inputs.shape[1]
    if predict == "all":
        return kept_positions(logits_to_keep, tokens, device)
    if predict != "rest":
        raise InputError(f"predict is {predict!r}; expected 'all' or 'rest'")
    if isinstance(logits_to_keep, Tensor) or logits_to_keep:
        raise InputError("predict='rest' says which logits to keep; leave logits_to_keep out")
    if inputs.rest is None:
        raise InputError(
            "predict='rest' depends on numbers of train_mask, which has none here (torch traces, "
            "or it is on the meta device); pass logits_to_keep with the positions"
        )
    return torch.arange(inputs.rest, tokens, device=device)


def labelled_positions(labels_BT: Tensor) -> Tensor | None:
    """From the first position on that any label is for; None for all."""
    if not has_values(labels_BT):
        return None
    first = int((labels_BT[:, 1:] != -100).any(0).byte().argmax())
    return torch.arange(first, labels_BT.shape[1], device=labels_BT.device) if first else None


def labels_of_rest(labels_BT: Tensor, first: int) -> Tensor:
    """Labels of what the positions from `first` on predict; all others are -100. Raises InputError
    if none is left.
    """
    kept_BT = labels_BT.clone()
    kept_BT[:, : first + 1] = -100
    if not bool((kept_BT != -100).any()):
        raise InputError(
            "labels hold no target behind the training segment, which predict='rest' asks for; "
            "pass predict='all', or labels of the rest"
        )
    return kept_BT


def kept_positions(
    logits_to_keep: int | Tensor, tokens: int, device: torch.device
) -> Tensor | None:
    """Positions whose logits are wanted, (K,); None for all. Raises InputError for what names no
    positions.
    """
    if isinstance(logits_to_keep, Tensor):
        shape, dtype = tuple(logits_to_keep.shape), logits_to_keep.dtype
        if len(shape) != 1 or shape[0] == 0 or dtype.is_floating_point or dtype == torch.bool:
            raise InputError(
                f"logits_to_keep has shape {shape}, {dtype}; expected positions (K,), whole "
                "numbers, at least one"
            )
        positions = logits_to_keep.long()
        if has_values(positions) and bool(((positions < 0) | (positions >= tokens)).any()):
            raise InputError(
                f"logits_to_keep holds {positions.tolist()[:8]}; the sequence has positions 0 to "
                f"{tokens - 1}"
            )
        return placed("logits_to_keep", positions, device)
    if (
        isinstance(logits_to_keep, bool)
        or not isinstance(logits_to_keep, int)
        or not 0 <= logits_to_keep <= tokens
    ):
        raise InputError(
            f"logits_to_keep is {logits_to_keep!r}; expected 0 for all, the last 1 to {tokens}, or "
            "a tensor of positions"
        )
    return torch.arange(tokens - logits_to_keep, tokens, device=device) if logits_to_keep else None
