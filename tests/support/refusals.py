"""What a source is refused with."""

from __future__ import annotations

from typing import Any

import pytest

from tintc.compiler.frontend.sources import load_source
from tintc.ir.errors import SourceError, TintcError


def refusal(source: Any, error: type[TintcError] = SourceError, **options: Any) -> str:
    """The message with which `source` is refused: exactly this error, on one line."""
    with pytest.raises(TintcError) as caught:
        load_source(source, **options)
    assert caught.type is error, caught.value
    assert "\n" not in str(caught.value)
    return str(caught.value)
