"""Forged artifacts: the checksums match, so only the contents can give them away."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tintc
from tests.support.artifacts import artifact, copy_of, edit_json, seal
from tintc.compiler.artifact_reader import read_report, seal_of
from tintc.ir.errors import ArtifactError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A compiled artifact that the test may change."""
    return copy_of(artifact(), tmp_path / "saved")


def first(graph: Any, kind: str) -> Any:
    return next(record for record in graph["lowered"] if record["kind"] == kind)


def _operator(name: str) -> Callable[[Any], None]:
    return lambda graph: first(graph, "call").update(operator=name)


def _renamed(kind: str, name: str) -> Callable[[Any], Any]:
    def change(graph: Any) -> Any:
        old = json.dumps(first(graph, kind)["name"])
        return {
            **graph,
            "lowered": json.loads(json.dumps(graph["lowered"]).replace(old, json.dumps(name))),
        }

    return change


ATTACK = "__import__('pathlib').Path('executed').touch()"
FORGED_GRAPHS: dict[str, Callable[[Any], Any]] = {
    "eval": _operator("builtins.eval"),
    "torch operator": _operator("aten.add.Tensor"),
    "load": _operator("torch.load"),
    "unknown tint operator": _operator("tint.eval"),
    "attribute of the dialect": _operator("tint.__class__"),
    "code as operator": _operator(f"tint.prefix({ATTACK})"),
    "code as argument": lambda graph: first(graph, "call").update(args=[{"repr": ATTACK}]),
    "code as input name": _renamed("input", f"x={ATTACK}"),
    "code as node name": _renamed("call", f"x;{ATTACK}#"),
    "code as slot name": lambda graph: graph["lowered"][-1]["args"][0]["updates"].update(
        {f"');{ATTACK}#": {"node": "logits"}}
    ),
    "unknown node": lambda graph: first(graph, "call").update(args=[{"node": "nobody"}]),
    "too few arguments": lambda graph: first(graph, "call").update(args=[]),
    "unknown field": lambda graph: first(graph, "call")["info"].update(evil=1),
    "unknown weight": lambda graph: first(graph, "parameter")["info"].update(parameter="nobody"),
    "other weight": lambda graph: first(graph, "parameter")["info"].update(
        parameter="model.decoder.final_layer_norm.bias"
    ),
    "shape": lambda graph: first(graph, "call").update(shape=[3]),
    "no shape": lambda graph: first(graph, "call").update(shape=5),
    "a list": lambda graph: [graph],
    "no records": lambda graph: {**graph, "lowered": []},
    "no stage": lambda graph: {"captured": graph["captured"]},
    "records that are numbers": lambda graph: {**graph, "lowered": [3]},
    "no output": lambda graph: {**graph, "lowered": graph["lowered"][:-1]},
    "empty output": lambda graph: graph["lowered"][-1].update(args=[]),
    "other outputs": lambda graph: graph["lowered"][-1]["args"][0].pop("initial_logits"),
}


def _named(graph: Any, operator: str, *, step: int | None = 0) -> Any:
    """A record of the lowered graph that calls an operator in a step."""
    return next(
        record
        for record in graph["lowered"]
        if record["operator"] == f"tint.{operator}" and record["info"].get("step") == step
    )


def _operand(operator: str, index: int, value: Any, step: int | None = 0) -> Callable[[Any], None]:
    return lambda graph: _named(graph, operator, step=step)["args"].__setitem__(index, value)


def _fewer_keys(graph: Any) -> None:
    """The last forward pass's queries look at the keys of the training segment alone."""
    segment = _named(graph, "attention_forward")
    whole = _named(graph, "attention_forward", step=1)
    whole["args"][1:3] = segment["args"][1:3]


# Operands that do not fit: torch's kernels would read beside their tensors, or stumble.
FORGED_GRAPHS |= {
    "fewer keys than queries": _fewer_keys,
    "heads that do not divide": _operand("attention_forward", 5, 5),
    "no heads": _operand("attention_forward", 5, 0),
    "a number for a tensor": _operand("linear_forward", 0, 3),
    "a tensor for a number": _operand("norm_forward", 3, {"node": "input_ids"}),
    "text for a number": _operand("norm_forward", 3, "1e-5"),
    "an infinite number": _operand("norm_forward", 3, 1e999),
    "an unknown kind": _operand("activation_forward", 1, "evil"),
    "weight of another layer": _operand("linear_forward", 1, {"node": "loss_mask"}),
    "real token ids": _operand("embedding", 1, {"node": "loss_mask"}),
    "a row behind the table": _operand("embedding", 2, 2**40),
    "rows outside the weight": _operand("prefix", 2, 10**6, None),
    "another slot": lambda graph: _named(graph, "prefix", step=None)["info"].update(slot="me"),
    "a step that is no number": lambda graph: first(graph, "call")["info"].update(step="x"),
    "an optimization's operator": _operator("tint.kept_tokens"),
    "a type it does not have": lambda graph: first(graph, "call")["info"].update(dtype="bool"),
}

FORGED_MANIFESTS: dict[str, Any] = {
    name: [None, 7, [7], {"a": 1}]
    for name in ("config", "facts", "aliases", "layout", "files", "manifest_sha256")
} | {"source": [None, 7, [7]]}


def _overlapping(layout: dict[str, Any], facts: dict[str, Any]) -> None:
    for slot in layout["memory"].values():
        slot["coordinates"] = {
            "start": 0,
            "stop": slot["coordinates"]["stop"] - slot["coordinates"]["start"],
        }


FORGED_LAYOUTS: dict[str, Callable[[dict[str, Any], dict[str, Any]], None]] = {
    "overlapping activations": _overlapping,
    "no activations": lambda layout, facts: layout.update(memory={}),
    "one page": lambda layout, facts: layout.update(pages=1),
    "one head": lambda layout, facts: layout.update(sim_heads=1),
    "one token": lambda layout, facts: layout.update(prefix_tokens=1),
    "no range": lambda layout, facts: next(iter(layout["memory"].values()))["coordinates"].update(
        start=-5
    ),
    "a number for a path": lambda layout, facts: facts.update(block_path=7),
}


class TestForged:
    """Checksums match, so only the contents can give a forgery away. It must be refused, and
    execute nothing.
    """

    @pytest.mark.parametrize("name", FORGED_GRAPHS)
    def test_graph(
        self, name: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        edit_json(saved / "graph.json", FORGED_GRAPHS[name])
        self.assert_refused(seal(saved))
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize(
        ("name", "index"),
        [(name, i) for name, values in FORGED_MANIFESTS.items() for i in range(len(values))],
    )
    def test_manifest(self, name: str, index: int, saved: Path) -> None:
        value = FORGED_MANIFESTS[name][index]
        seal(
            saved,
            lambda manifest: (
                manifest.pop(name) if value is None else manifest.update({name: value})
            ),
        )
        if name == "manifest_sha256":
            edit_json(saved / "manifest.json", lambda manifest: manifest.update({name: value}))
        self.assert_refused(saved)

    @pytest.mark.parametrize("name", FORGED_LAYOUTS)
    def test_layout(self, name: str, saved: Path) -> None:
        """What the transformer back end would compute wrong or stumble over."""
        seal(saved, lambda manifest: FORGED_LAYOUTS[name](manifest["layout"], manifest["facts"]))
        self.assert_refused(saved)

    @pytest.mark.parametrize(
        ("field", "value"), [("backend", "loop"), ("share", "some"), ("share", "all")]
    )
    def test_back_end(self, field: str, value: str, saved: Path) -> None:
        self.assert_refused(seal(saved, lambda manifest: manifest.update({field: value})))

    def test_pickle_for_weights(
        self, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Trap:
            def __reduce__(self) -> tuple[Any, ...]:
                return Path.touch, (Path("executed"),)

        monkeypatch.chdir(tmp_path)
        torch.save({"weight": Trap()}, saved / "weights.safetensors")
        self.assert_refused(seal(saved))
        assert not (tmp_path / "executed").exists()

    def test_code_beside_the_tokenizer(
        self, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (saved / "tokenizer" / "trap.py").write_text(f"{ATTACK}\nclass Trap: ...\n")
        changes = {"auto_map": {"AutoTokenizer": [None, "trap.Trap"]}, "tokenizer_class": "Trap"}
        edit_json(
            saved / "tokenizer" / "tokenizer_config.json", lambda config: config.update(changes)
        )
        self.assert_refused(seal(saved))
        assert not (tmp_path / "executed").exists()

    def test_missing_learning_rate(self, saved: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(saved / "weights.safetensors")
        weights.pop("tintc.inner_lr")
        save_file(weights, saved / "weights.safetensors")
        self.assert_refused(seal(saved))

    @pytest.mark.parametrize(
        "text",
        ["[" * 200_000, '{"x": ' * 200_000, '{"format_version": ' + "9" * 10_000 + "}"],
        ids=["deep list", "deep object", "long number"],
    )
    @pytest.mark.parametrize("name", ["manifest.json", "graph.json"])
    def test_json_that_readers_stumble_over(self, name: str, text: str, saved: Path) -> None:
        (saved / name).write_text(text)
        if name != "manifest.json":
            seal(saved)
        self.assert_refused(saved)

    @pytest.mark.parametrize("value", ["\ud800", "x" * 10**6, 10**400, -1, 1.5, True, [[]]])
    @pytest.mark.parametrize("field", ["steps", "sim_hidden"])
    def test_config(self, field: str, value: Any, saved: Path) -> None:
        self.assert_refused(seal(saved, lambda manifest: manifest["config"].update({field: value})))

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("train", "x" * 10**6),
            ("train", ["x" * 2000]),
            ("train", [["a"]]),
            ("train", {"a": 1.0}),
            ("train", [1.0]),
            ("lr_scale", {"a": "1"}),
            ("lr_scale", {"a": [1.0]}),
            ("lr_scale", {"a": {"b": 1.0}}),
            ("lr_scale", {"a": 10**400}),
            ("lr_scale", {"x" * 2000: 1.0}),
            ("lr_scale", [1.0, 2.0]),
            ("lr_scale", 3),
            ("schedule", [1.0, 2.0, 3.0]),
            ("schedule", [True, False]),
            ("schedule", ["1", None]),
            ("schedule", "fast"),
            ("betas", [0.5]),
            ("betas", [0.5, 1.0]),
            ("betas", {"a": 0.5}),
            ("momentum", 1.0),
            ("momentum", [0.5]),
            ("nesterov", True),
            ("nesterov", "yes"),
            ("clip_norm", -1.0),
            ("decay", 2.0),
            ("optimizer", "sgdd"),
        ],
        ids=lambda value: str(value)[:20],
    )
    def test_rules(self, field: str, value: Any, saved: Path) -> None:
        self.assert_refused(seal(saved, lambda manifest: manifest["config"].update({field: value})))

    @pytest.mark.parametrize(
        ("place", "field", "value"),
        [
            ("layout", "pages", 10**9),
            ("layout", "sim_heads", 0),
            ("config", "steps", 10**9),
            ("facts", "vocab_size", 0),
            ("facts", "max_positions", 10**9),
        ],
    )
    def test_sizes(self, place: str, field: str, value: int, saved: Path) -> None:
        self.assert_refused(seal(saved, lambda manifest: manifest[place].update({field: value})))

    @pytest.mark.parametrize("name", ["/etc/hostname", "../secret", "tokenizer/../../secret"])
    def test_names_of_files_outside(self, name: str, saved: Path, tmp_path: Path) -> None:
        """Nothing of them is read, and nothing of them is said."""
        (tmp_path / "secret").write_text("mine")
        outside = saved / name

        def forge(manifest: dict[str, Any]) -> None:
            manifest["files"][name] = seal_of(outside).model_dump()

        with pytest.raises(ArtifactError, match="is no file of an artifact") as caught:
            tintc.load(seal(saved, forge))
        assert seal_of(outside).sha256 not in str(caught.value)

    @pytest.mark.parametrize("name", ["graph.json", "weights.safetensors", "tokenizer/vocab.json"])
    def test_links_and_pipes(self, name: str, saved: Path) -> None:
        """Reading /dev/zero or a pipe would never end."""
        for make in (lambda path: path.symlink_to("/dev/zero"), os.mkfifo):
            (saved / name).unlink(missing_ok=True)
            make(saved / name)
            with pytest.raises(ArtifactError, match=r"expected a file that tintc wrote|altered"):
                tintc.load(saved)

    def test_report(self, saved: Path) -> None:
        """`tintc inspect` prints it."""
        edit_json(saved / "report.json", lambda report: report.update(depth="deep"))
        assert tintc.load(seal(saved)).config
        with pytest.raises(ArtifactError, match=r"report\.json is malformed at depth"):
            read_report(saved)

    def assert_refused(self, saved: Path) -> None:
        with pytest.raises(ArtifactError) as caught:
            tintc.load(saved)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1500
