"""Options of `tintc run` that show every token: coloured, or in a picture. Nothing here imports
torch.

Annotations are no strings here, as in options.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from tintc.commands import console
from tintc.commands.flags import ONCE
from tintc.commands.options import Common
from tintc.evaluate import figure, token_plot
from tintc.ir.errors import ArtifactError, UsageError
from tintc.runtime.showing.shown import Shown
from tintc.runtime.showing.tokens import Decode, TokenLosses


@dataclass(frozen=True, kw_only=True)
class Showing(Common):
    """What every command has, and what is shown of one text's tokens."""

    show: Annotated[
        bool,
        Parameter(
            help="Print the text's tokens, coloured by how their losses changed; with --json the "
            "losses of each token, in token_losses.",
            negative=(),
        ),
    ] = False
    plot: Annotated[
        Path | None,
        ONCE,
        Parameter(
            metavar="FILE.png",
            help="Draw the loss of every token before and after, and the difference; a file that "
            "exists is replaced. Needs pip install 'tintc[plot]'.",
        ),
    ] = None

    def names(self) -> list[str]:
        """The options that are given."""
        given = {"--show": self.show, "--plot": self.plot is not None}
        return [name for name, is_given in given.items() if is_given]

    def check(self, without: Mapping[str, bool]) -> None:
        """Raises UsageError for a picture that cannot be drawn, and beside what has no losses of
        one text's tokens to show. without: what that is, and whether it is asked for.
        """
        names = " and ".join(self.names())
        for other, is_asked in without.items():
            if names and is_asked:
                raise UsageError(f"{names} with {other}; expected one text, without that")
        if self.plot is None:
            return
        if self.plot.suffix.lower() != ".png":
            raise UsageError(f"plot is {self.plot}; expected a name that ends in .png")
        if self.plot.expanduser().is_dir():
            raise UsageError(f"{self.plot} is a directory; expected the name of a picture")
        if not figure.available():
            raise UsageError("--plot needs matplotlib; pip install 'tintc[plot]'")

    def told(
        self,
        ids: Sequence[int],
        decode: Decode,
        trained: int,
        before: Sequence[float],
        after: Sequence[float],
    ) -> "Told":
        """What is shown of a text whose first tokens are trained on; draws the picture. before,
        after: losses of tokens 1, 2, ... Raises ArtifactError for a picture that cannot be written.
        """
        if not self.names():
            return Told()
        losses = TokenLosses.of_text(ids, decode, trained, before, after)
        if self.plot is not None:
            _draw(losses, self.plot.expanduser())
        return Told(losses if self.show else None, self.plot)


@dataclass(frozen=True)
class Told:
    """What is shown of a text. losses: of its tokens, if they are shown. plot: a picture that was
    drawn.
    """

    losses: TokenLosses | None = None
    plot: Path | None = None

    def values(self) -> dict[str, Any]:
        """What JSON has of it."""
        found: dict[str, Any] = {} if self.plot is None else {"plot": str(self.plot)}
        return found if self.losses is None else {**found, "token_losses": self.losses.values()}

    def print(self) -> None:
        """The tokens, no wider than the terminal."""
        if self.losses is not None:
            console.out.print()
            console.out.print(Shown(self.losses), soft_wrap=False)


def _draw(losses: TokenLosses, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        token_plot.draw(losses, path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
