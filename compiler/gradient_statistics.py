"""Root mean squares of gradients, which the optimizer `rms` divides by: their file, and whether
they belong to a simulator. `gathering.py` makes them. TINT.md section 7.

The file has one tensor a parameter by its own name, and the `Gathered` of `artifact_schema.py`
(`described_tensors.py`). An artifact holds the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tintc.compiler.artifact_reader import read_manifest
from tintc.compiler.artifact_schema import WEIGHTS, Gathered, Gradients
from tintc.compiler.described_tensors import TensorFile, reason
from tintc.compiler.frontend.kinds import kind_of
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import ArtifactError, UsageError
from tintc.ir.inputs import is_models_own, statistics_name, statistics_of
from tintc.ir.node_meta import info
from tintc.ir.program import Program
from tintc.ir.selection import shortened
from tintc.runtime.digest import digest_of

_AGAIN = "gather them again with tintc statistics"
_FILE = TensorFile(
    key="tintc.statistics",
    about=Gathered,
    name="statistics",
    expected="statistics; expected a file that tintc statistics wrote",
    again=_AGAIN,
)


@dataclass(frozen=True)
class Statistics:
    """tensors: root mean squares by the parameter's name. about: how they were gathered. name: what
    messages call them. of_model, of_gradients: whether a simulator's are compared with `about`.
    """

    tensors: dict[str, Tensor]
    about: Gathered
    name: str = "the statistics"
    of_model: bool = True
    of_gradients: bool = True

    def check_config(self, config: SimulatorConfig) -> None:
        """Raises UsageError for a config whose gradients are others."""
        if not self.of_gradients:
            return
        found, wanted = self.about.gradients.model_dump(), gradients_of(config).model_dump()
        if "first_order" not in (config.norm_gradient, config.activation_gradient):
            del wanted["finite_difference_scale"]  # nothing depends on it
        for name, value in wanted.items():
            if found[name] != value:
                raise UsageError(
                    f"{self.name}: gathered with {name} {found[name]}, and this simulator has "
                    f"{value}; {_AGAIN} and the same preset"
                )

    def check_model(self, weights: Mapping[str, Tensor], source: str | None) -> None:
        """Raises UsageError unless a model has the weights that these gradients are of.

        source: digest of its file. It is asked only where a model is in float16, whose rounding the
        digest of weights does not see through.
        """
        if not self.of_model:
            return
        kinds = {str(t.dtype) for t in weights.values()} | {f"torch.{self.about.dtype}"}
        same_file = source is not None and source == self.about.source
        if "torch.float16" in kinds and same_file:
            return
        if digest_of_weights(weights) != self.about.weights:
            raise UsageError(
                f"{self.name}: gathered on another model, or on other weights of it; {_AGAIN} on "
                "this one"
            )

    def of_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of some weights, like them in type and device. Raises UsageError if one is missing
        or has another shape.
        """
        if lacking := [name for name in weights if name not in self.tensors]:
            raise UsageError(
                f"{self.name}: {len(lacking)} of the weights that are trained are not in it: "
                f"{shortened(lacking)}; {_AGAIN} and the same train, layers and norm_update"
            )
        for name, weight in weights.items():
            if self.tensors[name].shape != weight.shape:
                raise UsageError(
                    f"{self.name}: {name} has shape {tuple(self.tensors[name].shape)}, and "
                    f"{tuple(weight.shape)} in this model; {_AGAIN} on this one"
                )
        return {name: self.tensors[name].to(weight) for name, weight in weights.items()}

    def for_program(
        self, program: Program, weights: Mapping[str, Tensor], source: str | None
    ) -> dict[str, Tensor]:
        """What the program reads of them, under the names by which it does.

        weights: the model's. source: digest of its file. Raises UsageError if they belong to
        another model or other gradients, or lack a trained weight.
        """
        self.check_config(program.config)
        self.check_model(weights, source)
        found = self.of_weights({name: weights[name] for name in divided(program)})
        return {statistics_name(name): value for name, value in found.items()}

    def save(self, path: str | Path) -> Path:
        """Writes the file; what was there is replaced when it is whole. Raises ArtifactError if it
        cannot be written.
        """
        path = Path(path).expanduser()
        tensors = {name: value.cpu().contiguous() for name, value in self.tensors.items()}
        try:
            _FILE.write(path, tensors, self.about)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"cannot write {path}: {reason(error)}; nothing was left behind"
            ) from error
        return path


def gradients_of(config: SimulatorConfig) -> Gradients:
    """The fields of a config that decide what a gradient is; which weights have one is no matter of
    theirs.
    """
    return Gradients(**{name: getattr(config, name) for name in Gradients.model_fields})


def divided(program: Program) -> list[str]:
    """The parameters whose gradients a program divides by statistics."""
    named = [info(node).parameter or "" for node in program.graph.find_nodes(op="placeholder")]
    return [parameter for name in named if (parameter := statistics_of(name)) is not None]


def chosen_statistics(
    source: object, given: str | Path | Statistics | None, config: SimulatorConfig
) -> Statistics | None:
    """What a config's optimizer divides by: what is given, or what a compiled simulator has that
    was made with `rms` itself. None for any other optimizer.

    Raises UsageError for `rms` without statistics, statistics without `rms`, and those of other
    gradients; ArtifactError for a file that is none of these, or damaged.
    """
    if config.optimizer != "rms":
        if given is not None:
            raise UsageError(
                f"statistics are given, and the optimizer is {config.optimizer}; expected rms, "
                "which divides by them, or no statistics"
            )
        return None
    if given is None:
        found = _of_artifact(source)
    else:
        found = given if isinstance(given, Statistics) else read_statistics(given)
    if found is None:
        raise UsageError(
            "optimizer is rms, which divides by root mean squares of gradients; expected "
            "statistics=FILE, which `tintc statistics` gathers"
        )
    found.check_config(config)
    return found


def read_statistics(path: str | Path) -> Statistics:
    """Reads what `Statistics.save` wrote. Raises UsageError if there is no such file, ArtifactError
    for one that is none of these, or damaged.
    """
    path = Path(path).expanduser()
    if not path.is_file():  # a pipe may never end
        got = "is no plain file" if path.exists() else "does not exist"
        raise UsageError(f"{path} {got}; expected statistics, a file that `tintc statistics` wrote")
    tensors, about = _FILE.read(path)
    _check_numbers(path, tensors)
    _FILE.check_digest(path, tensors, about.sha256)
    return Statistics(tensors, about, str(path))


def check_target(path: Path, *, force: bool) -> None:
    """Raises UsageError if statistics cannot be written to `path`."""
    path = path.expanduser()
    if path.is_dir():
        raise UsageError(f"{path} is a directory; expected the name of a file to write")
    if path.exists() and not force:
        raise UsageError(f"{path} exists; pass force=True to replace it, or another output")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write {path}: {nearest} is no directory that can be written")


def _check_numbers(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        if not is_root_mean_square(value):
            raise ArtifactError(
                f"{path} is malformed: {name} holds numbers that are no root mean squares, which "
                f"are finite and not below 0; {_AGAIN}"
            )


def is_root_mean_square(value: Tensor) -> bool:
    """Whether all numbers are finite and none is below 0."""
    return value.is_floating_point() and bool((torch.isfinite(value) & (value >= 0)).all())


def _of_artifact(source: object) -> Statistics | None:
    """What a compiled simulator divides by. Its model is not compared: the rate, the weights and
    these were written together.
    """
    if not isinstance(source, (str, os.PathLike)) or kind_of(source) != "artifact":
        return None
    root = Path(source).expanduser()
    if (manifest := read_manifest(root)).statistics is None:
        return None
    with safe_open(root / WEIGHTS, framework="pt") as handle:
        tensors = {
            parameter: handle.get_tensor(name).clone()
            for name in handle.keys()  # noqa: SIM118 (no mapping)
            if (parameter := statistics_of(name)) is not None
        }
    about = manifest.statistics
    return Statistics(tensors, about, f"the statistics of {root.name}", of_model=False)


def digest_of_weights(tensors: Mapping[str, Tensor]) -> str:
    """Of a model's floating-point numbers, rounded to bfloat16: the same model in float64, float32
    and bfloat16, from a checkpoint and from a compiled simulator, has the same.
    """
    own = {
        name: value.detach().to(torch.bfloat16)
        for name, value in tensors.items()
        if is_models_own(name) and value.is_floating_point()
    }
    return digest_of(own)
