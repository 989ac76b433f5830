"""An independent reference: the Hugging Face model, torch.autograd and the inner rule by
torch.optim (`rules.py`), one sequence at a time.

It shares no code with tintc. Approximations are autograd.Functions put in place of the model's own
norms, activations and attention: naive finite differences, and probabilities that are held
constant.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from tests.oracle.rules import Rule
from tests.support.norms import centred, epsilon, gain_is_added_to_one, is_norm, normalized, shift


@dataclass
class Reference:
    """logits and initial_logits: (B, T, V), zero at padding. states: each sequence's whole state
    dict after the steps.
    """

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
    trained: Sequence[str] | None = None,
    rms: dict[str, Tensor] | None = None,
) -> Reference:
    """What a simulator of `model` must return. `config` is read by field name only.

    trained: parameters that descent changes, if not those that `layers` and `norm_update` name.
    rms: root mean squares of gradients, which the rule `rms` divides by.
    A (B, T) attention mask must be a block of ones: the tokens outside it are cut off, and the
    sequence runs alone.
    """
    changed = approximated(model, config)
    names = trained_names(changed, config) if trained is None else list(trained)
    found, initial, states = [], [], []
    batch, length = input_ids.shape
    for b in range(batch):
        keep = torch.ones(length, dtype=torch.bool)
        if attention_mask is not None and attention_mask.ndim == 2:
            keep = attention_mask[b].bool()
        kept = keep.nonzero()[:, 0]
        assert bool((kept.diff() == 1).all()), "a padding mask with holes"
        target = (
            train_mask[b].bool()
            if loss_mask is None
            else train_mask[b].bool() & loss_mask[b].bool()
        )
        looks = (
            None if attention_mask is None or attention_mask.ndim == 2 else attention_mask[b].bool()
        )
        positions = torch.arange(len(kept)) if position_ids is None else position_ids[b, kept]
        weights = {name: value.detach().clone() for name, value in changed.named_parameters()}
        rule = Rule(changed, {name: weights[name] for name in names}, config, rms)
        after, before, state = _one(
            changed, config, rule, input_ids[b, kept], target[kept], looks, positions
        )
        found.append(
            torch.zeros(length, after.shape[-1], dtype=after.dtype).index_copy(0, kept, after)
        )
        initial.append(
            torch.zeros(length, after.shape[-1], dtype=after.dtype).index_copy(0, kept, before)
        )
        states.append(state)
    return Reference(torch.stack(found), torch.stack(initial), states)


def _one(
    model: nn.Module,
    config: Any,
    rule: Rule,
    ids: Tensor,
    target: Tensor,
    looks: Tensor | None,
    positions: Tensor,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(final logits, initial logits, state dict) of one sequence; looks is (T, T), True where a
    query may look.
    """
    length = len(ids)
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    if looks is not None:
        allowed &= looks
    carries = target[1:]
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    names = list(rule.weights())

    def logits_of(values: dict[str, Tensor]) -> Tensor:
        with constant_probabilities(config.attention_gradient == "value"):
            out = call(model, values, ids[None], allowed[None, None], positions[None])
        return out[0]

    initial = logits_of(weights).detach()
    for _ in range(config.steps):
        leaves = {name: weights[name].detach().requires_grad_() for name in names}
        total = surrogate_loss(
            logits_of({**weights, **leaves})[:-1][carries], ids[1:][carries], config.loss_gradient
        )
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        weights |= rule.step(dict(zip(names, gradients, strict=True)))
    return logits_of(weights).detach(), initial, state_of(model, weights)


def state_of(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole state dict with these weights; every name of a tied one has its value."""
    first = {id(value): name for name, value in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    tied = {name: weights[first[id(value)]] for name, value in every}
    return {**{name: value.detach() for name, value in model.state_dict().items()}, **tied}


def call(
    model: nn.Module, values: dict[str, Tensor], ids: Tensor, allowed: Tensor, positions: Tensor
) -> Tensor:
    """Logits of a model called plainly, as on any sequence; or with masks and positions where the
    inputs ask for others.

    allowed is (1, 1, T, T), True where a query may look. A plain module, and a family that takes
    neither, is only called plainly.
    """
    huggingface = hasattr(model, "config")
    options: dict[str, Any] = {"use_cache": False} if huggingface else {}
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    plain = bool((allowed == causal).all()) and bool((positions == torch.arange(length)).all())
    if not plain:
        assert huggingface, "a plain module is only causal"
        options |= {"attention_mask": _own_mask(model.config, allowed)}
        if "position_ids" in inspect.signature(model.forward).parameters:
            options["position_ids"] = positions
        else:
            assert bool((positions == torch.arange(length)).all()), (
                f"{type(model).__name__} takes no position_ids"
            )
    out = functional_call(model, values, (ids,), options)
    return out.logits if huggingface else out


def _own_mask(config: Any, allowed: Tensor) -> Any:
    """The mask as a family takes it: boolean or added to the scores; cut to the sliding window,
    which a given mask replaces.
    """
    far = (
        torch.ones(allowed.shape[-2:], dtype=torch.bool).tril(-config.sliding_window)
        if getattr(config, "sliding_window", None)
        else None
    )
    near = allowed if far is None else allowed & ~far
    kinds = {"full_attention": allowed, "sliding_attention": near}
    if config._attn_implementation == "eager":
        least = torch.finfo(torch.float64).min
        kinds = {
            kind: torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, least)
            for kind, mask in kinds.items()
        }
    by_layer = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    return kinds if by_layer else kinds["sliding_attention"]


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
    """Parameters that descent changes: all in the top blocks and the final norm, gains and learned
    scales only with norm_update `all`.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    (path, blocks) = next(
        item for item in lists if item[0].split(".")[-1] in ("layers", "h", "blocks")
    )
    first = len(blocks) - (config.layers or len(blocks))
    owners = [f"{path}.{i}." for i in range(first, len(blocks))]
    stack = path.rpartition(".")[0]
    owners += [f"{stack}.{last}.".lstrip(".") for last in FINAL_NORMS]
    modules = dict(model.named_modules())
    names = [
        name
        for name, _ in model.named_parameters()
        if any(name.startswith(owner) for owner in owners)
    ]
    return [name for name in names if config.norm_update == "all" or not _multiplies(modules, name)]


FINAL_NORMS = ("final_layer_norm", "final_layernorm", "ln_f", "norm_f", "norm")


def _multiplies(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether a parameter is a norm's gain or a learned scale, and neither in a linear layer nor a
    shift.
    """
    path, _, own = name.rpartition(".")
    owner = modules[path]
    if isinstance(owner, DifferenceNorm) or is_norm(owner):
        return own == "weight"
    return not hasattr(owner, "weight")


ACTIVATIONS = ("activation_fn", "act", "act_fn", "gelu_impl")


def approximated(model: nn.Module, config: Any) -> nn.Module:
    """A copy of the model whose norms and activations have the backward that config asks for."""
    changed = copy.deepcopy(model).eval()
    scale = config.finite_difference_scale
    for parent in list(changed.modules()):
        for name, child in list(parent.named_children()):
            if config.norm_gradient == "first_order" and is_norm(child):
                setattr(parent, name, DifferenceNorm(child, scale))
            elif config.activation_gradient == "first_order" and name in ACTIVATIONS:
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
    """gain f(x) + shift; the gain and the shift are ordinary autograd, f has the difference as its
    backward.
    """

    def __init__(self, norm: nn.Module, scale: float) -> None:
        super().__init__()
        self.weight, self.bias = getattr(norm, "weight", None), shift(norm)
        self.added_to_one, self.scale = gain_is_added_to_one(norm), scale
        self.centre, self.eps = centred(norm), epsilon(norm)

    def _f(self, x: Tensor) -> Tensor:
        return normalized(x, self.centre, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        y = _Difference.apply(x, self._f, self.scale)
        if self.weight is not None:
            y = y * (1 + self.weight if self.added_to_one else self.weight)
        return y if self.bias is None else y + self.bias


class DifferenceActivation(nn.Module):
    """a(x), with the difference as its backward."""

    def __init__(self, activation: nn.Module, scale: float) -> None:
        super().__init__()
        self.kept, self.scale = [activation], scale  # in a list: no submodule of its own

    def forward(self, x: Tensor) -> Tensor:
        return _Difference.apply(x, self.kept[0], self.scale)


SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax)


class _Constant(TorchFunctionMode):
    """Every softmax is detached, and torch's attention is computed by one."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            return _constant_attention(*args, **(kwargs or {}))
        out = function(*args, **(kwargs or {}))
        return out.detach() if function in SOFTMAXES else out


def _constant_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Tensor:
    groups = q.shape[-3] // k.shape[-3]
    if groups > 1:
        assert options.get("enable_gqa") or k.shape[-3] == 1
        k, v = k.repeat_interleave(groups, -3), v.repeat_interleave(groups, -3)
    scale = options.get("scale")
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if options.get("is_causal"):
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is None:  # of one token
        assert scores.shape[-2:] == (1, 1)
        attn_mask = torch.ones(1, 1, dtype=torch.bool)
    scores = (
        scores.masked_fill(~attn_mask, float("-inf"))
        if attn_mask.dtype == torch.bool
        else scores + attn_mask
    )
    return scores.softmax(-1).detach() @ v


def constant_probabilities(on: bool) -> contextlib.AbstractContextManager[Any]:
    """In it, attention probabilities are constants: in torch's attention and in any that is written
    out.
    """
    return _Constant() if on else contextlib.nullcontext()
