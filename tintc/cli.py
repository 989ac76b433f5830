"""The command line. torch and transformers are imported inside commands, so that --help is quick."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tintc import __version__
from tintc.commands.console import Verbosity, configure_logging, err
from tintc.compiler.config import SimulatorConfig
from tintc.compiler.errors import TintcError, UsageError

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    name="tintc",
    help="A graph compiler from language models to simulators that fine-tune them inside one forward pass.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_OUT_OF_MEMORY = "out of memory; use a smaller model, a shorter text or a smaller dtype"
_DTYPES = ("float32", "float64", "bfloat16", "float16")


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


def _version(value: bool) -> None:
    if value:
        typer.echo(f"tintc {__version__}")
        raise typer.Exit


Artifact = Annotated[Path, typer.Argument(metavar="DIR", help="Directory that `tintc compile` wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", callback=_quiet, help="No progress and no hints.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", callback=_verbose, help="Log each pass on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", callback=_debug, help="Show tracebacks.")]
Backend = Annotated[str, typer.Option(help="fused, or transformer: the paper's construction.")]
Share = Annotated[str, typer.Option(help="Who shares structural constants: none, layers (all blocks) or all (equal modules).")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default cpu.")]
Dtype = Annotated[str | None, typer.Option(help=f"One of {', '.join(_DTYPES)}; default as stored.")]


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command("compile")
def compile_command(
    source: Annotated[str, typer.Argument(help="Hub id, directory, .gguf file, tiny-opt, smollm2-135m, or shape:NAME (shape:opt-125m).")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Directory to write.")],
    preset: Annotated[str | None, typer.Option(help="paper (default) or exact.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file of config fields.")] = None,
    steps: Annotated[int | None, typer.Option(help="Inner gradient steps.")] = None,
    layers: Annotated[int | None, typer.Option(help="Trained blocks, from the top; default all.")] = None,
    inner_lr: Annotated[float | None, typer.Option(help="Inner learning rate.")] = None,
    loss_gradient: Annotated[str | None, typer.Option(help="softmax, mean_embedding or quadratic.")] = None,
    norm_gradient: Annotated[str | None, typer.Option(help="first_order or exact.")] = None,
    norm_update: Annotated[str | None, typer.Option(help="bias or all.")] = None,
    activation_gradient: Annotated[str | None, typer.Option(help="first_order or exact.")] = None,
    attention_gradient: Annotated[str | None, typer.Option(help="value or full.")] = None,
    finite_difference_scale: Annotated[float | None, typer.Option(help="N of the first-order differences.")] = None,
    prefix_tokens: Annotated[int | None, typer.Option(help="K; default solved.")] = None,
    sim_hidden: Annotated[int | None, typer.Option(help="D_sim; default solved.")] = None,
    sim_heads: Annotated[int | None, typer.Option(help="H_sim; default solved.")] = None,
    backend: Backend = "fused",
    share: Share = "none",
    dtype: Annotated[str | None, typer.Option(help=f"One of {', '.join(_DTYPES)}; default float32.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where hub files are kept.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use cached files only.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with a hub model.")] = False,
    seed: Annotated[int, typer.Option(help="Of the random weights of a shape.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that exists.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Compile a model into a simulator."""
    flags = {
        "steps": steps,
        "layers": layers,
        "inner_lr": inner_lr,
        "loss_gradient": loss_gradient,
        "norm_gradient": norm_gradient,
        "norm_update": norm_update,
        "activation_gradient": activation_gradient,
        "attention_gradient": attention_gradient,
        "finite_difference_scale": finite_difference_scale,
        "prefix_tokens": prefix_tokens,
        "sim_hidden": sim_hidden,
        "sim_heads": sim_heads,
    }
    chosen = _config(preset, config, {name: value for name, value in flags.items() if value is not None})
    options = {
        "backend": backend,
        "share": share,
        "revision": revision,
        "cache_dir": None if cache_dir is None else str(cache_dir),
        "offline": offline,
        "trust_remote_code": trust_remote_code,
        "seed": seed,
        "dtype": _dtype(dtype),
    }
    from tintc.commands import compile as command

    command.run(source, output, chosen, force=force, as_json=as_json, options=options)


@app.command("inspect")
def inspect_command(
    path: Artifact,
    stage: Annotated[str | None, typer.Option(help="captured, canonical, lowered or emitted.")] = None,
    form: Annotated[str, typer.Option("--format", help="table, code, dot or json.")] = "table",
    slots: Annotated[bool, typer.Option("--slots", help="Show the prefix and memory slots.")] = False,
    params: Annotated[bool, typer.Option("--params", help="Show what every parameter is for.")] = False,
    node: Annotated[str | None, typer.Option(metavar="NAME", help="Show one node of the stage.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Show a compiled simulator: summary, graph, slots or parameters."""
    _choice("stage", stage, ("captured", "canonical", "lowered", "emitted"))
    _choice("format", form, ("table", "code", "dot", "json"))
    from tintc.commands import inspect as command

    command.run(path, stage=stage, form=form, slots=slots, params=params, node=node, as_json=as_json)


@app.command("run")
def run_command(
    path: Artifact,
    stdin: Annotated[str | None, typer.Argument(metavar="-", help="- reads standard input.")] = None,
    text: Annotated[str | None, typer.Option(help="The text.")] = None,
    file: Annotated[str | None, typer.Option(metavar="FILE", help="A UTF-8 text file, or -.")] = None,
    train_fraction: Annotated[float, typer.Option(help="Part of the tokens to train on; the rest is predicted.")] = 0.5,
    generate: Annotated[int, typer.Option(min=0, metavar="N", help="Continue with N tokens under the updated weights.")] = 0,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Cut the text to so many tokens.")] = None,
    inner_lr: Annotated[float | None, typer.Option(help="Inner learning rate; default the compiled one.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Train on the first part of a text and predict the rest."""
    if stdin not in (None, "-"):
        raise UsageError(f"unexpected argument {stdin!r}; pass --text TEXT, --file FILE, or - to read standard input")
    if stdin == "-" and (file is not None or text is not None):
        raise UsageError("pass one of --text TEXT, --file FILE, or - to read standard input")
    from tintc.commands import run as command

    command.run(
        path,
        text=text,
        file="-" if stdin == "-" else file,
        train_fraction=train_fraction,
        generate=generate,
        max_tokens=max_tokens,
        inner_lr=inner_lr,
        device=_device(device),
        dtype=_dtype(dtype),
        as_json=as_json,
    )


@app.command("verify")
def verify_command(
    path: Artifact,
    tokens: Annotated[int | None, typer.Option(min=2, help="Length of the random sequence; default 64.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random sequence.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Compare a compiled simulator with torch.autograd in float64. Exit code 5 on disagreement."""
    from tintc.commands import verify as command

    command.run(path, tokens=tokens, seed=seed, as_json=as_json)


@app.command("cost")
def cost_command(
    sources: Annotated[
        list[str],
        typer.Argument(help="Hub id, config.json, directory, .gguf file, tiny-opt, smollm2-135m, or shape:NAME; no weights are read."),
    ],
    preset: Annotated[str | None, typer.Option(help="paper (default) or exact.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file of config fields.")] = None,
    steps: Annotated[int | None, typer.Option(help="Inner gradient steps.")] = None,
    layers: Annotated[int | None, typer.Option(help="Trained blocks, from the top; default all.")] = None,
    prefix_tokens: Annotated[int | None, typer.Option(help="K; default solved.")] = None,
    sim_hidden: Annotated[int | None, typer.Option(help="D_sim; default solved.")] = None,
    sim_heads: Annotated[int | None, typer.Option(help="H_sim; default solved.")] = None,
    backend: Backend = "fused",
    share: Share = "none",
    tokens: Annotated[int | None, typer.Option(help="Tokens of each sequence; default 256, or what the model has.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences of one call.")] = 1,
    train_fraction: Annotated[float, typer.Option(help="Part of the tokens to train on.")] = 0.5,
    dtype: Annotated[str | None, typer.Option(help=f"One of {', '.join(_DTYPES)}; default float32.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where hub files are kept.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use cached files only.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with a hub model.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Count parameters, FLOPs and memory from configs alone.

    No weights are read, so the model may be of any size. Several models give a table, with --json a list.
    """
    flags = {"steps": steps, "layers": layers, "prefix_tokens": prefix_tokens, "sim_hidden": sim_hidden, "sim_heads": sim_heads}
    chosen = _config(preset, config, {name: value for name, value in flags.items() if value is not None})
    options: dict[str, Any] = {
        "backend": backend,
        "share": share,
        "tokens": tokens,
        "batch": batch,
        "train_fraction": train_fraction,
        "revision": revision,
        "cache_dir": None if cache_dir is None else str(cache_dir),
        "offline": offline,
        "trust_remote_code": trust_remote_code,
    }
    if (chosen_dtype := _dtype(dtype)) is not None:
        options["dtype"] = chosen_dtype
    from tintc.commands import cost as command

    command.run(sources, chosen, as_json=as_json, options=options)


@app.command("env")
def env_command(as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False, debug: Debug = False) -> None:
    """Show versions and hardware."""
    from tintc.commands import env as command

    command.run(as_json=as_json)


def main() -> None:
    """Entry point: one line on stderr and an exit code for every error; a traceback only with --debug."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    configure_logging()
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="tintc", standalone_mode=False))  # what it returns: 0 after --help, else None
    except TintcError as error:
        _fail(str(error), error.exit_code)
    except MemoryError:
        _fail(_OUT_OF_MEMORY, 4)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except (EOFError, typer.Abort):
        _fail("interrupted", 130)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own, whose class has moved between releases
            command = getattr(getattr(error, "ctx", None), "command_path", "tintc")
            _fail(f"{error.format_message().rstrip('.')}; `{command} --help` shows what there is", 2)
        if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error):  # torch's
            _fail(_OUT_OF_MEMORY, 4)
        reason = " ".join(str(error).split()) or "no message"
        _fail(f"unexpected {type(error).__name__}: {reason[:300]} (--debug shows where; please report it)", 1)


def _fail(message: str, code: int) -> None:
    if Verbosity.debug:
        raise
    err.print("error: " + " ".join(message.split()), markup=False)
    sys.exit(code)


def _config(preset: str | None, file: Path | None, flags: dict[str, Any]) -> SimulatorConfig:
    """Preset, then the file's fields over it, then the flags."""
    fields: dict[str, Any] = {}
    if file is not None:
        try:
            fields = json.loads(file.expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read the config {file}: {error}") from error
        if not isinstance(fields, dict):
            raise UsageError(f"the config {file} holds a {type(fields).__name__}; expected a JSON object of config fields")
    named = fields.pop("preset", "paper")
    return SimulatorConfig.preset(preset or named, **{**fields, **flags})


def _choice(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise UsageError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def _dtype(name: str | None) -> torch.dtype | None:
    _choice("dtype", name, _DTYPES)
    if name is None:
        return None
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _device(name: str | None) -> str | None:
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
        raise UsageError(f"device is {name}; this machine has {torch.cuda.device_count()} CUDA devices")
    return name


if __name__ == "__main__":
    main()
