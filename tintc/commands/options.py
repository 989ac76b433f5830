"""Options that several commands share. Nothing here imports torch before it is needed.

Annotations are no strings here: classes of other modules inherit these fields, and cyclopts would
look the names up there.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from cyclopts import Group, Parameter

from tintc.commands.compiled import Compiled
from tintc.commands.console import Verbosity, configure_logging
from tintc.commands.flags import ONCE, Flags, at_least, flags_of, shown_default
from tintc.ir.call_sizes import CallShape
from tintc.ir.config import PRESETS, Preset, SimulatorConfig
from tintc.ir.errors import UsageError
from tintc.ir.named import Backend, Check, Islands, Number, Share

if TYPE_CHECKING:
    import torch

# The parts of a command's help, in this order.
OPTIONS, GENERATION, STREAMS, SIMULATOR, MODEL, OUTPUT = (
    Group(name, sort_key=place)
    for place, name in enumerate(
        (
            "Options",
            "Generation",
            "Streams and many documents",
            "Simulator",
            "Model",
            "Output and messages",
        ),
        1,
    )
)


def flat(group: Group) -> Parameter:
    """Of a dataclass whose fields are options of the command itself."""
    return Parameter(name="*", group=group)


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every command has."""

    as_json: Annotated[
        bool, Parameter(name="--json", help="Print one JSON document and nothing else.")
    ] = False
    quiet: Annotated[bool, Parameter(name=("--quiet", "-q"), help="No progress and no hints.")] = (
        False
    )
    verbose: Annotated[
        bool, Parameter(name=("--verbose", "-v"), help="Log each pass on stderr.")
    ] = False
    debug: Annotated[bool, Parameter(help="Show tracebacks.")] = False

    def apply(self) -> None:
        """Says what is printed on stderr from here on."""
        Verbosity.quiet, Verbosity.verbose = self.quiet, self.verbose
        Verbosity.debug = self.debug
        configure_logging()


# As they are written.
COMMON = ("--json", "--quiet", "-q", "--verbose", "-v", "--debug")


@dataclass(frozen=True, kw_only=True)
class Found:
    """Where a model comes from."""

    revision: Annotated[str | None, Parameter(help="Branch, tag or commit of a hub model.")] = None
    cache_dir: Annotated[Path | None, Parameter(help="Where hub files are kept.")] = None
    offline: Annotated[bool, Parameter(help="Use cached files only.")] = False
    trust_remote_code: Annotated[bool, Parameter(help="Run code that comes with a hub model.")] = (
        False
    )

    def hub(self) -> dict[str, Any]:
        """Options of `load_source`, but for the number type."""
        return {
            "revision": self.revision,
            "cache_dir": None if self.cache_dir is None else str(self.cache_dir),
            "offline": self.offline,
            "trust_remote_code": self.trust_remote_code,
        }


@dataclass(frozen=True, kw_only=True)
class Loading(Found):
    """The same, and in what numbers."""

    dtype: Annotated[
        Number | None,
        Parameter(help="Of the weights; default float32, of a compiled simulator as stored."),
    ] = None

    def torch_dtype(self, start: Compiled | None = None) -> "torch.dtype | None":
        """What is given, or what a compiled simulator has."""
        from tintc.compiler.frontend.devices import dtype_of

        return dtype_of(self.dtype or (start.dtype if start else None))


Divisors = Annotated[
    Path | None,
    ONCE,
    Parameter(
        name="--statistics",
        metavar="FILE",
        group=SIMULATOR,
        help="Of optimizer rms: what `tintc statistics` gathered; default what a compiled "
        "simulator has.",
    ),
]
DEVICE = Parameter(help="cpu, cuda, cuda:1, ...; default cpu.")


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where a compiled simulator runs, and in what numbers."""

    device: Annotated[str | None, DEVICE] = None
    dtype: Annotated[Number | None, Parameter(help="Of the weights; default as stored.")] = None

    def chosen(self) -> "tuple[str | None, torch.dtype | None]":
        """Raises UsageError for a device that this machine does not have."""
        from tintc.compiler.frontend.devices import device_of, dtype_of

        return device_of(self.device), dtype_of(self.dtype)


@dataclass(frozen=True, kw_only=True)
class Placed(Loading):
    """The same, and where it runs."""

    device: Annotated[str | None, DEVICE] = None

    def torch_device(self) -> str | None:
        """Raises UsageError for a device that this machine does not have."""
        from tintc.compiler.frontend.devices import device_of

        return device_of(self.device)

    def everything(self, start: Compiled | None = None) -> dict[str, Any]:
        """Options of `Auxiliary`."""
        return {"device": self.torch_device(), "dtype": self.torch_dtype(start), **self.hub()}


@dataclass(frozen=True, kw_only=True)
class Construction:
    """How a simulator is built."""

    backend: Annotated[
        Backend | None,
        Parameter(help="fused, or transformer: the paper's construction.", show_default="fused"),
    ] = None
    share: Annotated[
        Share | None,
        Parameter(
            help="Who shares structural constants: all blocks, or all equal modules.",
            show_default="none",
        ),
    ] = None

    def chosen(self, start: Compiled | None) -> dict[str, Any]:
        """What is given, else what a compiled simulator has, else the default."""
        known = start.construction() if start else {"backend": "fused", "share": "none"}
        given = {"backend": self.backend, "share": self.share}
        if self.backend is not None and self.backend != known["backend"]:
            known["share"] = "none"  # what one back end shares, another has not
        return known | {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Divided(Construction):
    """The same, and what its optimizer divides by."""

    statistics: Divisors = None


@dataclass(frozen=True, kw_only=True)
class Checked(Divided):
    """The same, what is checked of it, and what may be left to torch."""

    islands: Annotated[
        Islands,
        Parameter(
            help="Operators that no pass recognises: differentiated by torch (allow), the same "
            "with a list of them (report), or refused."
        ),
    ] = "allow"

    check: Annotated[
        Check | None,
        Parameter(
            help="Against the model itself: its logits (forward), or also one exact step (step); "
            "default step up to 40 M parameters."
        ),
    ] = None


@flags_of(CallShape)
class CallFlags(Flags):
    """How large a call is."""


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """Over what gradients are gathered."""

    chunk: Annotated[int, at_least(1), Parameter(help="Targets of a chunk, one gradient each: C.")]
    context: Annotated[
        int, at_least(0), Parameter(help="Tokens before a chunk that it may look at: L.")
    ]
    tokens: Annotated[
        int | None, at_least(2), Parameter(help="Cut the text to so many tokens.")
    ] = None
    batch: Annotated[
        int, at_least(1), Parameter(help="Chunks of one call; results do not depend on it.")
    ] = 1


def shown_by_preset(each: dataclasses.Field[Any]) -> str:
    """A config field's default, of every preset where they differ."""
    values = {name: getattr(SimulatorConfig.preset(name), each.name, None) for name in PRESETS}
    if len(set(values.values())) == 1:
        return shown_default(each)
    return ", ".join(f"{value} ({name})" for name, value in values.items())


@dataclass(frozen=True, kw_only=True)
class FromFile(Flags):
    """Config fields from a JSON file, with flags over them.

    elsewhere: where fields that are left out come from; a file cannot set them either.
    """

    elsewhere: ClassVar[str] = ""
    config: Annotated[
        Path | None,
        Parameter(metavar="FILE", help="JSON file of the fields below, and of preset; flags win."),
    ] = None

    def fields(self) -> dict[str, Any]:
        """The file's fields and preset, and the flags that were given over them. Raises UsageError
        for a file that cannot be read.
        """
        if self.config is None:
            return self.given()
        try:
            found = json.loads(self.config.expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read the config {self.config}: {error}") from error
        if not isinstance(found, dict):
            raise UsageError(
                f"the config {self.config} holds a {type(found).__name__}; expected a JSON object "
                "of config fields"
            )
        refused = [name for name in found if name in self._left_out]
        if refused:
            raise UsageError(
                f"the config {self.config} sets {', '.join(refused)}, {self.elsewhere}; leave "
                "that out"
            )
        return {**found, **self.given()}


@dataclass(frozen=True, kw_only=True)
class DividedConfig(FromFile):
    """The same, and what its optimizer divides by."""

    statistics: Divisors = None


@flags_of(SimulatorConfig, shown=shown_by_preset)
class ConfigFlags(FromFile):
    """Every field of SimulatorConfig."""

    preset: Annotated[
        Preset | None,
        Parameter(
            help="Where the fields below start; default paper, or what a compiled simulator has."
        ),
    ] = None

    def chosen(self, start: Compiled | None = None) -> SimulatorConfig:
        """The preset, or without one the config of a compiled simulator, then the file's fields,
        then the flags.
        """
        fields = self.fields()
        named = self.preset or fields.pop("preset", None)
        fields.pop("preset", None)
        if named is None and start is not None:
            return SimulatorConfig.from_dict({**start.config.to_dict(), **fields})
        return SimulatorConfig.preset(named or "paper", **fields)


Source = Annotated[
    str,
    Parameter(
        name="source",
        help="Hub id, directory, compiled simulator, .gguf file, tiny-opt, smollm2-135m, or "
        "shape:NAME (shape:opt-125m).",
    ),
]
Artifact = Annotated[Path, Parameter(name="DIR", help="Directory that `tintc compile` wrote.")]
