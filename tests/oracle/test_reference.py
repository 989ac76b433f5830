"""The reference against code that knows less than it: the untouched model with autograd and SGD,
and limits of its approximations.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle.reference import DifferenceActivation, DifferenceNorm, approximated, reference
from tests.support.every import BUILDERS
from tests.support.families import FAMILIES, VOCAB
from tests.support.grid import some
from tests.support.norms import is_norm
from tests.support.scenarios import SCENARIOS
from tests.support.tolerances import error
from tests.support.variants import VARIANTS
from tintc.compiler.casts import no_casts

# What the variants change is in the reference's way rarely: theirs run in `slow`, but for plain
# fine-tuning, on which all else rests.
every_model = some("name", BUILDERS, default=[name for name in BUILDERS if name not in VARIANTS])
OUTSIDE = ("embed", "wte", "wpe", "lm_head", "head.", "tok.", "pos.", "table", "word_embeddings")
INPUTS = SCENARIOS["ragged"](2, 9, VOCAB)


@dataclass(frozen=True)
class Config:
    """The fields that the reference reads; exact unless told otherwise."""

    steps: int = 2
    layers: int | None = None
    inner_lr: float = 0.01
    loss_gradient: str = "softmax"
    norm_gradient: str = "exact"
    norm_update: str = "all"
    activation_gradient: str = "exact"
    attention_gradient: str = "full"
    finite_difference_scale: float = 1000.0
    lr_scale: tuple[tuple[str, float], ...] = ()
    schedule: str = "constant"
    momentum: float = 0.0
    nesterov: bool = False
    clip_norm: float | None = None
    normalize: str = "none"
    decay: float = 0.0
    max_drift: float | None = None
    optimizer: str = "sgd"


DIFFERENCES = Config(norm_gradient="first_order", activation_gradient="first_order")
PAPER = replace(DIFFERENCES, attention_gradient="value", norm_update="bias")


def logits_of(model: Any, ids: Tensor) -> Tensor:
    out = model(ids)
    return getattr(out, "logits", out)


def fine_tuned(
    model: nn.Module, ids: Tensor, train_mask: Tensor, steps: int, inner_lr: float
) -> nn.Module:
    """A copy of the model after SGD on everything but embeddings and head."""
    model = copy.deepcopy(model)
    inside = [
        parameter
        for name, parameter in model.named_parameters()
        if not any(f".{part}" in f".{name}" for part in OUTSIDE)
    ]
    optimizer = torch.optim.SGD(inside, lr=inner_lr)
    for _ in range(steps):
        optimizer.zero_grad()
        targets = torch.where(train_mask[1:].bool(), ids[1:], -100)
        F.cross_entropy(logits_of(model, ids[None])[0, :-1], targets, reduction="sum").backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("name", BUILDERS)
def test_exact_is_plain_fine_tuning(name: str) -> None:
    model, ids, train_mask = BUILDERS[name](), INPUTS["input_ids"], INPUTS["train_mask"]
    with no_casts():
        found = reference(model, Config(), **INPUTS)
        for b in range(2):
            tuned = fine_tuned(model, ids[b], train_mask[b], 2, 0.01)
            assert error(found.initial_logits[b], logits_of(model, ids[b : b + 1])[0]) < 1e-12
            assert error(found.logits[b], logits_of(tuned, ids[b : b + 1])[0]) < 1e-12
            assert all(
                error(found.states[b][key], value) < 1e-12
                for key, value in tuned.state_dict().items()
            )
    assert error(found.logits, found.initial_logits) > 1e-3


@every_model
def test_every_norm_and_activation_is_replaced(name: str) -> None:
    model = BUILDERS[name]()
    changed = approximated(model, PAPER)
    (blocks,) = (
        len(module)
        for path, module in model.named_modules()
        if path.split(".")[-1] in ("layers", "h", "blocks")
    )
    assert sum(isinstance(module, DifferenceActivation) for module in changed.modules()) == blocks
    old, new = dict(model.named_modules()), dict(changed.named_modules())
    replaced = [path for path, module in new.items() if isinstance(module, DifferenceNorm)]
    assert replaced == [path for path, module in old.items() if is_norm(module)]
    outside = {
        path
        for path, module in old.items()
        if list(module.parameters(recurse=False)) and path not in replaced
    }
    assert {type(old[path]).__name__ for path in outside if "norm" in path or "ln" in path} == set()
    with no_casts():
        for path in replaced:
            weight = new[path].weight
            x = torch.randn(2, 5, *weight.shape, dtype=torch.float64)
            assert error(new[path](x), old[path](x)) < 1e-12
    assert dict(changed.named_parameters()).keys() == dict(model.named_parameters()).keys()


@every_model
def test_differences_tend_to_derivatives(name: str) -> None:
    model = BUILDERS[name]()
    with no_casts():
        exact, near, far = (
            reference(model, config, **INPUTS).logits
            for config in (
                Config(),
                replace(DIFFERENCES, finite_difference_scale=1e6),
                replace(DIFFERENCES, finite_difference_scale=5.0),
            )
        )
    assert error(near, exact) < 1e-5
    assert error(far, exact) > 1e-5


@pytest.mark.parametrize(
    ("written_out", "fused"),
    [
        ("llama-eager", "llama"),
        ("opt-eager", "opt"),
        ("gpt2-eager", "gpt2"),
        ("mistral-eager", "mistral-sdpa"),
    ],
)
def test_probabilities_are_constant_however_they_are_computed(written_out: str, fused: str) -> None:
    config = Config(attention_gradient="value")
    with no_casts():
        found, expected = (
            reference(BUILDERS[name](), config, **INPUTS).logits for name in (written_out, fused)
        )
        exact = reference(BUILDERS[fused](), Config(), **INPUTS).logits
    assert error(found, expected) < 1e-12
    assert error(exact, expected) > 1e-4


@every_model
def test_value_attention_leaves_queries_and_keys_alone(name: str) -> None:
    model = BUILDERS[name]()
    with no_casts():
        state = reference(model, PAPER, **INPUTS).states[0]
    changed = {
        key for key, value in state.items() if not torch.equal(value, model.state_dict()[key])
    }
    assert changed
    scores = (
        "q_proj",
        "k_proj",
        "wq.",
        "wk.",
        "q_norm",
        "k_norm",
        "q_layernorm",
        "k_layernorm",
        "gamma",
    )
    assert not [key for key in changed if any(part in key for part in scores)]


@pytest.mark.parametrize(
    "name",
    [name for name, family in FAMILIES.items() if family.masks]
    + ["mistral-eager", "qwen2-windows"],
)
def test_demonstrations_equal_each_alone(name: str) -> None:
    """Block-diagonal masks, sliding windows and positions that restart, against the plain model on
    each demonstration.
    """
    model, family = BUILDERS[name](), FAMILIES[name.split("-")[0]]
    inputs = SCENARIOS["demonstrations" if family.position_ids else "blocks"](1, 20, VOCAB, seed=1)
    block = inputs["attention_mask"][0].long().argmax(-1)
    starts = sorted(set(block.tolist()))
    assert max(b - a for a, b in zip(starts, [*starts[1:], 20], strict=True)) > 5
    with no_casts():
        found = reference(model, Config(steps=1), **inputs).initial_logits[0]
        for start in starts:
            inside = (block == start).nonzero()[:, 0]
            alone = logits_of(model, inputs["input_ids"][:, inside])[0]
            assert error(found[inside], alone) < 1e-10
