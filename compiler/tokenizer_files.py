"""Writes a tokenizer's files so that they load without code, and the same each time."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from tintc.compiler.artifact_files import write_json
from tintc.compiler.frontend.tokenizer import needs_code, without_code

_ORIGIN = ("is_local", "local_files_only", "name_or_path")
_log = logging.getLogger(__name__)


def write_tokenizer(tokenizer: Any | None, folder: Path) -> None:
    """As one of transformers' own classes: what an artifact holds is loaded without code.

    Raises OSError if it cannot be written.
    """
    if tokenizer is not None and needs_code(tokenizer):
        kind = type(tokenizer).__name__
        tokenizer = without_code(tokenizer)
        if tokenizer is None:
            _log.warning(
                "the tokenizer %s is Python code, which an artifact does not hold: it is left "
                "out, and `tintc run` has none; use tintc.load, and call it with token ids",
                kind,
            )
    if tokenizer is None:
        return
    try:
        tokenizer.save_pretrained(str(folder))
        _forget_origin(folder / "tokenizer_config.json")
    except (
        Exception
    ) as error:  # the tokenizers library raises a bare Exception when the disk is full
        raise OSError(f"the tokenizer cannot be saved: {error}") from error


def _forget_origin(file: Path) -> None:
    """Drops what transformers notes about where a tokenizer was loaded from: two compilations give
    the same file.
    """
    if file.is_file():
        kept = {
            name: value
            for name, value in json.loads(file.read_text(encoding="utf-8")).items()
            if name not in _ORIGIN
        }
        write_json(file, kept, indent=2)
