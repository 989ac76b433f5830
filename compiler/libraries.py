"""What other libraries print while a model or data are loaded."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

import huggingface_hub.utils.logging as hub_logging
import transformers.utils.logging as transformers_logging
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

NO_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the warnings and bars of transformers and of the hub's client, and puts their
    settings back.

    The hub's own download bars stay: they are the only sign of life of a long download, and hide
    without a terminal. The environment variable that switches them off is heeded also where the
    client was imported before it was set.
    """
    levels = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    bars, no_downloads = (
        transformers_logging.is_progress_bar_enabled(),
        are_progress_bars_disabled(),
    )
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers_logging.disable_progress_bar()  # the hub's with its own
        _show_downloads(not no_downloads and os.environ.get(NO_BARS, "0") in ("", "0"))
        try:
            yield
        finally:
            transformers_logging.set_verbosity(levels[0])
            hub_logging.set_verbosity(levels[1])
            if bars:
                transformers_logging.enable_progress_bar()
            _show_downloads(not no_downloads)


def _show_downloads(wanted: bool) -> None:
    if wanted:
        enable_progress_bars()
    else:
        disable_progress_bars()
