"""tintc cost: what it predicts against what a compiled simulator has; every kind of source; what it
refuses.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import tintc as package
from tests.support.artifacts import LAYERS, POSITIONS, source_directory
from tests.support.command import tintc
from tintc import parameter_report, save
from tintc.compiler.cost import estimate
from tintc.compiler.frontend.sources import load_without_weights
from tintc.compiler.reports.cost import cost_report
from tintc.ir.config import SimulatorConfig
from tintc.runtime.backends.transformer.structure import SHARES


@pytest.mark.parametrize(
    ("backend", "share"), [("fused", "none"), *(("transformer", share) for share in SHARES)]
)
def test_predicts_what_a_compiled_simulator_has(backend: str, share: str) -> None:
    config = SimulatorConfig.exact(steps=2, layers=1)
    simulator = package.compile(str(source_directory()), config, backend=backend, share=share)
    facts = cost_report(
        str(source_directory()),
        config,
        backend=backend,
        share=share,
        batch=2,
        tokens=20,
        train_fraction=0.7,
    )
    assert facts["parameters"] == parameter_report(simulator)
    assert facts["parameters"]["total"] == sum(p.numel() for p in simulator.parameters())
    assert facts["weight_bytes"] == sum(
        p.numel() * p.element_size() for p in simulator.parameters()
    )
    assert facts["trained_tokens"] == 14
    cost = estimate(simulator.program, backend, torch.float32, batch=2, tokens=20, segment=13)
    assert (facts["flops"], facts["peak_bytes"]) == (
        cost.flops,
        cost.peak_bytes + facts["weight_bytes"],
    )


@pytest.mark.slow
def test_direct_fine_tuning_is_the_same_for_every_preset() -> None:
    """`paper` leaves out the gradient through the scores; what is compared with does not."""
    exact, paper = (
        cost_report("tiny-opt", SimulatorConfig.preset(preset), tokens=64)
        for preset in ("exact", "paper")
    )
    assert exact["direct_flops"] == paper["direct_flops"]
    assert paper["flops"] < exact["flops"] < exact["direct_flops"]


@pytest.mark.slow
def test_every_kind_of_source(tmp_path: Path) -> None:
    directory = source_directory()
    counted = cost_report(str(directory), SimulatorConfig())["parameters"]
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(directory / "config.json", bare)
    renamed = tmp_path / "my-model.json"
    shutil.copy(directory / "config.json", renamed)
    for source in (bare, bare / "config.json", renamed):
        assert cost_report(str(source), SimulatorConfig())["parameters"] == counted
    for source in ("tiny-opt", "shape:gpt2"):
        assert cost_report(source, SimulatorConfig())["parameters"]["total"] > 1_000_000


@pytest.mark.slow
def test_a_model_that_no_machine_here_could_hold() -> None:
    facts = cost_report(
        "shape:opt-13b", SimulatorConfig(layers=1), backend="transformer", share="layers", tokens=16
    )
    assert facts["parameters"]["auxiliary"] == 12_853_473_280
    assert facts["weight_bytes"] > 50e9
    model = load_without_weights("shape:opt-13b").model
    assert all(p.is_meta for p in model.parameters())


class TestCommand:
    def test_summary(self) -> None:
        done = tintc(
            *("cost", source_directory(), "--backend", "transformer", "--steps", 3, "--layers", 1),
            columns=200,
        )
        assert (done.code, done.err) == (0, "")
        for expected in (
            "transformer back end",
            f"3 steps on the top 1 of {LAYERS} blocks",
            "4 forward, 3 backward, 3 descent",
            "total by --share",
            "of fine-tuning the model directly",
            "prefix numbers",
            "S*P*d*(S + P + 2) + 4*d",
            "peak",
        ):
            assert expected in done.out
        assert all(line == line.rstrip() for line in done.out.splitlines())

    @pytest.mark.slow
    def test_json(self) -> None:
        done = tintc(
            "cost",
            source_directory(),
            "--backend",
            "transformer",
            "--share",
            "all",
            "--json",
            "--dtype",
            "bfloat16",
        )
        assert (done.code, done.err) == (0, "")
        facts = done.document
        assert facts["dtype"] == "bfloat16"
        assert facts["tokens"] == POSITIONS
        assert facts["weight_bytes"] == 2 * (facts["parameters"]["total"] - 1) + 8
        assert facts["parameters"]["share"] == "all"

    @pytest.mark.slow
    def test_breakdown(self) -> None:
        """By phase and operator, each beside the lower bound; the sums are those of the call."""
        asked = ("cost", source_directory(), "--breakdown")
        done = tintc(*asked, columns=100)
        assert (done.code, done.err) == (0, "")
        lines = done.out.splitlines()
        phases = ("step 0 forward ", "step 0 backward ", "last forward ")
        operators = ("  head_gradient ", "  attention_backward_value ")
        for start in (*phases, *operators, "all ", "fine-tuning the model directly: "):
            assert any(line.startswith(start) for line in lines), start
        assert "lower bound: Matrix products" in done.out
        facts = tintc(*asked, "--json").document
        found = facts["breakdown"]
        assert found["flops"] == facts["flops"] == sum(p["flops"] for p in found["phases"])
        assert found["direct_flops"] == facts["direct_flops"]
        assert found["lower_bound"] < found["flops"]
        assert "breakdown" not in tintc("cost", source_directory(), "--json").document

    @pytest.mark.slow
    def test_several_models_give_a_table(self) -> None:
        models = ("tiny-opt", source_directory())
        done = tintc("cost", *models, "--backend", "transformer", columns=300)
        header, *rows, caption = done.out.splitlines()
        assert caption.startswith(
            "one call: 1 x 256 tokens, 128 trained or 1 x 64 tokens, 32 trained, 1 step; "
            "transformer back end in float32"
        )
        assert header.split()[:2] == ["model", "auxiliary"]
        assert "share layers" in header
        assert all(re.search(r" [\d.]+ [GMk]FLOP  [\d.]+  ", row) for row in rows)
        assert [row.split()[0] for row in rows] == ["tiny-opt", str(source_directory())]
        found = tintc("cost", *models, "--json").document["models"]
        assert [facts["source"] for facts in found] == ["tiny-opt", str(source_directory())]
        assert "simulator" in tintc("cost", "tiny-opt", "tiny-opt").out.splitlines()[0]

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["shape:opt-1t"], 1, "there is no shape 'opt-1t'"),
            (
                ["nowhere/nothing", "--offline"],
                1,
                "neither a local directory nor complete in the cache",
            ),
            (["tiny-opt", "--tokens", "513"], 2, "tokens is 513; expected 2 to 512"),
            (["tiny-opt", "--tokens", "1"], 2, "tokens is 1; expected 2 to 512"),
            (["tiny-opt", "--batch", "0"], 2, "batch is 0; expected at least 1"),
            (["tiny-opt", "--train-fraction", "0"], 2, "train_fraction is 0.0"),
            (["tiny-opt", "--layers", "9"], 2, "layers is 9; expected 1 to 4"),
            (["tiny-opt", "--dtype", "int8"], 2, "dtype is 'int8'"),
            (
                ["tiny-opt", "--backend", "loop"],
                2,
                "backend is 'loop'; expected one of fused, transformer",
            ),
            (
                ["tiny-opt", "--share", "some"],
                2,
                "share is 'some'; expected one of none, layers, all",
            ),
            (
                ["tiny-opt", "--share", "all"],
                2,
                "fused back end has no structural constants to share",
            ),
            (["tiny-opt", "--sim-heads", "1"], 2, "The nearest that works is 2"),
            (["tiny-opt", "--revision", "main"], 2, "does not come from the hub"),
            ([], 2, "Missing argument"),
        ],
    )
    def test_refusals(self, arguments: list[str], code: int, message: str) -> None:
        assert message in tintc("cost", *arguments).refused(code)

    def test_a_config_of_no_language_model(self, tmp_path: Path) -> None:
        transformers.T5Config(num_layers=1, d_model=8, d_ff=8).save_pretrained(tmp_path)
        assert "no causal language model" in tintc("cost", tmp_path / "config.json").refused(3)
        (tmp_path / "config.json").write_text("[]")
        assert "expected a JSON object" in tintc("cost", tmp_path / "config.json").refused(1)
        assert "does not exist" in tintc("cost", tmp_path / "gone" / "config.json").refused(1)

    def test_a_config_whose_sizes_make_no_model(self, tmp_path: Path) -> None:
        file = tmp_path / "config.json"
        file.write_text(
            json.dumps({"model_type": "opt", "hidden_size": 10, "num_attention_heads": 3})
        )
        assert "no model can be built" in tintc("cost", file).refused(1)


class TestCompiled:
    def test_prefix_tokens_that_do_not_fit_in_memory(self, tmp_path: Path) -> None:
        arguments = ["--backend", "transformer", "--prefix-tokens", 10_000_000]
        assert "prefix tokens need" in tintc(
            "compile", source_directory(), "-o", tmp_path / "sim", *arguments
        ).refused(4)
        assert not (tmp_path / "sim").exists()

    @pytest.mark.slow
    def test_params_of_an_artifact(self, tmp_path: Path) -> None:
        folder = tmp_path / "sim"
        assert (
            tintc(
                "compile",
                source_directory(),
                "-o",
                folder,
                "--backend",
                "transformer",
                "--share",
                "layers",
                "-q",
            ).code
            == 0
        )
        simulator = package.load(folder)
        assert (simulator.backend, simulator.share) == ("transformer", "layers")
        done = tintc("inspect", folder, "--params", columns=200)
        assert done.code == 0
        for expected in (
            f"{sum(p.numel() for p in simulator.parameters()):,}",
            "the simulator's own",
            "2 forward, 1 backward",
            "times the",
        ):
            assert expected in done.out
        assert tintc("inspect", folder, "--params", "--json").document == parameter_report(
            simulator
        )
        assert "exclude" in tintc(
            "inspect", folder, "--params", "--format", "code", "--json"
        ).refused(2)
        assert "--params shows the whole simulator" in tintc(
            "inspect", folder, "--params", "--stage", "lowered"
        ).refused(2)
        assert "--slots shows the whole simulator" in tintc(
            "inspect", folder, "--params", "--slots"
        ).refused(2)
        assert "--params has the formats" in tintc(
            "inspect", folder, "--params", "--format", "dot"
        ).refused(2)
        emitted = tintc("inspect", folder, "--stage", "emitted")
        assert "LinearForward" in emitted.out
        assert (
            "modules_parts"
            not in tintc("inspect", folder, "--stage", "emitted", "--format", "code").out
        )
        assert tintc("verify", folder).code == 0

    def test_params_of_a_fused_artifact(self, tmp_path: Path) -> None:
        folder = tmp_path / "sim"
        assert tintc("compile", source_directory(), "-o", folder, "-q").code == 0
        done = tintc("inspect", folder, "--params", columns=200)
        assert "pads nothing" in done.out
        assert "total by --share" not in done.out

    def test_an_artifact_is_the_same_whichever_back_end_it_is_for(self, tmp_path: Path) -> None:
        """Weights are stored under the auxiliary names, so that they load into either."""
        for backend in ("fused", "transformer"):
            save(package.compile(str(source_directory()), backend=backend), tmp_path / backend)
        fused, transformer = (
            (tmp_path / backend / "weights.safetensors").read_bytes()
            for backend in ("fused", "transformer")
        )
        assert fused == transformer
