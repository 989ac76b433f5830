"""What an adapted simulator computes is what the Hugging Face model computes with its state dict
loaded: with a cache and without, both forms, in float64.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle.compare import assert_same_state
from tests.oracle.reference import reference
from tests.support.adapted import (
    EXACT,
    RATE,
    Loaded,
    adapted_of,
    by_chunks,
    context,
    own_simulator,
    prompts,
    rows_apart,
)
from tests.support.decoders import DECODERS
from tests.support.every import model_of, simulator_of
from tests.support.families import FAMILIES, VOCAB
from tests.support.grid import some
from tests.support.models import opt, simulate, tokens
from tests.support.tolerances import HALF_LOGITS, SIMULATOR, error, measured
from tests.support.variants import VARIANTS
from tintc.compiler.casts import no_casts
from tintc.evaluate.speed.benchmark import updated_parameters
from tintc.ir.config import SimulatorConfig
from tintc.runtime.decoding.form import Form

LIMIT = SIMULATOR[torch.float64]
FORMS: tuple[Form, ...] = ("weights", "factors")
# Learned positions and a tied head; windows, soft-caps and grouped keys; ALiBi; part of a head
# turned; local attention that is written out.
DEFAULT = ("opt", "gemma2", "bloom", "gptj", "gpt_neo")
# Other spellings, windows in some layers alone, one key/value head, plain PyTorch.
OTHERS = (
    *("mistral-eager", "qwen2-windows", "gpt_neo-local", "gemma2-no-caps", "llama-one-kv-head"),
    *("mpt-4-heads", "hand-complex-rotary", "hand-alibi"),
)


def assert_is_the_loaded_model(name: str, form: Form, config: SimulatorConfig = EXACT) -> None:
    adapted = adapted_of(name, form, config)
    assert adapted.form == form
    loaded, (ids, mask) = Loaded(name, adapted), prompts()
    found = {
        "uncached": adapted(ids, mask).logits,
        "cached, a token at a time": by_chunks(adapted, ids, mask, [1]),
        "cached, in chunks": by_chunks(adapted, ids, mask, [7, 3, 1]),
    }
    for row in range(len(ids)):
        expected = loaded.logits(row, ids[row, mask[row].bool()])
        for way, logits in found.items():
            off = error(rows_apart(logits, mask)[row], expected)
            assert measured(f"adapted against Hugging Face: {way}", off) < LIMIT, (way, row)
    assert error(found["uncached"][0], simulator_of(name, True, config).predict_initial(ids)[0]) > (
        1e-3
    ), "the steps must count"


@pytest.mark.parametrize("form", FORMS)
@some("name", FAMILIES, default=DEFAULT)
def test_every_family(name: str, form: Form) -> None:
    assert_is_the_loaded_model(name, form)


@pytest.mark.parametrize("form", FORMS)
def test_losses_are_those_of_the_loaded_model(form: Form) -> None:
    adapted = adapted_of("opt", form, EXACT)
    loaded, (ids, mask) = Loaded("opt", adapted), prompts()
    follows = mask.bool() & F.pad(mask.bool()[:, :-1], (1, 0))  # nothing predicts a first token
    labels = torch.where(follows, ids, -100)
    out = adapted.losses(ids, labels, mask, return_initial=True)
    assert out.initial_losses is not None
    before = rows_apart(simulator_of("opt", True, EXACT).predict_initial(ids, mask), mask)
    each = []
    for row, real in enumerate(mask.bool()):
        own = ids[row, real]
        for found, logits in (
            (out.losses, loaded.logits(row, own)),
            (out.initial_losses, before[row]),
        ):
            expected = F.cross_entropy(logits[:-1], own[1:], reduction="none")
            assert error(found[row, real][:-1], expected) < LIMIT
            each.append(expected)
    assert error(out.loss, torch.cat(each[::2]).mean()) < LIMIT
    assert error(out.losses, out.initial_losses) > 1e-3, "the steps must count"
    told = out.show(SimpleNamespace(decode=lambda ids, **_: str(ids))).losses
    assert not any(token.trained for token in told.tokens)


@pytest.mark.parametrize("backend", ["fused", "transformer"])
def test_losses_before_are_of_all_tokens(backend: str) -> None:
    simulator = simulate(opt(positions=32), EXACT, backend=backend)
    if backend == "fused":
        simulator.optimizations = ()
    ids = tokens(2, 20, simulator.program.facts.vocab_size)
    adapted = simulator.adapt(ids, torch.ones_like(ids))
    found = adapted.losses(ids, ids, return_initial=True).initial_losses
    assert found is not None
    logits = simulator.predict_initial(ids)[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    assert error(found[:, :-1].flatten(), expected) < 1e-4  # float32


@pytest.mark.parametrize("form", FORMS)
@some("name", OTHERS, default=["mistral-eager"])
def test_variants(name: str, form: Form) -> None:
    assert name in {**VARIANTS, **DECODERS}
    if name in DECODERS:
        assert_is_the_plain_module(name, form)
    else:
        assert_is_the_loaded_model(name, form)


def assert_is_the_plain_module(name: str, form: Form) -> None:
    """A decoder written by hand takes ids alone."""
    adapted, (ids, mask) = adapted_of(name, form), prompts()
    loaded = Loaded(name, adapted)
    cached = rows_apart(by_chunks(adapted, ids, mask, [5, 1]), mask)
    for row, found in enumerate(cached):
        with torch.no_grad():
            expected = loaded.models[row](ids[row, mask[row].bool()][None])[0]
        assert error(found, expected) < LIMIT


@some(
    ("name", "fields"),
    [
        ("opt", {"train": "*"}),  # embeddings of tokens and positions, the tied head
        ("gpt2", {"train": "*"}),
        ("llama", {"train": ("*norm*",)}),
        ("bloom", {"train": ("*.bias",)}),
        ("llama", {"train": ("*mlp*", "*lm_head*")}),
    ],
    default=[("opt", {"train": "*"}), ("bloom", {"train": ("*.bias",)})],
)
def test_what_learns(name: str, fields: dict[str, object]) -> None:
    """Whatever learns, and where nothing is a factor."""
    config = SimulatorConfig.exact(inner_lr=0.002, **fields)  # type: ignore[arg-type]
    assert_is_the_loaded_model(name, "weights", config)
    inputs = context()
    with no_casts():
        expected = reference(
            model_of(name), config, **inputs,
            trained=updated_parameters(simulator_of(name, True, config)),
        )  # fmt: skip
    forms: tuple[Form, ...] = ("weights", "auto")
    if name != "bloom" and fields["train"] != ("*norm*",):
        forms = (*forms, "factors")
    for form in forms:
        adapted = adapted_of(name, form, config)
        for index in range(len(adapted)):
            assert_same_state(adapted.state_dict(index), expected, index, LIMIT)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@some("name", ["mistral", "gemma2", "qwen2-windows"], default=["mistral"])
def test_a_window_s_edge(name: str, form: Form) -> None:
    """65 tokens behind a prompt; the window of 5 tokens keeps 4 of them."""
    adapted = adapted_of(name, form)
    ids, mask = prompts(length=70)
    cached = None
    parts = []
    for part in ids.split([5] + [1] * 65, 1):
        stop = part.shape[1] + (0 if cached is None else cached.get_seq_length())
        out = adapted(part, mask[:, :stop], cache=cached, use_cache=True)
        cached = out.cache
        parts.append(out.logits)
    assert cached is not None and cached.get_seq_length() == 70
    bounded = [layer for layer in cached.layers if layer.is_sliding]
    assert bounded and all(layer.keys.shape[2] == 4 for layer in bounded)
    loaded, found = Loaded(name, adapted), rows_apart(torch.cat(parts, 1), mask)
    for row, logits in enumerate(found):
        assert error(logits, loaded.logits(row, ids[row, mask[row].bool()])) < LIMIT


@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    padding=st.integers(0, 5),
    name=st.sampled_from(("gemma2", "bloom", "opt")),
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 50),
)
def test_chunks_and_padding_change_nothing(
    sizes: list[int], padding: int, name: str, form: Form, seed: int
) -> None:
    one = adapted_of(name, form).select(1)
    ids = tokens(1, 11, VOCAB - 1, seed) + 1
    expected = one(ids).logits
    wide = torch.cat([torch.zeros(1, padding, dtype=torch.int64), ids], 1)
    mask = (wide != 0).long()
    assert error(by_chunks(one, wide, mask, sizes)[:, padding:], expected) < LIMIT
    assert error(by_chunks(one, ids, None, sizes), expected) < LIMIT


def test_some_logits_and_losses() -> None:
    adapted, (ids, mask) = adapted_of("llama"), prompts()
    whole = adapted(ids, mask).logits
    assert error(adapted(ids, mask, logits_to_keep=2).logits, whole[:, -2:]) < LIMIT
    kept = torch.tensor([3, 11])
    assert error(adapted(ids, mask, logits_to_keep=kept).logits, whole[:, kept]) < LIMIT
    labels = ids.masked_fill(mask == 0, -100)
    found = adapted(ids, mask, labels=labels).loss
    expected = torch.nn.functional.cross_entropy(
        whole[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    assert found is not None and error(found, expected) < LIMIT
    positions = torch.arange(12).expand(3, 12)
    moved = adapted(ids, position_ids=positions + 2).logits
    assert error(moved, adapted(ids).logits) < LIMIT, "rotary: only distances count"


@settings(max_examples=10)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    gaps=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    name=st.sampled_from(("bloom", "opt", "llama")),
    form=st.sampled_from(FORMS),
)
@pytest.mark.slow
def test_padding_may_stand_anywhere(
    sizes: list[int], gaps: list[int], name: str, form: Form
) -> None:
    """Behind a prompt that then goes on, too: no token looks at it, no position counts it."""
    one, ids = adapted_of(name, form).select(0), tokens(1, sum(sizes), VOCAB - 1, seed=3) + 1
    parts, seen = [], []
    for part, gap in zip(ids.split(sizes, 1), gaps, strict=False):
        parts += [part, torch.zeros(1, gap, dtype=torch.int64)]
        seen += [torch.ones_like(part), torch.zeros(1, gap, dtype=torch.int64)]
    wide, mask = torch.cat(parts, 1), torch.cat(seen, 1)
    expected = one(ids).logits[0]
    assert error(one(wide, mask).logits[mask.bool()], expected) < LIMIT
    assert error(by_chunks(one, wide, mask, [3, 1, 4])[mask.bool()], expected) < LIMIT


@pytest.mark.parametrize("form", FORMS)
@some("name", ["llama", "bloom", "gemma2"], default=["bloom"])
@pytest.mark.slow
def test_bfloat16(name: str, form: Form) -> None:
    """Cached is near uncached, and both are near float64."""
    model = FAMILIES[name].build(torch.bfloat16)
    adapted, (ids, mask) = simulate(model, EXACT).adapt(**context(), form=form), prompts()
    exact = simulate(model.double(), EXACT).adapt(**context(), form=form)(ids, mask).logits
    limit = HALF_LOGITS[torch.bfloat16]
    for found in (adapted(ids, mask).logits, by_chunks(adapted, ids, mask, [4, 1])):
        assert found.dtype == torch.bfloat16
        for got, expected in zip(rows_apart(found, mask), rows_apart(exact, mask), strict=True):
            assert measured("adapted in bfloat16 against float64", error(got, expected)) < limit


def test_autocast_changes_nothing_and_meta_gives_shapes() -> None:
    adapted, (ids, mask) = adapted_of("opt"), prompts()
    expected = adapted(ids, mask).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(adapted(ids, mask).logits, expected)
        assert torch.equal(
            simulator_of("opt", True, EXACT).adapt(**context())(ids, mask).logits, expected
        )
    on_meta = own_simulator("opt").to("meta").adapt(**context())
    out = on_meta(ids, mask, use_cache=True)
    assert out.logits.is_meta and out.logits.shape == expected.shape and out.cache is not None
    assert {n: v.shape for n, v in on_meta.state_dict(1).items()} == {
        n: v.shape for n, v in adapted.state_dict(1).items()
    }


def test_the_transformer_back_end() -> None:
    config = SimulatorConfig.exact(inner_lr=RATE)
    adapted, (ids, mask) = adapted_of("gpt2", "auto", config, "transformer"), prompts()
    assert adapted.form == "weights"
    loaded = Loaded("gpt2", adapted)
    for row, found in enumerate(rows_apart(adapted(ids, mask).logits, mask)):
        assert error(found, loaded.logits(row, ids[row, mask[row].bool()])) < LIMIT
    two = adapted(ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0), logits_to_keep=1)
    assert error(two.logits[::2], adapted(ids, mask).logits[:, -1:]) < LIMIT
