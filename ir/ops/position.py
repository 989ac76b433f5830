"""Rotary positions, whether by fixed tables or by the length of the call, and sliding windows.

Shapes: x (B, T, H*E) with H heads; cos and sin (B, T, R), rows of position tables with R <= E. Only
the first R coordinates of a head turn. Source: TINT.md section 2, "Self-attention"; RoFormer, arXiv
2104.09864.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tintc.ir.dialect import operator
from tintc.ir.node_meta import Shape
from tintc.ir.ops.shapes import demand, demand_activation, demand_one_of, part, said

PAIRINGS = ("half", "interleaved")
WAVES = ("cos", "sin")


def _rotary_shape(
    x: Shape, cos: Shape, sin: Shape, heads: int, pairing: str, transpose: bool
) -> Shape:
    demand_activation(x)
    demand_one_of(pairing, PAIRINGS)
    turned = cos[-1] if cos and isinstance(cos[-1], int) else 1
    demand(
        cos == sin == (*x[:-1], turned) and turned % 2 == 0 and turned <= part(x[-1], heads),
        f"tables {said(cos)} and {said(sin)} do not turn {heads} heads of {said(x)}",
    )
    return x


def _window_shape(mask: Shape, window: int) -> Shape:
    demand(len(mask) == 4, f"a mask has shape {said(mask)}; expected (B, 1, T, T)")
    demand(window > 0, f"a window has {window} tokens; expected at least 1")
    return mask


@operator(
    "(Tensor x, Tensor cos, Tensor sin, int heads, str pairing, bool transpose) -> Tensor",
    shape=_rotary_shape,
    meaning="pairs of coordinates turned by their position",
)
def rotary(
    x_BTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, heads: int, pairing: str, transpose: bool
) -> Tensor:
    """y_e = cos_e x_e + sin_e x_p(e) in every head, and y_e = x_e behind the first R coordinates.

    The partner p(e) is R/2 away (`half`) or next door (`interleaved`: 0 with 1, 2 with 3, ...). The
    tables carry the signs, so that sin_p(e) = -sin_e makes it a rotation. transpose: the backward
    pass, dx_e = cos_e dy_e + sin_p(e) dy_p(e).
    """
    turned = cos_BTR.shape[-1]
    x_BTHE = torch.unflatten(x_BTD, -1, (heads, -1))
    cos_BT1R, sin_BT1R = cos_BTR.unsqueeze(-2), sin_BTR.unsqueeze(-2)
    first_BTHR = x_BTHE[..., :turned]
    if transpose:
        y_BTHR = first_BTHR * cos_BT1R + partner(first_BTHR * sin_BT1R, turned, pairing)
    else:
        y_BTHR = first_BTHR * cos_BT1R + partner(first_BTHR, turned, pairing) * sin_BT1R
    if turned * heads == x_BTD.shape[-1]:
        return y_BTHR.flatten(-2)
    return torch.cat([y_BTHR, x_BTHE[..., turned:]], -1).flatten(-2)


def partner(x: Tensor, size: int, pairing: str) -> Tensor:
    """x_p(e) at e, over a last dimension of `size`."""
    if pairing == "half":
        return torch.cat([x[..., size // 2 :], x[..., : size // 2]], -1)
    return torch.unflatten(x, -1, (size // 2, 2)).flip(-1).flatten(-2)


def _at_length_shape(table: Shape, length: Shape, first: int) -> Shape:
    demand(len(table) == 2, f"a table has shape {said(table)}; expected (N, R)")
    demand(
        len(length) == 2 and length[1] == 1,
        f"lengths have shape {said(length)}; expected (B, 1)",
    )
    return (length[0], 1, table[1])


@operator(
    "(Tensor table, Tensor length, int first) -> Tensor",
    shape=_at_length_shape,
    meaning="the row of a table for the length of the call",
    kind="read",
    takes={"length": "int"},
    wide=True,
)
def at_length(table_NR: Tensor, length_B1: Tensor, first: int) -> Tensor:
    """Row length - first of a table, (B, 1, R): the first row for shorter calls, the last for
    longer ones. So a rule that stays the same up to some length, or from some length on, needs no
    further rows.
    """
    row_B1 = (length_B1 - first).clamp(min=0, max=table_NR.shape[0] - 1)
    return F.embedding(row_B1, table_NR)


def _wave_shape(frequency: Shape, amplitude: Shape, positions: Shape, function: str) -> Shape:
    demand_one_of(function, WAVES)
    demand(len(positions) == 2, f"positions have shape {said(positions)}; expected (B, T)")
    demand(
        frequency == amplitude == (positions[0], 1, frequency[-1]),
        f"frequencies {said(frequency)} and amplitudes {said(amplitude)} are none of sequences "
        f"with positions {said(positions)}",
    )
    return (*positions, frequency[-1])


@operator(
    "(Tensor frequency, Tensor amplitude, Tensor positions, str function) -> Tensor",
    shape=_wave_shape,
    meaning="rotary tables of frequencies that each call has for itself",
    kind="read",
    takes={"positions": "int"},
)
def wave(
    frequency_B1R: Tensor, amplitude_B1R: Tensor, positions_BT: Tensor, function: str
) -> Tensor:
    """a cos(p f), or a sin(p f): what `rotary` reads at position p, (B, T, R). Signs are in a."""
    angle_BTR = positions_BT.unsqueeze(-1).to(frequency_B1R.dtype) * frequency_B1R
    return amplitude_B1R * (angle_BTR.cos() if function == "cos" else angle_BTR.sin())


@operator(
    "(Tensor mask, int window) -> Tensor",
    shape=_window_shape,
    meaning="a mask, narrowed to the last tokens",
    kind="read",
    dtype="bool",
    takes={"mask": "bool"},
)
def window_mask(mask_BxTT: Tensor, window: int) -> Tensor:
    """The mask, narrowed to the last `window` tokens, a query's own included. One that then may
    look at nothing looks at itself.
    """
    near_BxTT = mask_BxTT.triu(1 - window)
    itself_BxTT = torch.ones_like(mask_BxTT).triu().tril()
    return near_BxTT | (itself_BxTT & ~near_BxTT.any(-1, keepdim=True))


@operator(
    "(Tensor mask, int window) -> Tensor",
    shape=_window_shape,
    meaning="window_mask where keys of earlier tokens stand in front",
    kind="optimization",
    dtype="bool",
    takes={"mask": "bool"},
    whole=True,
)
def past_window_mask(mask_BxTC: Tensor, window: int) -> Tensor:
    """As `window_mask` of (B or 1, 1, T, C), whose queries are the last T of C tokens."""
    past = mask_BxTC.shape[-1] - mask_BxTC.shape[-2]
    near_BxTC = mask_BxTC.triu(past + 1 - window)
    itself_BxTC = torch.ones_like(mask_BxTC).triu(past).tril(past)
    return near_BxTC | (itself_BxTC & ~near_BxTC.any(-1, keepdim=True))
