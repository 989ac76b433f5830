"""What is timed and measured: random token ids, and a simulator's call for them. Apart from the
loop that it is compared with, so that a process which makes that call loads nothing else.

Legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tintc.ir.call_sizes import Predict
from tintc.runtime.simulator import Simulator


@dataclass(frozen=True)
class Workload:
    """ids_BT: token ids. trained: so many tokens at the start of each sequence are trained on, the
    last of them as a target only. predict: whether logits are wanted everywhere, or where what is
    not trained on is predicted from.
    """

    ids_BT: Tensor
    trained: int
    predict: Predict = "all"

    @property
    def first(self) -> int:
        """The first position whose logits are wanted."""
        return self.trained - 1 if self.predict == "rest" else 0

    @property
    def train_mask(self) -> Tensor:
        """(B, T), 1 on the trained tokens."""
        mask = torch.zeros_like(self.ids_BT)
        mask[:, : self.trained] = 1
        return mask

    def few(self, sequences: int) -> Workload:
        """The same with the first sequences only."""
        return replace(self, ids_BT=self.ids_BT[:sequences])

    def to(self, device: str) -> Workload:
        return replace(self, ids_BT=self.ids_BT.to(device))


def random_workload(
    vocab_size: int,
    *,
    batch: int,
    tokens: int,
    trained: int,
    seed: int = 0,
    predict: Predict = "all",
) -> Workload:
    """Random token ids; a larger batch begins with the sequences of a smaller one."""
    generator = torch.Generator().manual_seed(seed)
    return Workload(
        torch.stack(
            [torch.randint(vocab_size, (tokens,), generator=generator) for _ in range(batch)]
        ),
        trained,
        predict,
    )


@torch.inference_mode()
def simulate(simulator: Simulator, work: Workload) -> Tensor:
    """Logits (B, T, V) of one call, or those of the rest."""
    return simulator(work.ids_BT, work.train_mask, predict=work.predict).logits
