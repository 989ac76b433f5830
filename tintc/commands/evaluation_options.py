"""`tintc eval` and `tintc ablate`: their options. Nothing here imports torch before it is
needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tintc.commands.options import DTYPES, Debug, Device, Json, Quiet, Verbose, device_of, dtype_of
from tintc.ir.errors import UsageError

app = typer.Typer(
    name="eval",
    help="Measure language modelling or classification.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Source = Annotated[
    str,
    typer.Argument(help="Hub id, directory, .gguf file, tiny-opt, smollm2-135m, or shape:NAME."),
]
Data = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE",
        help="wikitext-2, wikitext-103, c4, a text file, or a JSONL file of {text}.",
    ),
]
Choose = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Text to choose learning rates on; default the hub's other split, or the first "
        "quarter of FILE.",
    ),
]
Seeds = Annotated[
    list[str] | None, typer.Option(metavar="N,...", help="Each draws its own items; default 1,2,3.")
]
InnerLr = Annotated[
    float | None, typer.Option(help="Inner learning rate of everyone; then none is chosen.")
]
Presets = Annotated[
    list[str] | None, typer.Option(metavar="NAME,...", help="paper, exact; default paper.")
]
Batch = Annotated[int, typer.Option(help="Sequences of one call; results do not depend on it.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="DIR",
        help="Results as they come, report and plot; run again to go on after an interruption.",
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
CacheDir = Annotated[Path | None, typer.Option(help="Where hub files are kept.")]
Offline = Annotated[bool, typer.Option("--offline", help="Use cached files only.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with a hub model.")
]
LoadDtype = Annotated[
    str | None, typer.Option(help=f"One of {', '.join(DTYPES)}; default float32.")
]


@app.command("lm")
def lm_command(
    source: Source,
    data: Data,
    choose: Choose = None,
    train_fraction: Annotated[
        list[str] | None,
        typer.Option(
            metavar="F,...", help="Parts of a sequence to train on; default 0.3,0.5,0.7,0.9."
        ),
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a sequence; default the model's own length.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Sequences of each seed; default all.")] = None,
    choosing: Annotated[
        int, typer.Option(help="Sequences that a learning rate is chosen on.")
    ] = 16,
    seeds: Seeds = None,
    inner_lr: InnerLr = None,
    presets: Presets = None,
    steps: Annotated[int, typer.Option(help="Inner gradient steps.")] = 1,
    layers: Annotated[
        int | None, typer.Option(help="Trained blocks, from the top; default all.")
    ] = None,
    batch: Batch = 1,
    output: Output = None,
    device: Device = None,
    dtype: LoadDtype = None,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    offline: Offline = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Perplexity of the rest of each sequence after training on its first part.

    For each training fraction: the unmodified model, true dynamic evaluation (torch.autograd, same
    budget), the simulator, and two
    controls: its gradient with the sign flipped, and training on the same tokens in random order.
    """
    settings: dict[str, Any] = {
        **_given("fractions", train_fraction, float),
        **_given("seeds", seeds, int),
        **_given("presets", presets, str),
        "length": length,
        "limit": limit,
        "choosing": choosing,
        "inner_lr": inner_lr,
        "steps": steps,
        "layers": layers,
        "batch": batch,
    }
    how = _loading(device, dtype, revision, cache_dir, offline, trust_remote_code)
    from tintc.commands import evaluate as command

    command.run_lm(source, data, choose, settings, how, output, as_json=as_json)


@app.command("classify")
def classify_command(
    source: Source,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...", help="sst2, mr, cr, mpqa, amazon, agnews, subj; default all seven."
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Holds TASK/{train,test}.jsonl of {text, label} and TASK/task.json; default the "
            "hub.",
        ),
    ] = None,
    shots: Annotated[
        list[str] | None,
        typer.Option(metavar="N,...", help="Numbers of demonstrations; default 0,32."),
    ] = None,
    form: Annotated[
        str, typer.Option(help="Demonstrations: separate (each sees only itself) or sequence.")
    ] = "separate",
    loss: Annotated[
        str, typer.Option(help="Of demonstrations: on their label words, or on the whole context.")
    ] = "label",
    budgets: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LxS,...",
            help="Layers of 12 x steps, scaled to the model; default 12x1,6x2,3x4.",
        ),
    ] = None,
    rates: Annotated[
        list[str] | None,
        typer.Option(metavar="RATE,...", help="Inner learning rates to choose from."),
    ] = None,
    limit: Annotated[int, typer.Option(help="Test items of each task.")] = 200,
    choosing: Annotated[
        int, typer.Option(help="Training items that everything is chosen on.")
    ] = 32,
    seeds: Seeds = None,
    inner_lr: InnerLr = None,
    presets: Presets = None,
    batch: Batch = 8,
    output: Output = None,
    device: Device = None,
    dtype: LoadDtype = None,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    offline: Offline = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Accuracy of text classification, zero-shot and with demonstrations.

    For each task: the unmodified model, true dynamic evaluation (torch.autograd, same budgets), the
    simulator, and two controls: its gradient with the sign flipped, and training on shuffled
    labels. Rate, budget, template and calibration are chosen on training data.
    """
    settings: dict[str, Any] = {
        **_given("tasks", task, str),
        **_given("shots", shots, int),
        **_given("seeds", seeds, int),
        **_given("presets", presets, str),
        **_given("budgets", budgets, str),
        **_given("rates", rates, float),
        "form": form,
        "loss": loss,
        "limit": limit,
        "choose": choosing,
        "inner_lr": inner_lr,
        "batch": batch,
        "data_dir": data_dir,
    }
    how = _loading(device, dtype, revision, cache_dir, offline, trust_remote_code)
    from tintc.commands import evaluate as command

    command.run_classify(source, settings, how, output, as_json=as_json)


def ablate_command(
    source: Source,
    data: Data,
    choose: Choose = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...",
            help="Variants or patterns, as paper, norm-*; default the whole grid.",
        ),
    ] = None,
    length: Annotated[
        int, typer.Option(help="Tokens of a sequence; half of them are trained on.")
    ] = 256,
    limit: Annotated[int, typer.Option(help="Sequences to evaluate.")] = 16,
    choosing: Annotated[
        int, typer.Option(help="Sequences that each variant's learning rate is chosen on.")
    ] = 4,
    error_sequences: Annotated[
        int, typer.Option(help="Sequences whose updates are compared with the exact gradient.")
    ] = 2,
    inner_lr: InnerLr = None,
    steps: Annotated[int, typer.Option(help="Inner gradient steps.")] = 1,
    layers: Annotated[
        int | None, typer.Option(help="Trained blocks, from the top; default all.")
    ] = None,
    batch: Batch = 4,
    output: Output = None,
    device: Device = None,
    dtype: LoadDtype = None,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    offline: Offline = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Measure what each approximation costs.

    In its update, as cosine and relative error against the exact gradient, and in the perplexity
    after it: each approximation alone, all of the paper's together, and lower float formats.
    """
    settings: dict[str, Any] = {
        **_given("only", only, str),
        "inner_lr": inner_lr,
        "error_sequences": error_sequences,
        "batch": batch,
    }
    sizes = {"length": length, "limit": limit, "choosing": choosing}
    how = _loading(device, dtype, revision, cache_dir, offline, trust_remote_code)
    from tintc.commands import ablate as command

    command.run(
        source,
        data,
        choose,
        sizes,
        {"steps": steps, "layers": layers},
        settings,
        how,
        output,
        as_json=as_json,
    )


def _given(name: str, values: list[str] | None, kind: type) -> dict[str, Any]:
    """{name: the values}, each of which may hold several with commas between them; {} if the option
    was not given.
    """
    if values is None:
        return {}
    parts = [part.strip() for value in values for part in value.split(",")]
    try:
        return {name: tuple(kind(part) for part in parts)}
    except ValueError:
        expected = {float: "numbers", int: "whole numbers"}[kind]
        raise UsageError(
            f"{name} are {','.join(values)!r}; expected {expected} with commas between them"
        ) from None


def _loading(
    device: str | None,
    dtype: str | None,
    revision: str | None,
    cache_dir: Path | None,
    offline: bool,
    trust_remote_code: bool,
) -> dict[str, Any]:
    return {
        "device": device_of(device),
        "dtype": dtype_of(dtype),
        "revision": revision,
        "cache_dir": None if cache_dir is None else str(cache_dir),
        "offline": offline,
        "trust_remote_code": trust_remote_code,
    }
