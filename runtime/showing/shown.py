"""A text's tokens, coloured by how their losses changed: in a terminal and in a notebook.

    shown = TokenLosses.of(...)  ->  Shown(losses): rich prints it, notebooks show its HTML,
                                     str() of it has marks in place of colours

Texts come from anywhere: control characters are spelled out, and HTML is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from tintc.runtime.showing.tokens import (
    LEVELS,
    Piece,
    TokenLosses,
    colour,
    level,
    said_of,
    visible,
)

_INK = "#111111"  # on every colour
_LEVELS = [size for size in range(-len(LEVELS), len(LEVELS) + 1) if size]  # as legends have them


@dataclass(frozen=True)
class _Signs:
    """Around what is trained on, and behind tokens whose loss changed."""

    begin: str
    end: str
    fell: str
    rose: str


_SIGNS = _Signs("\u27e6", "\u27e7", "\u25be", "\u25b4")  # [[, ]], and small triangles
_ASCII = _Signs("[[", "]]", "-", "+")


@dataclass(frozen=True, repr=False)
class Shown:
    """Tokens coloured by the change of their losses. losses: the numbers."""

    losses: TokenLosses

    def __str__(self) -> str:
        """With marks in place of colours."""
        return "\n".join(part.plain for part in self._parts(coloured=False, ascii_only=False))

    __repr__ = __str__

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # Of sixteen colours, light blue and light red are one.
        coloured = console.color_system in ("256", "truecolor") and not console.no_color
        yield from self._parts(coloured=coloured, ascii_only=options.ascii_only)

    def _parts(self, *, coloured: bool, ascii_only: bool) -> Iterator[Text]:
        """A legend, the text, and what there is of it."""
        signs = _ASCII if ascii_only else _SIGNS
        yield _legend(signs, coloured)
        found = Text()
        for trained, pieces in self.losses.runs():
            found.append(signs.begin if trained else "", "bold")
            for piece in pieces:
                _append(found, piece, signs, coloured, ascii_only)
            found.append(signs.end if trained else "", "bold")
        yield found
        yield from map(Text, self.losses.summary())

    def _repr_html_(self) -> str:
        """A figure whose styles stand at its elements: notebooks drop sheets of styles."""
        text = "".join(
            f'<span style="{_TRAINED}">{_pieces(pieces)}</span>' if trained else _pieces(pieces)
            for trained, pieces in self.losses.runs()
        )
        said = "; ".join(self.losses.summary())
        return (
            f'<figure style="margin:0"><div style="{_LINES}">{text}</div>'
            f'<figcaption style="font-size:smaller">{_html_legend()}<br>{html.escape(said)}'
            "</figcaption></figure>"
        )


def _append(text: Text, piece: Piece, signs: _Signs, coloured: bool, ascii_only: bool) -> None:
    size = level(piece.change)
    written = visible(piece.text, ascii_only=ascii_only)
    if not coloured:
        text.append(_marked(written, size, signs))
        return
    styles = ["underline"] if piece.trained else []
    if size:
        styles.append(f"{_INK} on {colour(size)}")
    text.append(written, " ".join(styles))


def _marked(written: str, size: int, signs: _Signs) -> str:
    """The marks stand behind the word, before what ends its line."""
    marks = (signs.fell if size < 0 else signs.rose) * abs(size)
    body = written.rstrip()
    return body + marks + written[len(body) :] if body else written + marks


def _legend(signs: _Signs, coloured: bool) -> Text:
    found = Text("loss: ")
    for size in _LEVELS:
        if coloured:
            found.append(f" {said_of(size)} ", f"{_INK} on {colour(size)}")
        else:
            found.append(f"{(signs.fell if size < 0 else signs.rose) * abs(size)} {said_of(size)}")
        found.append(" ")
    found.append("nats or more; ")
    found.append(f"{signs.begin}trained on{signs.end}", "underline" if coloured else "")
    return found


# HTML

_LINES = "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7"
_TRAINED = "text-decoration:underline;text-underline-offset:3px"


def _pieces(pieces: list[Piece]) -> str:
    return "".join(map(_piece, pieces))


def _piece(piece: Piece) -> str:
    size, losses = level(piece.change), piece.losses()
    written = html.escape(visible(piece.text))
    where = f"token {piece.tokens[-1].position}"
    if len(piece.tokens) > 1:
        where = f"tokens {piece.tokens[0].position} to {piece.tokens[-1].position}"
    said = "no loss"
    if losses is not None:
        before, after = losses
        said = f"loss {before:.3f} before, {after:.3f} after ({after - before:+.3f})"
    trained = ", trained on" if piece.trained else ""
    style = f' style="background:{colour(size)};color:{_INK}"' if size else ""
    return f'<span title="{where}: {said}{trained}"{style}>{written}</span>'


def _html_legend() -> str:
    swatches = " ".join(
        f'<span style="background:{colour(size)};color:{_INK};padding:0 4px">'
        f"{html.escape(said_of(size))}</span>"
        for size in _LEVELS
    )
    return f'loss changed by {swatches} nats or more; <span style="{_TRAINED}">trained on</span>'
