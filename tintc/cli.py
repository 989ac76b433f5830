"""The command line. torch and transformers are imported inside commands, so that --help is
quick.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tintc.commands import evaluation_options
from tintc.commands.console import Verbosity, configure_logging, err
from tintc.commands.options import (
    DTYPES,
    Artifact,
    Backend,
    Debug,
    Device,
    Dtype,
    Json,
    Opset,
    Quiet,
    Runnable,
    Share,
    Verbose,
    With,
    check_choice,
    config_of,
    device_of,
    dtype_of,
)
from tintc.ir.errors import TintcError, UsageError
from tintc.version import __version__

app = typer.Typer(
    name="tintc",
    help="A graph compiler from language models to simulators that fine-tune them inside one "
    "forward pass.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_OUT_OF_MEMORY = "out of memory; use a smaller model, a shorter text or a smaller dtype"


def _version(value: bool) -> None:
    if value:
        typer.echo(f"tintc {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("compile")
def compile_command(
    source: Annotated[
        str,
        typer.Argument(
            help="Hub id, directory, .gguf file, tiny-opt, smollm2-135m, or shape:NAME "
            "(shape:opt-125m)."
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Directory to write.")
    ],
    preset: Annotated[str | None, typer.Option(help="paper (default) or exact.")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON file of config fields.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Inner gradient steps.")] = None,
    layers: Annotated[
        int | None, typer.Option(help="Trained blocks, from the top; default all.")
    ] = None,
    inner_lr: Annotated[float | None, typer.Option(help="Inner learning rate.")] = None,
    loss_gradient: Annotated[
        str | None, typer.Option(help="softmax, mean_embedding or quadratic.")
    ] = None,
    norm_gradient: Annotated[str | None, typer.Option(help="first_order or exact.")] = None,
    norm_update: Annotated[str | None, typer.Option(help="bias or all.")] = None,
    activation_gradient: Annotated[str | None, typer.Option(help="first_order or exact.")] = None,
    attention_gradient: Annotated[str | None, typer.Option(help="value or full.")] = None,
    finite_difference_scale: Annotated[
        float | None, typer.Option(help="N of the first-order differences.")
    ] = None,
    prefix_tokens: Annotated[int | None, typer.Option(help="K; default solved.")] = None,
    sim_hidden: Annotated[int | None, typer.Option(help="D_sim; default solved.")] = None,
    sim_heads: Annotated[int | None, typer.Option(help="H_sim; default solved.")] = None,
    backend: Backend = "fused",
    share: Share = "none",
    dtype: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(DTYPES)}; default float32.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub model.")
    ] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where hub files are kept.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use cached files only.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with a hub model.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the random weights of a shape.")] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an artifact that exists.")
    ] = False,
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
    chosen = config_of(
        preset, config, {name: value for name, value in flags.items() if value is not None}
    )
    options = {
        "backend": backend,
        "share": share,
        "revision": revision,
        "cache_dir": None if cache_dir is None else str(cache_dir),
        "offline": offline,
        "trust_remote_code": trust_remote_code,
        "seed": seed,
        "dtype": dtype_of(dtype),
    }
    from tintc.commands import compile as command

    command.run(source, output, chosen, force=force, as_json=as_json, options=options)


@app.command("inspect")
def inspect_command(
    path: Artifact,
    stage: Annotated[
        str | None, typer.Option(help="captured, canonical, lowered, optimized or emitted.")
    ] = None,
    form: Annotated[str, typer.Option("--format", help="table, code, dot or json.")] = "table",
    slots: Annotated[
        bool, typer.Option("--slots", help="Show the prefix and memory slots.")
    ] = False,
    params: Annotated[
        bool, typer.Option("--params", help="Show what every parameter is for.")
    ] = False,
    node: Annotated[
        str | None, typer.Option(metavar="NAME", help="Show one node of the stage.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Show a compiled simulator: summary, graph, slots or parameters."""
    check_choice("stage", stage, ("captured", "canonical", "lowered", "optimized", "emitted"))
    check_choice("format", form, ("table", "code", "dot", "json"))
    from tintc.commands import inspect as command

    command.run(
        path, stage=stage, form=form, slots=slots, params=params, node=node, as_json=as_json
    )


@app.command("run")
def run_command(
    path: Runnable,
    stdin: Annotated[
        str | None, typer.Argument(metavar="-", help="- reads standard input.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="The text.")] = None,
    file: Annotated[
        str | None, typer.Option(metavar="FILE", help="A UTF-8 text file, or -.")
    ] = None,
    train_fraction: Annotated[
        float, typer.Option(help="Part of the tokens to train on; the rest is predicted.")
    ] = 0.5,
    generate: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Continue with N tokens under the updated weights."),
    ] = 0,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Cut the text to so many tokens.")
    ] = None,
    inner_lr: Annotated[
        float | None, typer.Option(help="Inner learning rate; default the compiled one.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Train on the first part of a text and predict the rest."""
    if stdin not in (None, "-"):
        raise UsageError(
            f"unexpected argument {stdin!r}; pass --text TEXT, --file FILE, or - to read standard "
            "input"
        )
    if stdin == "-" and (file is not None or text is not None):
        raise UsageError("pass one of --text TEXT, --file FILE, or - to read standard input")
    settings: dict[str, Any] = {
        "text": text,
        "file": "-" if stdin == "-" else file,
        "train_fraction": train_fraction,
        "generate": generate,
        "max_tokens": max_tokens,
        "inner_lr": inner_lr,
        "as_json": as_json,
    }
    if path.suffix == ".onnx":
        if device is not None or dtype is not None:
            raise UsageError(
                "an ONNX model runs on the CPU in the dtype that it was exported in; expected "
                "neither --device nor --dtype"
            )
        from tintc.commands import run_onnx

        run_onnx.run(path, **settings)
        return
    from tintc.commands import run as command

    command.run(path, device=device_of(device), dtype=dtype_of(dtype), **settings)


@app.command("export")
def export_command(
    path: Artifact,
    onnx: Annotated[
        Path, typer.Option(metavar="FILE", help="The model to write, ending in .onnx.")
    ],
    further: With = None,
    opset: Opset = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float64 or float16; default as stored.")
    ] = None,
    external_data: Annotated[
        bool, typer.Option("--external-data", help="Weights in FILE.data, as above 2 GB.")
    ] = False,
    optimize: Annotated[
        bool, typer.Option("--optimize", help="Fold constants with onnxscript.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check", help="Compare onnxruntime with torch before anything is left."
        ),
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace a model that exists.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Write a simulator as an ONNX model. Exit code 5 on disagreement."""
    from tintc.commands import export as command

    options: dict[str, Any] = {
        "external_data": external_data,
        "optimize": optimize,
        "check": check,
        "force": force,
    }
    command.run(
        path,
        onnx,
        further or [],
        dtype_of(dtype),
        options | ({} if opset is None else {"opset": opset}),
        as_json=as_json,
    )


@app.command("verify")
def verify_command(
    path: Artifact,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Length of the random sequence; default 64.")
    ] = None,
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
        typer.Argument(
            help="Hub id, config.json, directory, .gguf file, tiny-opt, smollm2-135m, or "
            "shape:NAME; no weights are read."
        ),
    ],
    preset: Annotated[str | None, typer.Option(help="paper (default) or exact.")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON file of config fields.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Inner gradient steps.")] = None,
    layers: Annotated[
        int | None, typer.Option(help="Trained blocks, from the top; default all.")
    ] = None,
    prefix_tokens: Annotated[int | None, typer.Option(help="K; default solved.")] = None,
    sim_hidden: Annotated[int | None, typer.Option(help="D_sim; default solved.")] = None,
    sim_heads: Annotated[int | None, typer.Option(help="H_sim; default solved.")] = None,
    backend: Backend = "fused",
    share: Share = "none",
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of each sequence; default 256, or what the model has."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences of one call.")] = 1,
    train_fraction: Annotated[float, typer.Option(help="Part of the tokens to train on.")] = 0.5,
    dtype: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(DTYPES)}; default float32.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub model.")
    ] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where hub files are kept.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use cached files only.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with a hub model.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Count parameters, FLOPs and memory from configs alone.

    No weights are read, so the model may be of any size. Several models give a table, with --json a
    list.
    """
    flags = {
        "steps": steps,
        "layers": layers,
        "prefix_tokens": prefix_tokens,
        "sim_hidden": sim_hidden,
        "sim_heads": sim_heads,
    }
    chosen = config_of(
        preset, config, {name: value for name, value in flags.items() if value is not None}
    )
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
    if (chosen_dtype := dtype_of(dtype)) is not None:
        options["dtype"] = chosen_dtype
    from tintc.commands import cost as command

    command.run(sources, chosen, as_json=as_json, options=options)


@app.command("bench")
def bench_command(
    source: Annotated[
        str,
        typer.Argument(
            help="Hub id, directory, .gguf file, tiny-opt, smollm2-135m, or shape:NAME "
            "(shape:opt-125m)."
        ),
    ],
    against: Annotated[
        str, typer.Option(help="autograd: a loop over the sequences, written by hand.")
    ] = "autograd",
    preset: Annotated[str | None, typer.Option(help="paper (default) or exact.")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON file of config fields.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Inner gradient steps.")] = None,
    layers: Annotated[
        int | None, typer.Option(help="Trained blocks, from the top; default all.")
    ] = None,
    inner_lr: Annotated[
        float | None, typer.Option(help="Inner learning rate; default 1e-5, or the config file's.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of each sequence; default 256, or what the model has."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences of one call.")] = 1,
    train_fraction: Annotated[float, typer.Option(help="Part of the tokens to train on.")] = 0.5,
    backend: Backend = "fused",
    share: Share = "none",
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Switch an optimization off; may be repeated."),
    ] = None,
    torch_compile: Annotated[
        str | None, typer.Option(metavar="MODE", help="torch.compile: default or reduce-overhead.")
    ] = None,
    each: Annotated[
        bool, typer.Option("--each", help="Also time every optimization, alone switched off.")
    ] = False,
    pairs: Annotated[int, typer.Option(help="How often both run, in turn.")] = 11,
    no_memory: Annotated[
        bool, typer.Option("--no-memory", help="Do not measure peak memory.")
    ] = False,
    device: Device = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(DTYPES)}; default float32.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub model.")
    ] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where hub files are kept.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use cached files only.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with a hub model.")
    ] = False,
    seed: Annotated[
        int, typer.Option(help="Of the random tokens, and of the random weights of a shape.")
    ] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Time a simulator against a fine-tuning loop. Exit code 5 on disagreement.

    The loop is torch.autograd and SGD, as one would write it by hand; both run in turn on the same
    random tokens.
    """
    # Shapes have random weights: at the rate that a trained model takes, float32 rounding of their
    # gradients shows in the logits.
    rate = 1e-5 if inner_lr is None and config is None else inner_lr
    flags = {"steps": steps, "layers": layers, "inner_lr": rate}
    chosen = config_of(
        preset, config, {name: value for name, value in flags.items() if value is not None}
    )
    settings: dict[str, Any] = {
        "backend": backend,
        "share": share,
        "against": against,
        "tokens": tokens,
        "batch": batch,
        "train_fraction": train_fraction,
        "pairs": pairs,
        "without": tuple(without or ()),
        "torch_compile": torch_compile,
        "each": each,
        "memory": not no_memory,
        "seed": seed,
        "options": {
            "revision": revision,
            "cache_dir": None if cache_dir is None else str(cache_dir),
            "offline": offline,
            "trust_remote_code": trust_remote_code,
        },
    }
    if (chosen_device := device_of(device)) is not None:
        settings["device"] = chosen_device
    if (chosen_dtype := dtype_of(dtype)) is not None:
        settings["dtype"] = chosen_dtype
    from tintc.commands import bench as command

    command.run(source, chosen, settings, as_json=as_json)


app.add_typer(evaluation_options.app)
app.command("ablate")(evaluation_options.ablate_command)


@app.command("env")
def env_command(
    as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False, debug: Debug = False
) -> None:
    """Show versions and hardware."""
    from tintc.commands import env as command

    command.run(as_json=as_json)


def main() -> None:
    """Entry point: one line on stderr and an exit code for every error; a traceback only with
    --debug.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    configure_logging()
    try:
        code = app(
            sys.argv[1:] or ["--help"], prog_name="tintc", standalone_mode=False
        )  # 0 after --help, 130 after Ctrl-C, else None
        if code == 130:
            raise KeyboardInterrupt
        sys.exit(code)
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
            _fail(
                f"{error.format_message().rstrip('.')}; `{command} --help` shows what there is", 2
            )
        if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(
            error
        ):  # torch's
            _fail(_OUT_OF_MEMORY, 4)
        reason = " ".join(str(error).split()) or "no message"
        _fail(
            f"unexpected {type(error).__name__}: {reason[:300]} (--debug shows where; please "
            "report it)",
            1,
        )


def _fail(message: str, code: int) -> None:
    if Verbosity.debug:
        raise
    err.print("error: " + " ".join(message.split()), markup=False)
    sys.exit(code)


if __name__ == "__main__":
    main()
