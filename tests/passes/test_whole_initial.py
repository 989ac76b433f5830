"""Initial logits of all tokens, and training that goes back from the segment alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.families import FAMILIES
from tests.support.models import opt
from tests.support.optimized import (
    LIMIT,
    assert_left_alone,
    calls,
    exact,
    optimized,
    paper,
    pruned,
)
from tests.support.stages import Stage, assert_golden, inputs, printed
from tests.support.tolerances import error
from tintc.ir.node_meta import info
from tintc.passes.optimize.kept_first import kept_first
from tintc.passes.optimize.scored_loss import scored_loss
from tintc.passes.optimize.whole_initial import whole_initial
from tintc.runtime.backends import fused

BOTH = ("logits", "initial_logits")
SEGMENT = 4


def run(at: Stage, segment: int, **more: Any) -> dict[str, Any]:
    known: dict[str, Any] = dict(inputs(batch=3, vocab=at.context.facts.vocab_size))
    known["loss_mask"][:, SEGMENT:] = 0
    known |= {"segment": segment, "labels": known["targets"], **more}
    owned = {**at.context.tensors, **at.context.tables}
    module, values = fused.emit(at.graph, torch.float64), []
    names = {node.name: info(node).parameter for node in at.graph.find_nodes(op="placeholder")}
    for node in module.graph.find_nodes(op="placeholder"):
        name = names[node.name]
        value = known[node.name] if name is None else owned[name]
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        values.append(value.double() if is_float else value)
    with torch.no_grad():
        found: dict[str, Any] = module(*values)
    return found


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (exact(steps=2), None),
        (paper(layers=1), None),
        (exact(loss_gradient="quadratic"), None),
        (exact(train="*"), opt),  # a tied head learns too
        (paper(loss_gradient="mean_embedding"), None),
        (exact(), FAMILIES["gemma2"].build),  # a soft-cap behind the head; windows
        (paper(), FAMILIES["bloom"].build),  # biases of scores
        (exact(train="lm_head.*"), FAMILIES["cohere"].build),  # the head alone learns, scaled
    ],
)
@pytest.mark.parametrize("outputs", [BOTH, ("losses", "initial_losses")])
def test_same_numbers(config: Any, model: Any, outputs: tuple[str, ...]) -> None:
    at = pruned(config, model=None if model is None else model(), outputs=outputs)
    after = optimized(whole_initial, at)
    tokens = inputs()["input_ids"].shape[1]
    expected, found = run(at, tokens), run(after, SEGMENT)
    assert {k: e for k in outputs if not (e := error(found[k], expected[k])) < LIMIT} == {}
    back = [n for n in after.graph.nodes if info(n).phase in ("backward", "descent")]
    assert back and not [n for n in back if "T" in info(n).shape]
    initial = after.graph.output_node().args[0][outputs[1]]  # type: ignore[index, call-overload]
    assert info(initial).shape[1] == "T"


def test_what_it_leaves_to_others() -> None:
    """Positions that carry loss, and positions whose logits are wanted."""
    enabled = frozenset({"whole_initial"})
    at = pruned(exact(), outputs=BOTH, scored=True, some_tokens=True, enabled=enabled)
    narrow = optimized(kept_first, optimized(scored_loss, at))
    assert {info(n).shape[1] for n in calls(narrow, "loss_gradient")} == {"L"}
    returned = narrow.graph.output_node().args[0]
    assert {info(n).shape[1] for n in returned.values()} == {"K"}  # type: ignore[union-attr]
    more = {"scored": torch.arange(SEGMENT), "kept": torch.arange(2, 7)}
    expected = run(at, SEGMENT, **more)
    found = run(narrow, SEGMENT, **more)
    assert {k: e for k in BOTH if not (e := error(found[k], expected[k])) < LIMIT} == {}


def test_leaves() -> None:
    """Calls without initial logits; those alone need no segment."""
    assert_left_alone(whole_initial, pruned(exact()))
    alone = optimized(whole_initial, pruned(exact(), outputs=("initial_logits",)))
    assert not calls(alone, "segment")


def test_golden(update_golden: bool) -> None:
    at = pruned(paper(), outputs=BOTH)
    assert_golden("whole_initial", printed(optimized(whole_initial, at).graph), update_golden)
