"""What a simulator has learned, as files: `tintc` for another session, `hf` for transformers,
`peft` beside the unmodified model. TINT.md section 9.

    tintc  updates.safetensors: every sequence's weights or factors, with the same bits
    hf     config.json, model.safetensors, tokenizer: a checkpoint of one sequence
    peft   adapter_config.json, adapter_model.safetensors: a LoRA adapter of one sequence

Each lies in a directory with a `tintc_adapted.json` (`adapted_manifest.py`), written whole or not
at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tintc.compiler.adapted_checkpoint import checkpoint_of, write_checkpoint
from tintc.compiler.adapted_manifest import (
    ADAPTED,
    AGAIN,
    FORMATS,
    KIND,
    AdaptedManifest,
    Format,
    check_simulator,
    read_manifest,
    simulator_of,
    write_manifest,
)
from tintc.compiler.artifact import load
from tintc.compiler.artifact_files import check_target, replacing
from tintc.compiler.peft_adapter import AdapterRow, Rank, adapter_of
from tintc.ir.builder import outputs
from tintc.ir.errors import ArtifactError, NumericalError, UsageError
from tintc.passes.analysis.factored import factorable
from tintc.runtime.adapted import Adapted
from tintc.runtime.decoding.form import as_weights, names_of
from tintc.runtime.decoding.program import Updates
from tintc.runtime.simulator import Simulator

_UPDATES = "updates.safetensors"
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


def load_adapted(path: str | Path, simulator: Simulator | str | Path) -> Adapted:
    """Reads back what `save_adapted` wrote with the format `tintc`, with the same bits.

    simulator: the one that was adapted, or the path of its artifact. Raises UsageError for another
    one, or another config of it; ArtifactError for a directory that `save_adapted` did not write,
    truncated, altered, or of another format version.
    """
    if not isinstance(simulator, (Simulator, str, Path)):
        raise UsageError(
            f"simulator is a {type(simulator).__name__}; expected the one that was adapted, or the "
            "path of its artifact"
        )
    root = Path(path).expanduser()
    manifest = read_manifest(root, "tintc")
    if not isinstance(simulator, Simulator):
        simulator = load(simulator)
    simulator.check_has_numbers()
    check_simulator(root, manifest, simulator)
    tensors = _read_updates(root, manifest, simulator)
    updates = Updates(tensors, frozenset(manifest.factored), manifest.positions)
    if simulator.structure is not None:  # the transformer back end reads own weights
        updates = as_weights(simulator, updates)
    return Adapted(simulator, updates, manifest.index)


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
    save_file({n: v.detach().cpu().contiguous() for n, v in tensors.items()}, root / _UPDATES)


def _read_updates(root: Path, manifest: AdaptedManifest, simulator: Simulator) -> dict[str, Tensor]:
    """Raises ArtifactError for other tensors than the simulator's slots ask for."""
    file = root / _UPDATES
    if set(manifest.files) != {_UPDATES}:
        raise ArtifactError(f"{root / ADAPTED} names other files than {_UPDATES}; {AGAIN}")
    try:
        with safe_open(file, framework="pt", device=str(simulator.device)) as handle:
            # Copied out of the file: what is mapped there is not aligned, and other kernels round
            # differently.
            found = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file} cannot be read: {str(error)[:200]}; {AGAIN}") from error
    expected = _expected(manifest, simulator)
    wrong = set(found) ^ set(expected) or {
        name for name, shape in expected.items() if not _fits(found[name], shape)
    }
    if wrong or max(manifest.index) >= manifest.contexts:
        raise ArtifactError(
            f"{file} is malformed: {min(wrong, default='its index')} is none of this simulator's; "
            f"{AGAIN}"
        )
    return {name: found[name] for name in expected}


def _fits(value: Tensor, shape: tuple[int | None, ...]) -> bool:
    """None of a shape is any size."""
    return (
        value.is_floating_point()
        and value.ndim == len(shape)
        and all(want in (None, size) for size, want in zip(value.shape, shape, strict=True))
    )


def _expected(manifest: AdaptedManifest, simulator: Simulator) -> dict[str, tuple[int | None, ...]]:
    """Name -> shape, with None for the training tokens of factors, in the order of updates."""
    program, contexts = simulator.program, manifest.contexts
    if strange := sorted(set(manifest.factored) - set(factorable(program.graph))):
        raise ArtifactError(f"{strange[0]} has no factors in this simulator; {AGAIN}")
    names = names_of(program, frozenset(manifest.factored))
    expected: dict[str, tuple[int | None, ...]] = {}
    for slot in outputs(program.graph)["updates"]:
        shape = program.layout.prefix[slot].shape
        if slot not in names:
            expected[slot] = (contexts, *shape)
            continue
        keys, values, rates = names[slot]
        expected |= {
            keys: (contexts, None, shape[1]),
            values: (contexts, None, shape[0]),
            rates: (contexts, None),
        }
    return expected
