"""Programs that a simulator has emitted so far, one for each kind of call, and how a kind is
chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tintc.ir.builder import outputs
from tintc.ir.call_sizes import call_sizes
from tintc.ir.choices import Choices
from tintc.ir.errors import UsageError
from tintc.ir.node_meta import info
from tintc.ir.program import Program
from tintc.runtime.backends import fused
from tintc.runtime.backends.transformer import emit as transformer
from tintc.runtime.backends.transformer.structure import Structure
from tintc.runtime.specialize.cost_model import SlotUse, slot_uses
from tintc.runtime.specialize.folding import fold_weights
from tintc.runtime.specialize.optimize import check_names, optimize

MODES = (
    "default",
    "reduce-overhead",
    "max-autotune",
)  # of torch.compile; the second replays CUDA graphs


@dataclass(frozen=True)
class Emitted:
    """A program, and for each of its arguments the name of the auxiliary parameter or, if it is
    none, of the input, or of the slot whose value is given. folded: makes what its weights have to
    be turned into, once."""

    module: fx.GraphModule
    arguments: list[tuple[bool, str]]
    folded: Emitted | None = None


class Programs:
    """Emits a program at the first call of its kind and keeps it. enabled: names of the
    optimizations that are on. torch_compile: mode of torch.compile for programs that nobody
    differentiates; its compiler takes no oneDNN products, so they are off with it."""

    def __init__(
        self,
        program: Program,
        structure: Structure | None,
        optimize: bool | Collection[str],
        torch_compile: str | None = None,
    ) -> None:
        self.program, self.structure = program, structure
        self.enabled = check_names(optimize)
        self.torch_compile = torch_compile
        if torch_compile is not None:
            if torch_compile not in MODES or structure is not None:
                raise UsageError(
                    f"torch_compile is {torch_compile!r}; expected {', '.join(MODES)}, and the "
                    "fused back end"
                )
            self.enabled = tuple(name for name in self.enabled if name != "onednn_products")
        self._compiled: dict[fx.GraphModule, Callable[..., dict[str, Any]]] = {}
        self._emitted: dict[Choices, Emitted] = {}
        self._uses: dict[str, SlotUse] | None = None
        self._folded: dict[
            str, tuple[Any, Tensor]
        ] = {}  # by name: the weights' states, and what was made of them

    def choose(
        self,
        wanted: tuple[str, ...],
        weights: Tensor,
        inputs: dict[str, Tensor],
        segment: int,
        **facts: Any,
    ) -> Choices:
        """The kind of a call. weights: any one of them. facts: `from_updates`, `differentiable` and
        `causal` of Choices.
        """
        if self.structure is not None:
            return Choices(
                wanted, from_updates=facts.get("from_updates", False), dtype=weights.dtype
            )
        low_rank: frozenset[str] = frozenset()
        tracing = (
            torch.compiler.is_compiling()
        )  # sizes are symbols then, and nothing may depend on them
        if "low_rank_updates" in self.enabled and "updates" not in wanted and not tracing:
            if self._uses is None:
                self._uses = slot_uses(self.program.graph)
            shape = (
                inputs["input_ids"].shape[1],
                segment,
                weights.element_size(),
                weights.device.type,
            )
            low_rank = frozenset(
                slot for slot, use in self._uses.items() if use.factors_win(*shape)
            )
        return Choices(
            wanted,
            dtype=weights.dtype,
            device=weights.device.type,
            enabled=frozenset(self.enabled),
            low_rank=low_rank,
            **facts,
        )

    def usual(
        self,
        wanted: tuple[str, ...],
        weights: Tensor,
        *,
        from_updates: bool = False,
        differentiable: bool,
    ) -> Choices:
        """The kind of a call without masks, of the shapes that costs are told for."""
        sizes = call_sizes(self.program.facts)
        inputs = {"input_ids": torch.empty(sizes["batch"], sizes["tokens"], device="meta")}
        facts = {
            "from_updates": from_updates,
            "differentiable": differentiable,
            "causal": not differentiable,
        }
        return self.choose(wanted, weights, inputs, sizes["segment"], **facts)

    def get(self, choices: Choices) -> Emitted:
        """The program of a kind of call."""
        if choices not in self._emitted:
            if self.structure is None:
                graph = optimize(self.program, choices)
                weights = fold_weights(graph)
                folded = (
                    None
                    if weights is None
                    else self._emitted_of(fused.emit(weights, choices.dtype), {}, None)
                )
                module = fused.emit(graph, choices.dtype)
                given = {
                    node.name: slot
                    for node in graph.nodes
                    if node.op == "placeholder" and (slot := info(node).slot)
                }
            else:
                folded = None
                module = transformer.emit(
                    self.program, self.structure, choices.outputs, from_updates=choices.from_updates
                )
                given = {
                    node.name: slot for slot, node in outputs(self.program.graph)["updates"].items()
                }
            self._emitted[choices] = self._emitted_of(module, given, folded)
        return self._emitted[choices]

    def runnable(
        self, module: fx.GraphModule, differentiable: bool
    ) -> Callable[..., dict[str, Any]]:
        """The program as it runs: itself, or compiled by torch."""
        if self.torch_compile is None or differentiable:
            return module
        if module not in self._compiled:
            self._compiled[module] = torch.compile(module, mode=self.torch_compile)
        return self._compiled[module]

    def _emitted_of(
        self, module: fx.GraphModule, given: dict[str, str], folded: Emitted | None
    ) -> Emitted:
        parameters = {
            node.name: name for node in self.program.graph.nodes if (name := info(node).parameter)
        }
        names = [str(node.target) for node in module.graph.nodes if node.op == "placeholder"]
        return Emitted(
            module,
            [(name in parameters, parameters.get(name) or given.get(name, name)) for name in names],
            folded,
        )

    @torch.no_grad()
    def folded(self, emitted: Emitted, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a program's weights are turned into: made at first use, and again when a weight has
        changed.
        """
        if emitted.folded is None:
            return {}
        used = [weights[name] for _, name in emitted.folded.arguments]
        state = [
            (weight.data_ptr(), 0 if weight.is_inference() else weight._version, weight.dtype)
            for weight in used
        ]
        names = list(fx.node.map_arg(emitted.folded.module.graph.output_node().args[0], str))  # type: ignore[arg-type]
        if any(name not in self._folded or self._folded[name][0] != state for name in names):
            self._folded |= {
                name: (state, value) for name, value in emitted.folded.module(*used).items()
            }
        return {name: self._folded[name][1] for name in names}
