"""What `tintc run` does with texts and results, whoever computes: torch or onnxruntime. Nothing
here imports torch.

Annotations are no strings here, as in options.py.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

from cyclopts import Parameter

from tintc.commands import console
from tintc.commands.flags import ONCE, at_least
from tintc.commands.prompt import Prompt, Tokenize, is_json_lines
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import InputError, NumericalError, UsageError
from tintc.ir.rule_values import rule_text


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What text is read, and at what rate it is trained on."""

    text: Annotated[str | None, ONCE, Parameter(allow_leading_hyphen=True, help="The text.")] = None
    file: Annotated[
        str | None,
        ONCE,
        Parameter(
            allow_leading_hyphen=True,
            metavar="FILE",
            help="A UTF-8 text file, or - as above; a directory of *.txt files, or FILE.jsonl with "
            '{"text": ...} in each line, for many documents.',
        ),
    ] = None
    tokens: Annotated[
        int | None,
        at_least(2),
        Parameter(help="Cut the text to so many tokens."),
    ] = None
    inner_lr: Annotated[
        float | None, Parameter(help="Inner learning rate; default the compiled one.")
    ] = None

    def from_stdin(self) -> Self:
        """The same of standard input. Raises UsageError if there is another text."""
        if self.file is not None or self.text is not None:
            raise UsageError("pass one of --text TEXT, --file FILE, or - to read standard input")
        return replace(self, file="-")

    @property
    def is_many(self) -> bool:
        """Whether the file holds documents, not one text."""
        file = self.file if self.text is None else None
        return file is not None and (is_json_lines(file) or Path(file).expanduser().is_dir())

    def check(self) -> None:
        """Raises UsageError for a rate that makes no sense, or unless there is one source of
        texts.
        """
        if self.inner_lr is not None and not math.isfinite(self.inner_lr):
            raise UsageError(f"inner-lr is {self.inner_lr:g}; expected a finite number")
        if (self.text is None) == (self.file is None):
            raise UsageError("pass one of --text TEXT, --file FILE, or - to read standard input")

    def prompt(self) -> Prompt:
        """The text. Raises what `check` raises, and InputError if it cannot be read."""
        self.check()
        if self.text is not None:
            return Prompt.of_text(self.text)
        assert self.file is not None
        return Prompt.of_file(self.file)

    def ids(
        self, prompt: Prompt, tokenize: Tokenize, limit: int | None, *, streams: bool = False
    ) -> list[int]:
        """As many token ids as are asked for, or all. limit: of the simulator. streams: whether
        the command has --stream, which has no limit. Raises InputError
        for a text that is too short, or longer than the simulator takes.
        """
        enough = None if limit is None else limit + 1  # to see that there are too many
        ids = prompt.ids(tokenize, enough if self.tokens is None else self.tokens)
        if limit is not None and len(ids) > limit:
            count = f"{len(ids)}" if prompt.is_whole else f"more than {limit}"
            raise InputError(
                f"the {prompt.kind} has {count} tokens; this simulator takes {limit}: pass "
                f"--tokens {limit} to cut it{', or --stream to read all of it' if streams else ''}"
            )
        if len(ids) < 2:
            raise InputError(f"the {prompt.kind} has {len(ids)} token; expected at least 2")
        return ids


@dataclass(frozen=True, kw_only=True)
class Reading(Texts):
    """The same, and what is done with it."""

    train_fraction: Annotated[
        float | None,
        Parameter(
            help="Part of the tokens to train on; the rest is predicted. Default 0.5, or 1 with a "
            "prompt."
        ),
    ] = None
    generate: Annotated[
        int | None,
        at_least(0),
        Parameter(
            metavar="N",
            help="Continue with N tokens under the updated weights, printed as they come.",
        ),
    ] = None

    def trained(self, tokens: int) -> int:
        """How many of a text's tokens are trained on."""
        return round((0.5 if self.train_fraction is None else self.train_fraction) * tokens)

    def check(self) -> None:
        """Raises UsageError also for a fraction that makes no sense."""
        part = self.train_fraction
        if part is not None and not (0 <= part < 1 or (part == 1 and self.generate)):
            raise UsageError(
                f"train-fraction is {part:g}; expected 0 or more and below 1, as the rest is what "
                "is predicted, or 1 with --generate N"
            )
        super().check()


def check_rest(tokens: int, trained: int, generate: int | None) -> int:
    """How many tokens are predicted: those behind the trained ones, never the first. Raises
    InputError if there is none and nothing is generated either.
    """
    predicted = tokens - max(trained, 1)
    if predicted < 1 and not generate:
        raise InputError(
            f"the text has {tokens} tokens, {trained} of them trained: nothing is left to predict; "
            "pass more text, or --generate N"
        )
    return predicted


def mean_of_rest(losses: Sequence[float], trained: int) -> float:
    """Mean loss of what is predicted. losses: of tokens 1, 2, ... Where nothing is left to predict,
    all tokens tell whether training diverged.
    """
    rest = losses[max(trained, 1) - 1 :] or losses
    return math.fsum(rest) / len(rest)


def check_loss(after: float, inner_lr: float) -> None:
    """Raises NumericalError if the updated weights give no finite loss."""
    if not math.isfinite(after):
        raise NumericalError(
            f"the loss after the inner training is {after:g} at learning rate {inner_lr:g}: "
            "the updated weights are too large; pass a smaller --inner-lr"
        )


def outcome(
    config: SimulatorConfig,
    inner_lr: float,
    *,
    tokens: int,
    trained: int,
    predicted: int,
    before: float,
    after: float,
) -> dict[str, Any]:
    """What became of a text, as JSON values. before, after: losses of what is predicted."""
    return {
        "tokens": tokens,
        "trained_tokens": trained,
        "predicted_tokens": predicted,
        "inner_lr": inner_lr,
        "steps": config.steps,
        "rule": config.rule,
        **(losses(before, after) if predicted else losses(None, None)),
    }


def room(longest: int | None, seen: int, count: int) -> int:
    """How many of so many generated tokens there are positions for; warns if not for all."""
    if longest is None or seen + count <= longest:
        return count
    warnings.warn(
        f"this simulator takes {longest} tokens: there is room for {longest - seen} of {count} "
        "generated tokens",
        stacklevel=3,
    )
    return longest - seen


def not_finite(inner_lr: float) -> str:
    """What generation says of logits that are not finite."""
    return (
        f"the logits after the inner training are not finite at learning rate {inner_lr:g}: the "
        "updated weights are too large; pass a smaller --inner-lr"
    )


def losses(before: float | None, after: float | None) -> dict[str, float | None]:
    """Losses and perplexities of the predicted tokens, None where there are none."""
    found = {"before": before, "after": after}
    return {
        **{f"loss_{when}": loss for when, loss in found.items()},
        **{
            f"perplexity_{when}": None if loss is None else perplexity(loss)
            for when, loss in found.items()
        },
    }


def perplexity(loss: float) -> float:
    """e^loss."""
    return (
        math.exp(loss) if loss < 709 else math.inf
    )  # e^709 is the largest power that a float holds


def show(result: dict[str, Any], as_json: bool) -> None:
    """Prints perplexities before and after, and what was generated."""
    if as_json:
        console.print_json(result)
        return
    rows = {
        "tokens": f"{result['tokens']}: {result['trained_tokens']} trained, "
        f"{result['predicted_tokens']} predicted",
        "inner training": f"{console.steps(result['steps'])} at learning rate "
        f"{result['inner_lr']:g}",
        **({"inner rule": rule_text(result["rule"])} if result.get("rule") else {}),
        **_perplexities(result["perplexity_before"], result["perplexity_after"]),
    }
    console.print_table(console.named(rows))
    if "generated" in result:
        console.out.print(result["generated"], markup=False)


def _perplexities(before: float | None, after: float | None) -> dict[str, str]:
    if before is None or after is None:
        return {}
    changed = f"  ({found})" if (found := change(before, after)) else ""
    return {"perplexity before": rounded(before), "perplexity after": rounded(after) + changed}


def change(before: float, after: float) -> str:
    """In per cent; nothing where that would be a long number."""
    if not (before > 0 and after < 100 * before):
        return ""
    # what was rounded to -0 is 0: which rounding fell on which side says nothing
    return f"{round(100 * (after / before - 1), 2) + 0.0:+.2f} %"


def rounded(value: float) -> str:
    """Three digits behind the point, of what is not too large."""
    return f"{value:.3f}" if value < 1e6 else f"{value:.3g}"
