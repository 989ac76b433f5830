"""A file server of one page, on loopback alone: Python's own, with what browsers ask for to run
WebAssembly on several threads, and compression.
"""

from __future__ import annotations

import gzip
import io
import threading
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO

from tintc.ir.errors import UsageError
from tintc.page.site import is_page

HOST = "127.0.0.1"
USUAL_PORT = 8000
_COMPRESSED = {".html", ".js", ".mjs", ".css", ".json", ".svg", ".txt", ".wasm"}
_HEADERS = {
    # both for SharedArrayBuffer, which several threads need
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # another page may have this port later
    "Vary": "Accept-Encoding",
}


class PageServer(ThreadingHTTPServer):
    """Serves a folder that `write_site` wrote: `serve_forever()`, or `start()` in a thread.

    port: None for 8000, or any free one where that is taken. Raises UsageError for a folder that is
    no page, and for a port that cannot be used.
    """

    daemon_threads = True

    def __init__(self, folder: str | Path, port: int | None = None) -> None:
        self.root = Path(folder).expanduser().resolve()
        if not is_page(self.root):
            raise UsageError(f"{folder} is no page; tintc page DIR -o OUT writes one")
        check_port(port)
        self._packed: dict[tuple[Path, int], bytes] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._bind(port)

    def _bind(self, port: int | None) -> None:
        try:
            super().__init__((HOST, USUAL_PORT if port is None else port), _Handler)
        except OSError as error:
            if port is None:
                self._bind(0)
                return
            raise UsageError(
                f"port is {port}, which cannot be used: {error.strerror}; pass another one, or 0 "
                "for any that is free"
            ) from error

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"

    def start(self) -> None:
        """Serves in a thread that ends with the process."""
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends that thread and gives the port back."""
        if self._thread is not None:
            self.shutdown()
            self._thread.join()
            self._thread = None
        self.server_close()

    def packed(self, file: Path) -> bytes:
        """The file compressed, once as long as it stays the same."""
        key = file, file.stat().st_mtime_ns
        with self._lock:
            if key not in self._packed:
                self._packed[key] = gzip.compress(file.read_bytes(), 6, mtime=0)
            return self._packed[key]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that closes a connection is no error."""


def check_port(port: int | None) -> None:
    """Raises UsageError for what is no port."""
    if port is not None and not 0 <= port <= 65535:
        raise UsageError(f"port is {port}; expected 0 to 65535")


class _Handler(SimpleHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "tintc", ""
    extensions_map = {  # noqa: RUF012 (of the class that it derives from)
        **SimpleHTTPRequestHandler.extensions_map,
        ".html": "text/html; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".mjs": "text/javascript; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".json": "application/json",
        ".txt": "text/plain; charset=utf-8",
        ".svg": "image/svg+xml",
        ".wasm": "application/wasm",
        ".onnx": "application/octet-stream",
        ".data": "application/octet-stream",
    }

    def __init__(self, request: Any, client_address: Any, server: PageServer) -> None:
        super().__init__(request, client_address, server, directory=str(server.root))

    def end_headers(self) -> None:
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def send_head(self) -> io.BytesIO | BinaryIO | None:
        file = self._file()
        if file is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        accepted = self.headers.get("Accept-Encoding", "")
        if file.suffix not in _COMPRESSED or "gzip" not in accepted:
            return super().send_head()
        try:
            body = self.server.packed(file)
        except OSError:
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", self.guess_type(str(file)))
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return io.BytesIO(body)

    def _file(self) -> Path | None:
        """What is asked for, if it is a file of the page: no link leads out of it."""
        try:
            file = Path(self.translate_path(self.path)).resolve()
            file = file / "index.html" if file == self.server.root else file
            inside = file.is_relative_to(self.server.root) and file.is_file()
        except (OSError, ValueError):
            return None
        return file if inside else None

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed of a request."""


def serving(folder: str | Path, port: int | None = None) -> PageServer:
    """A server of the page in a folder, started. Raises as PageServer does."""
    server = PageServer(folder, port)
    server.start()
    return server
