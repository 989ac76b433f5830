"""Causal self-attention per head: A = softmax(c tanh(scale * q k^T / c) + bias + mask), o = A v.

Shapes: q (B, T, H*E), k and v (B, T, G*E) with G key/value heads that divide H; the mask is
boolean, (B or 1, 1, T, T), True where a query may look, and lets every query see at least one key;
None is the causal mask. Under a mask k and v may have more tokens, C, than q, whose own are the
last T of them: the mask is (B or 1, 1, T, C) then.
bias: (B, T, H), what each head adds to
the scores of a key (ALiBi: slope times the key's position, since softmax sees only differences), or
None. c, the soft-cap, is 0 for none. A is recomputed in the backward pass. Grouped-query attention
sums dk and dv over the query heads of a group. Source: TINT.md section 2, "Self-attention"; paper
section 2.5; ALiBi, arXiv 2108.12409.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tintc.ir.dialect import operator
from tintc.ir.node_meta import Shape
from tintc.ir.ops.shapes import demand, demand_activation, part, said
from tintc.ir.precision import HALF


def _demand_scores(
    q: Shape, k: Shape, mask: Shape | None, bias: Shape | None, heads: int, kv_heads: int
) -> None:
    """That queries, keys, mask and biases are of the same tokens and heads."""
    for x in (q, k):
        demand_activation(x)
    demand(
        q[0] == k[0] and (mask is not None or q[1] == k[1]),
        f"q is {said(q)} and k {said(k)}; expected the same tokens, or a mask",
    )
    demand(
        part(q[-1], heads) == part(k[-1], kv_heads) and heads % kv_heads == 0,
        f"{heads} heads of q {said(q)} do not fit {kv_heads} of k {said(k)}",
    )
    demand(
        mask is None or mask in [(n, 1, q[1], k[1]) for n in (1, q[0])],
        f"a mask has shape {said(mask or ())}; expected (B, 1, {q[1]}, {k[1]})",
    )
    demand(
        bias is None or bias == (*k[:-1], heads),
        f"a bias has shape {said(bias or ())}; expected (B, {k[1]}, {heads})",
    )


def _attention_shape(
    q: Shape,
    k: Shape,
    v: Shape,
    mask: Shape | None,
    bias: Shape | None,
    heads: int,
    kv_heads: int,
    *_: float,
) -> Shape:
    _demand_scores(q, k, mask, bias, heads, kv_heads)
    demand(v[:-1] == k[:-1], f"v is {said(v)} and k {said(k)}; expected the same tokens")
    return (*q[:-1], part(v[-1], kv_heads) * heads)


@operator(
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, int heads, int kv_heads, "
    "float scale, float softcap) -> Tensor",
    shape=_attention_shape,
    meaning="softmax(scale q k^T + bias + mask) v",
    takes={"mask": "bool"},
)
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """o = A v, heads side by side: (B, T, H*E)."""
    q_BHTE, k_BGTE, v_BGTE = _split(q, heads), _split(k, kv_heads), _split(v, kv_heads)
    if softcap == 0:
        seen = (
            mask
            if mask is None or bias is None
            else torch.where(mask, _over_keys(bias, mask, q).to(q.dtype), float("-inf"))
        )
        how: dict[str, Any] = {"scale": scale, "enable_gqa": heads != kv_heads}
        return _merge(
            F.scaled_dot_product_attention(
                q_BHTE, k_BGTE, v_BGTE, attn_mask=seen, is_causal=seen is None, **how
            )
        )
    scores = _scores(q_BHTE, _repeat(k_BGTE, heads, kv_heads), scale, softcap)
    a_BHTT = _probabilities(scores, mask, bias, q)
    return _merge(torch.matmul(a_BHTT, _repeat(v_BGTE, heads, kv_heads)))


def _value_shape(
    do: Shape,
    q: Shape,
    k: Shape,
    mask: Shape | None,
    bias: Shape | None,
    heads: int,
    kv_heads: int,
    *_: float,
) -> Shape:
    _demand_scores(q, k, mask, bias, heads, kv_heads)
    demand(do[:-1] == q[:-1], f"do is {said(do)} and q {said(q)}; expected the same tokens")
    return (*k[:-1], part(do[-1], heads) * kv_heads)


@operator(
    "(Tensor do, Tensor q, Tensor k, Tensor? mask, Tensor? bias, int heads, int kv_heads, "
    "float scale, float softcap) -> Tensor",
    shape=_value_shape,
    meaning="dv with the probabilities held constant",
    kind="backward",
    takes={"mask": "bool"},
)
def attention_backward_value(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """dv_i = sum_j A_ji do_j, with A held constant: (B, T, G*E). Nothing flows into q or k."""
    scores = _scores(
        _split(q, heads), _repeat(_split(k, kv_heads), heads, kv_heads), scale, softcap
    )
    a_BHTT = _probabilities(scores, mask, bias, q)
    return _merge(_sum_groups(torch.matmul(a_BHTT.mT, _split(do, heads)), heads, kv_heads))


def _full_shape(
    do: Shape, q: Shape, k: Shape, v: Shape, mask: Shape | None, bias: Shape | None, heads: int,
    kv_heads: int, *how: float,
) -> tuple[Shape, Shape, Shape]:  # fmt: skip
    out = _attention_shape(q, k, v, mask, bias, heads, kv_heads)
    demand(do == out, f"do has shape {said(do)}; expected {said(out)}")
    return q, k, v


@operator(
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, int heads, int "
    "kv_heads, float scale, float softcap) -> (Tensor, Tensor, Tensor)",
    shape=_full_shape,
    meaning="dq, dk, dv through the scores",
    kind="backward",
    takes={"mask": "bool"},
)
def attention_backward_full(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) through the scores: with dA = do v^T and dS = A * (dA - sum_j dA * A), times 1 -
    tanh^2 under a soft-cap, dq = scale * dS k, dk = scale * dS^T q, dv = A^T do."""
    q_BHTE, do_BHTE = _split(q, heads), _split(do, heads)
    k_BHTE = _repeat(_split(k, kv_heads), heads, kv_heads)
    v_BHTE = _repeat(_split(v, kv_heads), heads, kv_heads)
    scores = _scores(q_BHTE, k_BHTE, scale, softcap)
    a_BHTT = _probabilities(scores, mask, bias, q)
    da_BHTT = torch.matmul(do_BHTE, v_BHTE.mT)
    ds_BHTT = a_BHTT * (da_BHTT - (da_BHTT * a_BHTT).sum(-1, keepdim=True)) * scale
    if softcap != 0:
        ds_BHTT = ds_BHTT * (1 - (scores / softcap).square())
    dk_BHTE, dv_BHTE = torch.matmul(ds_BHTT.mT, q_BHTE), torch.matmul(a_BHTT.mT, do_BHTE)
    return (
        _merge(torch.matmul(ds_BHTT, k_BHTE)),
        _merge(_sum_groups(dk_BHTE, heads, kv_heads)),
        _merge(_sum_groups(dv_BHTE, heads, kv_heads)),
    )


def _with_past_shape(past: Shape, x: Shape) -> Shape:
    demand_activation(x)
    demand((past[0], *past[2:]) == (x[0], *x[2:]), f"{said(past)} are no earlier {said(x)}")
    return (x[0], f"C{str(past[1])[1:]}", *x[2:])  # C = P + T, and of a window's own P likewise


@operator(
    "(Tensor past, Tensor x) -> Tensor",
    shape=_with_past_shape,
    meaning="keys or values of earlier tokens, and those of a window",
    kind="optimization",
)
def with_past(past_BPD: Tensor, x_BTD: Tensor) -> Tensor:
    """Side by side, (B, C, D) with C = P + T. What is past is constant for the gradient."""
    return torch.cat([past_BPD, x_BTD], 1)


def _own_shape(x: Shape, own: Shape) -> Shape:
    demand_activation(own)
    return (x[0], own[1], *x[2:])


@operator(
    "(Tensor x, Tensor own) -> Tensor",
    shape=_own_shape,
    meaning="what is not past",
    kind="optimization",
    whole=True,
)
def own_tokens(x_BCD: Tensor, own_BTD: Tensor) -> Tensor:
    """The gradient of `with_past` at the window's own tokens: the last T of C. own: any value of
    these, (B, T, ...).
    """
    return x_BCD[:, x_BCD.shape[1] - own_BTD.shape[1] :]


@operator(
    "(Tensor mask, Tensor k) -> Tensor",
    shape=lambda mask, k: (*mask[:-1], k[1]),
    meaning="a mask of the keys that are still there",
    kind="optimization",
    dtype="bool",
    takes={"mask": "bool"},
    whole=True,
)
def last_keys(mask_BxTC: Tensor, k_BKD: Tensor) -> Tensor:
    """The mask's last columns, as many as there are keys: a window forgets those in front of it."""
    return mask_BxTC[..., mask_BxTC.shape[-1] - k_BKD.shape[1] :]


@operator(
    "(Tensor x, Tensor past) -> Tensor",
    shape=lambda x, past: (past[0], "N", *x[2:]),
    meaning="rows of a context, each by itself",
    kind="optimization",
    whole=True,
)
def split_rows(x_BTD: Tensor, past_RPD: Tensor) -> Tensor:
    """(B, n N, ...) -> (R, N, ...), R = B n. past: anything of the R rows."""
    n = past_RPD.shape[0] // x_BTD.shape[0]
    return torch.unflatten(x_BTD, 1, (n, -1)).flatten(0, 1)


def _rejoin_shape(x: Shape, like: Shape) -> Shape:
    demand_activation(x)
    return (*like[:2], *x[2:])


@operator(
    "(Tensor x, Tensor like) -> Tensor",
    shape=_rejoin_shape,
    meaning="rows of a context, one behind the other",
    kind="optimization",
    whole=True,
)
def join_rows(x_RND: Tensor, like_BTD: Tensor) -> Tensor:
    """The inverse of `split_rows`. like: a value of the contexts, (B, n N, ...)."""
    return x_RND.reshape(*like_BTD.shape[:2], *x_RND.shape[2:])


def _flash_shape(
    q: Shape, k: Shape, v: Shape, heads: int, kv_heads: int, scale: float
) -> tuple[Shape, Shape]:
    return _attention_shape(q, k, v, None, None, heads, kv_heads), (q[0], heads, q[1])


@operator(
    "(Tensor q, Tensor k, Tensor v, int heads, int kv_heads, float scale) -> (Tensor, Tensor)",
    shape=_flash_shape,
    meaning="attention_forward under the causal mask, and its rows' sums",
    kind="optimization",
)
def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(o, logarithm of each row's sum of exponentials, (B, H, T)), under the causal mask, by
    torch's kernel for CPUs.
    """
    o_BHTE, sums_BHT = _FLASH(*_flash_operands(q, k, v, heads, kv_heads), 0.0, True, scale=scale)
    return _merge(o_BHTE), sums_BHT


def _flash_backward_shape(
    do: Shape, q: Shape, k: Shape, v: Shape, o: Shape, sums: Shape, heads: int, kv_heads: int,
    scale: float,
) -> tuple[Shape, Shape, Shape]:  # fmt: skip
    return _full_shape(do, q, k, v, None, None, heads, kv_heads)


@operator(
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor sums, int heads, int "
    "kv_heads, float scale) -> (Tensor, Tensor, Tensor)",
    shape=_flash_backward_shape,
    meaning="attention_backward_full, by torch's fused kernel",
    kind="optimization",
)
def flash_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    sums_BHT: Tensor,
    heads: int,
    kv_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from what `flash_forward` returned, as `attention_backward_full` under the
    causal mask.
    """
    operands = _flash_operands(q, k, v, heads, kv_heads)
    dq_BHTE, dk_BHTE, dv_BHTE = _FLASH_BACKWARD(
        _split(do, heads), *operands, _split(o, heads), sums_BHT, 0.0, True, scale=scale
    )
    return (
        _merge(dq_BHTE),
        _merge(_sum_groups(dk_BHTE, heads, kv_heads)),
        _merge(_sum_groups(dv_BHTE, heads, kv_heads)),
    )


def _flash_operands(
    q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    k_BHTE, v_BHTE = (_repeat(_split(x, kv_heads), heads, kv_heads) for x in (k, v))
    return _split(q, heads), k_BHTE, v_BHTE


_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _scores(q_BHTE: Tensor, k_BHTE: Tensor, scale: float, softcap: float) -> Tensor:
    """scale * q k^T, under the soft-cap."""
    scores = torch.matmul(q_BHTE * scale, k_BHTE.mT)
    return scores if softcap == 0 else torch.tanh(scores / softcap) * softcap


def _probabilities(
    scores_BHTC: Tensor, mask: Tensor | None, bias: Tensor | None, q: Tensor
) -> Tensor:
    # Half-precision scores are normalised in float32, as torch's own attention does.
    half = q.dtype in HALF
    if half:
        scores_BHTC = scores_BHTC.float()
    if bias is not None:
        scores_BHTC = scores_BHTC + _over_keys(bias, mask, q)
    unseen = (
        torch.ones_like(scores_BHTC[:1, :1], dtype=torch.bool).triu(1)
        if mask is None
        else torch.logical_not(mask)
    )
    a_BHTC = torch.softmax(scores_BHTC.masked_fill(unseen, float("-inf")), -1)
    return a_BHTC.to(q.dtype) if half else a_BHTC


def _over_keys(bias_BCH: Tensor, mask: Tensor | None, q_BTD: Tensor) -> Tensor:
    """(B, C, H) -> (B, H, 1, C); for half precision (B, H, T, C) in float32, less the query's own
    bias, or the largest that it sees where keys are more than queries: far positions have large
    biases, whose differences their types would lose."""
    bias_BHC = bias_BCH.transpose(1, 2)
    if q_BTD.dtype not in HALF:
        return bias_BHC.unsqueeze(-2)
    bias_BHC = bias_BHC.float()
    own_BHT1 = bias_BHC.unsqueeze(-1)
    if mask is not None and bias_BCH.shape[1] != q_BTD.shape[1]:
        own_BHT1 = torch.where(mask, bias_BHC.unsqueeze(-2), float("-inf")).amax(-1, keepdim=True)
    return bias_BHC.unsqueeze(-2) - own_BHT1


def _split(x: Tensor, heads: int) -> Tensor:
    return torch.unflatten(x, -1, (heads, -1)).transpose(1, 2)


def _merge(x_BHTE: Tensor) -> Tensor:
    return x_BHTE.transpose(1, 2).flatten(-2)


def _repeat(x_BGTE: Tensor, heads: int, kv_heads: int) -> Tensor:
    return x_BGTE if heads == kv_heads else x_BGTE.repeat_interleave(heads // kv_heads, 1)


def _sum_groups(x_BHTE: Tensor, heads: int, kv_heads: int) -> Tensor:
    return x_BHTE if heads == kv_heads else torch.unflatten(x_BHTE, 1, (kv_heads, -1)).sum(2)
