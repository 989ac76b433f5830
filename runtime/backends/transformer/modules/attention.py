"""Softmax attention with the auxiliary model's heads, and its backward pass by the same scores,
transposed.

Legend: B sequences, T input tokens, H heads, G key/value heads, E head width of the auxiliary
model. The mask is boolean, (B or 1, 1, T, T). The bias is (B, T, H): of each key, what it adds to
the scores of each head. Every map is a split map over a whole range. Source: TINT.md sections 2 and
3; paper section 2.5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tintc.ir.precision import wide
from tintc.runtime.backends.transformer.modules.parts import Layer, Range, SplitMap, read, same


class AttentionLayer(Layer):
    """queries, keys, values: coordinates of q, k and v; o of the result of a forward pass. heads:
    H. kv_heads: G.
    softcap: c of the scores c tanh(s / c), 0 for none. bias: whether keys carry one."""

    def __init__(
        self,
        *,
        queries: int,
        keys: int,
        values: int,
        width: int,
        heads: int,
        kv_heads: int,
        scale: float,
        softcap: float = 0.0,
        bias: bool = False,
    ) -> None:
        super().__init__(width)
        self.heads, self.kv_heads = heads, kv_heads
        self.sizes |= {"q": queries, "k": keys, "v": values, "o": values // kv_heads * heads}
        self.scale, self.softcap = scale, softcap
        self.query, self.key = SplitMap(same(queries)), SplitMap(same(keys))
        self.key_bias = SplitMap(same(heads)) if bias else None
        if bias:
            self.formula, self.sizes["b"] = f"{self.formula} + b", heads

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """(B, H, T, T): of each query head with its group's key head, under the soft-cap."""
        q_BHTE, k_BHTE = self.split_queries(self.query.whole(q)), self.split_keys(self.key.whole(k))
        scores = torch.matmul(q_BHTE * self.scale, k_BHTE.mT)
        return torch.tanh(scores / self.softcap) * self.softcap if self.softcap else scores

    def probabilities(self, scores_BHTT: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
        """(B, H, T, T): softmax of the scores and what their keys add to them."""
        if self.key_bias is not None and bias is not None:
            scores_BHTT = scores_BHTT + self.key_bias.whole(bias).mT.unsqueeze(-2)
        seen = scores_BHTT.masked_fill(torch.logical_not(mask), float("-inf"))
        return torch.softmax(wide(seen), -1).to(scores_BHTT.dtype)

    def split_queries(self, x: Tensor) -> Tensor:
        """(B, T, H * E) -> (B, H, T, E)."""
        return torch.unflatten(x, -1, (self.heads, -1)).transpose(1, 2)

    def split_keys(self, x: Tensor) -> Tensor:
        """(B, T, G * E) -> (B, H, T, E): each group's head once for each of its query heads."""
        x_BGTE = torch.unflatten(x, -1, (self.kv_heads, -1)).transpose(1, 2)
        return (
            x_BGTE
            if self.heads == self.kv_heads
            else x_BGTE.repeat_interleave(self.heads // self.kv_heads, 1)
        )

    def sum_groups(self, x_BHTE: Tensor) -> Tensor:
        """(B, H, T, E) -> (B, T, G * E)."""
        return merged(torch.unflatten(x_BHTE, 1, (self.kv_heads, -1)).sum(2))


def merged(x_BHTE: Tensor) -> Tensor:
    """(B, H, T, E) -> (B, T, H * E)."""
    return x_BHTE.transpose(1, 2).flatten(-2)


class AttentionForward(AttentionLayer):
    """o_t = sum_i A_ti v_i. values: G * E' coordinates of v; o has H * E'."""

    formula = "q + k + v + o + 4*d"

    def __init__(self, *, values: int, **sizes: Any) -> None:
        super().__init__(values=values, **sizes)
        self.value = SplitMap(same(values))
        self.output = SplitMap(same(values // self.kv_heads * self.heads))

    def forward(
        self,
        stream: Tensor,
        code: Tensor,
        mask: Tensor,
        bias: Range | None,
        q: Range,
        k: Range,
        v: Range,
        o: Range,
    ) -> Tensor:
        a_BHTT = self.probabilities(
            self.scores(read(stream, q), read(stream, k)), mask, of_keys(stream, bias)
        )
        v_BHTE = self.split_keys(self.value.whole(read(stream, v)))
        return self.write(stream, code, o, self.output.whole(merged(torch.matmul(a_BHTT, v_BHTE))))


class AttentionBackwardValue(AttentionLayer):
    """dv_i = sum_t A_ti do_t with A held constant, summed over the query heads of a group. values:
    G * E' coordinates of dv.
    """

    formula = AttentionForward.formula

    def __init__(self, *, values: int, **sizes: Any) -> None:
        super().__init__(values=values, **sizes)
        self.value = SplitMap(same(values // self.kv_heads * self.heads))
        self.output = SplitMap(same(values))

    def forward(
        self,
        stream: Tensor,
        code: Tensor,
        mask: Tensor,
        bias: Range | None,
        do: Range,
        q: Range,
        k: Range,
        dv: Range,
    ) -> Tensor:
        a_BHTT = self.probabilities(
            self.scores(read(stream, q), read(stream, k)), mask, of_keys(stream, bias)
        )
        do_BHTE = self.split_queries(self.value.whole(read(stream, do)))
        return self.write(
            stream, code, dv, self.output.whole(self.sum_groups(torch.matmul(a_BHTT.mT, do_BHTE)))
        )


class AttentionBackwardFull(AttentionLayer):
    """dq, dk and dv through the scores: with delta_t = do_t . o_t and, per head,

        dq_t = scale sum_i A_ti (do_t . v_i - delta_t) k_i = scale ((sum_i A_ti k_i v_i^T) do_t -
        delta_t sum_i A_ti k_i) dk_i = scale sum_t A_ti (do_t . v_i - delta_t) q_t = scale ((sum_t
        A_ti q_t do_t^T) v_i - sum_t A_ti delta_t q_t)

    Each sum is attention by the same probabilities, with outer products of coordinates as values;
    what stands in front is a token's linear attention to itself. So nothing but softmax and linear
    attention is used, at E times the work. Under a soft-cap the A of both sums, but not that of
    delta, is A_ti (1 - (s_ti / c)^2) with the capped scores s: attention of the same heads, damped.
    """

    formula = "2*q + 2*k + 2*v + o + 4*d"

    def __init__(self, *, queries: int, keys: int, values: int, **sizes: Any) -> None:
        super().__init__(queries=queries, keys=keys, values=values, **sizes)
        self.gradient, self.value = (
            SplitMap(same(values // self.kv_heads * self.heads)),
            SplitMap(same(values)),
        )
        self.to_query, self.to_key = SplitMap(same(queries)), SplitMap(same(keys))
        self.to_value = SplitMap(same(values))

    def forward(
        self,
        stream: Tensor,
        code: Tensor,
        mask: Tensor,
        bias: Range | None,
        do: Range,
        q: Range,
        k: Range,
        v: Range,
        results: tuple[Range | None, ...],
    ) -> Tensor:
        """results: where dq, dk and dv go; None for one that nothing reads."""
        scores = self.scores(read(stream, q), read(stream, k))
        a_BHTT = self.probabilities(scores, mask, of_keys(stream, bias))
        q_BHTE = self.split_queries(self.query.whole(read(stream, q)))
        k_BHTE = self.split_keys(self.key.whole(read(stream, k)))
        v_BHTE = self.split_keys(self.value.whole(read(stream, v)))
        do_BHTE = self.split_queries(self.gradient.whole(read(stream, do)))
        delta_BHT1 = (do_BHTE * torch.matmul(a_BHTT, v_BHTE)).sum(-1, keepdim=True)
        damped_BHTT = a_BHTT * (1 - (scores / self.softcap).square()) if self.softcap else a_BHTT
        dq = contracted(damped_BHTT, k_BHTE, v_BHTE, do_BHTE) - delta_BHT1 * torch.matmul(
            damped_BHTT, k_BHTE
        )
        dk = contracted(damped_BHTT.mT, q_BHTE, do_BHTE, v_BHTE) - torch.matmul(
            damped_BHTT.mT, delta_BHT1 * q_BHTE
        )
        dv = torch.matmul(a_BHTT.mT, do_BHTE)
        gradients = (
            self.to_query.whole(merged(dq * self.scale)),
            self.to_key.whole(self.sum_groups(dk * self.scale)),
            self.to_value.whole(self.sum_groups(dv)),
        )
        for where, value in zip(results, gradients, strict=True):
            stream = stream if where is None else self.write(stream, code, where, value)
        return stream


def of_keys(stream: Tensor, bias: Range | None) -> Tensor | None:
    """The biases of the keys, if they carry any."""
    return None if bias is None else read(stream, bias)


def contracted(a_BHTT: Tensor, u_BHTE: Tensor, w_BHTF: Tensor, with_BHTF: Tensor) -> Tensor:
    """(sum_i A_ti u_i w_i^T) with_t, (B, H, T, E): attention to outer products, then a product of
    each token with itself.
    """
    outer = (u_BHTE.unsqueeze(-1) * w_BHTF.unsqueeze(-2)).flatten(-2)
    seen = torch.unflatten(torch.matmul(a_BHTT, outer), -1, (u_BHTE.shape[-1], -1))
    return torch.matmul(seen, with_BHTF.unsqueeze(-1)).squeeze(-1)
