"""Options of `tintc bench`: of a call, of a stream, of generating. Nothing here imports torch.

Annotations are no strings here, as in options.py.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from tintc.commands.flags import Flags, flags_of
from tintc.evaluate.speed import settings as speed
from tintc.ir.errors import UsageError

Kind = Literal["call", "stream", "generate"]

_SHARED = ("batch", "pairs", "memory", "seed")  # of a call and of a stream
_GENERATED = ("tokens", "batch", "train_fraction", "pairs", "seed")  # of a call and of generating


@flags_of(speed.Options)
class BenchFlags(Flags):
    """What `tintc bench` measures."""


@flags_of(speed.StreamOptions, leave_out=(*_SHARED, "reset"))
class BenchStreamFlags(Flags):
    """How `tintc bench --stream` cuts its texts."""

    stream: Annotated[
        bool,
        Parameter(help="Time a stream, chunk by chunk, against loops that read texts as it does."),
    ] = False


@flags_of(speed.GenerateOptions, leave_out=_GENERATED)
class BenchGenerateFlags(Flags):
    """What `tintc bench --generate` generates."""

    generate: Annotated[
        bool,
        Parameter(
            help="Time what is generated after adapting, one sequence and a batch, against Hugging "
            "Face's generate."
        ),
    ] = False


def chosen_bench(
    asked: BenchFlags, cut: BenchStreamFlags, generated: BenchGenerateFlags
) -> tuple[Kind, dict[str, Any]]:
    """What is measured, and its settings. Raises UsageError for options of another kind."""
    own = asked.given()
    if cut.stream and generated.generate:
        raise UsageError("--stream and --generate are measured apart; expected one of the two")
    for flags, is_asked, name, kind in (
        (cut, cut.stream, "stream", "a stream"),
        (generated, generated.generate, "generate", "generating"),
    ):
        if (given := flags.given()) and not is_asked:
            raise UsageError(
                f"--{_flag(next(iter(given)))} is of {kind}; expected --{name} beside it"
            )
    if cut.stream:
        return "stream", _shared(own, _SHARED, "--stream") | cut.given()
    if generated.generate:
        return "generate", _shared(own, _GENERATED, "--generate") | generated.given()
    return "call", own


def bench_runner(kind: Kind) -> Callable[..., None]:
    """The function that measures and prints."""
    if kind == "stream":
        from tintc.commands import bench_stream

        return bench_stream.run
    if kind == "generate":
        from tintc.commands import bench_generate

        return bench_generate.run
    from tintc.commands import bench

    return bench.run


def _shared(own: dict[str, Any], names: tuple[str, ...], flag: str) -> dict[str, Any]:
    if other := [name for name in own if name not in names]:
        raise UsageError(f"--{_flag(other[0])} is of one call; expected it without {flag}")
    return own


def _flag(name: str) -> str:
    return name.replace("_", "-")
