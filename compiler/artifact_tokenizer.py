"""The tokenizer of an artifact, which may come from anybody.

Only transformers' own classes are loaded, from files of bounded size, and whatever their readers
raise or panic with becomes one line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic_core import from_json

from tintc.compiler.artifact_reader import read_plain
from tintc.compiler.network import without_network
from tintc.ir.errors import ArtifactError, raise_if_interrupted

_LARGEST_FILE = 2**27  # bytes; the largest published tokenizer.json have some 30 MB
_MOST_ADDED = 20_000  # each is added by a loop of Python; the most that is published is some 6,000
_LARGEST_ID = 2**24  # tables are as long as the largest id
_PROBE = "A river, 3 hills\n\u00e9\u4e2d"


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer of a folder, or None where there is no folder. Raises ArtifactError."""
    if not folder.is_dir():
        return None
    from transformers import AutoTokenizer

    for file in sorted(folder.rglob("*.json")):
        _check(file)
    try:
        with without_network():
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        tokenizer.decode(tokenizer(_PROBE)["input_ids"])
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        raise_if_interrupted(error)
        raise ArtifactError(
            f"{folder} cannot be read as a tokenizer: {type(error).__name__}: {_line(error)}"
        ) from error
    return tokenizer


def _check(file: Path) -> None:
    try:
        values = from_json(read_plain(file, _LARGEST_FILE))
    except ValueError as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{file} cannot be read: {_line(error)}") from error
    if not isinstance(values, dict):
        return
    model = values.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if file.name in ("vocab.json", "added_tokens.json"):
        vocabulary = values
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    for key in ("added_tokens", "added_tokens_decoder"):
        added = values.get(key)
        if isinstance(added, (list, dict)) and len(added) > _MOST_ADDED:
            raise ArtifactError(
                f"{file} adds {len(added):,} tokens; expected at most {_MOST_ADDED:,}"
            )
        ids += (
            [t.get("id") for t in added if isinstance(t, dict)] if isinstance(added, list) else []
        )
        ids += [int(key) for key in added if key.isdecimal()] if isinstance(added, dict) else []
    largest = max((number for number in ids if type(number) is int), default=0)
    if largest >= _LARGEST_ID:
        raise ArtifactError(f"{file} has a token {largest}; expected ids below {_LARGEST_ID:,}")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
