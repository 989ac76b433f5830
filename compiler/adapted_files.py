"""What a simulator has learned, as files: `tintc` for another session, `hf` for transformers,
`peft` beside the unmodified model. TINT.md section 9.

    tintc  updates.safetensors: every sequence's weights or factors, with the same bits
    hf     config.json, model.safetensors, tokenizer: a checkpoint of one sequence
    peft   adapter_config.json, adapter_model.safetensors: a LoRA adapter of one sequence

Each lies in a directory with a `tintc_adapted.json` (`adapted_manifest.py`), written whole or not
at all by `adapted_writer.py`. Apart from it, since a checkpoint is written by transformers, and
reading what was learned loads no such library.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tintc.compiler.adapted_manifest import (
    ADAPTED,
    AGAIN,
    UPDATES,
    AdaptedManifest,
    check_simulator,
    read_manifest,
)
from tintc.compiler.artifact import load
from tintc.ir.builder import outputs
from tintc.ir.errors import ArtifactError, UsageError
from tintc.passes.analysis.factored import factorable
from tintc.runtime.adapted import Adapted
from tintc.runtime.decoding.form import as_weights, names_of
from tintc.runtime.decoding.program import Updates
from tintc.runtime.simulator import Simulator


@torch.inference_mode(False)  # whatever the caller is in: what is made outlives it
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


def _read_updates(root: Path, manifest: AdaptedManifest, simulator: Simulator) -> dict[str, Tensor]:
    """Raises ArtifactError for other tensors than the simulator's slots ask for."""
    file = root / UPDATES
    if set(manifest.files) != {UPDATES}:
        raise ArtifactError(f"{root / ADAPTED} names other files than {UPDATES}; {AGAIN}")
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
