"""What is said where the hub, its storage or the network fails, and of repositories that hold
something else than a whole model.
"""

import errno
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from tests.support.artifacts import source_directory
from tests.support.hub import Fault, Hub, copied
from tests.support.refusals import refusal
from tintc.compiler.frontend import hub as hub_module
from tintc.compiler.frontend.sources import load_source
from tintc.ir.errors import UsageError

WEIGHTS = "model.safetensors"


class TestWhatWentWrong:
    """The reason, and what helps: not a check of the network, the disk or a token that is fine."""

    @pytest.fixture(autouse=True)
    def without_waiting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The hub's client waits before it asks again."""
        monkeypatch.setattr(time, "sleep", lambda seconds: None)

    @pytest.mark.parametrize("match", ["/api/models/*", "*/config.json", "/cdn/*"])
    def test_rate_limit(self, hub: Hub, cache: str, match: str) -> None:
        hub.faults.append(Fault(match, status=429, headers={"Retry-After": "7"}))
        message = refusal("owner/good", cache_dir=cache)
        assert "rate limit is reached (HTTP 429): wait 7 seconds, or run `hf auth login`" in message
        assert "network" not in message

    def test_rate_limit_as_the_hub_says_it(self, hub: Hub, cache: str) -> None:
        limit = {"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed window";"api";q=9;w=99'}
        hub.faults.append(Fault("/api/*", status=429, headers=limit))
        assert "wait 55 seconds" in refusal("owner/good", cache_dir=cache)

    @pytest.mark.parametrize("status", [500, 503])
    @pytest.mark.parametrize("match", ["/api/models/*", "*/config.json", "/cdn/*"])
    def test_a_hub_that_fails(self, hub: Hub, cache: str, match: str, status: int) -> None:
        hub.faults.append(Fault(match, status=status))
        message = refusal("owner/good", cache_dir=cache)
        assert f"the hub fails with HTTP {status} " in message
        assert "network" not in message and "later" in message

    def test_a_hub_that_fails_and_a_copy_in_the_cache(
        self, hub: Hub, cache: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        load_source("owner/good", cache_dir=cache)
        hub.faults.append(Fault("/api/*", status=503))
        load_source("owner/good", cache_dir=cache)
        assert "HTTP 503 Service Unavailable); taking it from the cache" in caplog.text

    @pytest.mark.parametrize("announced", [False, True])
    def test_shorter_than_it_should_be(self, hub: Hub, cache: str, announced: bool) -> None:
        size = (hub.model("owner/good") / WEIGHTS).stat().st_size
        hub.faults.append(Fault("/cdn/*", change=lambda data: data[:-5], announced=announced))
        message = refusal("owner/good", cache_dir=cache)
        assert "cannot store" not in message
        if announced:  # the client cannot tell that from a network that failed
            assert f"the network failed while {WEIGHTS} was being fetched" in message
        else:
            assert f"{WEIGHTS} came incomplete: {size - 5} bytes of {size}" in message

    def test_a_page_instead_of_the_weights(self, hub: Hub, cache: str) -> None:
        page = Fault("/cdn/*", change=lambda data: b"<title>Sign in</title>")
        page.headers = {"Content-Type": "text/html"}
        hub.faults.append(page)
        assert f"{WEIGHTS} came incomplete: 22 bytes of " in refusal("owner/good", cache_dir=cache)

    def test_a_page_instead_of_the_hub(self, hub: Hub, cache: str) -> None:
        hub.faults.append(Fault("*", change=lambda data: b"<title>Sign in</title>"))
        message = refusal("owner/good", cache_dir=cache)
        assert "something else answers in its place" in message and "login" in message

    def test_storage_that_refuses(self, hub: Hub, cache: str) -> None:
        hub.faults.append(Fault("/cdn/*", status=403))
        message = refusal("owner/good", cache_dir=cache)
        assert f"{hub.cdn.removeprefix('http://')}, where the hub stores large files" in message
        assert "HTTP 403" in message and "token" not in message

    def test_hub_that_refuses(self, hub: Hub, cache: str) -> None:
        hub.faults.append(Fault("/api/*", status=403))
        assert "check your token" in refusal("owner/good", cache_dir=cache)

    def test_disabled(self, hub: Hub, cache: str) -> None:
        hub.disabled.add("owner/good")
        message = refusal("owner/good", cache_dir=cache)
        assert "owner/good was taken down" in message and "token" not in message

    @pytest.mark.parametrize("revision", ["", " "])
    def test_empty_revision(self, hub: Hub, cache: str, revision: str) -> None:
        message = refusal("owner/good", UsageError, revision=revision, cache_dir=cache)
        assert "the revision is empty" in message
        assert not hub.requests

    def test_a_revision_without_files(self, hub: Hub, cache: str) -> None:
        for file in hub.model("owner/good").iterdir():
            file.unlink()
        assert "this revision holds no files" in refusal("owner/good", cache_dir=cache)

    def test_a_full_disk_is_still_told(
        self, hub: Hub, cache: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), cache)

        monkeypatch.setattr(hub_module, "hf_hub_download", full)
        assert "cannot store config.json in the cache" in refusal("owner/good", cache_dir=cache)


class TestOtherForms:
    """A repository with something else than whole weights."""

    @pytest.fixture
    def other(self, hub: Hub) -> Path:
        (hub.model("owner/other")).mkdir()
        return hub.model("owner/other")

    @pytest.mark.parametrize("config", [False, True])
    def test_adapter(self, hub: Hub, cache: str, other: Path, config: bool) -> None:
        (other / "adapter_config.json").write_text("{}")
        (other / "adapter_model.safetensors").write_bytes(b"")
        if config:
            shutil.copy(source_directory() / "config.json", other)
        assert "this is an adapter: merge it" in refusal("owner/other", cache_dir=cache)

    @pytest.mark.parametrize("config", [None, {"model_type": "llama"}])
    def test_gguf(self, hub: Hub, cache: str, other: Path, config: object) -> None:
        """A config of which nothing but its type is said is that of a 7B model."""
        for size in ("q4", "q8"):
            (other / f"model-{size}.gguf").write_bytes(b"GGUF")
        if config is not None:
            (other / "config.json").write_text(json.dumps(config))
        message = refusal("owner/other", cache_dir=cache)
        assert "one GGUF file: model-q4.gguf" in message
        assert "`hf download owner/other model-q4.gguf`" in message
        copied(other, Path(cache) / "here")
        assert "one GGUF file: model-q4.gguf" in refusal(Path(cache) / "here")

    def test_an_index_that_leads_outside(self, hub: Hub, cache: str) -> None:
        model = hub.model("owner/good")
        (model / WEIGHTS).unlink()
        index = {"weight_map": {"a": "../../escape.safetensors", "b": WEIGHTS}}
        (model / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
        for source in ("owner/good", model):
            message = refusal(source, cache_dir=cache)
            assert f"{WEIGHTS}.index.json names ../../escape.safetensors, outside" in message
            assert "again" not in message
