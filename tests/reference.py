"""An independent reference: the Hugging Face model, torch.autograd and plain SGD, one sequence at a time.

It shares no code with tintc. Approximations are autograd.Functions put in place of the model's own norms,
activations and attention: naive finite differences, and probabilities that are held constant.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


@dataclass
class Reference:
    """logits and initial_logits: (B, T, V), zero at padding. states: each sequence's whole state dict after the steps."""

    logits: Tensor
    initial_logits: Tensor
    states: list[dict[str, Tensor]]


def reference(
    model: Any,
    config: Any,
    input_ids: Tensor,
    train_mask: Tensor,
    loss_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Reference:
    """What a simulator of `model` must return. `config` is read by field name only.

    A (B, T) attention mask must be a block of ones: the tokens outside it are cut off, and the sequence runs alone.
    """
    changed = approximated(model, config)
    found, initial, states = [], [], []
    batch, length = input_ids.shape
    for b in range(batch):
        keep = torch.ones(length, dtype=torch.bool)
        if attention_mask is not None and attention_mask.ndim == 2:
            keep = attention_mask[b].bool()
        kept = keep.nonzero()[:, 0]
        assert bool((kept.diff() == 1).all()), "a padding mask with holes"
        target = train_mask[b].bool() if loss_mask is None else train_mask[b].bool() & loss_mask[b].bool()
        looks = None if attention_mask is None or attention_mask.ndim == 2 else attention_mask[b].bool()
        positions = torch.arange(len(kept)) if position_ids is None else position_ids[b, kept]
        after, before, state = _one(changed, config, input_ids[b, kept], target[kept], looks, positions)
        found.append(torch.zeros(length, after.shape[-1], dtype=after.dtype).index_copy(0, kept, after))
        initial.append(torch.zeros(length, after.shape[-1], dtype=after.dtype).index_copy(0, kept, before))
        states.append(state)
    return Reference(torch.stack(found), torch.stack(initial), states)


def _one(
    model: nn.Module, config: Any, ids: Tensor, target: Tensor, looks: Tensor | None, positions: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(final logits, initial logits, state dict) of one sequence; looks is (T, T), True where a query may look."""
    length = len(ids)
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    if looks is not None:
        allowed &= looks
    carries = target[1:]
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    names = trained_names(model, config)

    def logits_of(values: dict[str, Tensor]) -> Tensor:
        with constant_probabilities(config.attention_gradient == "value"):
            out = call(model, values, ids[None], allowed[None, None], positions[None])
        return out[0]

    initial = logits_of(weights).detach()
    for _ in range(config.steps):
        leaves = {name: weights[name].detach().requires_grad_() for name in names}
        total = surrogate_loss(logits_of({**weights, **leaves})[:-1][carries], ids[1:][carries], config.loss_gradient)
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                weights[name] = weights[name] - config.inner_lr * gradient
    state = {**{name: value.detach() for name, value in model.state_dict().items()}, **weights}
    return logits_of(weights).detach(), initial, state


def call(model: nn.Module, values: dict[str, Tensor], ids: Tensor, allowed: Tensor, positions: Tensor) -> Tensor:
    """Logits of a Hugging Face model, which takes a boolean (B, 1, T, T) mask as it stands; or of a plain module."""
    if not hasattr(model, "config"):
        assert bool((allowed == torch.ones_like(allowed).tril()).all()), "a plain module is only causal"
        return functional_call(model, values, (ids,))
    options = {"attention_mask": allowed, "position_ids": positions, "use_cache": False}
    return functional_call(model, values, (ids,), options).logits


def surrogate_loss(logits: Tensor, targets: Tensor, kind: str) -> Tensor:
    """A sum over positions whose gradient at the logits z is p - 1_y, 1/V - 1_y or z - 1_y."""
    if kind == "softmax":
        return F.cross_entropy(logits, targets, reduction="sum")
    picked = logits.gather(-1, targets[:, None])[:, 0]
    if kind == "mean_embedding":
        return (logits.mean(-1) - picked).sum()
    assert kind == "quadratic"
    return ((logits**2).sum(-1) / 2 - picked).sum()


def trained_names(model: nn.Module, config: Any) -> list[str]:
    """Parameters that descent changes: all in the top blocks and the final norm, gains of norms only with norm_update `all`."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    (path, blocks) = next(item for item in lists if item[0].split(".")[-1] in ("layers", "h", "blocks"))
    first = len(blocks) - (config.layers or len(blocks))
    owners = [f"{path}.{i}." for i in range(first, len(blocks))]
    stack = path.rpartition(".")[0]
    owners += [f"{stack}.{last}.".lstrip(".") for last in ("final_layer_norm", "ln_f")]
    gains = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, (nn.LayerNorm, DifferenceNorm))}
    names = [name for name, _ in model.named_parameters() if any(name.startswith(owner) for owner in owners)]
    return [name for name in names if config.norm_update == "all" or name not in gains]


def approximated(model: nn.Module, config: Any) -> nn.Module:
    """A copy of the model whose norms and activations have the backward that config asks for."""
    changed = copy.deepcopy(model).eval()
    scale = config.finite_difference_scale
    for parent in list(changed.modules()):
        for name, child in list(parent.named_children()):
            if config.norm_gradient == "first_order" and isinstance(child, nn.LayerNorm):
                setattr(parent, name, DifferenceNorm(child, scale))
            elif config.activation_gradient == "first_order" and name in ("activation_fn", "act"):
                setattr(parent, name, DifferenceActivation(child, scale))
    return changed


class _Difference(torch.autograd.Function):
    """y = f(x); dx = N (f(x + dy/N) - f(x)), as it stands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Any, scale: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function, ctx.scale = function, scale
        return function(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            return ctx.scale * (ctx.function(x + dy / ctx.scale) - ctx.function(x)), None, None


class DifferenceNorm(nn.Module):
    """gamma f(x) + beta; the gain and the shift are ordinary autograd, f has the difference as its backward."""

    def __init__(self, norm: nn.LayerNorm, scale: float) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.eps, self.scale = norm.eps, scale

    def _f(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(self.eps + variance)

    def forward(self, x: Tensor) -> Tensor:
        y = _Difference.apply(x, self._f, self.scale)
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias


class DifferenceActivation(nn.Module):
    """a(x), with the difference as its backward."""

    def __init__(self, activation: nn.Module, scale: float) -> None:
        super().__init__()
        self.kept, self.scale = [activation], scale  # in a list: no submodule of its own

    def forward(self, x: Tensor) -> Tensor:
        return _Difference.apply(x, self.kept[0], self.scale)


@contextlib.contextmanager
def constant_probabilities(on: bool) -> Iterator[None]:
    """Replaces torch's attention by one whose probabilities are detached."""

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_: Any, **options: Any) -> Tensor:
        scale = options.get("scale")
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if options.get("is_causal"):
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        assert attn_mask is not None
        assert attn_mask.dtype == torch.bool
        return scores.masked_fill(~attn_mask, float("-inf")).softmax(-1).detach() @ v

    if not on:
        yield
        return
    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        yield
