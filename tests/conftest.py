"""Settings of every test: one torch thread, a fixed seed; and what is measured and counted, said at
the end.
"""

import gc
import logging
import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.pop("COLUMNS", None)  # xdist sets it; consoles would keep it, whatever a test sets

os.environ["TINTC_CALIBRATION"] = "off"  # nothing depends on the machine that runs the tests

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings

from tests.support.counted import COUNTED, add, lines
from tests.support.every import BUILDERS
from tests.support.once import compiling_once
from tests.support.sampled import mark_others_slow
from tests.support.tolerances import MEASURED, measured

# Graphs are many small objects, and they are kept for other tests: looking for garbage among them
# took a tenth of the run.
gc.set_threshold(100_000, 50, 1000)

# pytest from 9.1 on listens to loggers that do not propagate; with a listener torch.export writes
# down all that it does, which takes long.
logging.getLogger("torch.__trace").propagate = True

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# Time depends on the machine and on what else runs there, so no test has a deadline. Derandomized:
# a run is repeatable.
settings.register_profile(
    "tintc",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tintc")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite the golden printed graphs of tests/golden/passes",
    )
    parser.addoption(
        "--fuzz",
        type=float,
        default=0.05,
        help="how much of tests/fuzz runs; `make fuzz` runs all, 1",
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of xdist hands what it measured and counted to the process that prints."""
    gc.freeze()  # pytest collects garbage five times more; of all that is kept it took 8 s
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
    """Tests of one model go to one worker of xdist (`--dist loadgroup`): each worker captures a
    model for itself.
    """
    mark_others_slow(items)
    for item in items:
        called: Any = getattr(item, "callspec", None)
        values = called.params.values() if called is not None else ()
        model = next((v for v in values if isinstance(v, str) and v in BUILDERS), None)
        if model is not None:
            item.add_marker(pytest.mark.xdist_group(model))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # toys are too small for two, and xdist keeps the other cores busy


@pytest.fixture(autouse=True, scope="session")
def _compiling_once() -> Iterator[None]:
    with compiling_once():
        yield


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))
