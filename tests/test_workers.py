"""xdist gives the tests of a group to one worker, with the pytest that is installed."""

import os

import pytest


@pytest.mark.xdist_group("workers")
@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process has no groups")
def test_groups(request: pytest.FixtureRequest) -> None:
    """Else models are captured in every worker, and tests of one browser tab in two."""
    if not request.config.getoption("loadgroup", default=False):
        pytest.skip("not run with --dist loadgroup")
    assert request.node.nodeid.endswith("@workers")
