"""The page's own file server."""

import gzip
import http.client
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.pages import site
from tintc.ir.errors import UsageError
from tintc.page.serving import PageServer, serving
from tintc.page.site import MANIFEST


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a page looks like, in few bytes."""
    root = tmp_path / "page"
    (root / "data").mkdir(parents=True)
    (root / "runtime").mkdir()
    (root / "index.html").write_text("<title>page</title>" + "x" * 1000)
    (root / "data" / "site.json").write_text("{}")
    (root / MANIFEST).write_text("{}")
    (root / "runtime" / "run.wasm").write_bytes(b"\0asm" * 1000)
    (root / "runtime" / "run.mjs").write_text("export {}")
    (root / "model.onnx").write_bytes(b"onnx")
    return root


@pytest.fixture
def server(folder: Path) -> Iterator[PageServer]:
    found = serving(folder, 0)
    yield found
    found.close()


def get(
    server: PageServer, path: str, method: str = "GET", **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    return response, response.read()


class TestFiles:
    @pytest.mark.parametrize(
        ("path", "kind"),
        [
            ("/", "text/html"),
            ("/index.html?x=1", "text/html"),
            ("/data/site.json", "application/json"),
            ("/runtime/run.wasm", "application/wasm"),
            ("/runtime/run.mjs", "text/javascript"),
            ("/model.onnx", "application/octet-stream"),
        ],
    )
    def test_kinds_and_isolation(self, server: PageServer, path: str, kind: str) -> None:
        for encoding in ("identity", "gzip"):
            response, _ = get(server, path, **{"Accept-Encoding": encoding})
            assert response.status == 200
            assert response.headers["Content-Type"].startswith(kind)
            assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
            assert "Python" not in response.headers["Server"]

    def test_compresses_text_and_wasm(self, server: PageServer, folder: Path) -> None:
        for name in ("index.html", "runtime/run.wasm"):
            response, body = get(server, f"/{name}", **{"Accept-Encoding": "br, gzip"})
            plain = (folder / name).read_bytes()
            assert response.headers["Content-Encoding"] == "gzip" and len(body) < len(plain)
            assert gzip.decompress(body) == plain
            response, body = get(server, f"/{name}")
            assert response.headers["Content-Encoding"] is None and body == plain
        assert get(server, "/model.onnx", **{"Accept-Encoding": "gzip"})[1] == b"onnx"

    def test_head(self, server: PageServer) -> None:
        response, body = get(server, "/", "HEAD", **{"Accept-Encoding": "gzip"})
        assert response.status == 200 and body == b""

    def test_a_page_that_is_written_again(self, server: PageServer, folder: Path) -> None:
        get(server, "/", **{"Accept-Encoding": "gzip"})
        (folder / "index.html").write_text("new")
        os.utime(folder / "index.html", ns=(1, 1))
        _, body = get(server, "/", **{"Accept-Encoding": "gzip"})
        assert gzip.decompress(body) == b"new"

    def test_nothing_outside(self, server: PageServer, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "secret.txt").write_text("secret")
        (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
        (folder / "data" / "up").symlink_to(tmp_path)
        for path in (
            "/../secret.txt",
            "/%2e%2e/secret.txt",
            "/link.txt",
            "/data/up/secret.txt",
            "/data",  # no listing either
            "/data/",
            "/missing",
            "/%00",
        ):
            assert get(server, path)[0].status == 404, path

    def test_only_reads(self, server: PageServer) -> None:
        assert get(server, "/", "POST")[0].status == 501


class TestPort:
    def test_loopback_alone(self, server: PageServer) -> None:
        assert server.server_address[0] == "127.0.0.1"
        assert server.url == f"http://127.0.0.1:{server.server_address[1]}/"

    def test_taken(self, server: PageServer, folder: Path) -> None:
        with pytest.raises(UsageError, match=r"port is \d+, which cannot be used: Address already"):
            PageServer(folder, server.server_address[1])
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                taken.bind(("127.0.0.1", 8000))
                taken.listen()
            except OSError:
                pass  # somebody else has it, which does as well
            with PageServer(folder) as other:
                assert other.server_address[1] not in (0, 8000)

    def test_out_of_range(self, folder: Path) -> None:
        with pytest.raises(UsageError, match="port is 65536; expected 0 to 65535"):
            PageServer(folder, 65536)

    def test_no_page(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="is no page"):
            PageServer(tmp_path)

    def test_closed_gives_the_port_back(self, folder: Path) -> None:
        before = threading.active_count()
        first = serving(folder, 0)
        port = first.server_address[1]
        first.close()
        second = serving(folder, port)
        second.close()
        assert threading.active_count() == before


def test_serves_a_whole_site() -> None:
    server = serving(site().path, 0)
    try:
        for file in site().path.rglob("*.json"):
            response, body = get(server, "/" + file.relative_to(site().path).as_posix())
            assert response.status == 200 and body == file.read_bytes()
    finally:
        server.close()
