"""tintc eval: experiments over many sequences, whose results are kept as they come."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tintc.commands import console
from tintc.commands.sheet import Sheet
from tintc.compiler.gradient_statistics import chosen_statistics
from tintc.evaluate import classification, figure, language, reports, stream, tables
from tintc.evaluate.auxiliary import Auxiliary
from tintc.evaluate.hub_rows import Access
from tintc.evaluate.language_settings import Learning
from tintc.evaluate.language_settings import Settings as LanguageSettings
from tintc.evaluate.settings import Settings
from tintc.evaluate.store import Store
from tintc.evaluate.stream_settings import Settings as StreamedSettings
from tintc.evaluate.text import HUB_TEXTS, Text, read_text
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import UsageError
from tintc.ir.named import FETCH
from tintc.runtime.stream_settings import StreamSettings

Experiment = Callable[[Auxiliary, Store, Callable[[str, int, int], None]], dict[str, Any]]


def run_lm(
    source: str,
    data: str,
    choose: str | None,
    settings: dict[str, Any],
    how: dict[str, Any],
    output: Path | None,
    *,
    as_json: bool,
) -> None:
    """Prints and keeps the table of `tintc.evaluate.language.run`."""
    chosen = LanguageSettings(**settings)
    text, choosing = _texts(source, data, choose, chosen, how)
    measure(
        source,
        how,
        output,
        lambda auxiliary, store, show: language.run(auxiliary, text, choosing, chosen, store, show),
        as_json,
    )


def run_stream(
    source: str,
    data: str,
    choose: str | None,
    settings: dict[str, Any],
    how: dict[str, Any],
    output: Path | None,
    *,
    as_json: bool,
) -> None:
    """Prints and keeps the table of `tintc.evaluate.stream.run`."""
    names = [each.name for each in dataclasses.fields(StreamSettings)]
    cut = StreamSettings(**{name: settings.pop(name) for name in names if name in settings})
    chosen = StreamedSettings(**settings, cut=cut)
    text, choosing = _texts(source, data, choose, chosen, how)
    measure(
        source,
        how,
        output,
        lambda auxiliary, store, show: stream.run(auxiliary, text, choosing, chosen, store, show),
        as_json,
    )


def _texts(
    source: str, data: str, choose: str | None, settings: Learning, how: dict[str, Any]
) -> tuple[Text, Text | None]:
    """(what is evaluated, what rates are chosen on), when all that needs no model is checked."""
    settings.check()
    check_statistics(source, how["statistics"], map(settings.config, settings.presets))
    access = access_of(how)
    text = read_text(data, access=access)
    return text, other_text(data, choose, access, settings.inner_lr)


def check_statistics(
    source: str, statistics: Path | None, configs: Iterable[SimulatorConfig]
) -> None:
    """Raises what `chosen_statistics` does, before anything is loaded."""
    for config in configs:
        chosen_statistics(source, statistics, config)


def access_of(how: dict[str, Any], before: Callable[[], None] = lambda: None) -> Access:
    """How data are fetched: as the model is. how: options of `Auxiliary`."""
    return Access(cache_dir=how["cache_dir"], offline=how["offline"], before=before)


def other_text(
    data: str, choose: str | None, access: Access, inner_lr: float | None
) -> Text | None:
    """The text to choose rates on: what was named, or the other split of a hub data set. Raises
    UsageError where nothing is chosen.
    """
    if inner_lr is not None and choose is not None:
        raise UsageError(
            f"--inner-lr {inner_lr:g} leaves nothing to choose; leave --choose out, or --inner-lr"
        )
    if inner_lr is not None or (choose is None and data not in HUB_TEXTS):
        return None
    return read_text(choose or data, choose=choose is None, access=access)


def run_classify(
    source: str,
    settings: dict[str, Any],
    how: dict[str, Any],
    output: Path | None,
    *,
    as_json: bool,
) -> None:
    """Prints and keeps the table of `tintc.evaluate.classification.run`."""
    chosen = Settings(**settings)
    configs = (SimulatorConfig.preset(preset, **chosen.changes) for preset in chosen.presets)
    check_statistics(source, how["statistics"], configs)
    measure(
        source,
        how,
        output,
        lambda auxiliary, store, show: classification.run(
            auxiliary, chosen, store, show, access_of(how, lambda: show(FETCH, 0, 0))
        ),
        as_json,
    )


def measure(
    source: str, how: dict[str, Any], output: Path | None, experiment: Experiment, as_json: bool
) -> None:
    """Loads the model, runs the experiment with its results kept in `output`, and shows the
    report.
    """
    folder = None if output is None else reports.prepare_directory(output.expanduser())
    start = time.monotonic()
    with console.work() as show:
        auxiliary = Auxiliary(source, progress=show, **how)
        store = Store(
            None if folder is None else folder / reports.UNITS, {"model": auxiliary.identity}
        )
        with resumable(store, folder):
            report = experiment(auxiliary, store, show)
    finish(report, store, folder, start, as_json)


@contextmanager
def resumable(store: Store, folder: Path | None) -> Iterator[None]:
    """Says, on an interruption, how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if folder is not None and not console.Verbosity.quiet:
            console.err.print(
                f"{store.computed} results of this run are kept in {folder}; the same command goes "
                "on there",
                markup=False,
            )
        raise


def finish(
    report: dict[str, Any], store: Store, folder: Path | None, start: float, as_json: bool
) -> None:
    """Writes and shows a report."""
    report |= reports.about(
        shlex.join(["tintc", *sys.argv[1:]]), time.monotonic() - start, report["model"]["device"]
    )
    report["units"] = {"found": store.found, "computed": store.computed}
    if folder is not None:
        reports.write(folder, report)
    if as_json:
        console.print_json(report)
        return
    show_table(tables.TABLES[report["experiment"]](report))
    if not console.Verbosity.quiet:
        console.err.print(_where(folder, store), markup=False)


def show_table(table: tables.Table) -> None:
    """The report's table on the terminal."""
    sheet = Sheet(*table.header, numeric=table.numeric)
    for row in table.rows:
        sheet.add_row(*row)
    console.print_text(table.title, style="bold")
    console.print_table(sheet)
    for note in table.notes:
        console.print_text(note)


def _where(folder: Path | None, store: Store) -> str:
    counted = f"{store.computed} results computed" + (
        f", {store.found} found from an earlier run" if store.found else ""
    )
    if folder is None:
        return f"{counted}; nothing was kept: -o DIR keeps results, report and plot"
    picture = ", plot.png" if figure.available() else "; for a picture: pip install 'tintc[plot]'"
    return f"{counted}; kept in {folder}: {reports.UNITS}, report.json, report.md{picture}"
