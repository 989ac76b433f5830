"""Artifacts: what comes back is what was saved, nothing altered is read, nothing half-written
stays.
"""

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import tintc
from tests.support.artifacts import TEXT, artifact, copy_of, edit_json, seal, source_directory
from tests.support.command import process
from tests.support.models import FAMILIES, gpt2, opt, simulate, tokens
from tintc import save
from tintc.compiler import artifact_files
from tintc.compiler import artifact_writer as module
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import ArtifactError, UsageError
from tintc.runtime.simulator import Simulator

RULES: tuple[dict[str, Any], ...] = (
    {"train": ("*.fc1.*", "*.0.*.weight")},
    {"lr_scale": {"*.1.*": 3.0, "*.bias": 0.5, "*fc2*": 0.0, "*.0.*": -1.0}},
    {"schedule": "cosine", "momentum": 0.9, "nesterov": True, "clip_norm": 0.5},
    {"schedule": (1.0, 0.25), "decay": 0.1, "max_drift": 0.5, "normalize": "weight"},
    {"optimizer": "adam", "betas": (0.5, 0.75), "eps": 1e-4},
    {"optimizer": "muon", "momentum": 0.5},
)
FILES = [
    "manifest.json",
    "graph.json",
    "weights.safetensors",
    "report.json",
    "tokenizer/tokenizer.json",
]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A compiled artifact that the test may change."""
    return copy_of(artifact(), tmp_path / "saved")


@pytest.fixture
def simulator() -> Simulator:
    return tintc.load(artifact())


def everything(simulator: Simulator) -> dict[str, torch.Tensor]:
    ids = tokens(2, 11, simulator.program.facts.vocab_size)
    train_mask = (torch.arange(11) < torch.tensor([[5], [8]])).long()
    with torch.inference_mode():
        out = simulator(ids, train_mask, return_initial=True)
    assert out.initial_logits is not None
    return {
        "logits": out.logits,
        "initial": out.initial_logits,
        **simulator.updated_state_dict(ids, train_mask, index=1),
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


class TestRoundTrip:
    @pytest.mark.parametrize("preset", ["paper", "exact"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_bit_for_bit(self, family: str, preset: str, tmp_path: Path) -> None:
        simulator = simulate(
            FAMILIES[family](), SimulatorConfig.preset(preset, inner_lr=0.01, steps=2, layers=1)
        )
        loaded = tintc.load(save(simulator, tmp_path / "saved"))
        assert_same(everything(loaded), everything(simulator))
        assert loaded.config == simulator.config
        assert loaded.program.facts == simulator.program.facts
        assert loaded.program.layout == simulator.program.layout
        assert loaded.program.stages == simulator.program.stages
        assert loaded.dtype == torch.float64

    @pytest.mark.parametrize("rule", RULES, ids=[next(iter(rule)) for rule in RULES])
    def test_rules(self, rule: dict[str, Any], tmp_path: Path) -> None:
        """Every field, in the order that decides between factors."""
        config = SimulatorConfig.exact(inner_lr=0.01, steps=2, **rule)
        simulator = simulate(opt(), config)
        loaded = tintc.load(save(simulator, tmp_path / "saved"))
        assert loaded.config == config
        assert_same(everything(loaded), everything(simulator))

    def test_twice(self, simulator: Simulator, tmp_path: Path) -> None:
        again = save(simulator, tmp_path / "again")
        for name in (*FILES[1:4], "tokenizer/tokenizer.json"):
            assert (again / name).read_bytes() == (artifact() / name).read_bytes(), name

    def test_tokenizer_and_source(self, simulator: Simulator) -> None:
        compiled = tintc.compile(str(source_directory()))
        assert simulator.tokenizer(TEXT)["input_ids"] == compiled.tokenizer(TEXT)["input_ids"]
        assert simulator.source == compiled.source
        assert simulator.source["sha256"]

    @pytest.mark.slow
    def test_no_tokenizer(self, tmp_path: Path) -> None:
        saved = save(simulate(opt(), SimulatorConfig.paper()), tmp_path / "saved")
        assert sorted(file.name for file in saved.iterdir()) == [
            "graph.json",
            "manifest.json",
            "report.json",
            "weights.safetensors",
        ]
        assert tintc.load(saved).tokenizer is None

    @pytest.mark.parametrize(("model", "head"), [(opt, "lm_head.weight"), (gpt2, "lm_head.weight")])
    def test_tied_weights_once(
        self, model: Callable[[], torch.nn.Module], head: str, tmp_path: Path
    ) -> None:
        saved = save(simulate(model(), SimulatorConfig.paper()), tmp_path / "saved")
        with safe_open(saved / "weights.safetensors", framework="pt") as weights:
            names = set(weights.keys())
        assert head not in names
        loaded = tintc.load(saved)
        assert loaded.program.aliases[head] in names
        state = loaded.updated_state_dict(tokens(1, 5, 29), torch.ones(1, 5))
        assert state[head] is state[loaded.program.aliases[head]]

    @pytest.mark.slow
    def test_untied_weights_twice(self, tmp_path: Path) -> None:
        saved = save(
            simulate(opt(tie_word_embeddings=False), SimulatorConfig.paper()), tmp_path / "saved"
        )
        with safe_open(saved / "weights.safetensors", framework="pt") as weights:
            assert "lm_head.weight" in weights.keys()  # noqa: SIM118 (no mapping)

    def test_trained_inner_lr_and_weights(self, tmp_path: Path) -> None:
        simulator = simulate(opt(), SimulatorConfig.exact(inner_lr=0.01))
        ids, train_mask = tokens(2, 9, 29), torch.ones(2, 9)
        optimizer = torch.optim.SGD(simulator.parameters(), lr=0.01)
        simulator(ids, train_mask).logits.square().mean().backward()
        optimizer.step()
        assert simulator.inner_lr.item() != 0.01
        loaded = tintc.load(save(simulator, tmp_path / "saved"))
        assert torch.equal(loaded.inner_lr, simulator.inner_lr)
        assert_same(everything(loaded), everything(simulator))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_dtype_on_load(self, dtype: torch.dtype, simulator: Simulator) -> None:
        loaded = tintc.load(artifact(), dtype=dtype)
        assert {p.dtype for p in loaded.prefix.parameters()} == {dtype}
        assert loaded.inner_lr.dtype == torch.float64
        assert loaded.inner_lr.item() == simulator.inner_lr.item()
        assert_same(everything(loaded), everything(simulator.to(dtype)))

    def test_half_precision_is_stored_as_such(self, tmp_path: Path) -> None:
        compiled = tintc.compile(str(source_directory()), dtype=torch.bfloat16)
        loaded = tintc.load(save(compiled, tmp_path / "saved"))
        assert loaded.dtype == torch.bfloat16
        assert loaded.inner_lr.dtype == torch.float64
        assert_same(everything(loaded), everything(compiled))

    def test_loaded_simulator_trains(self, simulator: Simulator) -> None:
        simulator(tokens(1, 7, 4096), torch.ones(1, 7)).logits.sum().backward()
        assert simulator.inner_lr.grad is not None
        assert all(p.requires_grad for p in simulator.prefix.parameters())


class TestPlaces:
    def test_home_and_parents(
        self, simulator: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        assert save(simulator, "~/a/b/saved") == tmp_path / "a" / "b" / "saved"
        assert tintc.load("~/a/b/saved").config == simulator.config

    def test_the_current_directory(
        self, simulator: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "here"
        folder.mkdir()
        monkeypatch.chdir(folder)
        save(simulator, ".", force=True)
        assert [file.name for file in tmp_path.iterdir()] == ["here"]
        assert tintc.load(folder).config == simulator.config

    def test_permissions_are_those_of_any_new_file(
        self, simulator: Simulator, tmp_path: Path
    ) -> None:
        before = os.umask(0o027)
        try:
            saved = save(simulator, tmp_path / "saved")
        finally:
            os.umask(before)
        modes = {stat.S_IMODE(path.stat().st_mode) for path in saved.rglob("*") if path.is_file()}
        assert modes == {0o640}
        assert stat.S_IMODE(saved.stat().st_mode) == 0o750

    def test_nothing_of_this_machine(self, tmp_path: Path) -> None:
        """No pickle, no code, and no absolute path: an artifact may be given away."""
        saved = save(
            tintc.compile(str(shutil.copytree(source_directory(), tmp_path / "model"))),
            tmp_path / "saved",
        )
        files = [file for file in saved.rglob("*") if file.is_file()]
        assert {file.suffix for file in files} == {".json", ".safetensors"}
        given = json.loads((saved / "manifest.json").read_text())["source"]["name"]
        secrets = {
            str(Path.home()),
            str(Path(module.__file__).resolve().parent),
            os.path.dirname(torch.__file__),
            tempfile.gettempdir(),
        }
        for file in files:
            text = (
                file.read_bytes().decode("utf-8", "replace").replace(given, "")
            )  # the source's name is kept as it was given
            assert [path for path in secrets if len(path) > 1 and path + "/" in text] == [], file


class TestDamage:
    @pytest.mark.parametrize("where", [0.0, 0.3, 0.7, 0.999])
    @pytest.mark.parametrize("name", FILES)
    def test_flipped_byte(self, name: str, where: float, saved: Path) -> None:
        data = bytearray((saved / name).read_bytes())
        data[int(where * len(data))] ^= 1
        (saved / name).write_bytes(data)
        self.assert_refused(saved, name)

    @pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
    @pytest.mark.parametrize("name", FILES)
    def test_truncated(self, name: str, keep: float, saved: Path) -> None:
        data = (saved / name).read_bytes()
        (saved / name).write_bytes(data[: int(keep * len(data))])
        self.assert_refused(saved, name)

    @pytest.mark.parametrize("name", FILES)
    def test_removed(self, name: str, saved: Path) -> None:
        (saved / name).unlink()
        self.assert_refused(saved, name)

    @pytest.mark.parametrize("name", FILES[1:])
    def test_longer(self, name: str, saved: Path) -> None:
        with (saved / name).open("ab") as file:
            file.write(b" ")
        self.assert_refused(saved, name)

    @pytest.mark.parametrize("field", ["inner_lr", "steps"])
    def test_manifest_that_was_edited(self, field: str, saved: Path) -> None:
        edit_json(saved / "manifest.json", lambda manifest: manifest["config"].update({field: 7}))
        self.assert_refused(saved, "manifest.json")

    def test_file_that_the_manifest_does_not_list(self, saved: Path) -> None:
        (saved / "tokenizer" / "vocab.json").write_text("{}")
        self.assert_refused(saved, "tokenizer/vocab.json")

    def assert_refused(self, saved: Path, name: str) -> None:
        """The file and the checksum are named, except where the manifest itself can no longer be
        read.
        """
        with pytest.raises(ArtifactError) as caught:
            tintc.load(saved)
        message = str(caught.value)
        assert name in message
        assert "\n" not in message
        said = ("the manifest says", "cannot be read", "has no manifest.json")
        assert any(text in message for text in said)


class TestNoArtifact:
    @pytest.mark.parametrize("version", [0, 1, 5, "6", None])
    def test_other_format_version(self, version: object, saved: Path) -> None:
        seal(saved, lambda manifest: manifest.update(format_version=version))
        with pytest.raises(
            ArtifactError, match=f"format version {version}; this tintc reads version 6"
        ):
            tintc.load(saved)

    def test_nothing_there(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("text")
        for path in (tmp_path, tmp_path / "absent", tmp_path / "file", source_directory()):
            with pytest.raises(
                ArtifactError, match=r"is no tintc artifact: it has no manifest\.json"
            ):
                tintc.load(path)

    @pytest.mark.parametrize("text", ["", "[]", "7", '"x"', "null", "{", "\udcff"])
    def test_another_manifest(self, text: str, saved: Path) -> None:
        (saved / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ArtifactError, match=r"format version None|cannot be read"):
            tintc.load(saved)


def listing(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _full_for_weights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "write_weights", full_disk)


def _full_for_json(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Path, "write_text", full_disk)


def _full_for_manifest(patch: pytest.MonkeyPatch) -> None:
    write = module.write_json
    patch.setattr(
        module,
        "write_json",
        lambda file, *rest, **more: (full_disk if file.name == "manifest.json" else write)(
            file, *rest
        ),
    )


def _no_temporary_directory(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tempfile, "mkdtemp", full_disk)


def _no_rename(patch: pytest.MonkeyPatch) -> None:
    """The finished directory cannot be moved; what was set aside can."""
    rename = Path.rename
    patch.setattr(
        Path,
        "rename",
        lambda self, to: rename(self, to) if self.name in ("artifact", "saved") else full_disk(),
    )


FAILURES = [
    _full_for_weights,
    _full_for_json,
    _full_for_manifest,
    _no_temporary_directory,
    _no_rename,
]


class TestWriting:
    @pytest.mark.parametrize("fail", FAILURES)
    @pytest.mark.parametrize("place", ["saved", "new/parents/saved"])
    def test_full_disk_leaves_nothing(
        self,
        fail: Callable[[pytest.MonkeyPatch], None],
        place: str,
        simulator: Simulator,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        fail(monkeypatch)
        with pytest.raises(ArtifactError, match="No space left on device"):
            save(simulator, tmp_path / place)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("fail", FAILURES)
    def test_full_disk_keeps_the_old_artifact(
        self,
        fail: Callable[[pytest.MonkeyPatch], None],
        saved: Path,
        simulator: Simulator,
        tmp_path: Path,
    ) -> None:
        before = listing(tmp_path)
        with pytest.MonkeyPatch.context() as patch:
            fail(patch)
            with pytest.raises(ArtifactError, match="No space left on device"):
                save(simulator, saved, force=True)
        assert listing(tmp_path) == before
        tintc.load(saved)

    def test_tokenizer_that_cannot_be_written(self, simulator: Simulator, tmp_path: Path) -> None:
        class Tokenizer:
            def save_pretrained(self, folder: str) -> None:
                raise Exception("No space left on device (os error 28)")

        simulator.tokenizer = Tokenizer()
        with pytest.raises(ArtifactError, match="No space left on device"):
            save(simulator, tmp_path / "saved")
        assert list(tmp_path.iterdir()) == []

    def test_interrupted(
        self, saved: Path, simulator: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = listing(tmp_path)

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(artifact_files, "open_to_others", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save(simulator, saved, force=True)
        assert listing(tmp_path) == before

    @pytest.mark.parametrize("limit", [1_000, 50_000, 250_000])
    @pytest.mark.slow
    def test_real_limit_on_file_size(self, limit: int, tmp_path: Path) -> None:
        """The kernel refuses to write on, somewhere in the graph, the weights or the tokenizer."""
        code = """
import resource, sys, tintc
simulator = tintc.load(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    tintc.save(simulator, sys.argv[2])
except tintc.ArtifactError as error:
    print(error)
"""
        done = process(artifact(), tmp_path / "saved", limit, code=code)
        assert "cannot write" in done.stdout, done
        assert "nothing was left behind" in done.stdout
        assert list(tmp_path.iterdir()) == []

    def test_existing_directory(self, saved: Path, simulator: Simulator) -> None:
        before = listing(saved)
        with pytest.raises(UsageError, match="saved exists; pass force=True"):
            save(simulator, saved)
        assert listing(saved) == before

    def test_force(self, saved: Path, tmp_path: Path) -> None:
        other = simulate(opt(), SimulatorConfig.exact(steps=3))
        save(other, saved, force=True)
        assert [path.name for path in tmp_path.iterdir()] == ["saved"]
        assert not (saved / "tokenizer").exists()
        assert tintc.load(saved).config == other.config

    def test_force_on_a_damaged_artifact(self, saved: Path, simulator: Simulator) -> None:
        (saved / "weights.safetensors").unlink()
        save(simulator, saved, force=True)
        assert tintc.load(saved).config == simulator.config

    @pytest.mark.parametrize(
        "files",
        [
            {"precious.txt": "x"},
            {"manifest.json": '{"name": "a web page"}', "index.html": "x"},
            {"manifest.json": "[]"},
            {"a/b": "x"},
        ],
        ids=["text", "another manifest", "a list", "nested"],
    )
    def test_force_spares_what_tintc_did_not_write(
        self, files: dict[str, str], simulator: Simulator, tmp_path: Path
    ) -> None:
        folder = tmp_path / "folder"
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        before = listing(tmp_path)
        with pytest.raises(UsageError, match="tintc does not replace what it did not write"):
            save(simulator, folder, force=True)
        assert listing(tmp_path) == before

    def test_force_spares_files_beside_an_artifact_s(
        self, saved: Path, simulator: Simulator
    ) -> None:
        (saved / "notes.txt").write_text("mine")
        with pytest.raises(UsageError, match=r"holds notes\.txt"):
            save(simulator, saved, force=True)

    @pytest.mark.parametrize("force", [False, True])
    def test_target_is_a_file(self, force: bool, simulator: Simulator, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        for target in ("file", "file/inside"):
            with pytest.raises(
                UsageError, match=r"file (exists|is a file)|is a file; expected a directory"
            ):
                save(simulator, tmp_path / target, force=force)
        assert listing(tmp_path) == {"file": b"mine"}

    def test_name_too_long(self, simulator: Simulator, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="File name too long"):
            save(simulator, tmp_path / ("x" * 300))

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_parent_that_is_read_only(self, simulator: Simulator, tmp_path: Path) -> None:
        tmp_path.chmod(0o555)
        try:
            with pytest.raises(UsageError, match="cannot be written"):
                save(simulator, tmp_path / "saved")
        finally:
            tmp_path.chmod(0o755)

    def test_parent_that_turns_out_to_be_read_only(
        self, simulator: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any, **__: Any) -> str:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(tempfile, "mkdtemp", refuse)
        with pytest.raises(ArtifactError, match="Permission denied"):
            save(simulator, tmp_path / "saved")
        assert list(tmp_path.iterdir()) == []
