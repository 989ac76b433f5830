"""Inner rules on the transformer back end: whole simulators against the fused back end (which
tests/compiler/test_rules.py compares with torch.optim), modules against operators, and pages.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.compiler.test_rules import LENGTH, inputs_of, without_key_bias
from tests.support.around import F64, Around, Held, apply, arounds, assert_same, cells, tiles
from tests.support.every import captured
from tests.support.grid import grid
from tests.support.rules import ALONE, RATE
from tests.support.tolerances import BACKENDS, error, measured
from tintc.compiler.driver import lower
from tintc.compiler.reports.parameters import parameter_report
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import UnsupportedModelError
from tintc.ir.node_meta import info
from tintc.ir.ops import rates, states
from tintc.ir.program import Program
from tintc.runtime.backends.transformer.modules import inner_rule as modules
from tintc.runtime.backends.transformer.modules.parts import Counted, read
from tintc.runtime.backends.transformer.pages import PrefixPages, read_slot, read_tile, write_tile
from tintc.runtime.simulator import Simulator

LIMIT = BACKENDS[torch.float64]
RULES = {
    **{name: fields for name, fields in ALONE.items() if fields.get("optimizer") != "muon"},
    "rms": {"optimizer": "rms", "eps": 1e-3},
    "everything of adam": {
        "optimizer": "adam", "normalize": "weight", "decay": 0.1, "max_drift": 0.002,
        "schedule": "linear",
    },
    "everything of rms": {"optimizer": "rms", "eps": 1e-3, "clip_norm": 0.5, "decay": 0.1},
}  # fmt: skip
SMALL = {"prefix_tokens": 3, "sim_hidden": 24}  # several tiles a matrix
moderate = settings(max_examples=40)


def both_of(name: str, config: SimulatorConfig, share: str = "none") -> tuple[Simulator, Simulator]:
    """(fused, transformer), of which statistics are random."""
    graph = captured(name, True)
    program = lower(graph.copy(), config)
    tensors = {**graph.tensors, **statistics_of(program)}
    fused = Simulator(program, tensors)
    return fused, Simulator(program, tensors, backend="transformer", share=share)


def statistics_of(program: Program) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    placeholders = program.graph.find_nodes(op="placeholder")
    names = ((n, info(n).parameter or "") for n in placeholders)
    return {
        name: torch.rand(*info(node).shape, generator=generator, dtype=F64)
        for node, name in names
        if name.startswith("tintc.rms.")
    }


def assert_agree(fused: Simulator, found: Simulator, **inputs: Tensor) -> None:
    """Logits before and after, every update, and what a state dict would hold."""
    inputs = inputs or inputs_of()
    with torch.inference_mode():
        wanted = fused(**inputs, return_initial=True)
        ours = found(**inputs, return_initial=True)
        alone, updates, theirs = found(**inputs), found.updates(**inputs), fused.updates(**inputs)
        state = found.updated_state_dict(**inputs)
        wanted_state = fused.updated_state_dict(**inputs)
    for logits in (ours.logits, alone.logits):
        off = measured("inner rules, transformer against fused", error(logits, wanted.logits))
        assert off < LIMIT
    assert error(ours.initial_logits, wanted.initial_logits) < LIMIT
    assert list(updates) == list(theirs)
    for slot, value in theirs.items():
        name = slot.partition("[")[0]
        if name.endswith(("k_proj.bias", "c_attn.bias")):  # 0 in theory: rules blow up rounding
            continue
        assert measured("inner rules, updates", error(updates[slot], value)) < LIMIT, slot
    assert list(state) == list(wanted_state)
    for name, value in wanted_state.items():
        assert error(*without_key_bias(name, state[name], value)) < LIMIT, name


@grid(
    together=1,
    rule=RULES,
    name=["opt", "gpt2", "llama"],
    preset=["paper", "exact"],
    steps=[1, 3, 6],
)
def test_as_the_fused_back_end(rule: str, name: str, preset: str, steps: int) -> None:
    """Six steps run in a loop, so states are given to a program too."""
    config = SimulatorConfig.preset(preset, inner_lr=RATE, steps=steps, **RULES[rule])
    assert_agree(*both_of(name, config))


@grid(together=1, rule=["clipped momentum", "scaled adam", "rms"], name=["gpt2", "llama"])
@pytest.mark.slow
def test_on_small_pages(rule: str, name: str) -> None:
    config = SimulatorConfig.exact(inner_lr=RATE, steps=2, **SMALL, **RULES[rule])
    fused, found = both_of(name, config, "all")
    slots = found.program.layout.prefix.values()
    assert any(len(slot.tiles) > 1 and slot.beside for slot in slots)
    assert_agree(fused, found)


@pytest.mark.slow
def test_a_sequence_without_targets_keeps_its_weights() -> None:
    config = SimulatorConfig.exact(inner_lr=RATE, steps=2, **ALONE["scaled adam"])
    fused, found = both_of("gpt2", config)
    inputs = inputs_of((LENGTH, 1))
    assert_agree(fused, found, **inputs)
    state, before = found.updated_state_dict(**inputs, index=1), found.prefix.tensors()
    assert all(torch.equal(state[name], before[name]) for name in before if name in state)


def test_muon_is_refused_by_name() -> None:
    for fields in ({}, {"momentum": 0.9, "nesterov": True}):
        config = SimulatorConfig.exact(optimizer="muon", **fields)  # type: ignore[arg-type]
        with pytest.raises(UnsupportedModelError, match="optimizer muon needs linear attention"):
            both_of("opt", config)


def test_gradients_from_outside() -> None:
    """Of the weights, once as what is descended and once as what decay leads back to, and of the
    rate; pages of states learn nothing.
    """
    config = SimulatorConfig.exact(inner_lr=RATE, steps=2, **ALONE["clipped momentum"])
    fused, found = both_of("opt", config)
    slots, pages = found.program.layout.prefix, found.prefix
    assert isinstance(pages, PrefixPages)
    for simulator in (fused, found):
        simulator(**inputs_of()).logits.square().sum().backward()
    rate = fused.inner_lr.grad, found.inner_lr.grad
    assert rate[0] is not None and rate[1] is not None and error(rate[1], rate[0]) < LIMIT
    gradients = {i: page.grad for i, page in enumerate(pages.pages) if page.grad is not None}
    zero = {tile.page for slot in slots.values() if slot.zero for tile in slot.tiles}
    assert zero and not zero & set(gradients)
    name = "model.decoder.layers.1.fc1.weight"
    wanted = dict(fused.prefix.named_parameters())[name].grad
    assert wanted is not None
    assert error(read_slot(gradients, slots[name]), wanted) < LIMIT


def test_what_a_rule_keeps_is_placed_and_counted() -> None:
    """Beside its weight, on pages of its own that hold zeros; formulas give the numbers."""
    fields = {**ALONE["scaled adam"], "normalize": "weight"}
    _, found = both_of("gpt2", SimulatorConfig.exact(inner_lr=RATE, steps=1, **fields))
    layout, structure, prefix = found.program.layout, found.structure, found.prefix
    assert structure is not None and isinstance(prefix, PrefixPages)
    updated = [name for name, slot in layout.prefix.items() if slot.updated]
    kinds = ("first", "second", "gradient", "original")
    kept = {f"{name}/{kind}" for name in updated for kind in kinds}
    assert kept == {name for name, slot in layout.prefix.items() if slot.beside}
    assert all(not prefix.pages[t.page].any() for n in kept for t in layout.prefix[n].tiles)
    for use in structure.uses:
        assert eval(use.formula, {"ceil": math.ceil}, dict(use.sizes)) == use.numbers, use
    report = parameter_report(found)
    assert report["total"] == sum(p.numel() for p in found.parameters())
    counted = {row["operator"]: row["module"] for row in report["structure"]}
    assert counted["adam_descent"] == "AdamDescent"
    assert counted["normal_factor"] == counted["drift_share"] == "OfNumbers"
    assert counted["linear_square"] == "TokenSquare"


# Modules


owned = st.booleans()


def rate_of(at: Around, is_own: bool) -> Tensor:
    return (at.draw(at.batch) if is_own else at.draw()).detach().requires_grad_()


def pages_of(at: Around, held: Held, count: int, is_shared: bool = False) -> list[Tensor]:
    return [at.page(is_shared, held.tokens, held.hidden) for _ in range(count)]


def size_of(held: Held) -> dict[str, int]:
    return {"size": held.tile.coordinates.size, "width": held.width}


def check(
    at: Around,
    held: Held,
    layer: modules.PageLayer,
    operator: Any,
    pages: list[Tensor],
    *more: Any,
    operands: tuple[Any, ...],
) -> None:
    """A module that rewrites the first page, against the operator on what the tiles hold."""
    stream = at.stream()
    found = apply(
        layer, pages[0], held.code, stream, held.place, *more, writes=cells(pages[0], held.place)
    )
    values = [read_tile(x, held.tile) if any(x is p for p in pages) else x for x in operands]
    leaves = [x for x in (*pages, *more) if isinstance(x, Tensor) and x.requires_grad]
    expected = operator.implementation(*values)
    assert_same(read_tile(found, held.tile), expected, list({id(x): x for x in leaves}.values()))


@given(arounds(), tiles(), owned, st.sampled_from((0.0, 0.9, 1.0)))
@moderate
def test_fade_and_descend(at: Around, held: Held, is_own: bool, factor: float) -> None:
    pages, width = pages_of(at, held, 2), held.width
    faded = modules.Faded(width=width, factor=factor)
    check(at, held, faded, states.fade, pages, pages[1], operands=(pages[1], factor))
    rate, layer = rate_of(at, is_own), modules.Descended(width=width)
    check(at, held, layer, states.descend, pages, pages[1], rate, operands=(*pages, rate))


@given(arounds(), tiles(), owned, st.booleans())
@moderate
def test_toward(at: Around, held: Held, is_own: bool, is_limited: bool) -> None:
    pages = [*pages_of(at, held, 1), *pages_of(at, held, 1, is_shared=True)]
    each = rate_of(at, is_own) if is_limited else None
    layer = modules.Toward(**size_of(held), share=0.3)
    check(at, held, layer, states.toward, pages, pages[1], each, operands=(*pages, 0.3, each))


@given(arounds(), tiles(), st.booleans())
@moderate
def test_moment(at: Around, held: Held, squared: bool) -> None:
    pages = pages_of(at, held, 2)
    layer = modules.Moment(**size_of(held), beta=0.9, squared=squared)
    check(at, held, layer, states.moment, pages, *pages, operands=(*pages, 0.9, squared))


@given(arounds(), tiles(), owned)
@moderate
def test_quotients(at: Around, held: Held, is_own: bool) -> None:
    """Where the second moment is 0 as well."""
    pages = pages_of(at, held, 3)
    pages[2] = pages[2].detach().abs().requires_grad_()
    divide = modules.Quotient(**size_of(held), eps=1e-3)
    check(at, held, divide, states.divide, pages, *pages[::2], operands=(*pages[::2], 1e-3))
    count, rate = at.draw(at.batch).detach().abs().round(), rate_of(at, is_own)
    second = pages[2].detach().clone()
    second[..., 0] = 0
    pages[2] = second.requires_grad_()
    layer = modules.AdamDescent(**size_of(held), beta1=0.9, beta2=0.99, eps=1e-3)
    operands = (*pages, count, rate, 0.9, 0.99, 1e-3)
    check(at, held, layer, states.adam_descent, pages, *pages[1:], count, rate, operands=operands)


def check_number(layer: Counted, expected: Tensor, leaves: list[Tensor], *args: Any) -> None:
    numbers = sum(p.numel() for p in layer.parameters())
    assert eval(layer.formula, {"ceil": math.ceil}, dict(layer.sizes)) == numbers
    assert_same(layer(*args), expected, leaves)


def padded(page: Tensor, held: Held) -> Tensor:
    """The page with zeros where the tile has padding, as all pages have."""
    return write_tile(page.detach(), read_tile(page.detach(), held.tile), held.tile)


@given(arounds(), tiles())
@moderate
def test_squares_of_pages(at: Around, held: Held) -> None:
    page, other = (padded(each, held).requires_grad_() for each in pages_of(at, held, 2))
    values = [read_tile(each, held.tile) for each in (page, other)]
    square = modules.PageSquare(**size_of(held))
    wanted = states.gradient_square.implementation(values[0])
    check_number(square, wanted, [page], held.code, held.place, page)
    change = modules.PageSquare(**size_of(held), of_change=True)
    wanted = states.change_square.implementation(*values)
    check_number(change, wanted, [page, other], held.code, held.place, page, other)


@given(arounds(), st.integers(1, 9), st.integers(1, 9))
@moderate
def test_square_of_tokens(at: Around, outputs: int, inputs: int) -> None:
    """Against the gradient itself, written out."""
    dy, x = at.range(outputs), at.range(inputs)
    stream, code = at.stream(), torch.ones(4, 6, dtype=F64)
    layer = modules.TokenSquare(outputs=outputs, inputs=inputs, width=3)
    gradient = torch.einsum("bto,bti->boi", read(stream, dy), read(stream, x))
    check_number(layer, gradient.square().sum((1, 2)), [stream], stream, code, dy, x)


@given(arounds(), st.integers(1, 4))
@moderate
def test_numbers(at: Around, parts: int) -> None:
    """A total of numbers of all and of each sequence; roots, quotients and limits, at 0 too."""
    numbers = [rate_of(at, index % 2 == 0) for index in range(parts)]
    total = torch.stack([number.expand(at.batch) for number in numbers]).sum(0)
    check_number(modules.Total(parts=parts, width=3), total, numbers, *numbers)
    squares = [at.draw(at.batch).detach().square() for _ in range(2)]
    squares[0][0] = 0
    for operator, constants, count in (
        (rates.clip_factor, (0.5,), 1),
        (rates.normal_factor, (7.0,), 1),
        (rates.drift_share, (0.1,), 2),
    ):
        given = [square.clone().requires_grad_() for square in squares[:count]]
        function = operator.implementation
        layer = modules.OfNumbers(width=3, function=function, constants=constants)
        check_number(layer, function(*given, *constants), given, *given)
