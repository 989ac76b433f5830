"""Tokenizer files that a reader could stumble over."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.mutations import mutate
from tests.fuzz.victim import TRAP

Spoil = Callable[[dict[str, Any]], Any]


def _token(number: int, content: str = "<extra>", **more: Any) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": True, **flags, **more}


def _nested(depth: int) -> dict[str, Any]:
    """Written by `_deeper`: Python's own writer recurses."""
    return {"type": "Sequence", "normalizers": [{"deeper": depth}]}


def _deeper(text: str) -> str:
    opening = '{"type": "Sequence", "normalizers": ['

    def nested(found: re.Match[str]) -> str:
        return opening * int(found[1]) + "]}" * int(found[1])

    return re.sub(r'\{"deeper": (\d+)\}', nested, text)


def _split(pattern: str) -> Spoil:
    how = {"type": "Split", "behavior": "Isolated", "invert": False}
    return _put(pre_tokenizer={**how, "pattern": {"Regex": pattern}})


def _put(**values: Any) -> Spoil:
    return lambda inside: inside.update(values)


def _model(**values: Any) -> Spoil:
    return lambda inside: inside["model"].update(values)


def _replace(pattern: dict[str, str], content: str) -> Spoil:
    return _put(normalizer={"type": "Replace", "pattern": pattern, "content": content})


def _padding(strategy: Any, multiple: int) -> Spoil:
    pad = {"pad_id": 0, "pad_type_id": 0, "pad_token": "?", "pad_to_multiple_of": multiple}
    return _put(padding={"strategy": strategy, "direction": "Left", **pad})


def _template(**values: Any) -> Spoil:
    return _put(post_processor={"type": "TemplateProcessing", "pair": [], **values})


_NOBODY = {"SpecialToken": {"id": "nobody", "type_id": 0}}
_FAR = {"sep": ["</s>", 2**31], "cls": ["<s>", 2**31], "trim_offsets": True}
# of tokenizer.json
INSIDE: tuple[Spoil, ...] = (
    _put(added_tokens=[_token(2**32 - 1)]),
    _put(added_tokens=[_token(2**24 - 1)]),
    _put(added_tokens=[_token(-1)]),
    _put(added_tokens=[_token(i, f"<{i}>") for i in range(100_000)]),
    _put(added_tokens=[_token(30, "")]),
    _put(added_tokens=[_token(30, "a" * 2**20)]),
    _put(added_tokens=[_token(30, "w")] * 3),
    _model(vocab={"?": 2**32 - 1}),
    _model(vocab={}),
    _model(vocab={"?": 0, "w1": 0}),
    _model(unk_token=None),
    _model(unk_token="nobody"),
    _model(type="BPE", merges=["a b"] * 10),
    _model(type="BPE", merges=[["w1", "nobody"]]),
    _model(type="Unigram", vocab=[["?", 0.0]], unk_id=7),
    _model(type="Unigram", vocab=[["?", float("inf")]], unk_id=0),
    _model(type="Unigram", vocab=[], unk_id=None),
    _model(type="WordPiece", max_input_chars_per_word=2**63),
    _model(type="Nobody"),
    _put(model=None),
    _put(normalizer=_nested(100)),
    _put(normalizer=_nested(20_000)),
    _replace({"Regex": "("}, ""),
    _replace({"String": ""}, "a" * 2**20),
    _put(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    _put(normalizer={"type": "Prepend", "prepend": "x" * 2**20}),
    _split("(a+)+$"),
    _split("(?:(?:(?:.*)*)*)*x"),
    _split("(?=)"),
    _split("[" * 1000),
    _split(""),
    _put(truncation={"max_length": 0, "strategy": "LongestFirst", "stride": 5}),
    _padding({"Fixed": 2**31}, 0),
    _padding("BatchLongest", 2**40),
    _template(single=[_NOBODY], special_tokens={}),
    _put(post_processor={"type": "RobertaProcessing", "add_prefix_space": True, **_FAR}),
    _put(decoder={"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True}),
    _put(version="9.9"),
    lambda inside: inside.clear(),
)
# of tokenizer_config.json
OUTSIDE: tuple[Spoil, ...] = (
    _put(tokenizer_class="os.system"),
    _put(tokenizer_class="BertTokenizer"),
    _put(tokenizer_class="LlamaTokenizer"),
    _put(tokenizer_class=7),
    _put(auto_map={"AutoTokenizer": ["evil.Trap", None]}),
    _put(auto_map={"AutoTokenizer": "someone/else--evil.Trap"}),
    _put(added_tokens_decoder={str(2**32): _token(1)}),
    _put(added_tokens_decoder={"x": _token(1)}),
    _put(added_tokens_decoder={str(i): _token(i, f"<{i}>") for i in range(100_000)}),
    _put(model_max_length="many"),
    _put(unk_token={"content": 7, "__type": "AddedToken"}),
    _put(unk_token=["a"] * 100),
    _put(chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    _put(chat_template="{% for i in range(10**9) %}{% endfor %}"),
    _put(extra_special_tokens=[TRAP] * 5),
    _put(padding_side=TRAP, truncation_side="nowhere"),
    _put(bos_token="a" * 2**20),
)


def spoil_tokenizer(folder: Path, case: int, numbers: random.Random) -> None:
    """The kinds above in turn, then the same once more with random changes on top."""
    index = case % (len(INSIDE) + len(OUTSIDE))
    name = "tokenizer.json" if index < len(INSIDE) else "tokenizer_config.json"
    file = folder / name
    values = json.loads(file.read_text(encoding="utf-8"))
    (INSIDE + OUTSIDE)[index](values)
    file.write_text(_deeper(json.dumps(values)), encoding="utf-8")
    if (
        case >= len(INSIDE) + len(OUTSIDE)
        and "Sequence" not in file.read_text()
        and file.stat().st_size < 2**16
    ):
        mutate(file, numbers)
