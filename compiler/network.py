"""Whether what is loaded may ask the network; `libraries.py` loads transformers, this does not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from huggingface_hub import constants


@contextlib.contextmanager
def without_network(wanted: bool = True) -> Iterator[None]:
    """No request leaves this process through the hub's client, which transformers and datasets ask
    through too: no files, no code of other repositories, no telemetry.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
