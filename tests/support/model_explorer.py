"""Model Explorer's own server and web app (ai-edge-model-explorer), on loopback alone."""

from __future__ import annotations

import importlib.util
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.browser import Watched, watched

PACKAGE = "model_explorer"
GROUP = "___group___"  # what the app writes behind the name of a group

# docs/guides/page.md says the same to users. torch takes seconds to import, and the server does
# without it; and it would ask PyPI for a newer version of itself.
_SERVE = """
import json, sys
sys.modules["torch"] = None
import model_explorer
from model_explorer import server
none = dict.fromkeys(("version", "runningVersion", "releaseUrl", "desktopAppUrl"), "")
server._check_new_version = lambda *asked: none
path, port = sys.argv[1:]
config = model_explorer.config()
config.add_model_from_path(path)
for name, data in json.load(open(path))["nodeData"].items():
    config.add_node_data(name, json.dumps(data))
model_explorer.visualize_from_config(
    config, host="127.0.0.1", port=int(port), no_open_in_browser=True
)
"""

# Its graphs are laid out in a worker: what that answers is kept. A layer of one node is kept too,
# where the app would leave it out by default.
_LISTEN = """
localStorage.setItem("model_explorer_settings", '{"keep_layers_with_a_single_child": true}');
const Plain = Worker;
window.Worker = class extends Plain {
  constructor(...given) {
    super(...given);
    this.addEventListener("message", ({data}) => { window.made = data.modelGraph ?? window.made; });
  }
};
"""

# WebGL without a graphics card.
_FLAGS = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


def why_no_model_explorer() -> str | None:
    """For a skipped test."""
    if importlib.util.find_spec(PACKAGE) is None:
        return "ai-edge-model-explorer is not installed: `make test` installs it"
    return None


@contextmanager
def explored(file: Path) -> Iterator[Watched]:
    """A tab in which the app shows a file of ours. Whatever it asks of other hosts is blocked."""
    with _served(file) as url, watched(url, _FLAGS) as page:
        origin = re.escape(url[: url.index("/?") + 1])
        page.tab.route(re.compile(rf"^(?!{origin}|data:|blob:)"), lambda route: route.abort())
        page.tab.add_init_script(_LISTEN)
        page.tab.goto(url)
        page.tab.get_by_text("op node count").wait_for()
        yield page


@contextmanager
def _served(file: Path) -> Iterator[str]:
    """Its address, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", _SERVE, str(file), str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    try:
        said = []
        for line in server.stdout:
            said.append(line)
            if line.startswith("http://"):
                yield line.strip()
                return
        raise AssertionError("Model Explorer's server said: " + "".join(said))
    finally:
        server.kill()
        server.communicate()


def counts(page: Watched) -> dict[str, int]:
    """The panel `Graph info`."""
    said = page.tab.locator("body").inner_text()
    found = re.findall(r"(op node count|layer count)\s+([\d,]+)", said)
    return {name: int(number.replace(",", "")) for name, number in found}


def graph_made(page: Watched) -> dict[str, Any]:
    """The graph as the app's worker built it from the file."""
    found: dict[str, Any] = json.loads(page.tab.evaluate("JSON.stringify(window.made)"))
    return found


def node_data(page: Watched, nodes: int) -> list[list[str]]:
    """The table `Node data`, page by page: a node's label, and what it shows of each data."""
    table = page.tab.locator("table", has=page.tab.locator("td.node-label")).last
    further = page.tab.get_by_text("chevron_right", exact=True).first
    found: list[list[str]] = []
    while True:
        table.locator(f"tr:first-child > td:first-child:text-is('{len(found)}')").wait_for()
        found += table.locator("tbody tr").evaluate_all(
            "rows => rows.map(row => [...row.cells].slice(1).map(cell => cell.textContent.trim()))"
        )
        if len(found) >= nodes:
            return found
        further.click()
