"""A tab for the tests of one file; one that fails says where the tab is, and shows it."""

from collections.abc import Generator, Iterator
from typing import Any

import pytest

from tests.support.browser import Watched, watched
from tests.support.pages import site
from tintc.page.serving import PageServer


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    for value in getattr(item, "funcargs", {}).values() if report.failed else ():
        if isinstance(value, Watched):
            report.sections.append(("the tab", value.told(item.name)))
    return report


@pytest.fixture(scope="module")
def page() -> Iterator[Watched]:
    """The site of the tiny artifact."""
    server = PageServer(site().path, 0)
    server.start()
    try:
        with watched(server.url) as found:
            yield found
    finally:
        server.close()
