"""Which of PEFT's means takes which trained weight of a model.

    target_modules     the matrix of an nn.Linear or a Conv1D, as two factors
    bias               its bias, whole, by bias="lora_only"
    target_parameters  a matrix that is a parameter of another module (experts), as two factors
    modules_to_save    norms, embeddings, the head and tied weights: their module, whole

Names of modules and parameters are the model's own. Where its config is known, the model without
weights tells what a module is; else a matrix named `weight` is taken for that of a layer.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from tintc.compiler.adapted_checkpoint import model_without_weights
from tintc.ir.builder import outputs
from tintc.ir.dialect import argument, is_tint
from tintc.ir.errors import UsageError
from tintc.ir.layout import PrefixSlot
from tintc.ir.node_meta import info
from tintc.ir.ops.linear import linear_forward, prefix
from tintc.ir.program import Program
from tintc.ir.selection import shortened
from tintc.runtime.simulator import Simulator

How = Literal["target_modules", "bias", "target_parameters", "modules_to_save"]


@dataclass(frozen=True)
class Forms:
    """parameters: how each trained one is written. modules: all paths of the model that are known.
    transposed: matrices that are stored as (I, O). carriers: layers whose matrix is not trained and
    gets an update of 0: they have a trained bias, or PEFT wants some layer to adapt.
    """

    parameters: dict[str, How]
    modules: frozenset[str]
    transposed: frozenset[str]
    carriers: tuple[str, ...]

    def named(self, how: How) -> list[str]:
        """The parameters that are written so, in the model's order."""
        return [name for name, each in self.parameters.items() if each == how]

    @property
    def saved(self) -> list[str]:
        """Modules that are saved whole."""
        return list(dict.fromkeys(owner_of(name) for name in self.named("modules_to_save")))

    @property
    def targets(self) -> list[str]:
        """Modules that get factors."""
        return [owner_of(name) for name in self.named("target_modules")] + [*self.carriers]


def owner_of(parameter: str) -> str:
    """The path of the module that has it."""
    return parameter.rpartition(".")[0]


def forms_of(simulator: Simulator, names: Collection[str]) -> Forms:
    """names: of the whole state dict. Raises UsageError for weights that no form takes, by name."""
    program, model = simulator.program, _model(simulator, names)
    aliases, trained = program.aliases, _trained(program)
    tied = {*aliases, *aliases.values()}
    matrices = _matrices(program, model)
    found: dict[str, How] = {
        name: "modules_to_save" if name in tied else matrices.get(name, "modules_to_save")
        for name in names
        if aliases.get(name, name) in trained
    }
    layers = [owner_of(n) for n, how in matrices.items() if how == "target_modules"]
    layers = [layer for layer in layers if f"{layer}.weight" not in tied]
    found |= {name: "bias" for layer in layers if (name := f"{layer}.bias") in found}
    whole = {owner_of(name) for name, how in found.items() if how == "modules_to_save"}
    found |= {name: "modules_to_save" for name in found if owner_of(name) in whole}
    modules = {path for name in names for path in _above(name)}
    if model is not None:
        modules |= {path for path, _ in model.named_modules() if path}
    transposed = frozenset(s.parameter for s in program.layout.prefix.values() if s.transpose)
    carriers = _carriers(found, [layer for layer in layers if layer not in whole])
    forms = Forms(found, frozenset(modules), transposed, carriers)
    _refuse(forms)
    return forms


def _model(simulator: Simulator, names: Collection[str]) -> nn.Module | None:
    """Without weights; None where transformers has no such model."""
    try:
        model = model_without_weights(simulator)
    except UsageError:
        return None
    return model if set(names) <= set(model.state_dict()) else None


def _trained(program: Program) -> set[str]:
    slots = program.layout.prefix
    return {slots[slot].parameter for slot in outputs(program.graph)["updates"]}


def _matrices(program: Program, model: nn.Module | None) -> dict[str, How]:
    """The parameters that are the matrix of a product, but for the head: as large as the vocabulary
    it is cheaper whole.
    """
    read = {
        info(argument(argument(node, "weight"), "parameter")).parameter
        for node in program.graph.nodes
        if is_tint(node, linear_forward) and is_tint(argument(node, "weight"), prefix)
    }
    return {
        slot.parameter: "target_modules"
        if _is_layers(slot.parameter, model)
        else "target_parameters"
        for slot in program.layout.prefix.values()
        if slot.parameter in read and not _is_head(program, slot)
    }


def _is_layers(name: str, model: nn.Module | None) -> bool:
    owner, _, leaf = name.rpartition(".")
    if leaf != "weight" or not owner:
        return False
    return model is None or isinstance(model.get_submodule(owner), (nn.Linear, Conv1D))


def _is_head(program: Program, slot: PrefixSlot) -> bool:
    block, _ = program.facts.place(slot.parameter)
    return slot.shape[0] == program.facts.vocab_size and not block


def _carriers(found: dict[str, How], layers: list[str]) -> tuple[str, ...]:
    with_bias = [
        layer
        for layer in layers
        if f"{layer}.weight" not in found and found.get(f"{layer}.bias") == "bias"
    ]
    if with_bias or {"target_modules", "target_parameters"} & set(found.values()):
        return tuple(with_bias)
    return tuple(layers[:1])


def _above(name: str) -> list[str]:
    """All modules that a parameter lies in."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: depth + 1]) for depth in range(len(parts))]


def _refuse(forms: Forms) -> None:
    """Raises UsageError for what PEFT would not load, or would load elsewhere."""
    inner = {path for path in forms.modules if any(m.startswith(f"{path}.") for m in forms.modules)}
    wrapped = {owner_of(name) for name in forms.named("target_parameters")}
    strange = [name for name in forms.named("target_parameters") if not owner_of(name)]
    for name in forms.named("modules_to_save"):
        owner = owner_of(name)
        if owner in inner | {""} or owner_of(owner) in wrapped:
            strange.append(name)
    if strange:
        raise UsageError(
            f"PEFT has no form for {shortened(strange)}: it saves whole modules, and none that "
            "holds others or stands beside an adapted parameter; use the format hf or tintc, or "
            "leave them out of train"
        )
    for path in forms.targets:  # PEFT looks for what ends so
        if also := [m for m in forms.modules if m.endswith(f".{path}")]:
            raise UsageError(
                f"PEFT would also adapt {shortened(sorted(also))} where it adapts {path}; use the "
                "format hf or tintc"
            )
    if not forms.targets and not forms.named("target_parameters"):
        raise UsageError(
            "PEFT wants a linear layer to adapt, and this model has none; use the format hf or "
            "tintc"
        )
