"""Sample arguments of every operator of the dialect."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tests.support.islands import scaled
from tests.support.shapes import Draw
from tintc.ir.ops import OPERATORS


def arguments(name: str, b: int, t: int, d: int, o: int, own: bool, draw: Draw) -> tuple[Any, ...]:
    """Arguments for a call: B sequences, T tokens, D inputs, O outputs; own: each sequence has its
    own weights.
    """
    h, g, e = 4, 2, 3
    x, dx, dy, lr = (
        draw(b, t, d),
        draw(b, t, d),
        draw(b, t, o),
        torch.tensor(0.1, dtype=torch.float64),
    )
    weight, bias = draw.parameter(b, not own, o, d), draw.parameter(b, not own, o)
    gamma, beta = draw.parameter(b, not own, d), draw.parameter(b, not own, d)
    q, k, v, do = draw(b, t, h * e), draw(b, t, g * e), draw(b, t, g * e), draw(b, t, h * e)
    mask = torch.ones(b if own else 1, 1, t, t, dtype=torch.bool).tril()
    ids, loss_mask = (
        torch.randint(o, (b, t), generator=draw.generator),
        torch.ones(b, t, dtype=torch.float64),
    )
    cut = (t + 1) // 2
    bias_BTH = draw(b, t, h) if own else None
    return {
        "prefix": (draw(d, 2 * o), o // 2, o, o, True),
        "embedding": (draw.parameter(b, not own, o + 2, d), ids, 2),
        "embedding_descent": (draw.parameter(b, not own, o + 2, d), x, ids, 2, lr),
        "without_padding": (dx, ids, 1),
        "residual": (x, dx),
        "multiply": (x, dx),
        "scale": (x, 0.3),
        "rotary": (
            draw(b, t, h * 5),
            draw(b, t, 4),
            draw(b, t, 4),
            h,
            "interleaved" if own else "half",
            d % 2 == 0,
        ),
        "at_length": (draw(o + 2, d), ids[:, :1] + 1, 2),
        "wave": (draw(b, 1, d), draw(b, 1, d), ids, "sin" if own else "cos"),
        "window_mask": (mask, 1 + o % 3),
        "segment": (x, cut),
        "segment_mask": (mask, cut),
        "island_forward": ([x, gamma], mask if own else None, scaled(d)),
        "island_backward": ([dx], [x, gamma], mask if own else None, scaled(d), [0, 1]),
        "island_descent": (gamma, draw(b, d), lr),
        "linear_forward": (x, weight, bias if d % 2 else None),
        "linear_backward": (dy, weight),
        "linear_descent": (weight, dy, x, lr),
        "bias_descent": (bias, dy, lr),
        "norm_forward": (x, gamma, beta if d % 2 else None, 1e-5, "layer", 1, 0.0),
        "norm_backward": (
            draw(b, t, 2 * d),
            draw(b, t, 2 * d),
            gamma,
            1e-5,
            "rms",
            2,
            1.0,
            "first_order",
            1000.0,
        ),
        "norm_descent": (
            gamma,
            draw(b, t, 2 * d),
            draw(b, t, 2 * d),
            1e-5,
            "rms" if d % 2 else "layer",
            2,
            lr,
        ),
        "activation_forward": (x, "silu"),
        "activation_backward": (dx, x, "gelu", "exact", 1000.0),
        "attention_forward": (q, k, v, mask, bias_BTH, h, g, 0.5, 0.0),
        "attention_backward_value": (do, q, k, mask, bias_BTH, h, g, 0.5, 3.0),
        "attention_backward_full": (do, q, k, v, mask, bias_BTH, h, g, 0.5, 3.0),
        "wide_linear": (x, weight, bias if d % 2 else None, False),
        "low_rank": (draw(b, t, o), x, draw(b, cut, d), draw(b, cut, o), lr, own),
        "same_rows": (x, ids, 2, ids[:, :cut], 1, draw(b, cut, d), lr),
        "rows_of_factors": (x, ids, 2, draw(b, cut, o + 2), draw(b, cut, d), lr),
        "scattered_scores": (draw(b, t, o + 2), x, ids[:, :cut], 2, draw(b, cut, d), lr),
        "gathered_scores": (x, draw(b, t, o + 2), ids[:, :cut], 2, draw(b, cut, d), lr),
        "concatenate": ([x, dx],),
        "linear_residual": (x, weight, bias if d % 2 else None, dy, False),
        "onednn_product": (x, weight, bias if d % 2 else None, dy if own else None, False),
        "onednn_low_rank": (draw(b, t, o), x, draw(b, cut, d), draw(b, cut, o), lr, own),
        "onednn_descent": (weight, dy, x, lr),
        "onednn_token_products": (x, draw(b, cut, d)),
        "onednn_low_rank_of_scores": (draw(b, t, o), draw(b, t, cut), draw(b, cut, o), lr, own),
        "low_rank_of_scores": (draw(b, t, o), draw(b, t, cut), draw(b, cut, o), lr, own),
        "flash_forward": (q, k, v, h, g, 0.5),
        "flash_backward": (do, q, k, v, do, draw(b, h, t), h, g, 0.5),
        "head_gradient": (
            x,
            draw(o, d),
            draw(o) if own else None,
            ids,
            loss_mask,
            "softmax",
            ["scale", "tanh"],
            [0.3, 1.0],
            0,
            False,
        ),
        "head_logits": (
            x,
            draw(o, d),
            draw(o) if own else None,
            ["scale"],
            [0.3],
            torch.empty(b, t, o, dtype=torch.float64),
            0,
            False,
        ),
        "head_losses_and_gradient": (
            *(x, draw(o, d), draw(o) if own else None, ids, ids, loss_mask, "softmax"),
            *(["scale"], [0.3], 0, False),
        ),
        "head_losses": (x, draw(o, d), draw(o) if own else None, ids, ["scale"], [0.3], 0, False),
        "token_losses": (dy, ids),
        "kept_tokens": (x, torch.arange(cut)),
        "spread_tokens": (x, torch.arange(t), loss_mask),
        "kept_queries": (
            torch.ones(b if own else 1, 1, t, t + 2, dtype=torch.bool).tril(2),
            torch.arange(cut),
        ),
        "with_past": (draw(b, 2, d), x),
        "own_tokens": (draw(b, t + 2, o), x),
        "last_keys": (
            torch.ones(b if own else 1, 1, t, t + 2, dtype=torch.bool).tril(2),
            draw(b, (t + 3) // 2, d),
        ),
        "split_rows": (draw(b, 2 * t, d), draw(2 * b, 3, o)),
        "join_rows": (draw(2 * b, t, d), draw(b, 2 * t, o)),
        "past_window_mask": (
            torch.ones(b if own else 1, 1, t, t + 2, dtype=torch.bool).tril(2),
            1 + o % 3,
        ),
        "stack_rows": ([draw(o, d), draw(d, d)],),
        "columns": (x, d // 2, d),
        "loss_gradient": (dy, ids, loss_mask, "softmax" if own else "mean_embedding"),
        "mean_embedding_gradient": (draw(o, d), ids, loss_mask),
        **_of_rates(b, t, d, o, own, draw),
        **_of_states(b, t, d, o, own, draw),
    }[name]


def _rate(b: int, own: bool) -> Tensor:
    """A rate: one number, or one a sequence."""
    each = torch.linspace(0.1, 0.3, b, dtype=torch.float64)
    return each if own else torch.tensor(0.1, dtype=torch.float64)


def _of_rates(b: int, t: int, d: int, o: int, own: bool, draw: Draw) -> dict[str, tuple[Any, ...]]:
    lr, rate = torch.tensor(0.1, dtype=torch.float64), _rate(b, own)
    return {
        "rate": (lr, rate if own else None, 0.5, d % 2 == 0),
        "total": ([rate, lr],),
        "clip_factor": (rate, 0.2),
        "normal_factor": (rate, 3.0),
        "drift_share": (rate, lr, 0.5),
        "combine": (rate, lr if d % 2 else None, 0.5, 2.0),
        "product": (rate, lr),
        "spread": ([rate, lr], [draw(b, t, d), draw(b, t, d)]),
        "token_products": (draw(b, t, d), draw(b, t + 1, d)),
        "gradient_products": (draw(b, t, 2 * d), draw(b, t, 2 * d), 2),
        "sum_square": ([rate, lr], [draw(b, 1), draw(b, 1)], [draw(b, 1)]),
    }


def _of_states(b: int, t: int, d: int, o: int, own: bool, draw: Draw) -> dict[str, tuple[Any, ...]]:
    lr, rate = torch.tensor(0.1, dtype=torch.float64), _rate(b, own)
    d, o = d + 10, o + 10  # never as many as sequences
    weight, each, mask = draw.parameter(b, not own, o, d), draw(b, o, d), torch.ones(b, t).double()
    return {
        "zero_state": (weight,),
        "fade": (weight, 0.9),
        "descend": (weight, each, rate),
        "toward": (each, draw(o, d), 0.3, rate if own else None),
        "gradient_square": (each,),
        "change_square": (each, draw(o, d)),
        "original_square": (draw(o, d),),
        "linear_square": (draw(b, t, o), draw(b, t, d)),
        "zero_count": (mask,),
        "next_count": (mask[:, 0], mask),
        "moment": (weight, each, 0.9, own),
        "adam_descent": (weight, each, each**2 + 1, 2 * mask[:, 0], lr, 0.9, 0.99, 1e-8),
        "divide": (each, draw(o, d) ** 2 + 1, 1e-8),
        "orthogonal": ([each, draw(b, d, d)],),
        "rows": (each, 0, o // 2 + 1),
    }


FLOAT32 = tuple(name for name in OPERATORS if name.startswith("onednn_"))  # in no other dtype
# Kernels and loops that serve calls nobody differentiates.
WITHOUT_DERIVATIVES = tuple(
    name
    for name, operator in OPERATORS.items()
    if operator.whole or name.startswith("flash_") or name == "next_count"
)


def sample(name: str, b: int, t: int, d: int, o: int, own: bool, draw: Draw) -> tuple[Any, ...]:
    """`arguments`, in the operator's dtype and detached where it has no derivative."""
    given_arguments = arguments(name, b, t, d, o, own, draw)
    if name in WITHOUT_DERIVATIVES:
        given_arguments = tree_map_only(Tensor, Tensor.detach, given_arguments)
    if name in FLOAT32:
        given_arguments = tree_map_only(Tensor, Tensor.float, given_arguments)
    return given_arguments
