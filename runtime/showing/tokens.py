"""A text's tokens and what training did to the loss of each: what terminals, notebooks and pictures
show. Nothing here imports torch.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

Decode = Callable[[list[int]], str]

# Okabe and Ito's blue and vermilion, which colour-blind readers can tell apart.
FELL, ROSE = "#0072B2", "#D55E00"
LEVELS = (0.1, 0.5, 1.0)  # nats: changes from which on a colour is light, middling, full
_HELD = 4  # tokens that may share a character: UTF-8 has at most four bytes
_JOINERS = "\u200c\u200d"  # format characters that words and emoji are spelled with


@dataclass(frozen=True)
class Token:
    """One token of a text. text: what it adds to the text; a character that several tokens share
    is the last one's. before, after: -log p of it in nats, None where it has no loss. trained:
    whether it was trained on.
    """

    position: int
    token: int
    text: str
    trained: bool
    before: float | None
    after: float | None


@dataclass(frozen=True)
class Piece:
    """Tokens that are shown as one, as they share a character. change: of the summed loss, None
    where there is none.
    """

    tokens: tuple[Token, ...]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def trained(self) -> bool:
        return self.tokens[-1].trained

    def losses(self) -> tuple[float, float] | None:
        """Before and after: -log p of the characters."""
        pairs = _losses(self.tokens)
        return _summed(pairs) if pairs else None

    @property
    def change(self) -> float | None:
        found = self.losses()
        return None if found is None else found[1] - found[0]


@dataclass(frozen=True)
class TokenLosses:
    """The tokens of one text, in its order."""

    tokens: tuple[Token, ...]

    @classmethod
    def of(
        cls,
        ids: Sequence[int],
        decode: Decode,
        trained: Sequence[bool],
        before: Sequence[float | None],
        after: Sequence[float | None],
    ) -> TokenLosses:
        """Of values a token. decode: token ids -> text, special tokens included."""
        rows = zip(ids, token_texts(ids, decode), trained, before, after, strict=True)
        return cls(tuple(Token(position, *row) for position, row in enumerate(rows)))

    @classmethod
    def of_text(
        cls,
        ids: Sequence[int],
        decode: Decode,
        trained: int,
        before: Sequence[float],
        after: Sequence[float],
    ) -> TokenLosses:
        """Of a text whose first tokens are trained on. before, after: of tokens 1, 2, ..., as many
        as have one.
        """
        none = [None] * (len(ids) - 1 - len(after))
        first = [position < trained for position in range(len(ids))]
        return cls.of(ids, decode, first, [None, *before, *none], [None, *after, *none])

    def runs(self) -> Iterator[tuple[bool, list[Piece]]]:
        """Whether trained, and the pieces that follow one another: the whole text."""
        for trained, pieces in groupby(self.pieces(), key=lambda piece: piece.trained):
            yield trained, list(pieces)

    def pieces(self) -> Iterator[Piece]:
        """Tokens with the text that they make up together."""
        held: list[Token] = []
        for token in self.tokens:
            held.append(token)
            if token.text:
                yield Piece(tuple(held))
                held = []
        if held:
            yield Piece(tuple(held))

    def summary(self) -> list[str]:
        """For trained and predicted tokens: how many, and their mean losses."""
        lines = []
        for trained, name in ((True, "trained on"), (False, "predicted")):
            tokens = [token for token in self.tokens if token.trained is trained]
            if pairs := _losses(tokens):
                before, after = (total / len(pairs) for total in _summed(pairs))
                lines.append(f"{len(pairs)} {name}: mean loss {before:.3f} -> {after:.3f} nats")
        return lines

    def values(self) -> list[dict[str, object]]:
        """As JSON values."""
        return [
            {
                "position": token.position,
                "token": token.token,
                "text": token.text,
                "trained": token.trained,
                "loss_before": token.before,
                "loss_after": token.after,
            }
            for token in self.tokens
        ]


def token_texts(ids: Sequence[int], decode: Decode) -> Iterator[str]:
    """What each token adds to the text. A character that several tokens make up is the last one's,
    and the others' texts are empty.

    Each is decoded behind the one before it: alone, some tokenizers drop the space in front of it.
    """
    start = read = 0  # of the last piece, and of the tokens that belong to no piece yet
    for stop in range(1, len(ids) + 1):
        before, text = decode(list(ids[start:read])), decode(list(ids[start:stop]))
        is_part = text.endswith("\ufffd") or text == before
        if is_part and stop < len(ids) and stop - read < _HELD:
            yield ""
            continue
        yield text[len(before) :]
        start, read = read, stop


def level(change: float | None) -> int:
    """How strongly a change is shown: 0 for none, up to 3, below 0 for a loss that fell."""
    if change is None or math.isnan(change):
        return 0
    size = sum(abs(change) >= bound for bound in LEVELS)
    return -size if change < 0 else size


def said_of(level: int) -> str:
    """What a legend says of a level that is not 0."""
    return f"{math.copysign(LEVELS[abs(level) - 1], level):+g}"


def colour(level: int) -> str:
    """Behind a token, for a level that is not 0; dark text can be read on all of them."""
    full = FELL if level < 0 else ROSE
    part = (0.25, 0.5, 0.8)[abs(level) - 1]
    channels = (int(full[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(255 + part * (value - 255)):02x}" for value in channels)


def visible(text: str, *, ascii_only: bool = False) -> str:
    """The text with everything that would move a cursor, hide or turn text around spelled out.
    Line breaks stay, with a mark in front.
    """
    marks = {"\n": "\\n\n", "\t": "\\t"} if ascii_only else {"\n": "\u21b5\n", "\t": "\u21e5"}
    return "".join(marks.get(letter) or _spelled(letter, ascii_only) for letter in text)


def _spelled(letter: str, ascii_only: bool) -> str:
    kind = unicodedata.category(letter)
    unseen = kind in ("Cc", "Cf", "Cs", "Zl", "Zp") and letter not in _JOINERS
    if unseen or (ascii_only and not letter.isascii()):
        return letter.encode("unicode_escape").decode("ascii")
    return letter


def _losses(tokens: Sequence[Token]) -> list[tuple[float, float]]:
    """Of the tokens that have some."""
    return [
        (token.before, token.after)
        for token in tokens
        if token.before is not None and token.after is not None
    ]


def _summed(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    before, after = zip(*pairs, strict=True)
    return math.fsum(before), math.fsum(after)
