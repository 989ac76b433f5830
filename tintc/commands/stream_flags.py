"""Options of `tintc run` for texts of any length and for many documents. Nothing here imports
torch.

Annotations are no strings here, as in options.py.
"""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tintc.commands.flags import ONCE, Flags, at_least, flags_of
from tintc.commands.text import Reading
from tintc.ir.errors import UsageError
from tintc.runtime.stream_settings import StreamSettings

_ALONE = 8  # documents of one call without --stream


@flags_of(StreamSettings)
class StreamFlags(Flags):
    """How documents are read."""

    stream: Annotated[
        bool,
        Parameter(
            help="Score each chunk of the text, then train on it: texts of any length, and every "
            "token is scored before it is learnt."
        ),
    ] = False
    batch: Annotated[
        int | None,
        at_least(1),
        Parameter(
            help=f"Documents side by side; default 1 with --stream, else up to {_ALONE}.",
        ),
    ] = None
    scores: Annotated[
        Path | None,
        ONCE,
        Parameter(
            metavar="FILE.jsonl",
            help="Of --stream: write a line for each scored token, as it goes.",
        ),
    ] = None
    state: Annotated[
        Path | None,
        ONCE,
        Parameter(
            metavar="FILE",
            help="Of --stream: keep in a file how far it is; the same command goes on from there.",
        ),
    ] = None

    @property
    def side_by_side(self) -> int:
        """Documents of one call, at most."""
        return self.batch or (1 if self.stream else _ALONE)

    def settings(self) -> StreamSettings:
        """Of the stream."""
        return StreamSettings(**self.given())

    def check(self, asked: Reading) -> None:
        """Raises UsageError for options that mean nothing together."""
        if self.stream:
            given = {"train-fraction": asked.train_fraction is not None}
            given["generate"] = asked.generate is not None
            if names := [f"--{name}" for name, is_given in given.items() if is_given]:
                raise UsageError(
                    f"{' and '.join(names)} with --stream, which scores every token and trains on "
                    "it; expected one of the two"
                )
            if self.state is not None and self.state == self.scores:
                raise UsageError(f"{self.state} is both --state and --scores; expected two files")
            return
        names = [f"--{name}" for name in self.given()]
        names += [f"--{name}" for name in ("scores", "state") if getattr(self, name) is not None]
        if names:
            raise UsageError(f"{', '.join(names)}: options of --stream; pass --stream too")
