"""Writes what `adapted_files.py` describes and reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from tintc.compiler.adapted_checkpoint import checkpoint_of, write_checkpoint
from tintc.compiler.adapted_manifest import (
    ADAPTED,
    FORMATS,
    KIND,
    UPDATES,
    Format,
    simulator_of,
    write_manifest,
)
from tintc.compiler.artifact_files import check_target, replacing
from tintc.compiler.peft_adapter import AdapterRow, Rank, adapter_of
from tintc.ir.errors import NumericalError, UsageError
from tintc.runtime.adapted import Adapted
from tintc.runtime.decoding.program import Updates

_Write = Callable[[Path], None]


@dataclass(frozen=True)
class SavedAdapted:
    """What was written where. rows: how each weight went into a PEFT adapter, with its rank and
    the relative error of what that rank leaves out; none in other formats.
    """

    path: Path
    format: Format
    rows: tuple[AdapterRow, ...] = ()


def save_adapted(
    adapted: Adapted,
    path: str | Path,
    format: Format = "tintc",
    *,
    rank: Rank = "full",
    force: bool = False,
) -> SavedAdapted:
    """Writes what `Simulator.adapt` returned into a directory.

    format: `tintc` holds all sequences, for `load_adapted`; `hf` is a checkpoint that
    AutoModelForCausalLM.from_pretrained loads, and `peft` a LoRA adapter that
    peft.PeftModel.from_pretrained loads beside the unmodified model, each of one sequence.
    rank: of an adapter's matrices at most. A matrix of (D_out, D_in) gets min(rank, D_out, D_in)
    and no more than the update has: the positions that the gradient reached, summed over steps.
    `full` is exact; below that it is the best approximation in the Frobenius norm, and the rows say
    how good.
    force: replace what `save_adapted` wrote there.

    Raises UsageError for a path that exists, several sequences where one is expected, a rank that
    no matrix has, a model without a config that transformers knows (`hf`) and weights that no form
    of PEFT takes (`peft`), each before anything is written; ArtifactError where it cannot be
    written: what was there stays.
    """
    path = Path(path).expanduser()
    simulator_of(adapted)
    if format not in FORMATS:
        raise UsageError(f"format is {format!r}; expected {', '.join(FORMATS)}")
    if rank != "full" and format != "peft":
        raise UsageError(f"rank is {rank!r}, and only the format peft has ranks; leave it out")
    check_target(path, force=force, manifest=ADAPTED, kind=KIND)
    adapted, write, rows = _prepared(adapted, format, rank)
    with replacing(path) as written:
        write(written)
        write_manifest(written, adapted, format)
    return SavedAdapted(path, format, rows)


def _prepared(
    adapted: Adapted, format: Format, rank: Rank
) -> tuple[Adapted, _Write, tuple[AdapterRow, ...]]:
    """(what is written of it, how, rows): all that can be refused is refused here."""
    if format == "tintc":
        own = _only_used(adapted)
        return own, lambda root: _write_updates(own, root), ()
    if len(adapted) != 1:
        raise UsageError(
            f"{format} holds one sequence, and there are {len(adapted)}; save each of "
            "adapted.select(i)"
        )
    own, simulator = _only_used(adapted), simulator_of(adapted)
    _check_finite(own)
    if format == "hf":
        model = checkpoint_of(simulator, own.state_dict())
        return own, lambda root: write_checkpoint(model, simulator.tokenizer, root), ()
    adapter = adapter_of(own, rank)
    return own, adapter.write, adapter.rows


def _only_used(adapted: Adapted) -> Adapted:
    """Without contexts that no sequence reads: what was not selected is nobody's business."""
    used = sorted(set(adapted.index))
    values = {name: value[used] for name, value in adapted.updates.values.items()}
    updates = Updates(values, adapted.updates.factored, adapted.updates.positions)
    return Adapted(adapted.simulator, updates, [used.index(context) for context in adapted.index])


def _check_finite(adapted: Adapted) -> None:
    for name, value in adapted.updates.values.items():
        if not bool(torch.isfinite(value).all()):
            raise NumericalError(
                f"what was learned is not finite at {name}; adapt with a smaller inner_lr"
            )


def _write_updates(adapted: Adapted, root: Path) -> None:
    tensors = adapted.updates.values
    save_file({n: v.detach().cpu().contiguous() for n, v in tensors.items()}, root / UPDATES)
