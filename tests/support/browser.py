"""A browser that looks at a page: which one there is, and what it was heard to say."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60_000  # milliseconds: other tests may keep all cores busy
DONE = ".figures:not(.old) [data-figure=time]"  # of *Run*: what is set has run
AXE = Path(__file__).parents[2] / "web" / "node_modules" / "axe-core" / "axe.min.js"


def browser_path() -> str | None:
    """TINTC_BROWSER, or the first of the usual names on PATH."""
    return os.environ.get("TINTC_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


def why_no_browser() -> str | None:
    """For a skipped test."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed"
    if browser_path() is None:
        return f"no browser: none of {', '.join(NAMES)} is on PATH; TINTC_BROWSER names another"
    return None


@dataclass
class Watched:
    """A tab, and all that went wrong or out in it. Its methods speak of the page's own parts."""

    tab: Any
    url: str
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def go(self, hash_: str, url: str = "") -> None:
        """Shows a view of the site, or opens the one at `url` anew; waits for it."""
        if url or not self.tab.url.startswith(self.url):
            self.tab.goto("about:blank")
            self.tab.goto((url or self.url) + hash_)
        else:
            self.tab.evaluate("hash => { location.hash = hash }", hash_)
        self.settle()

    def settle(self) -> None:
        """Waits until the page shows what its URL says."""
        self.tab.wait_for_function(
            "() => document.querySelector('main')?.dataset.shown === location.hash"
        )

    def told(self, name: str) -> str:
        """For a test that failed: where the tab is and what went wrong there. It saves a picture
        called `name` where a folder is asked for.
        """
        lines = [f"tab: {self.tab.url}", *(f"problem: {each}" for each in self.problems)]
        folder = os.environ.get("TINTC_SCREENSHOTS")
        if folder:
            picture = Path(folder) / f"failed-{re.sub(r'[^A-Za-z0-9]+', '-', name)}.png"
            try:
                self.tab.screenshot(path=picture, timeout=10_000)
                lines.append(f"picture: {picture}")
            except Exception as error:  # of a tab that answers no more
                lines.append(f"no picture: {str(error).splitlines()[0]}")
        return "\n".join(lines)

    def params(self) -> dict[str, str]:
        """What the URL says of the view."""
        found: dict[str, str] = self.tab.evaluate(
            "Object.fromEntries(new URLSearchParams(location.hash.split('?')[1] ?? ''))"
        )
        return found

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.tab.locator(selector).all_text_contents()
        return found

    def drawn(self, selector: str) -> list[str]:
        """Ids of what the canvas shows, by cytoscape's own selectors."""
        found: list[str] = self.tab.evaluate(
            """selector => document.querySelector(".canvas")._cyreg.cy.$(selector).map(e => e.id())
            """,
            selector,
        )
        return found

    def place(self, element: str) -> tuple[float, float]:
        """Where on the screen something on the canvas stands."""
        x, y = self.tab.evaluate(
            """id => {
                const canvas = document.querySelector(".canvas");
                const box = canvas.getBoundingClientRect();
                const at = canvas._cyreg.cy.getElementById(id).renderedPosition();
                return [box.left + at.x, box.top + at.y];
            }""",
            element,
        )
        return x, y

    def check_quiet(self) -> None:
        """Nothing went wrong so far, and nothing was asked of others."""
        assert not self.problems
        outside = [url for url in self.requests if not url.startswith((self.url, "data:"))]
        assert not outside, outside

    def look(self, width: int, height: int, theme: str) -> None:
        self.tab.set_viewport_size({"width": width, "height": height})
        self.tab.emulate_media(color_scheme=theme)
        self.tab.wait_for_timeout(60)


@contextmanager
def watched(url: str, flags: Sequence[str] = ()) -> Iterator[Watched]:
    """A tab of a browser of its own, closed at the end. flags: more of them, for its start."""
    from playwright.sync_api import sync_playwright

    flags = [*flags, "--no-sandbox"] if os.geteuid() == 0 else [*flags]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=flags)
        tab = browser.new_page(viewport={"width": 1280, "height": 800}, reduced_motion="reduce")
        tab.set_default_timeout(PATIENCE)
        found = Watched(tab, url)
        tab.on("console", lambda said: _hear(found, said))
        tab.on("pageerror", lambda error: found.problems.append(str(error)))
        tab.on("request", lambda request: found.requests.append(request.url))
        try:
            yield found
        finally:
            browser.close()


def run(page: Watched) -> None:
    """Presses the button of *Run* and waits for figures."""
    page.tab.locator("#run").click()
    page.tab.wait_for_selector(f"{DONE}, .figures [role=alert]")
    print("run:", page.texts(".figures")[0])


def _hear(found: Watched, said: Any) -> None:
    if said.type in ("error", "warning"):
        found.problems.append(f"{said.type}: {said.text}")
