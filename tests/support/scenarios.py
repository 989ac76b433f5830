"""The shapes of input that a simulator takes, by name. Each gives keyword arguments of a
simulator's call.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.support.models import ragged_train_mask, scattered_mask, tokens

Inputs = dict[str, Tensor]


def ragged(batch: int, length: int, vocab: int, seed: int = 0) -> Inputs:
    return {
        "input_ids": tokens(batch, length, vocab, seed),
        "train_mask": ragged_train_mask(batch, length, seed),
    }


def scattered(batch: int, length: int, vocab: int, seed: int = 0) -> Inputs:
    return {
        "input_ids": tokens(batch, length, vocab, seed),
        "train_mask": scattered_mask(batch, length, seed).bool(),
    }


def loss_mask(batch: int, length: int, vocab: int, seed: int = 0) -> Inputs:
    return {**ragged(batch, length, vocab, seed), "loss_mask": scattered_mask(batch, length, seed)}


def position_ids(batch: int, length: int, vocab: int, seed: int = 0) -> Inputs:
    return {
        **ragged(batch, length, vocab, seed),
        "position_ids": (torch.arange(length) % 4 + 1).expand(batch, length),
    }


def blocks(batch: int, length: int, vocab: int, seed: int = 0) -> Inputs:
    """Each demonstration sees only itself; demonstrations end elsewhere in each sequence."""
    generator = torch.Generator().manual_seed(seed + 3)
    block = (torch.rand(batch, length, generator=generator) < 0.3).long().cumsum(-1)
    return {
        **ragged(batch, length, vocab, seed),
        "attention_mask": (block[:, :, None] == block[:, None, :]).long(),
    }


def demonstrations(batch: int, length: int, vocab: int, seed: int = 0) -> Inputs:
    """Block-diagonal attention and positions that restart."""
    inputs = blocks(batch, length, vocab, seed)
    within = (inputs["attention_mask"] * torch.ones(length, length).tril()).sum(-1).long() - 1
    return {**inputs, "position_ids": within}


def holes(batch: int, length: int, vocab: int, seed: int = 0) -> Inputs:
    """Any position may be hidden from any later one."""
    seen = (
        torch.rand(batch, length, length, generator=torch.Generator().manual_seed(seed + 4)) < 0.6
    )
    return {
        **ragged(batch, length, vocab, seed),
        "attention_mask": seen | torch.eye(length, dtype=torch.bool),
    }


def _padded(batch: int, length: int, vocab: int, seed: int, side: str) -> Inputs:
    """The first sequence is whole, the others have padding; the training mask covers padding too,
    which must not matter.
    """
    generator = torch.Generator().manual_seed(seed + 5)
    sizes = torch.randint(3, max(4, length - 1), (batch, 1), generator=generator)
    sizes[0] = length
    column = torch.arange(length)
    mask = column < sizes
    if side == "left":
        mask = column >= length - sizes
    elif side == "both":
        mask = (column >= (length - sizes) // 2) & (column < (length - sizes) // 2 + sizes)
    start = mask.long().argmax(-1, keepdim=True)
    train = (column < start + (sizes + 1) // 2 + 1).long()
    return {
        "input_ids": tokens(batch, length, vocab, seed),
        "train_mask": train,
        "attention_mask": mask.long(),
    }


def padded_left(batch: int, length: int, vocab: int, seed: int = 0) -> Inputs:
    return _padded(batch, length, vocab, seed, "left")


def padded_right(batch: int, length: int, vocab: int, seed: int = 0) -> Inputs:
    return {
        **_padded(batch, length, vocab, seed, "right"),
        "train_mask": torch.ones(batch, length, dtype=torch.long),
    }


def padded_both(batch: int, length: int, vocab: int, seed: int = 0) -> Inputs:
    return _padded(batch, length, vocab, seed, "both")


SCENARIOS: dict[str, Callable[..., Inputs]] = {
    make.__name__: make
    for make in (
        ragged,
        scattered,
        loss_mask,
        position_ids,
        blocks,
        demonstrations,
        holes,
        padded_left,
        padded_right,
        padded_both,
    )
}
