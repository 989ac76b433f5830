"""--offline sends no request, whatever command has it; and what was fetched before is enough."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

from tests.support.artifacts import TEXT, edit_json, source_directory
from tests.support.command import Finished, tintc
from tests.support.hub import Hub, copied, point_at, serving, sst2, wikitext

SMALL = ("--tokens", 16, "--limit", 1, "--choosing", 1, "--train-fraction", "0.5", "--seeds", 1)
FEW = (
    "--shots",
    0,
    "--limit",
    2,
    "--choosing",
    4,
    "--seeds",
    1,
    "--budgets",
    "12x1",
    "--rates",
    "1e-3",
)
NAME = "owner/good"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(tmp_path / "hub") as hub:
        copied(source_directory(), hub.model(NAME))
        wikitext(hub)
        sst2(hub)
        point_at(hub.url, monkeypatch, tmp_path / "home")
        yield hub


def both(hub: Hub, *command: object) -> Finished:
    """The command, and once more offline."""
    first = tintc(*command)
    assert first.code == 0, first
    assert hub.requests
    return offline(hub, *command)


def offline(hub: Hub, *command: object) -> Finished:
    with pytest.MonkeyPatch.context() as anew:
        point_at(hub.url, anew)
        hub.requests.clear()
        found = tintc(*command, "--offline")
        assert hub.requests == []
    return found


class TestNoRequest:
    def test_compile(self, hub: Hub, tmp_path: Path) -> None:
        target = tmp_path / "sim"
        assert both(hub, "compile", NAME, "-o", target, "--force").code == 0
        hub.requests.clear()
        assert tintc("run", target, "--text", TEXT).code == 0
        assert hub.requests == []  # an artifact is read without any

    def test_cost(self, hub: Hub) -> None:
        assert both(hub, "cost", NAME).code == 0

    @pytest.mark.slow
    def test_language(self, hub: Hub) -> None:
        assert both(hub, "eval", "lm", NAME, "--data", "wikitext-2", *SMALL).code == 0

    @pytest.mark.slow
    def test_classification(self, hub: Hub) -> None:
        assert both(hub, "eval", "classify", NAME, "--task", "sst2", *FEW).code == 0

    @pytest.mark.slow
    def test_ablation(self, hub: Hub) -> None:
        only = ("--only", "exact", "--tokens", 16, "--limit", 1, "--choosing", 1)
        assert both(hub, "ablate", NAME, "--data", "wikitext-2", *only).code == 0

    @pytest.mark.slow
    def test_bench(self, hub: Hub) -> None:
        small = ("--tokens", 8, "--pairs", 1, "--no-memory")
        assert both(hub, "bench", NAME, *small).code == 0

    @pytest.mark.parametrize(
        "command",
        [
            ("eval", "lm", "tiny-opt", "--data", "wikitext-2", *SMALL),
            ("eval", "lm", "tiny-opt", "--data", "c4", *SMALL),
            ("eval", "classify", "tiny-opt", "--task", "sst2", *FEW),
            ("ablate", "tiny-opt", "--data", "wikitext-2"),
            ("compile", "owner/elsewhere", "-o", "never"),
            ("cost", "owner/elsewhere"),
        ],
        ids=lambda command: " ".join(map(str, command[:4])),
    )
    def test_what_was_never_fetched(self, hub: Hub, command: tuple[object, ...]) -> None:
        assert "offline mode" in offline(hub, *command).refused(1)

    @pytest.mark.slow
    def test_code_of_another_repository(
        self, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        modules = str(tmp_path / "modules")
        monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", modules)
        monkeypatch.syspath_prepend(modules)
        hub.model("owner/code").mkdir()
        (hub.model("owner/code") / "its_code.py").write_text(
            "from transformers import OPTConfig, OPTForCausalLM\n"
            "class OwnConfig(OPTConfig):\n    model_type = 'own'\n"
            "class OwnForCausalLM(OPTForCausalLM):\n    config_class = OwnConfig\n"
        )
        code = {
            "AutoConfig": "owner/code--its_code.OwnConfig",
            "AutoModelForCausalLM": "owner/code--its_code.OwnForCausalLM",
        }
        config = hub.model(NAME) / "config.json"
        edit_json(config, lambda values: values.update(model_type="own", auto_map=code))
        trusted = ("compile", NAME, "-o", tmp_path / "sim", "--force", "--trust-remote-code")
        assert both(hub, *trusted).code == 0
