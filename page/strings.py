"""Texts of a column, each stored once."""

from __future__ import annotations

NONE = -1  # in place of an index


class Strings:
    """table: the texts. Called with one it gives its index there; NONE for none."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def __call__(self, text: str | None) -> int:
        if text is None:
            return NONE
        return self._places.setdefault(text, len(self._places))

    @property
    def table(self) -> list[str]:
        return list(self._places)
