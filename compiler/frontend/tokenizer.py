"""A checkpoint's tokenizer: with a vocabulary, and as an artifact can hold it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tintc.compiler.frontend.files import check_there
from tintc.compiler.frontend.messages import first_line, untrusted
from tintc.ir.errors import SourceError

_CONFIG = "tokenizer_config.json"
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
)
_BESIDE = (_CONFIG, "merges.txt", "special_tokens_map.json", "added_tokens.json")
_KEPT = ("model_max_length", "padding_side", "truncation_side", "model_input_names")
_SAMPLES = ("The river rises in the hills.", " 12.5 x\n\n\tÄ 漢字 🙂", "a")
_log = logging.getLogger(__name__)


def load_tokenizer(directory: Path, name: str, **arguments: Any) -> Any | None:
    """The tokenizer of a directory; None where it has none, or (with a warning) only the settings
    of one.

    arguments: of AutoTokenizer. Raises SourceError for one that is damaged, or code of its own that
    is not trusted.
    """
    for path in _named(directory, *_VOCABULARIES, *_BESIDE):
        check_there(path, name)
    vocabulary = any(path.is_file() for path in _named(directory, *_VOCABULARIES))
    if not vocabulary and not (directory / _CONFIG).is_file():
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, **arguments)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise untrusted(name) from error
        if vocabulary:
            raise SourceError(
                f"{name}: its tokenizer cannot be loaded: {first_line(error)}"
            ) from error
        tokenizer = None
    if vocabulary or (tokenizer is not None and _has_tokens(tokenizer)):
        return tokenizer
    _log.warning(
        "%s has a %s but no vocabulary (tokenizer.json, vocab.json or tokenizer.model): it is "
        "used without a tokenizer, on token ids alone",
        name,
        _CONFIG,
    )
    return None


def _named(directory: Path, *patterns: str) -> list[Path]:
    """Files of these names, links to nothing among them."""
    return [path for path in directory.iterdir() if any(path.match(each) for each in patterns)]


def _has_tokens(tokenizer: Any) -> bool:
    """Whether it has others than those that settings name: a tokenizer of bytes needs no file."""
    named = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    return len(set(tokenizer.get_vocab()) - named) > 1  # T5's has a space without any file


def needs_code(tokenizer: Any) -> bool:
    """Whether a tokenizer is, or names, Python code that came with a model."""
    return type(tokenizer).__module__.startswith("transformers_modules.") or "auto_map" in (
        getattr(tokenizer, "init_kwargs", None) or {}
    )


def without_code(tokenizer: Any) -> Any | None:
    """The same tokenizer as a class of transformers' own; None where its code does more than the
    tokenizer inside does.
    """
    inside = getattr(tokenizer, "backend_tokenizer", None)
    if inside is None:
        return None
    kept = {key: getattr(tokenizer, key) for key in _KEPT if hasattr(tokenizer, key)}
    plain = PreTrainedTokenizerFast(tokenizer_object=inside, **kept, **tokenizer.special_tokens_map)
    plain.chat_template = getattr(tokenizer, "chat_template", None)
    return plain if _ids(plain) == _ids(tokenizer) else None


def _ids(tokenizer: Any) -> list[Any]:
    """Of the samples, with and without special tokens, and the texts that come back."""
    found = []
    for text in _SAMPLES:
        for special in (False, True):
            ids = tokenizer(text, add_special_tokens=special)["input_ids"]
            found.append((ids, tokenizer.decode(ids)))
    return found
