"""Options of `tintc run` for what is generated, and from what. Nothing here imports torch.

Annotations are no strings here, as in options.py.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tintc.commands.flags import ONCE, WHOLE
from tintc.commands.prompt import Prompt
from tintc.commands.text import Reading
from tintc.ir.errors import UsageError

TOKENS = 128  # that follow a prompt where --generate says nothing


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen, and what ends them besides the end token."""

    temperature: Annotated[
        float | None,
        Parameter(
            metavar="T",
            help="Draw each token from softmax(logits / T); default the likeliest token.",
        ),
    ] = None
    top_p: Annotated[
        float | None,
        Parameter(
            metavar="P",
            help="With --temperature: of the likeliest tokens that make up this probability; "
            "default 1.",
        ),
    ] = None
    seed: Annotated[
        int | None, WHOLE, Parameter(help="With --temperature: of the draws; default 0.")
    ] = None
    stop: Annotated[
        list[str] | None,
        Parameter(
            allow_leading_hyphen=True,
            metavar="TEXT",
            help="End in front of this text; may be repeated.",
        ),
    ] = None

    def named(self) -> list[str]:
        """The options that are given."""
        given = {
            "--temperature": self.temperature,
            "--top-p": self.top_p,
            "--seed": self.seed,
            "--stop": self.stop,
        }
        return [name for name, value in given.items() if value is not None]

    def check(self) -> None:
        """Raises UsageError for values that make no sense, alone or together."""
        if self.temperature is None:
            for name in self.named():
                if name != "--stop":
                    raise UsageError(
                        f"{name} without --temperature, and then the likeliest token is taken; "
                        "expected both"
                    )
        elif not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UsageError(
                f"temperature is {self.temperature:g}; expected a number above 0, or none at all "
                "for the likeliest tokens"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top-p is {self.top_p:g}; expected above 0 and at most 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UsageError(f"seed is {self.seed}; expected 0 or more and below 2**63")
        if self.stop is not None and "" in self.stop:
            raise UsageError("stop is an empty text; expected some characters")


@dataclass(frozen=True, kw_only=True)
class Generating(Sampling):
    """The same, and what is continued."""

    prompt: Annotated[
        str | None,
        ONCE,
        Parameter(
            name="--prompt",
            allow_leading_hyphen=True,
            metavar="TEXT",
            help="Continue this text in place of the one that is trained on: train on a document, "
            f"ask about it. Trains on all of the document and generates {TOKENS} tokens unless "
            "told otherwise.",
        ),
    ] = None
    prompt_file: Annotated[
        str | None,
        ONCE,
        Parameter(
            allow_leading_hyphen=True, metavar="FILE", help="The same from a UTF-8 file, or from -."
        ),
    ] = None
    each: Annotated[
        Path | None,
        ONCE,
        Parameter(
            metavar="FILE.jsonl",
            help='Of many: {"context": ..., "prompt": ...} in each line, and "id" if you like; '
            "trains on each context, continues its prompt, and prints a line of JSON for each.",
        ),
    ] = None

    adapted: Annotated[
        Path | None,
        ONCE,
        Parameter(
            metavar="OUT", help="What tintc adapt wrote, in place of a text: continue --prompt."
        ),
    ] = None

    @property
    def is_asked(self) -> bool:
        """Whether there is a prompt."""
        return self.prompt is not None or self.prompt_file is not None

    def settled(self, reading: Reading) -> Reading:
        """The text with what a prompt means for it. Raises UsageError for options that mean
        nothing together.
        """
        if self.prompt is not None and self.prompt_file is not None:
            raise UsageError("pass one of --prompt TEXT and --prompt-file FILE")
        if self.prompt_file == "-" == reading.file:
            raise UsageError("standard input is both the text and the prompt; expected one of them")
        has_prompt = self.is_asked or self.each is not None
        if self.adapted is not None:
            self._check_adapted(reading)
        if not (has_prompt or reading.generate):
            if names := self.named():
                raise UsageError(
                    f"{', '.join(names)}: nothing is generated; pass --generate N or --prompt TEXT "
                    "too"
                )
            return reading
        self.check()
        if self.each is not None:
            self._check_each(reading)
        if not has_prompt:
            return reading
        return replace(
            reading,
            generate=TOKENS if reading.generate is None else reading.generate,
            train_fraction=1.0 if reading.train_fraction is None else reading.train_fraction,
        )

    def read(self) -> Prompt:
        """The prompt. Raises InputError if it cannot be read or is empty."""
        if self.prompt is not None:
            return Prompt.of_text(self.prompt, "--prompt", kind="prompt")
        assert self.prompt_file is not None
        return Prompt.of_any_file(self.prompt_file, kind="prompt")

    def names(self) -> Iterator[str]:
        """All options of generation that are given, but --generate."""
        given = {"--prompt": self.prompt, "--prompt-file": self.prompt_file, "--each": self.each}
        given["--adapted"] = self.adapted
        yield from (name for name, value in given.items() if value is not None)
        yield from self.named()

    def _check_adapted(self, reading: Reading) -> None:
        given = {
            "--text": reading.text,
            "--file": reading.file,
            "--train-fraction": reading.train_fraction,
            "--tokens": reading.tokens,
            "--inner-lr": reading.inner_lr,
            "--each": self.each,
        }
        _refuse(given, "--adapted, which is trained already")
        if not self.is_asked:
            raise UsageError("--adapted without a text to continue; pass --prompt TEXT too")

    def _check_each(self, reading: Reading) -> None:
        given = {
            "--text": reading.text,
            "--file": reading.file,
            "--prompt": self.prompt,
            "--prompt-file": self.prompt_file,
        }
        _refuse(given, "--each, whose file has a context and a prompt in each line")


def _refuse(given: Mapping[str, object], beside: str) -> None:
    """Raises UsageError for options that are given beside another."""
    if names := [name for name, value in given.items() if value is not None]:
        raise UsageError(f"{' and '.join(names)} with {beside}; expected one of the two")
