"""Options that several commands share, and what their values mean. Nothing here imports torch
before it is needed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tintc.commands.console import Verbosity, configure_logging
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import UsageError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float64", "bfloat16", "float16")


def _quiet(value: bool) -> bool:
    Verbosity.quiet = Verbosity.quiet or value
    configure_logging()
    return value


def _verbose(value: bool) -> bool:
    Verbosity.verbose = Verbosity.verbose or value
    configure_logging()
    return value


def _debug(value: bool) -> bool:
    Verbosity.debug = Verbosity.debug or value
    return value


Artifact = Annotated[
    Path, typer.Argument(metavar="DIR", help="Directory that `tintc compile` wrote.")
]
Runnable = Annotated[
    Path,
    typer.Argument(
        metavar="DIR", help="What `tintc compile` or `tintc export` wrote: DIR, or MODEL.onnx."
    ),
]
With = Annotated[
    list[str] | None,
    typer.Option(
        "--with",
        metavar="NAME",
        help="Further input (loss_mask, attention_mask, pair_mask, position_ids) or output "
        "(initial_logits, losses, initial_losses); "
        "may be repeated.",
    ),
]
Opset = Annotated[
    int | None, typer.Option(help="Of ONNX's standard operators, 18 to 23; default 20.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Quiet = Annotated[
    bool, typer.Option("-q", "--quiet", callback=_quiet, help="No progress and no hints.")
]
Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", callback=_verbose, help="Log each pass on stderr.")
]
Debug = Annotated[bool, typer.Option("--debug", callback=_debug, help="Show tracebacks.")]
Backend = Annotated[str, typer.Option(help="fused, or transformer: the paper's construction.")]
Share = Annotated[
    str,
    typer.Option(
        help="Who shares structural constants: none, layers (all blocks) or all (equal modules)."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default cpu.")]
Dtype = Annotated[str | None, typer.Option(help=f"One of {', '.join(DTYPES)}; default as stored.")]


def config_of(preset: str | None, file: Path | None, flags: dict[str, Any]) -> SimulatorConfig:
    """Preset, then the file's fields over it, then the flags."""
    fields: dict[str, Any] = {}
    if file is not None:
        try:
            fields = json.loads(file.expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read the config {file}: {error}") from error
        if not isinstance(fields, dict):
            raise UsageError(
                f"the config {file} holds a {type(fields).__name__}; expected a JSON object of "
                "config fields"
            )
    named = fields.pop("preset", "paper")
    return SimulatorConfig.preset(preset or named, **{**fields, **flags})


def check_choice(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise UsageError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def dtype_of(name: str | None) -> torch.dtype | None:
    check_choice("dtype", name, DTYPES)
    if name is None:
        return None
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def device_of(name: str | None) -> str | None:
    if name is None:
        return None
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device is {name!r}; expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device is {name!r}; expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device is {name}; this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return name
