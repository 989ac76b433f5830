from typing import Any

import pytest

from tests.support import counted as module
from tests.support.counted import add, counted, lines


def test_rows_of_all_processes_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}
    monkeypatch.setattr(module, "COUNTED", found)
    refusal = "cannot simulate this model: aten.elu.default x2 in blocks.1.act (m.py:3)."
    counted("random", "compiled")
    counted("random", "refused", refusal)
    add({"random": {"compiled": {"": 4}, "refused": {refusal.replace("1.act", "0.act"): 2}}})
    counted("random", "refused", "blocks.0 is itself a list of 2 blocks; expected one")
    assert lines("random") == [
        "compiled 5, refused 4, wrong 0, crashed 0",
        "   3  aten.elu.default",
        "   1  ... is itself a list of 2 blocks; expected one",
    ]
