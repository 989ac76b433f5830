"""One number for many tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes, types and bytes, whatever the order."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(json.dumps([name, list(value.shape), str(value.dtype)]).encode())
        flat = value.detach().cpu().contiguous().flatten()
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()
