"""Bytes of tokens, against what the tokens themselves decode to."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.support import small
from tintc.evaluate.byte_offsets import byte_spans, starts_with_text
from tintc.ir.errors import InputError

TEXTS = [
    "A river, 3 hills\n",
    "  caf\u00e9 \u4e2d\u6587 na\u00efve \U0001f600\U0001f468\u200d\U0001f469 end  ",
    "\U0001f600",
    "",
    "one\u2028two\r\n\tthree</s>four",
]


def _own_bytes(tokenizer: Any, token: int) -> bytes:
    """What a byte-level token spells, by the alphabet itself."""
    spelled = tokenizer.convert_ids_to_tokens(token)
    alphabet = {c: b for b, c in _byte_alphabet().items()}
    if any(c not in alphabet for c in spelled):
        return str(spelled).encode()
    return bytes(alphabet[c] for c in spelled)


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's table: printable bytes stand for themselves, others from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("special", [True, False])
def test_each_token_has_its_own_bytes(text: str, special: bool) -> None:
    tokenizer = small.tokenizer()
    ids, spans = byte_spans(tokenizer, text, special=special)
    assert ids == tokenizer(text, add_special_tokens=special)["input_ids"]
    content = text.encode()
    if not special:
        assert [content[a:b] for a, b in spans] == [_own_bytes(tokenizer, i) for i in ids]
    else:
        assert not starts_with_text(spans)  # OPT's begin with </s>
        assert b"".join(content[a:b] for a, b in spans) == content


def _sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama's: a space in front, spaces as U+2581, bytes of what is not in the vocabulary."""
    pieces = ["<s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "a", "b"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    own = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    own.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    own.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    own.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>")


def test_bytes_that_stand_alone_are_one_each() -> None:
    ids, spans = byte_spans(_sentencepiece(), "a \u4e2db")
    # <s>, the space that is not in the text, a, space, three bytes, b
    assert spans == [(0, 0), (0, 0), (0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)]
    assert len(ids) == len(spans)


def test_what_a_tokenizer_trims_belongs_to_the_token_behind() -> None:
    own = Tokenizer(models.WordLevel({"[U]": 0, "caf\u00e9": 1, "au": 2}, unk_token="[U]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    ids, spans = byte_spans(PreTrainedTokenizerFast(tokenizer_object=own), " caf\u00e9  au  ")
    assert ids == [1, 2]
    assert spans == [(0, 6), (6, 12)]
    assert starts_with_text(spans)


def test_characters_whose_bytes_are_not_told_belong_to_the_last_token() -> None:
    own = Tokenizer(models.WordPiece({"[U]": 0, "a": 1, "##\u0301": 2}, unk_token="[U]"))
    own.normalizer = normalizers.NFD()
    ids, spans = byte_spans(PreTrainedTokenizerFast(tokenizer_object=own), "\u00e1")
    assert ids == [1, 2]
    assert spans == [(0, 0), (0, 2)]


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(InputError, match="fast tokenizer"):
        byte_spans(Slow(), "text")
