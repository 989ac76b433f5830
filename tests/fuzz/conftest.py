"""How much is fuzzed: by default a twentieth, `pytest tests/fuzz --fuzz 1` for all of it (what
`make fuzz` runs), more for longer. A case's seed is its number.

A test marked `first_by_default` runs its first row of parameters alone where less than all is
fuzzed; the others are slow.
"""

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test marked `cases(total, together)` runs in batches of that many cases."""
    marker = metafunc.definition.get_closest_marker("cases")
    if marker is None:
        return
    total, together = marker.args
    wanted = max(1, round(total * metafunc.config.getoption("--fuzz")))
    batches = [range(start, min(start + together, wanted)) for start in range(0, wanted, together)]
    metafunc.parametrize("cases", batches, ids=[str(batch.start) for batch in batches])


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fuzz") >= 1:
        return
    met: set[str] = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        if item.get_closest_marker("first_by_default") is not None and test in met:
            item.add_marker(pytest.mark.slow)
        met.add(test)
