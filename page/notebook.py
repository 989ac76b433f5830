"""The page inside a notebook: written to a temporary folder, served on loopback by a thread of this
process, and shown in a frame.
"""

from __future__ import annotations

import html
import tempfile
import weakref
from pathlib import Path

from tintc.ir.errors import UsageError
from tintc.page.running import LIMIT_MB
from tintc.page.serving import PageServer, serving
from tintc.page.site import write_site
from tintc.runtime.simulator import Simulator

HEIGHT = 720  # pixels
_LEAST = 100

# A frame needs its server as long as it can be seen, and nobody need hold what a cell returned.
_OPEN: set[Page] = set()
_OF: weakref.WeakKeyDictionary[Simulator, Page] = weakref.WeakKeyDictionary()


class Page:
    """A simulator's page that is served; `tintc.show` makes it. Notebooks show it in a frame. It
    ends with the process, with `close()`, or when the same simulator is shown again.
    """

    def __init__(self, server: PageServer, folder: tempfile.TemporaryDirectory[str], height: int):
        self.url = server.url
        self._height = height
        self._end = weakref.finalize(self, _end, server, folder)  # at exit, too
        _OPEN.add(self)

    @property
    def closed(self) -> bool:
        return not self._end.alive

    def close(self) -> None:
        """Ends the server and removes its files; a second time nothing happens."""
        _OPEN.discard(self)
        self._end()

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Page({'closed' if self.closed else self.url})"

    def _repr_html_(self) -> str:
        if self.closed:
            return "<p>This page is closed; tintc.show makes another.</p>"
        url = html.escape(self.url)
        return (
            f'<iframe src="{url}" title="The simulator\'s page" width="100%" '
            f'height="{self._height}" style="border:0"></iframe>'
            f'<p><a href="{url}" target="_blank" rel="noopener">{url}</a>, on the machine that '
            "runs this notebook</p>"
        )


def show(
    simulator: Simulator, *, height: int = HEIGHT, model: bool = True, limit_mb: float = LIMIT_MB
) -> Page:
    """The simulator's page in a notebook: graph, slots, costs, and a text to run, as `tintc page`
    writes it.

    It is served on this machine alone: with a notebook server elsewhere, forward the port of
    `.url`, or write it with `tintc page DIR -o OUT`. height: of the frame, in pixels. model,
    limit_mb: whether the exported model comes with it, and the largest that does, in MB. What an
    earlier call showed of the same simulator is closed. Raises UsageError for values that make no
    sense.
    """
    if not isinstance(simulator, Simulator):
        raise UsageError(
            f"show got a {type(simulator).__name__}; expected a simulator, as tintc.compile and "
            "tintc.load return it"
        )
    if isinstance(height, bool) or not isinstance(height, int) or height < _LEAST:
        raise UsageError(f"height is {height!r}; expected a whole number of pixels from {_LEAST}")
    if (before := _OF.pop(simulator, None)) is not None:
        before.close()
    folder = tempfile.TemporaryDirectory(prefix="tintc-page-", ignore_cleanup_errors=True)
    try:
        root = Path(folder.name) / "page"
        write_site(simulator, root, model=model, limit_mb=limit_mb)
        server = serving(root, 0)
    except BaseException:
        folder.cleanup()
        raise
    page = _OF[simulator] = Page(server, folder, height)
    return page


def _end(server: PageServer, folder: tempfile.TemporaryDirectory[str]) -> None:
    server.close()
    folder.cleanup()
