"""Models of the hub: fetched once, found again without a network, and compared with what the hub
says that they are.
"""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import psutil
import pytest
import torch
import transformers

import tintc as package
from tests.support.artifacts import source_directory
from tests.support.families import FAMILIES
from tests.support.hub import NOBODY, Fault, Hub, copied, digest, point_at, serving
from tests.support.refusals import refusal
from tintc.compiler import driver
from tintc.compiler.frontend import hub as hub_module
from tintc.compiler.frontend.capture import Captured, capture
from tintc.compiler.frontend.model_checks import with_unwritten_weights
from tintc.compiler.frontend.sources import load_source
from tintc.evaluate.auxiliary import Auxiliary
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import MemoryLimitError, UnsupportedModelError, UsageError

WEIGHTS = "model.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the model owner/good."""
    with serving(tmp_path / "hub") as hub:
        copied(source_directory(), hub.model("owner/good"))
        point_at(hub.url, monkeypatch)
        yield hub


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def flipped(data: bytes) -> bytes:
    """As many bytes, of which some in the middle are others."""
    middle = len(data) // 2
    return (
        data[:middle] + bytes(255 - byte for byte in data[middle : middle + 8]) + data[middle + 8 :]
    )


class TestFetched:
    def test_model_is_fetched_and_cached(
        self, hub: Hub, cache: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for other in ("tf_model.h5", "pytorch_model.bin", "onnx/model.onnx"):
            (hub.model("owner/good") / other).parent.mkdir(exist_ok=True)
            (hub.model("owner/good") / other).write_bytes(b"the same weights in another form")
        source = load_source("owner/good", cache_dir=cache)
        assert source.description.kind == "hub"
        assert len(source.description.revision or "") == 40
        assert source.description.sha256 == digest(hub.model("owner/good") / WEIGHTS)
        assert source.tokenizer is not None
        assert {"config.json", WEIGHTS, "tokenizer.json"} <= hub.fetched()
        assert not hub.fetched() & {"tf_model.h5", "pytorch_model.bin", "model.onnx"}

        hub.requests.clear()
        load_source("owner/good", cache_dir=cache)
        assert not hub.fetched(), "fetched twice"

        hub.requests.clear()
        offline = load_source("owner/good", cache_dir=cache, offline=True)
        assert offline.description == source.description
        assert not hub.requests

        point_at(NOBODY, monkeypatch)
        assert load_source("owner/good", cache_dir=cache).description == source.description

    def test_weights_that_do_not_fit_are_not_fetched(
        self, hub: Hub, cache: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
        refusal("owner/good", MemoryLimitError, cache_dir=cache)
        assert WEIGHTS not in hub.fetched()


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "revision", "words"),
        [
            ("owner/private", None, "there is no model owner/private on the hub, or it is private"),
            ("owner/gated", None, "owner/gated is gated"),
            ("owner/good", "no-such-revision", "no revision 'no-such-revision'"),
            ("owner/too/deep", None, "neither a directory nor a hub id"),
            ("two words", None, "neither a directory nor a hub id"),
        ],
    )
    def test_by_name(
        self, hub: Hub, cache: str, name: str, revision: str | None, words: str
    ) -> None:
        copied(source_directory(), hub.model("owner/gated"))
        hub.gated.add("owner/gated")
        assert words in refusal(name, revision=revision, cache_dir=cache)

    def test_repository_without_config(self, hub: Hub, cache: str) -> None:
        (hub.model("owner/good") / "config.json").unlink()
        assert "no config.json" in refusal("owner/good", cache_dir=cache)

    def test_repository_without_weights(self, hub: Hub, cache: str) -> None:
        (hub.model("owner/good") / WEIGHTS).unlink()
        assert "has no weights" in refusal("owner/good", cache_dir=cache)

    def test_no_network_says_what_to_fetch_and_does_not_hang(
        self, cache: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        point_at(NOBODY, monkeypatch)
        start = time.monotonic()
        message = refusal("facebook/opt-125m", revision="v1", cache_dir=cache)
        assert time.monotonic() - start < 5
        assert "hf download facebook/opt-125m --revision v1" in message
        assert "save_pretrained" in message

    def test_offline_and_only_a_part_in_the_cache(self, hub: Hub, cache: str) -> None:
        load_source("owner/good", cache_dir=cache)
        next(Path(cache).rglob(f"snapshots/*/{WEIGHTS}")).unlink()
        assert "hf download owner/good" in refusal("owner/good", cache_dir=cache, offline=True)


class TestDamaged:
    """A file is compared with the digest that the hub gave for it."""

    @pytest.mark.parametrize("file", [WEIGHTS, "config.json", "tokenizer.json"])
    def test_on_the_way(self, hub: Hub, cache: str, file: str) -> None:
        hub.faults.append(Fault(f"*/{file}", change=flipped, method="GET", times=1))
        message = refusal("owner/good", cache_dir=cache)
        assert f"owner/good: {file} is damaged: its digest is " in message
        given = digest(hub.model("owner/good") / file)
        assert f"the hub's is {given}" in message
        blob = message.split("delete ")[1].split(" and run")[0]
        assert Path(blob).name == given
        # run again alone does not help, what the message says does
        assert message == refusal("owner/good", cache_dir=cache)
        assert message == refusal("owner/good", cache_dir=cache, offline=True)
        os.remove(blob)
        source = load_source("owner/good", cache_dir=cache)
        assert source.description.sha256 == digest(hub.model("owner/good") / WEIGHTS)

    def test_shards(self, hub: Hub, cache: str) -> None:
        model = hub.model("owner/good")
        (model / WEIGHTS).unlink()
        load_source(source_directory()).model.save_pretrained(model, max_shard_size="100KB")  # type: ignore[operator]
        names = sorted(path.name for path in model.glob("model-*"))
        load_source("owner/good", cache_dir=cache)
        blob = next(Path(cache).rglob(f"snapshots/*/{names[1]}")).resolve()
        blob.write_bytes(flipped(blob.read_bytes()))
        assert f"{names[1]} is damaged" in refusal("owner/good", cache_dir=cache)

    def test_a_directory_of_the_cache(self, hub: Hub, cache: str) -> None:
        load_source("owner/good", cache_dir=cache)
        file = next(Path(cache).rglob(f"snapshots/*/{WEIGHTS}"))
        blob = file.resolve()
        blob.write_bytes(flipped(blob.read_bytes()))
        assert f"{WEIGHTS} is damaged" in refusal(file.parent)

    @pytest.mark.parametrize("keep", [0, 100, -1])
    def test_cut(self, hub: Hub, cache: str, keep: int) -> None:
        load_source("owner/good", cache_dir=cache)
        blob = next(Path(cache).rglob(f"snapshots/*/{WEIGHTS}")).resolve()
        blob.write_bytes(blob.read_bytes()[:keep])
        message = refusal("owner/good", cache_dir=cache)
        assert f"{WEIGHTS} is truncated or damaged" in message
        assert f"delete {blob} and run the command again" in message


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


class TestRefusedByItsConfig:
    """What the graph alone decides is decided before gigabytes of weights are fetched."""

    CONFIGS: ClassVar[dict[str, transformers.PreTrainedConfig]] = {
        "mamba": transformers.MambaConfig(
            vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1
        ),
        "mixtral": transformers.MixtralConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=2,
        ),
        "gemma3": transformers.Gemma3Config(
            text_config={
                "vocab_size": 64,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 8,
            },
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            mm_tokens_per_image=1,
        ),
    }

    @pytest.mark.parametrize(
        ("name", "make"),
        [
            ("mamba", package.compile),
            ("mamba", Auxiliary),
            pytest.param("mixtral", package.compile, marks=pytest.mark.slow),
            pytest.param("gemma3", package.compile, marks=pytest.mark.slow),
        ],
    )
    def test_nothing_is_fetched(
        self, hub: Hub, cache: str, name: str, make: Callable[..., object]
    ) -> None:
        model = hub.model("owner/refused")
        model.mkdir()
        self.CONFIGS[name].save_pretrained(model)
        (model / WEIGHTS).write_bytes(b"weights")
        with pytest.raises(UnsupportedModelError) as caught:
            make("owner/refused", cache_dir=cache)
        assert "\n" not in str(caught.value)
        assert WEIGHTS not in hub.fetched()

    def test_unwritten_weights_cost_no_memory(self) -> None:
        model = torch.nn.Linear(2**14, 2**14, device="meta")  # 1 GB
        before = psutil.Process().memory_info().rss
        assert with_unwritten_weights(model).weight.device.type == "cpu"
        assert psutil.Process().memory_info().rss - before < 1e8

    @pytest.mark.parametrize("name", ["gpt_neo", pytest.param("falcon", marks=pytest.mark.slow)])
    def test_what_the_meta_device_alone_cannot_do_is_fetched(
        self, hub: Hub, cache: str, name: str
    ) -> None:
        made = FAMILIES[name].build(torch.float32)
        made.save_pretrained(hub.model(f"owner/{name}"))  # type: ignore[operator]
        package.compile(f"owner/{name}", cache_dir=cache, check="forward")

    def test_config_of_a_simulator_too(self, hub: Hub, cache: str) -> None:
        config = SimulatorConfig.paper(layers=3)
        with pytest.raises(UsageError, match="layers is 3; expected 1 to 2"):
            package.compile("owner/good", config, cache_dir=cache)
        assert WEIGHTS not in hub.fetched()

    def test_what_is_in_the_cache_is_not_looked_at_twice(
        self, hub: Hub, cache: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[torch.device] = []

        def captured(model: torch.nn.Module) -> Captured:
            seen.append(next(model.parameters()).device)
            return capture(model)

        monkeypatch.setattr(driver, "capture", captured)
        for _ in range(2):
            package.compile("owner/good", cache_dir=cache, check="none")
        assert [device.type for device in seen] == ["meta", "cpu", "cpu"]
