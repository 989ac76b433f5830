"""The driver and what stands at both ends of it."""

from tintc.compiler import docstrings

docstrings.allow_none()  # before any part of this room imports a model of transformers
