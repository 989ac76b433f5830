"""Types of transformers that islands carry, as `python -m tests.coverage_table` compares them."""

from __future__ import annotations

from tests.coverage_table import compared, line
from tests.support.grid import some

KINDS = ("nanochat", "bert", "openai-gpt", "ctrl", "diffllama", "minicpm3", "apertus", "llama")


@some("kind", KINDS, default=["openai-gpt"])
def test_equals_autograd(kind: str) -> None:
    found = compared(kind, quick=True)
    assert found["became"] == "equal", line(found)
    assert (found["exact"]["islands"] > 0) == (kind != "llama")
