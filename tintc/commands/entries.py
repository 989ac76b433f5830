"""The commands but for the experiments: what each takes on the command line. Everything that
imports torch is imported inside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from tintc.commands.adapt_options import AdaptStream, Learning, Saving
from tintc.commands.bench_flags import (
    BenchFlags,
    BenchGenerateFlags,
    BenchStreamFlags,
    bench_runner,
    chosen_bench,
)
from tintc.commands.compiled import compiled
from tintc.commands.exporting import Exporting
from tintc.commands.flags import WHOLE, at_least, split
from tintc.commands.generating import Generating
from tintc.commands.help import says
from tintc.commands.options import (
    GENERATION,
    MODEL,
    OPTIONS,
    OUTPUT,
    SIMULATOR,
    STREAMS,
    Artifact,
    CallFlags,
    Checked,
    Common,
    ConfigFlags,
    Construction,
    Divided,
    Divisors,
    Found,
    Loading,
    Placed,
    Source,
    Where,
    flat,
)
from tintc.commands.paging import Paging
from tintc.commands.showing import Showing
from tintc.commands.stream_flags import StreamFlags
from tintc.commands.text import Reading
from tintc.commands.view import View
from tintc.ir.call_sizes import Predict
from tintc.ir.errors import UsageError
from tintc.ir.named import Number


@says("Compile a model into a simulator.")
def compile_command(
    source: Source,
    /,
    *,
    output: Annotated[
        Path, Parameter(name=("-o", "--output"), metavar="DIR", help="Directory to write.")
    ],
    force: Annotated[bool, Parameter(help="Replace an artifact that exists.")] = False,
    config: Annotated[ConfigFlags, flat(SIMULATOR)] = ConfigFlags(),
    construction: Annotated[Checked, flat(SIMULATOR)] = Checked(),
    model: Annotated[Loading, flat(MODEL)] = Loading(),
    seed: Annotated[
        int, WHOLE, Parameter(group=MODEL, help="Of the random weights of a shape.")
    ] = 0,
    common: Annotated[Common, flat(OUTPUT)] = Common(),
) -> None:
    start = compiled(source)
    chosen = config.chosen(start)
    options = {
        **construction.chosen(start),
        "check": construction.check,
        "islands": construction.islands,
        "statistics": construction.statistics,
        "seed": seed,
        "dtype": model.torch_dtype(),
        **model.hub(),
    }
    from tintc.commands import compile as command

    command.run(source, output, chosen, force=force, as_json=common.as_json, options=options)


@says("Show a simulator: summary, graph, slots or parameters.")
def inspect_command(
    path: Artifact,
    /,
    *,
    view: Annotated[View, flat(OPTIONS)] = View(),
    common: Annotated[Common, flat(OUTPUT)] = Common(),
) -> None:
    from tintc.commands import inspect as command

    command.run(path, view, as_json=common.as_json)


@says(
    """Write a page that shows a simulator, and runs it.

    A static site in one folder: the graph at every stage, slots, costs, and the exported model,
    which trains on a text in the browser. --serve shows it, also one that is there already.
    """
)
def page_command(
    path: Annotated[
        Path,
        Parameter(
            name="DIR",
            help="Directory that `tintc compile` wrote; with --serve or --open, or a page.",
        ),
    ],
    /,
    *,
    paging: Annotated[Paging, flat(OPTIONS)] = Paging(),
    common: Annotated[Common, flat(OUTPUT)] = Common(),
) -> None:
    from tintc.commands import page as command

    command.run(path, paging, as_json=common.as_json)


@says(
    """Train on the first part of a text and predict the rest.

    With --generate N go on from there, with --prompt TEXT from another text, under what was
    learned. With --stream every chunk of the text is scored and then trained on. Of many
    documents, those that cannot be used do not lose the others; the exit code is then 2.
    """
)
def run_command(
    path: Annotated[
        Path,
        Parameter(
            name="DIR",
            help="What `tintc compile` or `tintc export` wrote: DIR, MODEL.onnx, or the folder of "
            "a pair.",
        ),
    ],
    stray: Annotated[str | None, Parameter(show=False)] = None,
    /,
    *,
    stdin: Annotated[bool, Parameter(name="-", help="Read the text from standard input.")] = False,
    reading: Annotated[Reading, flat(OPTIONS)] = Reading(),
    generating: Annotated[Generating, flat(GENERATION)] = Generating(),
    reads: Annotated[StreamFlags, flat(STREAMS)] = StreamFlags(),
    where: Annotated[Where, flat(OPTIONS)] = Where(),
    common: Annotated[Showing, flat(OUTPUT)] = Showing(),
) -> None:
    if stray is not None:
        raise UsageError(
            f"unexpected argument {stray!r}; pass --text TEXT, --file FILE, or - to read standard "
            "input"
        )
    asked = reading.from_stdin() if stdin else reading
    from tintc.commands import run_any

    run_any.run(path, asked, generating, reads, where, common, as_json=common.as_json)


@says(
    """Train on a text and write what was learned.

    tintc run DIR --adapted OUT --prompt TEXT goes on from there.
    """
)
def adapt_command(
    path: Artifact,
    /,
    *,
    stdin: Annotated[bool, Parameter(name="-", help="Read the text from standard input.")] = False,
    learning: Annotated[Learning, flat(OPTIONS)] = Learning(),
    saving: Annotated[Saving, flat(OPTIONS)],
    reads: Annotated[AdaptStream, flat(STREAMS)] = AdaptStream(),
    where: Annotated[Where, flat(OPTIONS)] = Where(),
    common: Annotated[Common, flat(OUTPUT)] = Common(),
) -> None:
    asked = learning.from_stdin() if stdin else learning
    asked.check()
    reads.check(asked)
    saving.rank_number()
    from tintc.commands import adapt as command

    command.run(path, asked, saving, reads, *where.chosen(), as_json=common.as_json)


@says(
    """Write ONNX: a call, a stream's window, or adapting and decoding.

    Exit code 5 if onnxruntime disagrees with torch.
    """
)
def export_command(
    path: Artifact,
    /,
    *,
    onnx: Annotated[
        Path,
        Parameter(
            metavar="FILE", help="The model to write, ending in .onnx; of a pair, the folder."
        ),
    ],
    further: Annotated[
        list[str] | None,
        Parameter(
            name="--with",
            metavar="NAME,...",
            help="Further input (loss_mask, attention_mask, pair_mask, position_ids) or output "
            "(initial_logits, losses, initial_losses).",
        ),
    ] = None,
    dtype: Annotated[
        Number | None, Parameter(help="Of the weights, not bfloat16; default as stored.")
    ] = None,
    exporting: Annotated[Exporting, flat(OPTIONS)] = Exporting(),
    common: Annotated[Common, flat(OUTPUT)] = Common(),
) -> None:
    from tintc.commands import export as command
    from tintc.compiler.frontend.devices import dtype_of

    command.run(
        path,
        onnx,
        split("with", further or (), str),
        dtype_of(dtype),
        exporting.options(),
        pair=exporting.pair,
        as_json=common.as_json,
    )


@says(
    """Compare a simulator with torch.autograd in float64.

    A compiled simulator as it is, or, of another source or config, the one that `tintc compile`
    would make. Exit code 5 on disagreement.
    """
)
def verify_command(
    source: Source,
    /,
    *,
    tokens: Annotated[
        int | None,
        at_least(2),
        Parameter(help="Length of the random sequence; default 64."),
    ] = None,
    seed: Annotated[
        int, WHOLE, Parameter(help="Of the random sequence, and of a shape's random weights.")
    ] = 0,
    config: Annotated[ConfigFlags, flat(SIMULATOR)] = ConfigFlags(),
    construction: Annotated[Divided, flat(SIMULATOR)] = Divided(),
    model: Annotated[Found, flat(MODEL)] = Found(),
    common: Annotated[Common, flat(OUTPUT)] = Common(),
) -> None:
    start = compiled(source)
    chosen, built = config.chosen(start), construction.chosen(start)
    same = start is not None and (chosen, built) == (start.config, start.construction())
    as_it_is = same and construction.statistics is None
    from tintc.commands import verify as command

    made = (
        None
        if as_it_is
        else (chosen, {**built, "statistics": construction.statistics, **model.hub()})
    )
    command.run(source, made, tokens=tokens, seed=seed, as_json=common.as_json)


@says(
    """Count parameters, FLOPs and memory from configs alone.

    No weights are read, so the model may be of any size. Several models give a table.
    """
)
def cost_command(
    *sources: Annotated[
        str,
        Parameter(
            name="source",
            required=True,
            help="Hub id, config.json, directory, compiled simulator, .gguf file, tiny-opt, "
            "smollm2-135m, or shape:NAME; no weights are read.",
        ),
    ],
    call: Annotated[CallFlags, flat(OPTIONS)] = CallFlags(),
    predict: Annotated[
        Predict,
        Parameter(
            group=OPTIONS,
            help="Logits of all tokens, or of those alone that are not trained on: what `run` and "
            "`eval` ask for.",
        ),
    ] = "all",
    breakdown: Annotated[
        bool,
        Parameter(
            group=OPTIONS,
            help="Also FLOPs by phase and operator, beside the lower bound that the mathematics "
            "asks for.",
        ),
    ] = False,
    config: Annotated[ConfigFlags, flat(SIMULATOR)] = ConfigFlags(),
    construction: Annotated[Construction, flat(SIMULATOR)] = Construction(),
    model: Annotated[Loading, flat(MODEL)] = Loading(),
    common: Annotated[Common, flat(OUTPUT)] = Common(),
) -> None:
    options: dict[str, Any] = {**call.given(), **model.hub(), "predict": predict}
    options["by_phase"] = breakdown
    asked = []
    for source in sources:
        start = compiled(source)
        own: dict[str, Any] = construction.chosen(start)
        if (dtype := model.torch_dtype(start)) is not None:
            own["dtype"] = dtype
        asked.append((source, config.chosen(start), own))
    from tintc.commands import cost as command

    command.run(asked, as_json=common.as_json, options=options)


@says(
    """Time a simulator against a fine-tuning loop.

    The loop is torch.autograd and SGD, as one would write it by hand; both run in turn on the same
    random tokens. Exit code 5 on disagreement.
    """
)
def bench_command(
    source: Source,
    /,
    *,
    asked: Annotated[BenchFlags, flat(OPTIONS)] = BenchFlags(),
    cut: Annotated[BenchStreamFlags, flat(STREAMS)] = BenchStreamFlags(),
    generated: Annotated[BenchGenerateFlags, flat(OPTIONS)] = BenchGenerateFlags(),
    config: Annotated[ConfigFlags, flat(SIMULATOR)] = ConfigFlags(),
    statistics: Divisors = None,
    model: Annotated[Placed, flat(MODEL)] = Placed(),
    common: Annotated[Common, flat(OUTPUT)] = Common(),
) -> None:
    start = compiled(source)
    chosen = config.chosen(start)
    kind, own = chosen_bench(asked, cut, generated)
    settings: dict[str, Any] = {**own, "options": model.hub()}
    if statistics is not None:
        settings["statistics"] = statistics
    if start is not None and "backend" not in settings and kind == "call":
        settings = {**start.construction(), **settings}
    if (device := model.torch_device()) is not None:
        settings["device"] = device
    if (dtype := model.torch_dtype(start)) is not None:
        settings["dtype"] = dtype
    bench_runner(kind)(source, chosen, settings, as_json=common.as_json)


@says("Show versions and hardware.")
def env_command(
    *,
    calibrate: Annotated[
        bool,
        Parameter(
            group=OPTIONS,
            help="Measure, in up to 3 s, how fast this machine multiplies and copies, and keep it: "
            "optimizations choose by it.",
        ),
    ] = False,
    common: Annotated[Common, flat(OUTPUT)] = Common(),
) -> None:
    from tintc.commands import env as command

    command.run(calibrate=calibrate, as_json=common.as_json)
