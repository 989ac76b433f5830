"""Options of `tintc adapt`. Nothing here imports torch.

Annotations are no strings here, as in options.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from tintc.commands.flags import Flags, flags_of
from tintc.commands.text import Texts
from tintc.ir.errors import UsageError
from tintc.runtime.stream_settings import StreamSettings


@dataclass(frozen=True, kw_only=True)
class Learning(Texts):
    """What text is learned."""

    train_fraction: Annotated[
        float, Parameter(help="Part of the tokens to train on, from the first one on.")
    ] = 1.0

    def check(self) -> None:
        """Raises UsageError also for a fraction that makes no sense, and for many documents."""
        if not 0 < self.train_fraction <= 1:
            raise UsageError(
                f"train-fraction is {self.train_fraction:g}; expected above 0 and at most 1"
            )
        super().check()
        if self.is_many:
            raise UsageError(
                f"{self.file} holds documents, and one text is adapted to; expected a text file"
            )


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Where what was learned goes, and how."""

    output: Annotated[
        Path, Parameter(name=("-o", "--output"), metavar="OUT", help="Directory to write.")
    ]
    format: Annotated[
        Literal["tintc", "hf", "peft"],
        Parameter(
            help="For tintc run DIR --adapted OUT and tintc.load_adapted; a checkpoint for "
            "AutoModelForCausalLM; a LoRA adapter for PeftModel."
        ),
    ] = "tintc"
    rank: Annotated[
        str | None,
        Parameter(
            metavar="N|full",
            help="With --format peft: of each matrix at most; default full, which is exact.",
        ),
    ] = None
    force: Annotated[bool, Parameter(help="Replace what tintc adapt wrote there.")] = False

    def rank_number(self) -> int | Literal["full"]:
        """Raises UsageError for what is no rank, and for one that no format asks for."""
        if self.rank is None or self.rank == "full":
            number: int | Literal["full"] = "full"
        elif self.rank.isascii() and self.rank.isdigit() and int(self.rank) > 0:
            number = int(self.rank)
        else:
            raise UsageError(
                f"rank is {self.rank!r}; expected full, or a whole number of at least 1"
            )
        if self.rank is not None and self.format != "peft":
            raise UsageError(
                f"rank is {self.rank}, and only the format peft has ranks; expected --format peft "
                "too, or no --rank"
            )
        return number


@flags_of(StreamSettings, leave_out=("reset",))
class AdaptStream(Flags):
    """How a text of any length is read."""

    stream: Annotated[
        bool,
        Parameter(
            help="Read the text chunk by chunk, each scored and then trained on: texts of any "
            "length."
        ),
    ] = False

    def settings(self) -> StreamSettings:
        """Of the stream."""
        return StreamSettings(**self.given())

    def check(self, asked: Learning) -> None:
        """Raises UsageError for options that mean nothing together."""
        if self.stream and asked.train_fraction != Learning.train_fraction:
            raise UsageError(
                "--train-fraction with --stream, which trains on every token; expected one of the "
                "two"
            )
        if not self.stream and (names := [f"--{name}" for name in self.given()]):
            raise UsageError(f"{', '.join(names)}: options of --stream; pass --stream too")
