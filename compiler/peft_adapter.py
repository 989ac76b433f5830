"""What one sequence has learned as a LoRA adapter: adapter_config.json and
adapter_model.safetensors, which peft.PeftModel.from_pretrained loads beside the unmodified model.

    W' = W_0 + B A,  with B A the best approximation of W' - W_0 of its rank

Each matrix has a rank r of its own (`rank_pattern`), and its alpha is the same, so that PEFT's
scale alpha / r is 1. Legend: O, I a matrix's sizes, R a rank.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from tintc.compiler.adapted_manifest import simulator_of
from tintc.compiler.artifact_files import write_json
from tintc.compiler.peft_forms import Forms, How, forms_of, owner_of
from tintc.ir.builder import outputs
from tintc.ir.errors import UsageError
from tintc.ir.precision import HALF
from tintc.passes.analysis.factored import factorable
from tintc.runtime.adapted import Adapted
from tintc.runtime.decoding.form import names_of

if TYPE_CHECKING:
    from peft import LoraConfig

Rank = int | Literal["full"]
_BASE = "base_model.model."  # where PEFT has the model that it wraps
_MUCH_LOWER, _MORE = 4, 8  # for which a rank the short way is shorter; directions beyond the rank


@dataclass(frozen=True)
class AdapterRow:
    """How one parameter went into an adapter. how: PEFT's name for it. rank, error: of a matrix as
    two factors: its rank, and the Frobenius norm of what is left out over that of the whole update.
    """

    name: str
    how: How
    rank: int | None = None
    error: float = 0.0


@dataclass(frozen=True)
class Adapter:
    """Ready to be written."""

    config: LoraConfig
    tensors: dict[str, Tensor]
    rows: tuple[AdapterRow, ...]

    def write(self, root: Path) -> None:
        """Raises OSError or SafetensorError."""
        self.config.save_pretrained(str(root))
        file = root / "adapter_config.json"
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["target_modules"] is not None:  # a set, whose order is another every time
            values["target_modules"].sort()
        write_json(file, values, 2)
        save_file(self.tensors, root / "adapter_model.safetensors", {"format": "pt"})


@dataclass(frozen=True)
class Factors:
    """B A, and the norm of what it leaves out over that of all."""

    a_RI: Tensor
    b_OR: Tensor
    error: float

    @property
    def rank(self) -> int:
        return len(self.a_RI)


def adapter_of(adapted: Adapted, rank: Rank) -> Adapter:
    """The adapter of one sequence.

    rank: at most, of every matrix. Raises UsageError for a rank that no matrix has, for weights
    that no form of PEFT takes, and where peft is not installed.
    """
    check_installed()
    simulator = simulator_of(adapted)
    after = {name: value.cpu() for name, value in adapted.state_dict().items()}
    forms = forms_of(simulator, after)
    before = {name: value.detach().cpu() for name, value in simulator.prefix.tensors().items()}
    matrices = forms.named("target_modules") + forms.named("target_parameters")
    shapes = {name: _as_matrix(after[name]).shape for name in matrices}
    _check_rank(rank, [min(shape) for shape in shapes.values()])
    reached = _ranks_of_updates(adapted)
    factors = {}
    for name, shape in shapes.items():
        delta = _as_matrix(after[name]).double() - _as_matrix(before[name]).double()
        layer = forms.parameters[name] == "target_modules" and name in forms.transposed
        factors[name] = truncated(
            delta.T if layer else delta,
            after[name].dtype,
            at_most=min(shape) if rank == "full" else rank,
            of_update=min(reached.get(name, min(shape)), *shape),
        )
    for name in (f"{layer}.weight" for layer in forms.carriers):
        factors[name] = _nothing(after[name], transposed=name in forms.transposed)
    return _assembled(simulator.source, forms, factors, after)


def check_installed() -> None:
    """Raises UsageError where there is no peft."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "the format peft needs the package peft; pip install 'tintc[peft]', or use the format "
            "hf or tintc"
        ) from error


def _check_rank(rank: Rank, largest: list[int]) -> None:
    if rank == "full":
        return
    most = max(largest, default=0)
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= most:
        raise UsageError(
            f"rank is {rank!r}; expected full, or a whole number from 1 to {most}, the rank of the "
            "largest matrix that was trained"
            if most
            else f"rank is {rank!r}, and no matrix was trained; leave it out"
        )


def _ranks_of_updates(adapted: Adapted) -> dict[str, int]:
    """Parameter -> the rank of its update at most, where it is a sum of products of tokens: each
    position that the gradient reaches adds 1 in each step.
    """
    program, positions = adapted.simulator.program, adapted.updates.positions
    if positions is None:
        return {}
    terms, config = factorable(program.graph), program.config
    names, again = names_of(program, frozenset(terms)), config.steps // config.unrolled_steps
    keys: dict[str, dict[str, int]] = {}
    without = set()
    for slot in outputs(program.graph)["updates"]:
        parameter = program.layout.prefix[slot].parameter
        if slot not in terms:
            without.add(parameter)
            continue
        keys.setdefault(parameter, {})[names[slot].keys] = terms[slot] * positions * again
    return {name: sum(of.values()) for name, of in keys.items() if name not in without}


def _as_matrix(parameter: Tensor) -> Tensor:
    return parameter.squeeze(0) if parameter.ndim == 3 else parameter


def truncated(delta_OI: Tensor, dtype: torch.dtype, *, at_most: int, of_update: int) -> Factors:
    """The best approximation of an update in float64 by factors in a weight's type (float32 where
    that is of half precision).

    at_most: their rank. of_update: what the update's rank cannot be above; what is beyond is the
    rounding of weights. An end that is lost in the rounding of the factors is left out.
    """
    kept = torch.float32 if dtype in HALF else dtype
    u, s, vh = _decomposed(delta_OI, of_update)
    tails = s.square().flip(0).cumsum(0).flip(0).sqrt()
    seen = int((tails > torch.finfo(kept).eps * tails[0]).sum())
    rank = max(1, min(at_most, of_update, seen))
    root_R = s[:rank].sqrt()
    a_RI, b_OR = (root_R[:, None] * vh[:rank]).to(kept), (u[:, :rank] * root_R).to(kept)
    whole, left = delta_OI.norm(), (delta_OI - b_OR.double() @ a_RI.double()).norm()
    return Factors(a_RI.contiguous(), b_OR.contiguous(), float(left / whole) if whole else 0.0)


def _decomposed(delta_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition; of a matrix of much lower rank within the few directions
    that it has: the products of random vectors span them all.
    """
    wanted = rank + _MORE
    if _MUCH_LOWER * wanted > min(delta_OI.shape):
        u, s, vh = torch.linalg.svd(delta_OI, full_matrices=False)
        return u, s, vh
    drawn = torch.Generator().manual_seed(0)
    random = torch.randn(delta_OI.shape[1], wanted, generator=drawn, dtype=delta_OI.dtype)
    basis = torch.linalg.qr(delta_OI @ random).Q
    basis = torch.linalg.qr(delta_OI @ (delta_OI.T @ basis)).Q  # away from rounding
    u, s, vh = torch.linalg.svd(basis.T @ delta_OI, full_matrices=False)
    return basis @ u, s, vh


def _nothing(weight: Tensor, *, transposed: bool) -> Factors:
    """An update of 0, for a layer that PEFT has to adapt though its matrix was not trained."""
    rows, columns = weight.T.shape if transposed else weight.shape
    return Factors(weight.new_zeros(1, columns), weight.new_zeros(rows, 1), 0.0)


def _assembled(
    source: dict[str, object], forms: Forms, factors: dict[str, Factors], after: dict[str, Tensor]
) -> Adapter:
    placed = _Places(forms)
    tensors: dict[str, Tensor] = {}
    rows: list[AdapterRow] = []
    for name, found in factors.items():
        where = placed.of_factors(name)
        tensors |= {f"{where}.lora_A.weight": found.a_RI, f"{where}.lora_B.weight": found.b_OR}
        how = forms.parameters.get(name, "target_modules")  # of a carrier
        rows.append(AdapterRow(name, how, found.rank, found.error))
    for name in _biases(forms, after):
        tensors[f"{placed.of(owner_of(name))}.base_layer.bias"] = after[name].clone()
    for path in forms.saved:
        tensors |= {
            f"{placed.of(path)}{name.removeprefix(path)}": value.clone()
            for name, value in after.items()
            if owner_of(name) == path
        }
    rows += [AdapterRow(n, how) for n, how in forms.parameters.items() if n not in factors]
    return Adapter(_config(source, forms, factors, placed), tensors, tuple(rows))


def _biases(forms: Forms, after: dict[str, Tensor]) -> list[str]:
    """Those of all adapted layers, if any of them was trained."""
    if not forms.named("bias"):
        return []
    return [name for path in forms.targets if (name := f"{path}.bias") in after]


class _Places:
    """Where PEFT has what: a module whose own parameters are adapted is wrapped once for each of
    them, the last outermost, which puts `base_layer` into the path of whatever is in it.
    """

    def __init__(self, forms: Forms) -> None:
        self._own: dict[str, list[str]] = {}
        for name in forms.named("target_parameters"):
            self._own.setdefault(owner_of(name), []).append(name)

    def of(self, path: str) -> str:
        """Of a module."""
        parts, found, at = path.split("."), _BASE.removesuffix("."), ""
        for number, part in enumerate(parts):
            at = f"{at}.{part}".removeprefix(".")
            found += f".{part}"
            if number + 1 < len(parts):
                found += ".base_layer" * len(self._own.get(at, ()))
        return found

    def of_factors(self, parameter: str) -> str:
        owner = owner_of(parameter)
        own = self._own.get(owner, [parameter])
        further = len(own) - 1 - own.index(parameter) if parameter in own else 0
        return self.of(owner) + ".base_layer" * further


def _config(
    source: dict[str, object], forms: Forms, factors: dict[str, Factors], placed: _Places
) -> LoraConfig:
    from peft import LoraConfig

    parameters = forms.named("target_parameters")
    ranks = {
        (name if name in parameters else owner_of(name)): each.rank
        for name, each in factors.items()
    }
    most = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != most}
    transposed = any(name in forms.transposed for name in factors)
    hub = source.get("kind") == "hub"
    return LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=forms.targets or None,
        target_parameters=parameters or None,
        modules_to_save=[_unambiguous(path, forms, placed) for path in forms.saved] or None,
        bias="lora_only" if forms.named("bias") else "none",
        fan_in_fan_out=transposed and not parameters,
        task_type="CAUSAL_LM" if source.get("config") else None,
        base_model_name_or_path=source.get("name") if hub else None,
        revision=source.get("revision") if hub else None,
        inference_mode=True,
    )


def _unambiguous(path: str, forms: Forms, placed: _Places) -> str:
    """PEFT saves every module whose path ends so: with more of its path where others do too."""
    found = placed.of(path)
    plain = found.removeprefix(_BASE)
    others = {placed.of(module) for module in forms.modules} - {found}
    return found if any(other.endswith(plain) for other in others) else plain
