"""`tintc page`: what it writes, what it refuses, and that a page is served until Ctrl-C."""

import http.client
import json
import threading
import webbrowser
from pathlib import Path
from typing import Any

import pytest

from tests.support.artifacts import artifact
from tests.support.command import Finished, tintc
from tests.support.pages import content, site
from tintc.page.serving import PageServer


class TestWrite:
    def test_says_what_it_wrote(self, tmp_path: Path) -> None:
        done = tintc("page", artifact(), "-o", tmp_path / "site")
        assert done.code == 0, done
        assert "files" in done.out and "in the browser" in done.out
        assert done.err.startswith(f"wrote {tmp_path / 'site'} in ")
        assert "next: tintc page" in done.err
        assert (tmp_path / "site" / "data" / "run.json").is_file()

    def test_json(self, tmp_path: Path) -> None:
        out = tmp_path / "site"
        done = tintc("page", artifact(), "-o", out, "--no-model", "--json")
        found = done.document
        assert found["path"] == str(out) and found["run"] is False
        assert "without the model" in found["reason"]
        files = [file for file in out.rglob("*") if file.is_file()]
        assert found["files"] == len(files)
        assert 0 <= sum(file.stat().st_size for file in files) - found["bytes"] < 2000  # page.json

    def test_a_limit(self, tmp_path: Path) -> None:
        done = tintc("page", artifact(), "-o", tmp_path / "site", "--limit-mb", "0.01")
        assert done.code == 0 and "too much for a browser" in " ".join(done.out.split())
        assert content("site", tmp_path / "site")["views"]["run"]["available"] is False

    @pytest.mark.slow
    def test_force(self, tmp_path: Path) -> None:
        out = tmp_path / "site"
        assert tintc("page", artifact(), "-o", out, "--no-model", "-q").code == 0
        said = tintc("page", artifact(), "-o", out, "--no-model").refused(2)
        assert "exists; pass --force to replace it" in said
        done = tintc("page", artifact(), "-o", out, "--no-model", "--force", "-q")
        assert (done.code, done.err) == (0, "")


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ((), "Missing option '-o'"),
            (("-o", "OUT", "--port", "80"), "--port is of a page that is served"),
            (("-o", "OUT", "--json", "--serve"), "expected one of --json and --serve"),
            (("-o", "OUT", "--limit-mb", "0"), "limit_mb is 0; expected more than 0"),
            (("-o", "OUT", "--limit-mb", "much"), "limit-mb"),
            (("--serve", "--port", "-1"), "expected at least 0"),
            (("--serve", "--port", "65536", "--no-model"), "port is 65536; expected 0 to 65535"),
        ],
    )
    def test_options(self, arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
        given = [str(tmp_path / "site") if a == "OUT" else a for a in arguments]
        assert said in tintc("page", artifact(), *given).refused(2)
        assert not (tmp_path / "site").exists()

    def test_no_artifact(self, tmp_path: Path) -> None:
        said = tintc("page", tmp_path, "-o", tmp_path / "site").refused(1)
        assert "is no tintc artifact" in said

    def test_not_over_the_artifact(self) -> None:
        said = tintc("page", artifact(), "-o", artifact(), "--force").refused(2)
        assert "is no page of tintc's" in said or "holds" in said

    @pytest.mark.parametrize("arguments", [(), ("-o", "OUT"), ("-o", "OUT", "--serve")])
    def test_a_page_is_only_served(self, arguments: tuple[str, ...], tmp_path: Path) -> None:
        given = [str(tmp_path / "site") if a == "OUT" else a for a in arguments]
        assert "is a page already" in tintc("page", site().path, *given).refused(2)


def served(
    monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[Finished, list[dict[str, Any]]]:
    """The command, and site.json as its server gave it before Ctrl-C."""
    seen: list[dict[str, Any]] = []
    serve = PageServer.serve_forever

    def until_asked(server: PageServer, poll_interval: float = 0.5) -> None:
        thread = threading.Thread(target=serve, args=(server, 0.01))
        thread.start()
        try:
            connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)
            connection.request("GET", "/data/site.json")
            seen.append(json.loads(connection.getresponse().read()))
        finally:
            server.shutdown()
            thread.join()
        raise KeyboardInterrupt

    monkeypatch.setattr(PageServer, "serve_forever", until_asked)
    return tintc(*arguments), seen


class TestServe:
    def test_a_page(self, monkeypatch: pytest.MonkeyPatch) -> None:
        done, seen = served(monkeypatch, "page", site().path, "--serve", "--port", "0")
        assert done.code == 0 and "interrupted" not in done.err  # Ctrl-C is how it is meant to end
        assert done.out.startswith("http://127.0.0.1:")
        assert seen == [content("site")]

    def test_an_artifact_without_leaving_anything(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        done, seen = served(
            monkeypatch, "page", artifact(), "--serve", "--no-model", "--port", "0", "-q"
        )
        assert (done.code, done.err) == (0, "")
        assert seen[0]["views"]["run"]["available"] is False
        assert list(tmp_path.iterdir()) == []

    def test_opens_a_browser(self, monkeypatch: pytest.MonkeyPatch) -> None:
        opened: list[str] = []
        monkeypatch.setattr(webbrowser, "open", opened.append)
        done, _ = served(monkeypatch, "page", site().path, "--open", "--port", "0")
        assert opened == [done.out.strip()]
