"""`tintc eval`, `tintc ablate` and `tintc statistics`, which read texts: what they take on the
command line. Everything that imports torch is imported inside them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from tintc.commands.compiled import Compiled, compiled
from tintc.commands.flags import ONCE, Flags, flags_of
from tintc.commands.help import says
from tintc.commands.options import (
    MODEL,
    OPTIONS,
    OUTPUT,
    SIMULATOR,
    Chunks,
    Common,
    ConfigFlags,
    DividedConfig,
    FromFile,
    Placed,
    Source,
    flat,
    shown_by_preset,
)
from tintc.evaluate import ablation_settings, language_settings, settings, stream_settings
from tintc.ir.config import SimulatorConfig
from tintc.ir.described import flag_of
from tintc.ir.errors import UsageError
from tintc.runtime.stream_settings import StreamSettings

Data = Annotated[
    str,
    ONCE,
    Parameter(
        metavar="NAME|FILE",
        help="wikitext-2, wikitext-103, c4, a text file, or a JSONL file of {text}.",
    ),
]
Choose = Annotated[
    str | None,
    ONCE,
    Parameter(
        metavar="FILE",
        help="Text to choose learning rates on; default the hub's other split, or the first "
        "quarter of FILE.",
    ),
]
Output = Annotated[
    Path | None,
    Parameter(
        name=("-o", "--output"),
        metavar="DIR",
        group=OUTPUT,
        help="Results as they come, report and plot; run again to go on after an interruption.",
    ),
]

_EVERYONE = {
    "inner_lr": "Inner learning rate of everyone; then none is chosen. That of a compiled "
    "simulator is taken, unless this is none."
}


def _no_rate(each: Any) -> str:
    return "" if each.name == "inner_lr" else shown_by_preset(each)


@flags_of(SimulatorConfig, help=_EVERYONE, shown=_no_rate, or_none=("inner_lr",))
class LanguageConfig(DividedConfig):
    """Every field of SimulatorConfig, over each of the presets."""


@flags_of(language_settings.Settings, leave_out=("inner_lr", "steps", "layers", "changes"))
class LanguageFlags(Flags):
    """What `tintc eval lm` measures."""


_SHARED = tuple(each.name for each in dataclasses.fields(language_settings.Learning))


@flags_of(StreamSettings)
class CutFlags(LanguageFlags):
    """The same, and how a stream is cut."""


@flags_of(stream_settings.Settings, leave_out=(*_SHARED, "cut"))
class BothProtocols(CutFlags):
    """The same, and what else only a stream has."""

    protocol: Annotated[
        Literal["split", "stream"],
        Parameter(
            help="split: train on a sequence's first part, score the rest. stream: score each "
            "chunk of a document, train on it, go on."
        ),
    ] = "split"


@says(
    """Perplexity of text that the model is trained on as it reads.

    For each training fraction, or with --protocol stream for whole documents: the unmodified model,
    true dynamic evaluation (torch.autograd, same budget), the simulator, and two controls: its
    gradient with the sign flipped, and training on the same tokens in random order.
    """
)
def lm_command(
    source: Source,
    /,
    *,
    data: Data,
    choose: Choose = None,
    asked: Annotated[BothProtocols, flat(OPTIONS)] = BothProtocols(),
    config: Annotated[LanguageConfig, flat(SIMULATOR)] = LanguageConfig(),
    model: Annotated[Placed, flat(MODEL)] = Placed(),
    output: Output = None,
    common: Annotated[Common, flat(OUTPUT)] = Common(),
) -> None:
    given = asked.given()
    _check_protocol(asked.protocol, given)
    start = None if "presets" in given else compiled(source)
    given = {**over_presets(config, ("inner_lr", "steps", "layers"), start), **given}
    how = {**model.everything(), "statistics": config.statistics}
    from tintc.commands import evaluate as command

    run = command.run_stream if asked.protocol == "stream" else command.run_lm
    run(source, data, choose, given, how, output, as_json=common.as_json)


_OF_SPLIT = (language_settings.Settings,)
_OF_STREAM = (StreamSettings, stream_settings.Settings)


def _check_protocol(protocol: str, given: dict[str, Any]) -> None:
    """Raises UsageError for options of the other protocol."""
    other = "split" if protocol == "stream" else "stream"
    fields = [
        each
        for settings in (_OF_SPLIT if other == "split" else _OF_STREAM)
        for each in dataclasses.fields(settings)
        if each.name not in _SHARED
    ]
    wrong = ", ".join(flag_of(each) for each in fields if each.name in given)
    if wrong:
        raise UsageError(
            f"{wrong} belong to protocol {other}; expected --protocol {other}, or leave {wrong} out"
        )


@flags_of(
    SimulatorConfig,
    leave_out=("steps", "layers"),
    help=_EVERYONE,
    shown=_no_rate,
    or_none=("inner_lr",),
)
class ClassifyConfig(DividedConfig):
    """Every field of SimulatorConfig over each of the presets, but those of a budget."""

    elsewhere = "which --budgets tells"


@flags_of(settings.Settings, leave_out=("inner_lr", "changes"))
class ClassifyFlags(Flags):
    """What `tintc eval classify` measures."""


@says(
    """Accuracy of text classification, zero-shot and with demonstrations.

    For each task: the unmodified model, true dynamic evaluation (torch.autograd, same budgets), the
    simulator, and two controls: its gradient with the sign flipped, and training on shuffled
    labels. Rate, budget, template and calibration are chosen on training data.
    """
)
def classify_command(
    source: Source,
    /,
    *,
    asked: Annotated[ClassifyFlags, flat(OPTIONS)] = ClassifyFlags(),
    config: Annotated[ClassifyConfig, flat(SIMULATOR)] = ClassifyConfig(),
    model: Annotated[Placed, flat(MODEL)] = Placed(),
    output: Output = None,
    common: Annotated[Common, flat(OUTPUT)] = Common(),
) -> None:
    given = asked.given()
    start = None if "presets" in given else compiled(source)
    budgets = _budgets(start) if start is not None and "budgets" not in given else {}
    given = {**over_presets(config, ("inner_lr",), start), **budgets, **given}
    how = {**model.everything(), "statistics": config.statistics}
    from tintc.commands import evaluate as command

    command.run_classify(source, given, how, output, as_json=common.as_json)


def _budgets(start: Compiled) -> dict[str, Any]:
    """The budget that a compiled simulator has. Raises UsageError where none stands for it."""
    budget = start.budget(settings.DEPTH)
    if start.config.train:
        raise UsageError(
            "this simulator trains what patterns name, and budgets count blocks; compile it with "
            "layers, or pass the model itself"
        )
    if budget is None:
        raise UsageError(
            f"this simulator trains {start.config.layers} of {start.blocks} blocks, which is no "
            f"whole number of {settings.DEPTH} parts; pass --budgets LxS"
        )
    return {"budgets": (budget,)}


def over_presets(
    config: FromFile, own: tuple[str, ...], start: Compiled | None = None
) -> dict[str, Any]:
    """Settings of an experiment on several presets: the fields of theirs that it has itself, the
    file's preset, and all other fields as changes of every preset. Without a preset a compiled
    simulator is where they start, its rate included.
    """
    fields = config.fields()
    if start is not None and "preset" not in fields:
        begun = start.over_preset()
        fields = {k: v for k, v in begun.items() if k not in config._left_out} | fields
    found = {name: fields.pop(name) for name in own if name in fields}
    if "preset" in fields:
        found["presets"] = (fields.pop("preset"),)
    return {**found, "changes": fields}


_SET_BY_VARIANTS = tuple(name for name in ablation_settings.VARIED if name != "inner_lr")


@flags_of(
    SimulatorConfig,
    leave_out=_SET_BY_VARIANTS,
    help=_EVERYONE,
    shown=_no_rate,
    or_none=("inner_lr",),
)
class AblationConfig(DividedConfig):
    """Every field of SimulatorConfig but what the variants are about."""

    elsewhere = "which the variants of an ablation set"


@flags_of(ablation_settings.Asked, leave_out=("inner_lr",))
class AblationFlags(Flags):
    """What `tintc ablate` measures."""


@says(
    """Measure what each approximation costs.

    In its update, as cosine and relative error against the exact gradient, and in the perplexity
    after it: each approximation alone, all of the paper's together, and lower float formats.
    """
)
def ablate_command(
    source: Source,
    /,
    *,
    data: Data,
    choose: Choose = None,
    asked: Annotated[AblationFlags, flat(OPTIONS)] = AblationFlags(),
    config: Annotated[AblationConfig, flat(SIMULATOR)] = AblationConfig(),
    model: Annotated[Placed, flat(MODEL)] = Placed(),
    output: Output = None,
    common: Annotated[Common, flat(OUTPUT)] = Common(),
) -> None:
    fields = config.fields()
    if (start := compiled(source)) is not None:
        begun = start.config.to_dict()
        fields = {k: v for k, v in begun.items() if k not in config._left_out} | fields
    rate = fields.pop("inner_lr", None)
    base = SimulatorConfig.exact(**fields)
    how = {**model.everything(start), "statistics": config.statistics}
    from tintc.commands import ablate as command

    given = ablation_settings.Asked(**asked.given(), inner_lr=rate)
    command.run(source, data, choose, given, base, how, output, as_json=common.as_json)


@says(
    """Gather what the optimizer rms divides by.

    The root mean square of each weight's gradient over the chunks of a text, which should not be
    the one that is evaluated: of a hub data set its other split is read. `--optimizer rms
    --statistics FILE` takes it.
    """
)
def statistics_command(
    source: Source,
    /,
    *,
    data: Data,
    output: Annotated[
        Path, Parameter(name=("-o", "--output"), metavar="FILE", help="File to write.")
    ],
    force: Annotated[bool, Parameter(help="Replace a file that exists.")] = False,
    chunks: Annotated[Chunks, flat(OPTIONS)],
    config: Annotated[ConfigFlags, flat(SIMULATOR)] = ConfigFlags(),
    model: Annotated[Placed, flat(MODEL)] = Placed(),
    common: Annotated[Common, flat(OUTPUT)] = Common(),
) -> None:
    start = compiled(source)
    chosen, how = config.chosen(start), model.everything(start)
    from tintc.commands import statistics as command

    command.run(source, data, output, chosen, chunks, how, force=force, as_json=common.as_json)
