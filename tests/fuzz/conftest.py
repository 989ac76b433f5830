"""How much is fuzzed: by default a twentieth, `pytest tests/fuzz --fuzz 1` for all of it (what
`make fuzz` runs), more for longer. A case's seed is its number.
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
