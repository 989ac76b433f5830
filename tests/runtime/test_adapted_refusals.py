"""What an adapted simulator cannot do is refused in one line that says what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.support.adapted import (
    EXACT,
    adapted_of,
    context,
    own_simulator,
    prompts,
    with_config,
)
from tests.support.every import simulator_of
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import InputError, TintcError, UsageError
from tintc.runtime.adapted import Adapted, stack
from tintc.runtime.decoding.generation import _CACHE as CACHE

IDS, MASK = prompts()
ADAM = SimulatorConfig.exact(inner_lr=0.002, optimizer="adam")
LOOP = SimulatorConfig.exact(inner_lr=0.002, steps=5)


def refused(kind: type[TintcError], message: str, use: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message) as caught:
        use()
    assert "\n" not in str(caught.value)


def opt(**options: Any) -> Adapted:
    return adapted_of("opt", **options)


def cached(adapted: Adapted, tokens: int = 12) -> Any:
    return adapted(IDS[:, :tokens].clamp(min=1), use_cache=True).cache


CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "longer than the model": (
        lambda: opt()(torch.ones(3, 33, dtype=torch.int64)),
        r"33 tokens, 0 of them in the cache; this model has 32 positions",
    ),
    "more tokens than the cache leaves room for": (
        lambda: opt()(torch.ones(3, 21, dtype=torch.int64), cache=cached(opt())),
        r"33 tokens, 12 of them in the cache; this model has 32 positions: begin anew",
    ),
    "a cache of another batch": (
        lambda: opt()(IDS.repeat(2, 1), cache=cached(opt())),
        "the cache holds 3 rows; input_ids have 6",
    ),
    "a cache of another adapted simulator": (
        lambda: opt(form="weights")(IDS, cache=cached(opt(form="factors"))),
        "the cache holds keys and values of other weights; expected one that",
    ),
    "a cache of other sequences": (
        lambda: opt().select([2, 1, 0])(IDS, cache=cached(opt())),
        "the cache holds keys and values of other weights",
    ),
    "a cache of transformers": (
        lambda: opt()(IDS, cache=DynamicCache()),  # type: ignore[arg-type]
        "the cache is a DynamicCache; expected one that this adapted simulator made",
    ),
    "no tensor": (lambda: opt()(IDS.tolist()), "input_ids is a list; expected a torch.Tensor"),  # type: ignore[arg-type]
    "ids out of range": (lambda: opt()(IDS + 29), "input_ids hold 57; this model's tokens are 0"),
    "negative ids": (lambda: opt()(IDS - 30), "input_ids hold -30; this model's tokens are 0"),
    "no batch": (lambda: opt()(IDS[0]), r"input_ids has shape \(12,\); expected \(batch, tokens\)"),
    "too few prompts": (
        lambda: opt()(IDS[:2]),
        "there are 2 prompts for 3 adapted sequences; expected one for each",
    ),
    "no whole number of prompts for each": (
        lambda: opt()(IDS.repeat(2, 1)[:4]),
        r"there are 4 prompts for 3 adapted sequences.*select\(rows\) says which reads which",
    ),
    "a mask of the new tokens alone": (
        lambda: opt()(IDS[:, :3], MASK[:, :3], cache=cached(opt())),
        r"attention_mask has shape \(3, 3\); expected \(3, 15\): the 12 tokens in the cache",
    ),
    "positions of another shape": (
        lambda: opt()(IDS, position_ids=torch.arange(12)),
        r"position_ids has shape \(12,\); expected \(3, 12\)",
    ),
    "labels of kept logits": (
        lambda: opt()(IDS, labels=IDS, logits_to_keep=2),
        "labels need the logits of all tokens; leave logits_to_keep out",
    ),
    "labels out of range": (lambda: opt()(IDS, labels=IDS + 29), "labels hold 49; expected -100"),
    "a row that is not there": (lambda: opt().select([0, 3]), "select asks for 3; there are 3"),
    "a row in front of the first": (lambda: opt().select(-4), "select asks for -4; there are 3"),
    "no rows": (lambda: opt().select([]), "select asks for nothing; there are 3"),
    "rows by name": (
        lambda: opt().select("first"),  # type: ignore[arg-type]
        r"select got 'first'; expected numbers of rows, as in \[2, 0, 0\]",
    ),
    "a mask of rows": (
        lambda: opt().select([True, False, True]),
        "select got .True, False, True.; expected numbers of rows",
    ),
    "a table of rows": (
        lambda: opt().select(torch.zeros(2, 2, dtype=torch.int64)),
        r"select got a tensor of shape \(2, 2\), torch.int64; expected numbers of rows",
    ),
    "no such sequence's state": (lambda: opt().state_dict(3), "select asks for 3; there are 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_inputs(name: str) -> None:
    use, message = CALLS[name]
    refused(InputError, message, use)


def stale() -> Adapted:
    simulator = own_simulator("opt")
    adapted = simulator.adapt(**context())
    with torch.no_grad():
        next(simulator.prefix.parameters()).mul_(1.5)
    return adapted


def adapt(name: str, config: SimulatorConfig, form: Any, backend: str = "fused") -> Adapted:
    return simulator_of(name, True, config, backend).adapt(**context(), form=form)


USES: dict[str, tuple[Callable[[], Any], str]] = {
    "an unknown form": (
        lambda: adapt("opt", EXACT, "sparse"),
        "form is 'sparse'; expected auto, factors, weights",
    ),
    "another unknown form": (
        lambda: opt().with_form("dense"),  # type: ignore[arg-type]
        "form is 'dense'; expected auto, factors, weights",
    ),
    "factors of Adam": (
        lambda: adapt("opt", ADAM, "factors"),
        "form is 'factors', but no update of this rule stays one.*expected auto or weights",
    ),
    "factors of a loop": (
        lambda: adapt("opt", LOOP, "factors"),
        "form is 'factors', but 5 steps are a loop, which keeps own weights; expected auto",
    ),
    "factors of the transformer": (
        lambda: adapt("gpt2", EXACT, "factors", "transformer"),
        "form is 'factors', but the transformer back end has none; expected auto or weights",
    ),
    "factors of weights": (
        lambda: opt(form="weights").with_form("factors"),
        "own weights do not become factors again; adapt with form='factors'",
    ),
    "a stack of nothing": (lambda: stack([]), "stack got nothing; expected adapted simulators"),
    "a stack of two simulators": (
        lambda: stack([opt(), adapted_of("gpt2")]),
        "stack takes what one simulator has learned; these are of several",
    ),
    "a cache of the transformer": (
        lambda: adapted_of("gpt2", backend="transformer")(IDS, use_cache=True),
        "the transformer back end has no cache; compile with backend='fused'",
    ),
    "a new cache of the transformer": (
        lambda: adapted_of("gpt2", backend="transformer").new_cache(3),
        "the transformer back end has no cache",
    ),
    "generation of the transformer from a cache": (
        lambda: adapted_of("gpt2", backend="transformer").generate(
            IDS, max_new_tokens=2, **{CACHE: DynamicCache()}
        ),
        "the transformer back end has no cache",
    ),
    "changed weights": (
        lambda: stale()(IDS),
        "the simulator's weights have changed, or moved, since it was adapted.*adapt again",
    ),
    "generation under changed weights": (
        lambda: stale().generate(IDS, max_new_tokens=2),
        "the simulator's weights have changed",
    ),
    "a choice under changed weights": (lambda: stale().select(0), "weights have changed"),
    "the state under changed weights": (lambda: stale().state_dict(), "weights have changed"),
    "a stack under changed weights": (lambda: stack([stale()]), "weights have changed"),
}  # fmt: skip


@pytest.mark.parametrize("name", USES)
def test_uses(name: str) -> None:
    use, message = USES[name]
    refused(UsageError, message, use)


GENERATIONS: dict[str, tuple[Callable[[], Any], str]] = {
    "past the last position": (
        lambda: with_config("opt").generate(IDS, max_new_tokens=22),
        "12 tokens, and up to 22 more are asked for; this model has 32 positions: expected "
        "max_new_tokens of at most 21",
    ),
    "a prompt that is too long": (
        lambda: with_config("opt").generate(
            torch.ones(3, 33, dtype=torch.int64), max_new_tokens=1
        ),
        "the prompt has 33 tokens; this model has 32 positions: cut the prompt",
    ),
    "a prompt that is too long, of no stated length": (
        lambda: with_config("opt").generate(torch.ones(3, 40, dtype=torch.int64)),
        "the prompt has 40 tokens; this model has 32 positions: cut the prompt",
    ),
    "too few prompts": (
        lambda: with_config("opt").generate(IDS[:2], max_new_tokens=2),
        "there are 2 prompts for 3 adapted sequences",
    ),
    "a cache of transformers": (
        lambda: with_config("opt").generate(IDS, max_new_tokens=2, **{CACHE: DynamicCache()}),
        "the cache is a DynamicCache; expected one that this adapted simulator made",
    ),
    "a cache of others": (
        lambda: with_config("opt").generate(
            torch.cat([IDS, IDS], 1), max_new_tokens=2, **{CACHE: cached(opt())}
        ),
        "the cache holds keys and values of other weights",
    ),
    "a cache for beams of one row": (
        lambda: with_config("opt").generate(
            torch.cat([IDS, IDS[:, :4]], 1), max_new_tokens=2, num_beams=2,
            **{CACHE: cached(with_config("opt"))},
        ),
        "the cache holds 3 rows; input_ids have 6",
    ),
    "nothing behind the cache": (
        lambda: with_config("opt").generate(
            IDS, max_new_tokens=2, **{CACHE: cached(with_config("opt"))}
        ),
        "the cache holds 12 tokens and the text has 12; expected a text that goes on behind",
    ),
    "ids out of range": (
        lambda: with_config("opt").generate(IDS + 29, max_new_tokens=2),
        "input_ids hold 57; this model's tokens are 0 to 28",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GENERATIONS)
def test_generation(name: str) -> None:
    use, message = GENERATIONS[name]
    refused(InputError, message, use)


def test_as_many_tokens_as_there_are_positions() -> None:
    """The last token needs none: no token looks at it."""
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    found = with_config("opt").generate(IDS.clamp(min=1), max_new_tokens=21, **options)
    assert found.shape == (3, 33)
    by_default = with_config("opt").generate(IDS.clamp(min=1), **options)
    assert by_default.shape == (3, 32), "as Hugging Face has it: 20 more, to the last position"


def test_crop_of_what_a_window_forgot() -> None:
    adapted = adapted_of("mistral")
    cache = cached(adapted)
    refused(UsageError, "a window of 5 tokens has forgotten.*activate_past", lambda: cache.crop(-2))
    assert cache.get_seq_length() == 12
    mixed = cached(adapted_of("gemma2"))  # the first layer has a window, the second has none
    refused(UsageError, "has forgotten", lambda: mixed.crop(-2))
    assert {layer.tokens for layer in mixed.layers} == {12}
    again = cached(adapted, 8)
    again.activate_past_recording()
    adapted(IDS[:, 8:].clamp(min=1), cache=again)
    again.crop(-4)
    assert again.get_seq_length() == 8 and again.layers[0].keys.shape[2] == 4
    refused(UsageError, "takes no single layers", lambda: cache.update(IDS, IDS, 0))


def test_updates_of_another_simulator_or_batch() -> None:
    """`predict` takes them from a caller."""
    simulator = simulator_of("opt", True, EXACT)
    updates = simulator.updates(**context())
    refused(InputError, "expected .2, 12", lambda: simulator.predict(updates, IDS[:2]))
    others = simulator_of("gpt2", True, EXACT).updates(**context())
    refused(
        InputError, "do not hold this simulator's slots", lambda: simulator.predict(others, IDS)
    )
