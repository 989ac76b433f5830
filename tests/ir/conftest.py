"""Here every pass is verified after it ran: the graph is well formed and its shapes agree."""

import pytest


@pytest.fixture(autouse=True)
def _each_pass_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINTC_VERIFY", "1")
