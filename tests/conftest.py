"""Settings of every test: one torch thread, a fixed seed; and what is measured and counted, said at
the end.
"""

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings

from tests.support.counted import COUNTED, add, lines
from tests.support.sampled import mark_others_slow
from tests.support.tolerances import MEASURED, measured

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# Time depends on the machine and on what else runs there, so no test has a deadline. Derandomized:
# a run is repeatable.
settings.register_profile(
    "tintc", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tintc")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite the golden printed graphs of tests/golden/passes",
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of xdist hands what it measured and counted to the process that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput |= {"measured": MEASURED, "counted": COUNTED}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    output = getattr(node, "workeroutput", {})
    for kind, value in output.get("measured", {}).items():
        measured(kind, value)
    add(output.get("counted", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if MEASURED:
        terminalreporter.section("largest figures measured")
        for kind, value in sorted(MEASURED.items()):
            terminalreporter.write_line(f"{value:.1e}  {kind}")
    for test in sorted(COUNTED):
        terminalreporter.section(test)
        for line in lines(test):
            terminalreporter.write_line(line)


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where a file is marked `neighbours(argument)`, brings together the tests that share a value
    of it: xdist hands out neighbours, and each worker captures a model for itself.
    """
    mark_others_slow(items)
    files: dict[Path, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        if item.get_closest_marker("neighbours"):
            files[item.path].append(index)
    for places in files.values():
        moved = [items[index] for index in places]
        values = [_neighbourhood(item) for item in moved]
        order = sorted(range(len(moved)), key=lambda i: values.index(values[i]))
        for place, i in zip(places, order, strict=True):
            items[place] = moved[i]


def _neighbourhood(item: pytest.Item) -> Any:
    marker, call = item.get_closest_marker("neighbours"), getattr(item, "callspec", None)
    return None if marker is None or call is None else call.params.get(marker.args[0])


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # toys are too small for two, and xdist keeps the other cores busy


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))
