"""An exported pair, in float32 in onnxruntime, against autograd and the Hugging Face model in
float64 (tests/oracle/reference.py), and against torch's own `adapt` and `generate`.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import tintc
from tests.compiler.test_onnx_rules import loops, made, wanted
from tests.oracle.reference import call
from tests.support.families import FAMILIES, POSITIONS, VOCAB
from tests.support.grid import some
from tests.support.models import simulate, tokens
from tests.support.nano import nano
from tests.support.onnx_pairs import PlainPair, session
from tests.support.rules import RATE
from tests.support.tolerances import ONNX, error, measured
from tests.support.variants import VARIANTS
from tintc import export_onnx_pair
from tintc.compiler.casts import no_casts
from tintc.compiler.onnx import comparison
from tintc.compiler.onnx.decoding import cached
from tintc.compiler.onnx.genai import genai_config
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import ArtifactError, InputError, NumericalError, UsageError
from tintc.runtime.onnx_pair import OnnxPair
from tintc.runtime.simulator import Simulator

LIMIT = ONNX[torch.float32]
CONTEXT, TEXT = 11, 26  # tokens; windows here are of 5, and are passed token by token
PARTS = [6, *[1] * 15, 5]
# Learned positions, grouped keys, windows, soft-caps, ALiBi: of the others the slow tests.
DEFAULT = ("opt", "gpt2", "llama", "mistral", "gemma2", "bloom")


def contexts(batch: int = 2) -> dict[str, Tensor]:
    """Trained on all but their last tokens; the second is padded on its left."""
    mask = torch.ones(batch, CONTEXT, dtype=torch.int64)
    mask[1:2, :3] = 0
    ids, train = tokens(batch, CONTEXT, VOCAB - 1, seed=3) + 1, mask.clone()
    train[:, -2:] = 0
    return {"input_ids": ids, "train_mask": train, "attention_mask": mask}


def texts(batch: int = 2) -> tuple[Tensor, Tensor]:
    """(ids, mask) that are read under the updates; the first is padded on its left."""
    ids, mask = tokens(batch, TEXT, VOCAB - 1, seed=4) + 1, torch.ones(batch, TEXT).long()
    mask[0, :4] = 0
    return ids, mask


def pair_of(sim: Simulator, folder: Path, *, bounded: bool = False, **options: Any) -> PlainPair:
    done = export_onnx_pair(sim, folder / "pair", inputs=("attention_mask",), **options)
    assert done.check is not None
    assert done.check.agrees
    return PlainPair(folder / "pair", bounded=bounded)


def arrays(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value.numpy() for name, value in tensors.items()}


def logits_of(model: nn.Module, state: dict[str, Tensor], ids: Tensor) -> Tensor:
    """(T, V) of the model with these weights, without a cache."""
    tokens_ = len(ids)
    allowed = torch.ones(1, 1, tokens_, tokens_, dtype=torch.bool).tril()
    with torch.no_grad():
        return call(model, state, ids[None], allowed, torch.arange(tokens_)[None])[0]


def assert_follows(
    pair: PlainPair, sim: Simulator, model: nn.Module, parts: list[int] = PARTS
) -> None:
    """Every row's logits are those of the float64 model with its own trained weights."""
    given, (ids, mask) = contexts(), texts()
    updates = pair.adapt(RATE, **arrays(given))
    found = torch.from_numpy(pair.read(updates, ids.numpy(), mask.numpy(), parts))
    states = wanted(sim, model, given).states
    for row, state in enumerate(states):
        keep = mask[row].bool()
        with no_casts():
            expected = logits_of(model, state, ids[row, keep])
        off = measured("ONNX pair against autograd, float32", error(found[row, keep], expected))
        assert off < LIMIT


@some("name", FAMILIES, DEFAULT)
def test_families(name: str, tmp_path: Path) -> None:
    sim, model = made(name)
    assert_follows(pair_of(sim, tmp_path), sim, model)


@pytest.mark.slow
@some("name", ["mistral", "gpt_neo", "gemma2"], ["mistral", "gpt_neo"])
def test_windows_may_forget(name: str, tmp_path: Path) -> None:
    """Only as many keys as they see are given; the mask is of all."""
    sim, model = made(name)
    pair = pair_of(sim, tmp_path, bounded=True)
    assert pair.windows
    assert set(pair.windows.values()) == {5}
    assert_follows(pair, sim, model)


@pytest.mark.slow
def test_windows_of_some_layers(tmp_path: Path) -> None:
    model = VARIANTS["qwen2-windows"](torch.float32)
    sim = simulate(model, SimulatorConfig.exact(inner_lr=RATE))
    pair = pair_of(sim, tmp_path, bounded=True)
    assert set(pair.windows) == {"1.key", "1.value"}
    assert_follows(pair, sim, copy.deepcopy(model).double())


@some(
    "fields",
    [
        {"momentum": 0.9, "steps": 3}, {"steps": 6, "schedule": "linear", "momentum": 0.5},
        {"optimizer": "adam"}, {"train": ("*",)}, {"train": ("*.1.*",)}, {"clip_norm": 0.1},
    ],
    [{"steps": 6, "schedule": "linear", "momentum": 0.5}, {"train": ("*",)}],
)  # fmt: skip
def test_inner_rules(fields: dict[str, Any], tmp_path: Path) -> None:
    """Many steps are a Loop in the one file; embeddings and a tied head may learn."""
    sim, model = made("opt", **fields)
    pair = pair_of(sim, tmp_path)
    assert_follows(pair, sim, model)
    files = [onnx.load(tmp_path / "pair" / f"{name}.onnx") for name in ("adapt", "decode")]
    assert [len(loops(file)) for file in files] == [int(fields.get("steps", 1) > 4), 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.slow
def test_other_types(dtype: torch.dtype, tmp_path: Path) -> None:
    sim = simulate(FAMILIES["bloom"].build(dtype), SimulatorConfig.exact(inner_lr=RATE))
    done = export_onnx_pair(sim, tmp_path / "pair")
    assert done.check is not None
    assert all(found.error < ONNX[dtype] for found in done.check.outputs.values())


@pytest.mark.slow
def test_64_tokens_of_tiny_opt(tmp_path: Path) -> None:
    """Greedy, by runtime/onnx_pair.py: the tokens of torch's `generate`, and its logits."""
    sim = tintc.compile("tiny-opt", SimulatorConfig.exact(inner_lr=1e-3))
    assert export_onnx_pair(sim, tmp_path / "pair").check is not None
    ids = tokens(1, 40, sim.program.facts.vocab_size, seed=1)
    train = torch.ones_like(ids)
    adapted = sim.adapt(ids, train, form="weights")
    expected = adapted.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None)
    pair = opened(tmp_path / "pair")
    decoding = pair.decoding(pair.adapt(ids.numpy(), train.numpy(), 1e-3))
    logits = decoding(ids.numpy(), logits_to_keep=1)
    found = [logits]
    for _ in range(63):
        found.append(decoding(found[-1].argmax(-1)))
    chosen = np.concatenate([each.argmax(-1) for each in found], 1)
    assert chosen.tolist() == expected[:, 40:].tolist()
    torchs = adapted(expected[:, :-1]).logits[:, 39:]
    off = error(torch.from_numpy(np.concatenate(found, 1)), torchs)
    assert measured("ONNX pair against torch, 64 tokens of tiny-opt", off) < LIMIT


def opened(folder: Path) -> OnnxPair:
    return OnnxPair(session(folder / "adapt.onnx"), session(folder / "decode.onnx"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pairs of the same shapes."""
    found = tmp_path_factory.mktemp("pairs")
    for name, seed in (("one", 0), ("other", 1)):
        model = FAMILIES["opt"].build(torch.float32, seed)
        sim = simulate(model, SimulatorConfig.exact(inner_lr=RATE))
        export_onnx_pair(sim, found / name, check=False)
    return found


def test_logits_of_the_last_tokens(folder: Path) -> None:
    pair = opened(folder / "one")
    given = arrays(contexts())
    del given["attention_mask"]
    updates = pair.adapt(**given)
    every = pair.decoding(updates)(given["input_ids"])
    assert every.shape == (2, CONTEXT, VOCAB)
    for count in (1, 4, CONTEXT, CONTEXT + 3):
        found = pair.decoding(updates)(given["input_ids"], logits_to_keep=count)
        assert np.allclose(found, every[:, -count:], atol=1e-6)


class TestGenai:
    """onnxruntime-genai 0.18 ran a pair with this file; it is not installed here."""

    def test_names_what_the_model_has(self, tmp_path: Path) -> None:
        sim = tintc.compile("tiny-opt", SimulatorConfig.exact())
        export_onnx_pair(sim, tmp_path / "pair", check=False)
        model = json.loads((tmp_path / "pair" / "genai_config.json").read_text())["model"]
        decoder = model["decoder"]
        graph = session(tmp_path / "pair" / decoder["filename"])
        shapes = {value.name: value.shape for value in graph.get_inputs()}
        for part in ("key", "value"):
            names = [
                decoder["inputs"][f"past_{part}_names"] % layer
                for layer in range(decoder["num_hidden_layers"])
            ]
            shape = ["batch", decoder["num_key_value_heads"], "past", decoder["head_size"]]
            assert all(shapes.pop(name) == shape for name in names)
        own = {decoder["inputs"][n] for n in ("input_ids", "attention_mask", "position_ids")}
        rest = set(shapes) - own  # the caller sets them, once
        assert rest
        assert all(name.startswith("updates.") for name in rest)
        assert model["eos_token_id"] == sim.tokenizer.eos_token_id
        assert model["context_length"] == sim.program.facts.longest

    def test_what_it_has_no_words_for(self) -> None:
        """Biases of scores are cached; a model without a tokenizer has no end token."""
        for name in ("bloom", "opt"):
            sim = simulate(FAMILIES[name].build(torch.float32), SimulatorConfig.exact())
            assert genai_config(sim, cached(sim).values()) is None


class TestFolder:
    def test_contents(self, tmp_path: Path) -> None:
        """Weights of both lie in one file, once; both say what they are."""
        sim, _ = made("opt", train=("*.1.*",))
        done = export_onnx_pair(sim, tmp_path / "pair", check=False)
        folder = tmp_path / "pair"
        assert sorted(file.name for file in folder.iterdir()) == [
            "adapt.onnx", "decode.onnx", "pair.json", "weights.data"
        ]  # fmt: skip
        said = json.loads((folder / "pair.json").read_text())
        assert said["files"] == ["adapt.onnx", "decode.onnx", "weights.data"]
        assert said["max_tokens"] == POSITIONS
        assert [each["name"] for each in said["cache"]] == ["0.key", "0.value", "1.key", "1.value"]
        total = sum(x.numel() * x.element_size() for x in sim.prefix.tensors().values())
        assert done.weight_bytes < total + 50 * 4096  # aligned
        models = [onnx.load(folder / name, load_external_data=False) for name in said["files"][:2]]
        about = [{e.key: e.value for e in model.metadata_props} for model in models]
        assert about[0] == about[1]
        assert json.loads(about[0]["tintc.pair"])["weights"] == said["weights"]
        assert json.loads(about[0]["tintc.config"]) == sim.config.to_dict()
        assert all(node.domain == "" for model in models for node in model.graph.node)
        assert done.inputs["adapt.onnx"] == ("input_ids", "train_mask", "inner_lr")
        assert done.outputs["decode.onnx"][:2] == ("logits", "present.0.key")
        shapes = {
            value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            for value in models[1].graph.input
        }
        assert shapes["past_key_values.0.key"] == ["batch", 3, "past", 4]
        assert shapes["logits_to_keep"] == []
        assert shapes["attention_mask"] == ["batch", "past+sequence"]

    def test_the_cache_is_copied_once(self, tmp_path: Path) -> None:
        """Keys come and go by heads, as attention multiplies them: none is turned."""
        sim, _ = made("llama")
        export_onnx_pair(sim, tmp_path / "pair", check=False)
        graph = onnx.load(tmp_path / "pair" / "decode.onnx").graph
        past = [value.name for value in graph.input if value.name.startswith("past_key_values.")]
        readers = [node for node in graph.node if set(past) & set(node.input)]
        kinds = {node.op_type for node in readers}
        assert kinds <= {"Concat", "Shape"}
        joined = {node.output[0] for node in readers if node.op_type == "Concat"}
        assert len(joined) == len(past)
        after = {node.op_type for node in graph.node if joined & set(node.input)}
        assert after == {"Transpose", "MatMul", "Identity"}  # k^T, v, and what is returned

    def test_what_is_there_stays(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sim, _ = made("opt")
        folder = tmp_path / "pair"
        export_onnx_pair(sim, folder, check=False)
        before = (folder / "pair.json").read_bytes()
        with pytest.raises(UsageError, match="exists; pass force=True"):
            export_onnx_pair(sim, folder)
        monkeypatch.setattr(comparison, "TOLERANCE", {torch.float32: 0.0})
        monkeypatch.setattr("tintc.compiler.onnx.pair_comparison.TOLERANCE", {torch.float32: 0.0})
        with pytest.raises(NumericalError, match="onnxruntime disagrees"):
            export_onnx_pair(sim, folder, force=True)
        assert (folder / "pair.json").read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["pair"]
        (folder / "mine.txt").touch()
        with pytest.raises(UsageError, match=r"holds mine\.txt; tintc does not replace"):
            export_onnx_pair(sim, folder, force=True)
        (folder / "mine.txt").unlink()
        export_onnx_pair(sim, folder, force=True, check=False)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"inputs": ("labels",)}, "there is no input labels"),
            ({"opset": 9}, "opset is 9"),
        ],
    )
    def test_refused(self, options: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=message):
            export_onnx_pair(made("opt")[0], tmp_path / "pair", **options)
        assert not list(tmp_path.iterdir())

    def test_the_transformer_back_end(self, tmp_path: Path) -> None:
        model = FAMILIES["opt"].build(torch.float32)
        sim = simulate(model, SimulatorConfig.paper(), backend="transformer")
        with pytest.raises(UsageError, match="needs the fused back end"):
            export_onnx_pair(sim, tmp_path / "pair")
        assert not list(tmp_path.iterdir())

    @pytest.mark.slow
    def test_a_plain_module(self, tmp_path: Path) -> None:
        sim = tintc.compile(nano().float(), SimulatorConfig.exact(inner_lr=RATE))
        assert export_onnx_pair(sim, tmp_path / "pair", optimize=True).check is not None


class TestPair:
    def test_of_two_exports(self, folder: Path, tmp_path: Path) -> None:
        mixed = tmp_path / "mixed"
        shutil.copytree(folder / "one", mixed)
        shutil.copy(folder / "other" / "decode.onnx", mixed)
        with pytest.raises(ArtifactError, match=r"do not belong together: their weights \(\w+ and"):
            opened(mixed)
        shutil.copy(mixed / "adapt.onnx", mixed / "decode.onnx")
        with pytest.raises(ArtifactError, match="their updates differ"):
            opened(mixed)

    def test_updates(self, folder: Path) -> None:
        one, other = opened(folder / "one"), opened(folder / "other")
        given = arrays(contexts())
        del given["attention_mask"]
        updates = one.adapt(**given)
        with pytest.raises(InputError, match="are of another pair"):
            other.decoding(updates)
        decoding = one.decoding(updates)
        with pytest.raises(InputError, match="updates are of 2 contexts"):
            decoding(np.ones((1, 3), np.int64))

    def test_bad_inputs(self, folder: Path) -> None:
        pair = opened(folder / "one")
        given = arrays(contexts())
        with pytest.raises(InputError, match=r"adapt\.onnx takes input_ids, train_mask, inner_lr"):
            pair.adapt(**given)
        del given["attention_mask"]
        with pytest.raises(InputError, match="this model has tokens 0 to 28"):
            pair.adapt(given["input_ids"] + VOCAB, given["train_mask"])
        with pytest.raises(InputError, match="train_mask has shape"):
            pair.adapt(given["input_ids"], given["train_mask"][:1])
        with pytest.raises(InputError, match="expected whole numbers"):
            pair.adapt(given["input_ids"] * 1.0, given["train_mask"])
        decoding = pair.decoding(pair.adapt(**given))
        decoding(np.ones((2, POSITIONS - 2), np.int64), logits_to_keep=1)
        with pytest.raises(InputError, match="33 tokens, 30 of them in the cache; this model has"):
            decoding(np.ones((2, 3), np.int64))
        decoding(np.ones((2, 2), np.int64))  # nothing was read of what was refused
