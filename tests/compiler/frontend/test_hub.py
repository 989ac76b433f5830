"""Models of the hub: fetched once, found again without a network, and compared with what the hub
says that they are.
"""

import os
import time
from collections.abc import Callable
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
from tests.support.hub import NOBODY, Fault, Hub, copied, digest, point_at
from tests.support.refusals import refusal
from tintc.compiler import driver
from tintc.compiler.frontend.capture import Captured, capture
from tintc.compiler.frontend.sources import load_source
from tintc.evaluate.auxiliary import Auxiliary
from tintc.evaluate.speed.report import Settings, bench_report
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import MemoryLimitError, UnsupportedModelError, UsageError

WEIGHTS = "model.safetensors"


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


def benched(source: str, cache_dir: str) -> object:
    settings = Settings(options={"cache_dir": cache_dir})
    return bench_report(source, SimulatorConfig.paper(), settings)


class TestRefusedByItsConfig:
    """What the graph alone decides is decided before gigabytes of weights are fetched."""

    CONFIGS: ClassVar[dict[str, transformers.PreTrainedConfig]] = {
        "mamba": transformers.MambaConfig(
            vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1
        ),
        "rwkv": transformers.RwkvConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2),
    }

    @pytest.mark.parametrize(
        ("name", "make"),
        [
            ("mamba", package.compile),
            ("mamba", Auxiliary),
            ("mamba", benched),
            pytest.param("rwkv", package.compile, marks=pytest.mark.slow),
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

    @pytest.mark.parametrize("name", ["gpt_neo", pytest.param("falcon", marks=pytest.mark.slow)])
    def test_what_looks_at_numbers_of_its_own_is_fetched(
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

    @pytest.mark.slow
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
