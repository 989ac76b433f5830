"""What the passes' tests share: the graph at any stage, its numbers by torch.fx.Interpreter, and
golden printed forms.

Golden graphs are of the hand-written decoder `tests.nano`, so they depend on torch, which is
pinned, but not on transformers. Rewrite them with `pytest --update-golden`, and read the
difference.
"""

from __future__ import annotations

import copy
import difflib
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from tests.support.nano import nano
from tests.support.once import capture_once
from tests.support.tolerances import error
from tintc.compiler.frontend.capture import Captured, capture
from tintc.ir.config import SimulatorConfig
from tintc.ir.context import Context
from tintc.ir.facts import least
from tintc.ir.node_meta import info
from tintc.ir.pass_manager import run_passes
from tintc.ir.records import to_records
from tintc.passes.lowering import DEFAULT_PIPELINE

NAMES = [step.name for step in DEFAULT_PIPELINE]
GOLDEN = Path(__file__).parents[1] / "golden" / "passes"


@dataclass
class Stage:
    graph: fx.Graph
    context: Context

    def named(self, name: str) -> fx.Node:
        return next(node for node in self.graph.nodes if node.name == name)

    def operators(self) -> Counter[str]:
        """How often each operator is called: `tint.linear_forward`, `aten.add.Tensor`,
        `getitem`.
        """
        return Counter(
            record.operator for record in to_records(self.graph) if record.kind == "call"
        )


@lru_cache(maxsize=8)
def _captured_nano(layers: int) -> Captured:
    return capture(nano(layers=layers))


def nano_captured(layers: int = 2) -> Captured:
    return _captured_nano(layers).copy()


def stage(
    last: str | None,
    config: SimulatorConfig | None = None,
    *,
    layers: int = 2,
    model: nn.Module | None = None,
    longest: int | None = None,
) -> Stage:
    """The graph after the pass `last` (None: as captured), of the hand-written decoder unless a
    model is given. longest: looked at.
    """
    captured = nano_captured(layers) if model is None else capture_once(model)
    context = Context(
        config or SimulatorConfig.exact(inner_lr=0.01),
        captured.tensors,
        captured.constants,
        aliases=captured.aliases,
    )
    context.learn(max_tokens=least(captured.max_tokens, longest))
    if last is None:
        return Stage(captured.graph, context)
    return Stage(run_passes(captured.graph, context, DEFAULT_PIPELINE, stop_after=last), context)


def before(name: str, config: SimulatorConfig | None = None, **options: Any) -> Stage:
    """The graph that the pass `name` gets."""
    index = NAMES.index(name)
    return stage(NAMES[index - 1] if index else None, config, **options)


def apply(name: str, at: Stage) -> Stage:
    """One pass more, contract checked."""
    step = DEFAULT_PIPELINE[NAMES.index(name)]
    return Stage(run_passes(at.graph, at.context, [step], verify_each=True), at.context)


def inputs(batch: int = 2, length: int = 7, vocab: int = 19) -> dict[str, Any]:
    """Every input that any stage has, by name."""
    ids = torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(0))
    carries = torch.zeros(batch, length, dtype=torch.float64)
    carries[0, 1:4] = 1
    carries[1:, :3] = 1
    return {
        "input_ids": ids,
        "position_ids": torch.arange(length).expand(batch, length),
        "text_length": torch.full((batch, 1), length),
        "attention_mask": torch.ones(length, length, dtype=torch.bool).tril()[None, None],
        "targets": torch.nn.functional.pad(ids[:, 1:], (0, 1)),
        "loss_mask": carries,
        "inner_lr": torch.tensor(0.01, dtype=torch.float64),
        "segment": length,
    }


def numbers(at: Stage, given: dict[str, Any] | None = None) -> Any:
    """What the graph returns: the logits, or a dict once it is lowered."""
    given = inputs() if given is None else given
    values = []
    for node in at.graph.nodes:
        if node.op == "placeholder":
            name = info(node).parameter
            owned = {**at.context.tensors, **at.context.tables}
            known = (
                owned[name]
                if name is not None
                else given.get(node.name, at.context.constants.get(node.name))
            )
            assert known is not None, f"no value for {node.name}"
            values.append(known)
    root = at.graph.owning_module or nn.Module()
    graph = copy.deepcopy(at.graph)
    for node in graph.find_nodes(op="placeholder"):
        node.target = (
            node.name
        )  # a target may be the same for several tables, and becomes an argument's name
    with torch.no_grad():
        result = fx.Interpreter(fx.GraphModule(root, graph)).run(*values)
    return result[0] if isinstance(result, tuple) else result


def assert_same_numbers(
    name: str, limit: float = 1e-12, config: SimulatorConfig | None = None, **options: Any
) -> None:
    """The pass `name` changes nothing that the graph computes: every output of before is found
    after it, equal.
    """
    at = before(name, config, **options)
    given = (
        inputs(vocab=at.context.tensors["tokens.weight"].shape[0])
        if "tokens.weight" in at.context.tensors
        else inputs()
    )
    expected = flat(numbers(at, given))
    found = flat(numbers(apply(name, at), given))
    assert set(expected) <= set(found)
    assert {key: e for key in expected if not (e := error(found[key], expected[key])) < limit} == {}


def flat(result: Any) -> dict[str, Tensor]:
    """A result as named tensors, whatever the stage."""
    if isinstance(result, Tensor):
        return {"logits": result}
    updates = {f"updates.{name}": value for name, value in result["updates"].items()}
    return {"logits": result["logits"], "initial_logits": result["initial_logits"], **updates}


def printed(graph: fx.Graph) -> str:
    """One line a node: `name = operator(arguments) : shape  [phase step slot]`."""
    lines = []
    for record in to_records(graph):
        arguments = ", ".join(
            [_text(a) for a in record.args]
            + [f"{name}={_text(a)}" for name, a in record.kwargs.items()]
        )
        tags = [
            str(record.info[tag])
            for tag in ("phase", "step", "slot", "parameter")
            if tag in record.info
        ]
        tags += ["trainable"] if record.info.get("trainable") else []
        shape = ", ".join(str(size) for size in record.shape)
        name = record.kind if record.kind in ("input", "parameter") else record.operator
        call = name if record.kind in ("input", "parameter") else f"{name}({arguments})"
        lines.append(
            f"{record.name} = {call} : ({shape})" + (f"  [{' '.join(tags)}]" if tags else "")
        )
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        if set(value) == {"node"}:
            return "%" + value["node"]
        if set(value) == {"repr"}:
            return str(value["repr"])
        return "{" + ", ".join(f"{name}: {_text(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_text(item) for item in value) + "]"
    return repr(value)


def assert_golden(name: str, text: str, update: bool) -> None:
    """The text equals tests/golden/passes/<name>.txt; `update` writes that file first."""
    path = GOLDEN / f"{name}.txt"
    if update:
        path.write_text(text)
    expected = path.read_text() if path.exists() else ""
    difference = "\n".join(
        difflib.unified_diff(
            expected.splitlines(), text.splitlines(), "golden", "now", lineterm="", n=1
        )
    )
    assert text == expected, (
        f"{path.name} differs; if that is meant, run pytest --update-golden\n{difference}"
    )
