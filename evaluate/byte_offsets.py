"""Where in the UTF-8 bytes of a text each token stands: what bits per byte are counted over.

Tokenizers give offsets in characters, and they leave gaps (spaces that are trimmed) and overlaps
(bytes of one character in several tokens). Here every byte belongs to exactly one token.
"""

from __future__ import annotations

import re
from itertools import accumulate, pairwise
from typing import Any

from tintc.ir.errors import InputError

Span = tuple[int, int]
_ONE_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # SentencePiece's spelling of a byte


def byte_spans(tokenizer: Any, text: str, *, special: bool = True) -> tuple[list[int], list[Span]]:
    """Token ids of a text, and the bytes [start, stop) of each in its UTF-8.

    The spans follow one another from 0 to the last byte. A space between two tokens belongs to the
    second, as does what a normalizer drops; behind the last token, to the last. A token that is
    not in the text (BOS, EOS) has an empty span. special: with these tokens.
    Raises InputError for a tokenizer without offsets.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} gives no offsets into the text, which bytes of tokens "
            "need; expected a fast tokenizer (tokenizer.json)"
        )
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    ids: list[int] = found["input_ids"]
    byte_of = [0, *accumulate(len(c.encode("utf-8", "surrogatepass")) for c in text)]
    raw = [(byte_of[start], byte_of[stop]) for start, stop in found["offset_mapping"]]
    in_text = [number for number, (start, stop) in enumerate(raw) if stop > start]
    ends = _ends(tokenizer, ids, raw, in_text)
    if in_text:
        ends[in_text[-1] :] = [byte_of[-1]] * (len(ends) - in_text[-1])
    return ids, list(pairwise([0, *ends]))


def starts_with_text(spans: list[Span]) -> bool:
    """Whether the first token holds bytes of the text. It is never scored, so they do not count;
    where it is a BOS, every byte does.
    """
    return bool(spans) and spans[0][1] > spans[0][0]


def _ends(tokenizer: Any, ids: list[int], raw: list[Span], in_text: list[int]) -> list[int]:
    """Where each token's bytes end, in ascending order."""
    ends: dict[int, int] = {}
    at = 0
    for group in _sharing(raw, in_text):
        start, stop = max(at, raw[group[0]][0]), max(raw[number][1] for number in group)
        if len(group) > 1:
            sizes = _sizes(tokenizer, [ids[number] for number in group], stop - start)
            for number, size in zip(group, sizes, strict=True):
                start += size
                ends[number] = start
        ends[group[-1]] = at = max(at, stop)
    filled, last = [], 0
    for number in range(len(ids)):
        last = ends.get(number, last)
        filled.append(last)
    return filled


def _sharing(raw: list[Span], in_text: list[int]) -> list[list[int]]:
    """Tokens of the text, those together whose characters overlap."""
    groups: list[list[int]] = []
    stop = 0
    for number in in_text:
        if groups and raw[number][0] < stop:
            groups[-1].append(number)
        else:
            groups.append([number])
        stop = max(stop, raw[number][1])
    return groups


def _sizes(tokenizer: Any, ids: list[int], total: int) -> list[int]:
    """Bytes of tokens that share characters. A byte-level token is spelled with one character a
    byte. Where the spelling does not add up, all bytes belong to the last, which ends the
    character.
    """
    spelled = tokenizer.convert_ids_to_tokens(ids)
    sizes = [1 if _ONE_BYTE.fullmatch(token) else len(token) for token in spelled]
    return sizes if sum(sizes) == total else [*[0] * (len(ids) - 1), total]
