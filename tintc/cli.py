"""The command line. torch and transformers are imported inside commands, so that --help is
quick.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Group, Parameter

from tintc import interrupts
from tintc.commands import entries, experiments, streams
from tintc.commands.console import Verbosity, configure_logging, err, out
from tintc.commands.help import PlainHelp, says
from tintc.commands.options import COMMON, OPTIONS, Common
from tintc.commands.refused import as_flags, one_line
from tintc.ir.errors import TintcError, UsageError
from tintc.version import __version__

BUILD, LOOK, USE, MEASURE, OTHER = (
    Group(name, sort_key=place)
    for place, name in enumerate(
        ("Build a simulator", "Look at it", "Use it", "Measure it", "Other")
    )
)
_ARGUMENTS = Group("Arguments", sort_key=0)
_OUT_OF_MEMORY = "out of memory; use a smaller model, a shorter text or a smaller dtype"


def _app(name: str, help: str, commands: Group, **more: Any) -> App:
    return App(
        name=name,
        help=help,
        help_format="plaintext",
        help_formatter=PlainHelp(),
        help_flags=["--help", "-h"],
        group_arguments=_ARGUMENTS,
        group_parameters=OPTIONS,
        group_commands=commands,
        # The last of several wins; switches have no --no-NAME unless they ask for one.
        default_parameter=Parameter(allow_repeating=True, negative=()),
        result_action="return_value",
        print_error=False,
        exit_on_error=False,
        suppress_keyboard_interrupt=False,
        **more,
    )


app = _app(
    "tintc",
    "A graph compiler from language models to simulators that fine-tune them inside one forward "
    "pass.",
    OTHER,
    version=f"tintc {__version__}",
    console=out,
)
measured = _app(
    "eval",
    "Measure language modelling or classification.",
    Group("Commands", sort_key=0),
    version_flags=[],
    group=MEASURE,
    sort_key=2,
)
app.command(entries.compile_command, name="compile", group=BUILD, sort_key=0)
app.command(entries.export_command, name="export", group=BUILD, sort_key=1)
app.command(experiments.statistics_command, name="statistics", group=BUILD, sort_key=2)
app.command(entries.inspect_command, name="inspect", group=LOOK, sort_key=0)
app.command(entries.page_command, name="page", group=LOOK, sort_key=1)
app.command(entries.cost_command, name="cost", group=LOOK, sort_key=2)
app.command(entries.env_command, name="env", group=LOOK, sort_key=3)
app.command(entries.run_command, name="run", group=USE, sort_key=0)
app.command(entries.adapt_command, name="adapt", group=USE, sort_key=1)
app.command(entries.verify_command, name="verify", group=MEASURE, sort_key=0)
app.command(entries.bench_command, name="bench", group=MEASURE, sort_key=1)
app.command(measured)
app.command(experiments.ablate_command, name="ablate", group=MEASURE, sort_key=3)
measured.command(experiments.lm_command, name="lm", sort_key=0)
measured.command(experiments.classify_command, name="classify", sort_key=1)


@app.command(name="--install-completion", group=OTHER, version_flags=[])
@says(
    """Have the shell complete commands and options.

    Writes a script, and a line that reads it into the shell's startup file if the script goes where
    the shell looks.
    """
)
def install_completion(
    *,
    shell: Annotated[
        Literal["bash", "zsh", "fish", "powershell"] | None,
        Parameter(help="Default the one that runs this command."),
    ] = None,
    output: Annotated[
        Path | None,
        Parameter(
            name=("-o", "--output"),
            metavar="FILE",
            help="Where its script goes; default where the shell looks.",
        ),
    ] = None,
) -> None:
    from cyclopts.completion.detect import ShellDetectionError

    try:
        written = app.install_completion(shell=shell, output=output, add_to_startup=output is None)
    except ShellDetectionError as error:
        raise UsageError(
            "it is not clear which shell this is; pass --shell bash, zsh, fish or powershell"
        ) from error
    out.print(f"{written}: start the shell anew to complete `tintc`", markup=False)


def _common_last(arguments: Sequence[str]) -> list[str]:
    """What every command takes, --json and -q for example, may stand in front of its name too;
    where none is named, there is nobody to take it.
    """
    rest, names, moved, commands = list(arguments), [], [], app
    while rest:
        if rest[0] in commands and not rest[0].startswith("-"):
            commands = commands[rest[0]]
            names.append(rest.pop(0))
        elif rest[0] in COMMON:
            moved.append(rest.pop(0))
        else:
            break
    return [*names, *(moved if commands.default_command is not None else ()), *rest]


def call(arguments: Sequence[str]) -> None:
    """Runs one command line. Raises what the command raises, and CycloptsError for a command line
    that makes no sense.
    """
    command, bound, _ = app.parse_args(_common_last(arguments) or ["--help"])
    for value in bound.arguments.values():
        if isinstance(value, Common):
            value.apply()
    command(*bound.args, **bound.kwargs)


def main() -> None:
    """Entry point: one line on stderr and an exit code for every error; a traceback only with
    --debug.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    streams.occupy()
    configure_logging()
    interrupts.watch()
    try:
        if sys.stdout is None:
            raise TintcError(streams.CLOSED)
        call(sys.argv[1:])
        interrupts.check()
        with streams.writing():
            sys.stdout.flush()
    except SystemExit:
        raise
    except BaseException as error:
        message, code = _ending(error)
        if isinstance(error, streams.OutputLost):
            streams.abandon()
        if message is None:
            sys.exit(code)
        if Verbosity.debug:
            if code != interrupts.EXIT_CODE:
                raise
            traceback.print_exc()
        err.print("error: " + " ".join(message.split()), markup=False)
        interrupts.forget()
        sys.exit(code)


def _ending(error: BaseException) -> tuple[str | None, int]:
    """The line, if any, and the exit code of a command that raised this."""
    if interrupts.came() or isinstance(error, (KeyboardInterrupt, EOFError)):
        return interrupts.MESSAGE, interrupts.EXIT_CODE
    if isinstance(error, streams.OutputLost):
        if isinstance(error.__cause__, BrokenPipeError):  # `tintc ... | head`: it has enough
            return None, 0
        reason = getattr(error.__cause__, "strerror", None)
        return f"cannot write to standard output: {reason or error.__cause__}", 1
    if isinstance(error, CycloptsError):
        return one_line(error, app), 2
    if isinstance(error, TintcError):
        return as_flags(str(error), app), error.exit_code
    torchs = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    if torchs or isinstance(error, MemoryError):
        return _OUT_OF_MEMORY, 4
    reason = " ".join(str(error).split()) or "no message"
    message = f"unexpected {type(error).__name__}: {reason[:300]}"
    return f"{message} (--debug shows where; please report it)", 1


if __name__ == "__main__":
    main()
