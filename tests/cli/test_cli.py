"""Every command, its formats and its JSON."""

import ast
import json
import math
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import OPTForCausalLM

import tintc as package
from tests.support.artifacts import (
    LAYERS,
    POSITIONS,
    TEXT,
    VOCAB,
    artifact,
    copy_of,
    source_directory,
)
from tests.support.command import process, tintc
from tintc.commands.env import PACKAGES
from tintc.runtime.simulator import Simulator

ROOT = Path(__file__).parents[2]
STAGES = ["captured", "canonical", "lowered", "optimized", "emitted"]


@pytest.fixture(scope="module")
def simulator() -> Simulator:
    return package.load(artifact())


class TestHelp:
    def test_commands(self) -> None:
        done = tintc("--help")
        assert (done.code, done.err) == (0, "")
        assert all(
            re.search(rf"^  {name} ", done.out, re.M)
            for name in (
                "compile",
                "inspect",
                "run",
                "adapt",
                "verify",
                "cost",
                "bench",
                "eval",
                "ablate",
                "env",
                "export",
                "statistics",
            )
        )
        assert "..." not in done.out  # no description is cut off
        assert tintc().out == done.out

    @pytest.mark.parametrize(
        "command",
        [
            "compile",
            "inspect",
            "run",
            "verify",
            "cost",
            "bench",
            "eval lm",
            "eval classify",
            "ablate",
            "env",
            "export",
            "statistics",
        ],
    )
    def test_options(self, command: str) -> None:
        done = tintc(*command.split(), "--help")
        assert (done.code, done.err) == (0, "")
        for option in ("--json", "--quiet", "--verbose", "--debug"):
            assert option in done.out
        assert all(len(line) < 81 for line in done.out.splitlines())

    def test_version(self) -> None:
        assert tintc("--version").out == f"tintc {package.__version__}\n"

    def test_neither_torch_nor_transformers(self) -> None:
        code = """
import sys
from tintc.cli import app
for command in ("", "compile", "cost", "bench", "eval lm", "eval classify", "ablate", "run"):
    app([*command.split(), "--help"])
app(["statistics", "--help"])
app(["--version"])
heavy = {"torch", "transformers", "numpy", "networkx", "safetensors"} & set(sys.modules)
assert not heavy, heavy
"""
        done = process(code=code)
        assert (done.returncode, done.stderr) == (0, "")


class TestCompile:
    def test_summary(self, tmp_path: Path) -> None:
        done = tintc(
            "compile",
            source_directory(),
            "-o",
            tmp_path / "sim",
            "--layers",
            1,
            "--steps",
            2,
            "--inner-lr",
            0.5,
        )
        assert done.code == 0
        for expected in (
            f"vocabulary {VOCAB}, {POSITIONS} positions",
            "2 steps at learning rate 0.5 on the top 1 of 2 blocks",
            "norm first_order",
            "prefix slots",
            "K 12, D_sim",
            "depth",
            "MB in float32",
            "FLOP, peak",
        ):
            assert expected in done.out
        assert re.fullmatch(
            r"wrote \S+ in [\d.]+ s, .*; next: tintc inspect \S+, or tintc run \S+ "
            r"--text '\.\.\.'\n",
            done.err,
        )
        assert all(line == line.rstrip() for line in done.out.splitlines())
        assert package.load(tmp_path / "sim").config == package.SimulatorConfig.paper(
            layers=1, steps=2, inner_lr=0.5
        )

    def test_json(self, tmp_path: Path) -> None:
        done = tintc("compile", source_directory(), "-o", tmp_path / "sim", "--json", "-q")
        assert (done.code, done.err) == (0, "")
        report = json.loads((tmp_path / "sim" / "report.json").read_text())
        assert {**done.document, **report} == done.document
        assert done.document["output"] == str(tmp_path / "sim")
        assert done.document["seconds"] > 0

    @pytest.mark.slow
    def test_config_file_preset_and_flags(self, tmp_path: Path) -> None:
        file = tmp_path / "config.json"
        file.write_text(json.dumps({"preset": "exact", "steps": 2, "inner_lr": 0.1}))
        common = ("compile", source_directory(), "-q", "--force", "-o", tmp_path / "sim")
        for flags, expected in (
            (("--config", file), package.SimulatorConfig.exact(steps=2, inner_lr=0.1)),
            (
                ("--config", file, "--steps", 3),
                package.SimulatorConfig.exact(steps=3, inner_lr=0.1),
            ),
            (
                ("--preset", "exact", "--norm-update", "bias"),
                package.SimulatorConfig.exact(norm_update="bias"),
            ),
            (
                ("--loss-gradient", "quadratic", "--prefix-tokens", 5),
                package.SimulatorConfig(loss_gradient="quadratic", prefix_tokens=5),
            ),
        ):
            assert tintc(*common, *flags).code == 0
            assert package.load(tmp_path / "sim").config == expected

    def test_preset_flag_wins_over_the_file_s(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"preset": "exact"}))
        done = tintc(
            "compile",
            source_directory(),
            "-o",
            tmp_path / "sim",
            "--config",
            tmp_path / "config.json",
            "--preset",
            "paper",
        )
        assert done.code == 0, done
        assert package.load(tmp_path / "sim").config == package.SimulatorConfig.paper()

    def test_every_field_has_a_flag(self) -> None:
        text = tintc("compile", "--help").out
        assert [
            name
            for name in package.SimulatorConfig().to_dict()
            if f"--{name.replace('_', '-')} " not in text
        ] == []

    def test_dtype(self, tmp_path: Path) -> None:
        assert (
            tintc("compile", source_directory(), "-o", tmp_path / "sim", "--dtype", "float64").code
            == 0
        )
        assert package.load(tmp_path / "sim").dtype == torch.float64

    def test_force(self, tmp_path: Path) -> None:
        folder = copy_of(artifact(), tmp_path / "sim")
        assert tintc("compile", source_directory(), "-o", folder, "--steps", 2, "--force").code == 0
        assert package.load(folder).config.steps == 2

    def test_verbose_and_quiet(self, tmp_path: Path) -> None:
        loud = tintc("compile", source_directory(), "-o", tmp_path / "loud", "-v")
        assert (
            "tintc.passes: build_backward: +" in loud.err or loud.code == 0
        )  # pytest may own the log's handler
        assert tintc("compile", source_directory(), "-o", tmp_path / "quiet", "-q").err == ""


class TestInspect:
    def test_summary(self) -> None:
        done = tintc("inspect", artifact())
        assert (done.code, done.err) == (0, "")
        assert re.search(r"^tint\.linear_forward +\d+$", done.out, re.M)
        assert tintc("inspect", artifact(), "--json").document == json.loads(
            (artifact() / "report.json").read_text()
        )

    @pytest.mark.parametrize("stage", STAGES)
    def test_table(self, stage: str) -> None:
        lines = tintc("inspect", artifact(), "--stage", stage, columns=1000).out.splitlines()
        records = tintc("inspect", artifact(), "--stage", stage, "--format", "json").document[
            "nodes"
        ]
        assert lines[0].split() == ["node", "operator", "shape", "phase", "step", "module", "reads"]
        rows, rest = lines[1 : len(records) + 1], lines[len(records) + 1 :]
        assert [line.split()[0] for line in rows] == [record["name"] for record in records]
        assert [line[:11] for line in rest] == (["", "calibration"] if stage == "optimized" else [])
        assert all(line == line.rstrip() for line in lines)
        assert not any("…" in line for line in lines)

    @pytest.mark.parametrize("stage", STAGES)
    def test_code_is_python(self, stage: str) -> None:
        code = tintc("inspect", artifact(), "--stage", stage, "--format", "code").out
        (function,) = ast.parse(code).body
        assert isinstance(function, ast.FunctionDef)
        assert "input_ids" in [argument.arg for argument in function.args.args]
        assert isinstance(function.body[-1], ast.Return)

    @pytest.mark.parametrize("stage", STAGES)
    def test_dot(self, stage: str) -> None:
        lines = tintc("inspect", artifact(), "--stage", stage, "--format", "dot").out.splitlines()
        assert lines[0] == "digraph simulator {"
        assert lines[-1] == "}"
        quoted = r'"[^"\\]*(\\n[^"\\]*)*"'
        box = re.compile(rf'  ("[^"]+") \[label={quoted}, fillcolor="#?\w+"\];')
        boxes = [match.group(1) for line in lines if (match := box.fullmatch(line))]
        edges = [
            match.groups()
            for line in lines
            if (match := re.fullmatch(r'  ("[^"]+") -> ("[^"]+");', line))
        ]
        assert len(boxes) + len(edges) == len(lines) - 3
        assert len(set(boxes)) == len(boxes)
        assert {end for edge in edges for end in edge} <= set(boxes)

    @pytest.mark.parametrize("stage", STAGES)
    def test_json(self, stage: str) -> None:
        records = tintc("inspect", artifact(), "--stage", stage, "--json").document["nodes"]
        names = {record["name"] for record in records}
        assert len(names) == len(records) > 20
        assert {"name", "kind", "operator", "args", "kwargs", "shape", "info"} == set(records[0])
        if stage == "lowered":
            calls = {record["operator"] for record in records if record["kind"] == "call"}
            assert all(name.startswith("tint.") for name in calls)
        if stage == "captured":
            assert any("modeling_opt.py:" in record["info"].get("source", "") for record in records)

    def test_default_stage_is_the_lowered_one(self) -> None:
        default = tintc("inspect", artifact(), "--format", "code").out
        assert default == tintc("inspect", artifact(), "--stage", "lowered", "--format", "code").out

    @pytest.mark.slow
    def test_slots_that_learn_are_those_that_are_updated(self, tmp_path: Path) -> None:
        """Under value-only attention no gradient reaches q and k."""
        tintc("compile", "tiny-opt", "-o", tmp_path / "sim", "-q")
        done = tintc("inspect", tmp_path / "sim", "--slots", columns=200)
        rows = done.out.split("memory slot")[0]
        facts = tintc("inspect", tmp_path / "sim", "--json").document
        learning = [row for row in rows.splitlines() if " yes " in row]
        reached = [row for row in rows.splitlines() if " no gradient " in row]
        assert len(learning) == facts["updated_slots"] == 41
        assert len(learning) + len(reached) == facts["trainable_slots"] == 57
        assert all(".q_proj." in row or ".k_proj." in row for row in reached)

    def test_slots(self, simulator: Simulator) -> None:
        done = tintc("inspect", artifact(), "--slots", columns=200)
        layout = simulator.program.layout
        assert (
            f"{layout.pages} pages of K = {layout.prefix_tokens} prefix tokens, D_sim = "
            f"{layout.sim_hidden}" in done.out
        )
        for slot in (*layout.prefix, *layout.memory):
            assert re.search(rf"^{re.escape(slot)}  ", done.out, re.M), slot
        assert tintc("inspect", artifact(), "--slots", "--json").document == json.loads(
            json.dumps(layout.to_dict())
        )

    def test_node(self) -> None:
        done = tintc("inspect", artifact(), "--node", "logits_backward")
        for expected in (
            "tint.linear_backward",
            "(B, S, 12)",
            "lm_head",
            "backward",
            "loss_gradient",
            "users",
        ):
            assert expected in done.out
        found = tintc("inspect", artifact(), "--node", "logits_backward", "--json").document
        assert found["operator"] == "tint.linear_backward"
        assert len(found["users"]) > 0
        assert tintc("inspect", artifact(), "--node", "input_ids", "--stage", "captured").code == 0

    @pytest.mark.slow
    def test_reader_that_goes_away(self) -> None:
        command = f'"{sys.executable}" -m tintc inspect "{artifact()}" --stage emitted | head -1'
        root = str(Path(__file__).parents[2])
        done = subprocess.run(
            ["sh", "-c", command],
            capture_output=True,
            text=True,
            cwd=root,
            timeout=300,
            check=False,
        )
        assert done.stdout.startswith("node ")
        assert done.stderr == ""


class TestRun:
    def test_text(self, simulator: Simulator) -> None:
        done = tintc("run", artifact(), "--text", TEXT, "--json")
        assert (done.code, done.err) == (0, "")
        found = done.document
        ids = simulator.tokenizer(TEXT, return_tensors="pt")["input_ids"]
        trained = round(ids.shape[1] / 2)
        labels = ids.clone()
        labels[:, :trained] = -100
        with torch.inference_mode():
            out = simulator(
                ids,
                (torch.arange(ids.shape[1]) < trained).long()[None],
                labels=labels,
                return_initial=True,
            )
        assert out.loss is not None
        assert out.initial_loss is not None
        assert found["tokens"] == ids.shape[1]
        assert found["trained_tokens"] == trained
        assert found["predicted_tokens"] == ids.shape[1] - trained
        assert found["loss_before"] == pytest.approx(float(out.initial_loss))
        assert found["loss_after"] == pytest.approx(float(out.loss))
        assert found["perplexity_after"] == pytest.approx(math.exp(float(out.loss)))
        assert found["inner_lr"] == 0.01
        assert "generated" not in found

    def test_table(self) -> None:
        done = tintc("run", artifact(), "--text", TEXT)
        assert (done.code, done.err) == (0, "")
        assert [line.split("  ")[0] for line in done.out.splitlines()] == [
            "tokens",
            "inner training",
            "perplexity before",
            "perplexity after",
        ]
        assert "1 step at learning rate 0.01" in done.out

    def test_file_and_standard_input(self, tmp_path: Path) -> None:
        (tmp_path / "text").write_text(TEXT + "\n")
        expected = tintc("run", artifact(), "--text", TEXT, "--json").out
        assert tintc("run", artifact(), "--file", tmp_path / "text", "--json").out == expected
        assert tintc("run", artifact(), "-", "--json", stdin=TEXT.encode()).out == expected
        assert (
            tintc("run", artifact(), "--file", "-", "--json", stdin=TEXT.encode()).out == expected
        )

    def test_byte_order_mark_is_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "text").write_text(TEXT, encoding="utf-8-sig")
        assert (
            tintc("run", artifact(), "--file", tmp_path / "text").out
            == tintc("run", artifact(), "--text", TEXT).out
        )

    def test_all_of_it_may_be_trained_where_something_is_generated(
        self, simulator: Simulator
    ) -> None:
        """What follows is what the updated weights continue with."""
        assert simulator.tokenizer is not None
        done = tintc("run", artifact(), "--text", TEXT, "--train-fraction", 1, "--generate", 3)
        assert (done.code, done.err) == (0, "")
        assert "0 predicted" in done.out
        assert "perplexity" not in done.out
        options = ("--train-fraction", 1, "--generate", 3, "--json")
        found = tintc("run", artifact(), "--text", TEXT, *options).document
        assert found["trained_tokens"] == found["tokens"]
        assert [found[name] for name in found if "loss" in name or "perplexity" in name] == [
            None
        ] * 4
        ids = simulator.tokenizer(TEXT, return_tensors="pt")["input_ids"]
        state = simulator.updated_state_dict(ids, torch.ones_like(ids))
        model = OPTForCausalLM.from_pretrained(source_directory())
        model.load_state_dict(state)
        expected = model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :]
        assert found["generated"] == simulator.tokenizer.decode(expected, skip_special_tokens=True)
        assert "nothing is left to predict" in tintc(
            "run", artifact(), "--text", "the sea", "--train-fraction", 0.99
        ).refused(2)
        assert "too large" in tintc(
            "run", artifact(), "--text", TEXT, *options, "--inner-lr", 1e38
        ).refused(5)

    def test_train_fraction(self) -> None:
        found = [
            tintc("run", artifact(), "--text", TEXT, "--train-fraction", part, "--json").document
            for part in (0.2, 0.9)
        ]
        assert [f["trained_tokens"] for f in found] == [
            round(part * found[0]["tokens"]) for part in (0.2, 0.9)
        ]

    def test_nothing_trained_is_said_once(self) -> None:
        done = tintc(
            "run", artifact(), "--text", TEXT, "--train-fraction", 0, "--generate", 2, "--json"
        )
        assert (
            done.err.count(
                "no training target: their logits are the unmodified model's (said once)"
            )
            == 1
        )
        assert done.err.count("\n") == 1
        assert done.document["loss_after"] == pytest.approx(done.document["loss_before"], rel=1e-5)

    def test_inner_lr(self) -> None:
        found = [
            tintc("run", artifact(), "--text", TEXT, "--inner-lr", rate, "--json").document
            for rate in (0, 0.001, 0.01)
        ]
        assert [f["inner_lr"] for f in found] == [0, 0.001, 0.01]
        assert found[0]["loss_after"] == pytest.approx(found[0]["loss_before"], rel=1e-5)
        assert len({f["loss_after"] for f in found}) == 3
        assert found[2] == tintc("run", artifact(), "--text", TEXT, "--json").document

    def test_tokens(self) -> None:
        long = " ".join([TEXT] * 10)
        for count in (2, 9, POSITIONS):
            assert (
                tintc("run", artifact(), "--text", long, "--tokens", count, "--json").document[
                    "tokens"
                ]
                == count
            )

    def test_generate(self, simulator: Simulator) -> None:
        done = tintc("run", artifact(), "--text", TEXT, "--generate", 3, "--json")
        ids = simulator.tokenizer(TEXT, return_tensors="pt")["input_ids"]
        train_mask = (torch.arange(ids.shape[1]) < done.document["trained_tokens"]).long()[None]
        updated = simulator.updated_state_dict(ids, train_mask)
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(source_directory())
        model.load_state_dict(updated)
        start = ids.shape[1]
        for _ in range(3):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        assert done.document["generated"] == simulator.tokenizer.decode(
            ids[0, start:], skip_special_tokens=True
        )
        assert tintc("run", artifact(), "--text", TEXT, "--generate", 3).out.endswith(
            done.document["generated"] + "\n"
        )

    def test_generate_up_to_the_last_position(self) -> None:
        done = tintc(
            "run",
            artifact(),
            "--text",
            " ".join([TEXT] * 10),
            "--tokens",
            POSITIONS - 2,
            "--generate",
            9,
            "--json",
        )
        assert done.code == 0
        assert (
            done.err
            == f"warning: this simulator takes {POSITIONS} tokens: there is room for 2 of 9 "
            "generated tokens\n"
        )

    def test_dtype(self) -> None:
        losses = [
            tintc("run", artifact(), "--text", TEXT, "--dtype", dtype, "--json").document[
                "loss_after"
            ]
            for dtype in ("float64", "bfloat16")
        ]
        assert losses[0] != losses[1]
        assert losses[0] == pytest.approx(losses[1], rel=0.05)

    def test_perplexity_that_no_float_holds(self) -> None:
        done = tintc("run", artifact(), "--text", TEXT, "--inner-lr", 1000, "--json")
        assert done.code == 0
        assert done.document["loss_after"] > 709
        assert done.document["perplexity_after"] is None
        assert "inf" in tintc("run", artifact(), "--text", TEXT, "--inner-lr", 1000).out


class TestVerify:
    def test_exact(self) -> None:
        done = tintc("verify", artifact("exact"), "--tokens", 20)
        assert (done.code, done.err) == (0, "")
        assert "agrees with autograd through OPTForCausalLM in float64 (exact)" in done.out
        for layer in range(LAYERS):
            assert re.search(
                rf"^model\.decoder\.layers\.{layer} +1\.000000 +\S+e-1\d", done.out, re.M
            )

    def test_approximations_report_cosine_and_error(self) -> None:
        done = tintc("verify", artifact(), "--json", "--tokens", 20)
        assert (done.code, done.err) == (0, "")
        assert done.document["agrees"]
        assert not done.document["exact"]
        assert {layer["name"] for layer in done.document["layers"]} == {
            *(f"model.decoder.layers.{i}" for i in range(LAYERS)),
            "model.decoder.final_layer_norm",
        }
        assert all(
            0 < layer["cosine"] <= 1 + 1e-9 and layer["relative_error"] >= 0
            for layer in done.document["layers"]
        )

    def test_seed_and_length(self) -> None:
        found = [
            tintc("verify", artifact(), "--json", *options).document["logits_error"]
            for options in (
                ("--tokens", 9),
                ("--tokens", 9, "--seed", 0),
                ("--tokens", 9, "--seed", 1),
                ("--tokens", 12),
            )
        ]
        assert found[0] == found[1]
        assert len(set(found)) == 3


class TestEnv:
    def test_table_and_json(self) -> None:
        found = tintc("env", "--json").document
        assert (
            found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
        )
        assert {
            "tintc",
            "python",
            "transformers",
            "platform",
            "processor_cores",
            "memory_bytes",
            "gpus",
        } <= set(found)
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        extras = project["optional-dependencies"]
        needed = [*project["dependencies"]]
        for extra in ("onnx", "gguf", "lm-eval", "plot", "smollm2", "peft"):
            needed += extras[extra]
        assert {re.split("[<>=]", line)[0] for line in needed} == set(PACKAGES) <= set(found)
        assert set(extras) == {
            "onnx",
            "gguf",
            "lm-eval",
            "plot",
            "smollm2",
            "peft",
            "test",
            "check",
            "docs",
            "web",
        }
        text = tintc("env").out
        assert all(re.search(rf"^{name}  ", text, re.M) for name in found)


def test_the_wheel_has_every_package() -> None:
    """What pyproject.toml forgets is missed by whoever installs the wheel, and by nobody here."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    rooms = ("ir", "passes", "runtime", "compiler", "evaluate", "page")
    folders = {path.parent for room in rooms for path in (ROOT / room).rglob("__init__.py")}
    found = {".".join(("tintc", *folder.relative_to(ROOT).parts)) for folder in folders}
    assert {"tintc", "tintc.commands", *found} == set(tool["setuptools"]["packages"])
