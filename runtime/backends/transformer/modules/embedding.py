"""Embeddings, the head and the loss: what stands at both ends of the stream.

Legend: B sequences, T input tokens, V vocabulary, D width. The table of the head is the simulator's
own vocabulary embedding, V tokens that input tokens attend to: its scores are the logits, their
softmax weighs the same rows in the backward pass. Nothing here has structural constants but its
gate. Source: TINT.md section 2, "Loss"; paper section 2.6.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tintc.ir.precision import wide
from tintc.runtime.backends.transformer.modules.parts import Layer, Range, read


class Embedding(Layer):
    """Row index + offset of a token or position table, (V, D) or (1, V, D)."""

    def __init__(self, *, width: int, offset: int) -> None:
        super().__init__(width)
        self.offset = offset

    def forward(
        self, stream: Tensor, code: Tensor, table: Tensor, index: Tensor, y: Range
    ) -> Tensor:
        return self.write(stream, code, y, F.embedding(index + self.offset, table.flatten(0, -2)))


class HeadForward(Layer):
    """z_t = E h_t + b: the scores of each input token with the V vocabulary tokens."""

    def forward(
        self, stream: Tensor, code: Tensor, table: Tensor, bias: Tensor | None, h: Range, z: Range
    ) -> Tensor:
        return self.write(stream, code, z, F.linear(read(stream, h), table, bias))


class HeadBackward(Layer):
    """dh_t = E^T dz_t: the vocabulary tokens weighed by what the loss left of their scores."""

    def forward(self, stream: Tensor, code: Tensor, table: Tensor, dz: Range, dh: Range) -> Tensor:
        return self.write(stream, code, dh, torch.matmul(read(stream, dz), table))


class LossGradient(Layer):
    """dz_t = m_t (softmax(z_t) - e_y), m_t (z_t - e_y) for kind `quadratic`, m_t (1/V - e_y) for
    `mean_embedding`: gradient of the summed loss, m the 0/1 loss mask, e_y the one-hot of the
    target."""

    def __init__(self, *, width: int, kind: str) -> None:
        super().__init__(width)
        self.kind = kind

    def forward(
        self, stream: Tensor, code: Tensor, targets: Tensor, mask: Tensor, z: Range, dz: Range
    ) -> Tensor:
        scores = wide(read(stream, z))
        weights = torch.softmax(scores, -1) if self.kind == "softmax" else scores
        if self.kind == "mean_embedding":
            weights = torch.full_like(scores, 1 / scores.shape[-1])
        at = targets.unsqueeze(-1)
        minus_one = torch.full_like(at, -1, dtype=weights.dtype)
        found = weights.scatter_add(-1, at, minus_one) * mask.unsqueeze(-1)
        return self.write(stream, code, dz, found.to(stream.dtype))


class MeanEmbeddingGradient(Layer):
    """dh_t = m_t (mean_v E[v] - E[y]): linear attention that weighs all vocabulary tokens alike."""

    def forward(
        self, stream: Tensor, code: Tensor, table: Tensor, targets: Tensor, mask: Tensor, dh: Range
    ) -> Tensor:
        return self.write(
            stream, code, dh, (table.mean(0) - F.embedding(targets, table)) * mask.unsqueeze(-1)
        )
