"""tintc bench: its document and its tables, what it checks, the processes that measure memory, and
what it refuses.
"""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.artifacts import POSITIONS, source_directory
from tests.support.command import Finished, tintc
from tintc.evaluate.speed import agreement, benchmark
from tintc.evaluate.speed import memory as bench_memory
from tintc.evaluate.speed import report as bench_report
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import MemoryLimitError, SourceError, TintcError, UsageError
from tintc.ir.ops.onednn import available
from tintc.passes.specializing import OPTIMIZATION_NAMES
from tintc.runtime.simulator import Simulator

SMALL = ("--tokens", 15, "--pairs", 2, "--inner-lr", 0.01)


@pytest.fixture(autouse=True)
def _small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benchmark.MATMUL_SIZE, "cpu", 64)


def bench(*arguments: object, memory: bool = False) -> Finished:
    return tintc(
        "bench", source_directory(), *SMALL, *arguments, *(() if memory else ("--no-memory",))
    )


class TestRule:
    @pytest.mark.slow
    def test_is_named_and_both_sides_follow_it(self) -> None:
        rule = ("--decay", 0.5, "--lr-scale", "*.bias=2", "--schedule", "1,.5", "--steps", 2)
        facts = bench("--json", *rule).document
        assert facts["rule"] == {"decay": 0.5, "lr_scale": {"*.bias": 2.0}, "schedule": [1, 0.5]}
        shown = " ".join(bench(*rule).out.split())
        assert "inner rule sgd, lr_scale *.bias=2, schedule 1 0.5, decay 0.5" in shown
        assert bench("--json").document["rule"] == {}

    @pytest.mark.slow
    def test_of_an_exact_simulator_is_the_loop_s(self) -> None:
        """Else bench would refuse the difference; and the process that measures memory has it."""
        rule = ("--momentum", 0.9, "--steps", 2, "--optimizer", "muon", "--preset", "exact")
        facts = bench("--json", *rule, "--dtype", "float64", memory=True).document
        assert facts["checks"][-1]["name"] == "loop"
        assert facts["memory"]["loop"]["peak_bytes"] > 0


class TestDocument:
    @pytest.mark.slow
    def test_everything(self) -> None:
        """The whole document of a run with every part of it switched on."""
        left_out, *on = OPTIMIZATION_NAMES
        done = bench(
            "--json",
            "--preset",
            "exact",
            "--steps",
            2,
            "--layers",
            1,
            "--batch",
            3,
            "--each",
            "--without",
            left_out,
            memory=True,
        )
        assert (done.code, done.err) == (0, "")
        facts = done.document
        expected = {
            "source": str(source_directory()),
            "against": "autograd",
            "kernels": "default",
            "loop_products": None,
            "exact": True,
            "backend": "fused",
            "share": "none",
            "optimizations": on,
            "without": [left_out],
            "batch": 3,
            "tokens": 15,
            "trained_tokens": 8,
            "train_fraction": 0.5,
            "predict": "all",
            "pairs": 2,
            "seed": 0,
            "dtype": "float32",
            "device": "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        assert {name: facts[name] for name in expected} == expected
        assert (
            facts["config"]["steps"],
            facts["config"]["layers"],
            facts["config"]["inner_lr"],
        ) == (2, 1, 0.01)
        assert all(
            ".layers.1." in name or "final_layer_norm" in name
            for name in facts["trained_parameters"]
        )
        assert facts["simulator_parameters"] > 4096 * 12
        assert facts["seconds"] > 0
        assert facts["device_name"]
        self.check_times(facts, "loop", "simulator")
        assert [row["name"] for row in facts["each"]] == [*on, "none"]
        for row in facts["each"]:
            self.check_times(row, "full", "without")
        self.check_memory(facts["memory"])
        assert [(c["name"], c["sequences"]) for c in facts["checks"]] == [
            ("optimizations", 2),
            ("loop", 2),
        ]
        for found in facts["checks"]:
            assert 1e-4 < found["tolerance"] < 1e-3
            assert 0 <= found["difference"] <= found["tolerance"]

    @staticmethod
    def check_times(facts: Any, base: str, other: str) -> None:
        assert [len(facts[name]) for name in ("ratios", f"{base}_times", f"{other}_times")] == [
            2,
            2,
            2,
        ]
        assert facts["ratios"] == [
            b / a for a, b in zip(facts[f"{base}_times"], facts[f"{other}_times"], strict=True)
        ]
        assert facts["ratio_range"][0] <= facts["ratio"] <= facts["ratio_range"][1]
        assert facts[f"{base}_seconds"] > 0
        assert facts[f"{other}_seconds"] > 0

    @staticmethod
    def check_memory(memory: Any) -> None:
        assert "a fresh process for each" in memory["how"]
        for side in ("simulator", "loop"):
            found = memory[side]
            assert set(found) == {"before_bytes", "call_peak_bytes", "peak_bytes"}
            assert 50e6 < found["before_bytes"] <= found["peak_bytes"]
            assert (
                found["call_peak_bytes"] is None
                or found["before_bytes"] * 0.9 < found["call_peak_bytes"] <= found["peak_bytes"]
            )
        assert memory["ratio"] == memory["simulator"]["peak_bytes"] / memory["loop"]["peak_bytes"]
        assert (memory["call_ratio"] is None) == (memory["loop"]["call_peak_bytes"] is None)

    @pytest.mark.slow
    def test_approximating_config(self) -> None:
        """Its distance to the loop is a figure, however large, and it is the same at every run."""
        facts = bench("--json", "--dtype", "float64", "--train-fraction", 0.3, "--seed", 5).document
        plain, approximation = facts["checks"]
        assert (plain["name"], plain["tolerance"]) == ("optimizations", 1e-9)
        assert (approximation["name"], approximation["tolerance"]) == ("approximation", None)
        assert approximation["difference"] > 1e-4
        assert (facts["exact"], facts["memory"], facts["each"], facts["trained_tokens"]) == (
            False,
            None,
            None,
            5,
        )
        again = bench(
            "--json", "--dtype", "float64", "--train-fraction", 0.3, "--seed", 5, "--pairs", 1
        ).document
        assert again["checks"][1] == approximation
        spent = facts["products"]
        assert spent["share"] == pytest.approx(
            spent["product_seconds"] / facts["simulator_seconds"]
        )
        assert spent["flops"] == sum(spent["kernels"].values())
        assert spent["flops"] > 0 and 0 <= spent["copies"] < 1
        assert facts["choices"]["calibration"] == {"from": "fixed"}
        speed = facts["throughput"]
        assert speed["flops_per_second"] == pytest.approx(
            speed["flops"] / facts["simulator_seconds"]
        )
        assert speed["share_of_peak"] == pytest.approx(
            speed["flops_per_second"] / speed["peak_flops_per_second"]
        )
        assert speed["peak_flops_per_second"] == max(speed["matmul_rates"].values())
        assert speed["matmul_size"] == 64


class TestAgainst:
    """Another loop, or the simulator elsewhere, beside it."""

    @pytest.mark.skipif(not available(), reason="this torch has no oneDNN")
    def test_same_kernels(self) -> None:
        facts = bench("--json", "--kernels", "same").document
        *_, kernels = facts["checks"]
        assert (facts["kernels"], kernels["name"]) == ("same", "kernels")
        assert kernels["difference"] <= kernels["tolerance"] < 3e-3
        assert facts["loop_products"]["same_kernels"] == 1.0
        assert facts["loop_products"]["flops"] > 0
        shown = " ".join(bench("--kernels", "same").out.split())
        assert "same: 100.0% of the loop's linear layers run on the simulator's kernels" in shown

    def test_same_kernels_of_a_simulator_on_torch_s_own(self) -> None:
        facts = bench("--json", "--kernels", "same", "--without", "onednn_products").document
        assert facts["loop_products"] is None
        assert "kernels" not in [found["name"] for found in facts["checks"]]

    @pytest.mark.slow
    def test_logits_of_the_rest(self) -> None:
        """Both sides give them alone, in fewer operations."""
        rest, whole = (
            bench("--json", "--preset", "exact", "--predict", predict).document
            for predict in ("rest", "all")
        )
        assert rest["checks"][-1]["name"] == "loop"
        assert rest["checks"][-1]["difference"] <= rest["checks"][-1]["tolerance"]
        assert rest["throughput"]["flops"] < whole["throughput"]["flops"]
        assert rest["throughput"]["direct_flops"] == whole["throughput"]["direct_flops"]

    @pytest.mark.parametrize(
        ("against", "title", "check"),
        [
            ("vmap", "vmap", "loop"),
            ("lora", "lora loop", "adapters"),
            ("onnxruntime", "onnxruntime", "onnxruntime"),
        ],
    )
    def test_another(self, against: str, title: str, check: str) -> None:
        facts = bench("--json", "--preset", "exact", "--against", against).document
        assert facts["against"] == against
        assert facts["checks"][-1]["name"] == check
        assert set(facts["first_call_seconds"]) == {"simulator", "loop"}
        if check != "adapters":
            assert facts["checks"][-1]["difference"] <= facts["checks"][-1]["tolerance"] < 1e-2
        assert title in bench("--preset", "exact", "--against", against).out

    @pytest.mark.slow
    @pytest.mark.parametrize("against", ["lora", "onnxruntime"])
    def test_memory_of_another(self, against: str) -> None:
        facts = bench("--json", "--against", against, memory=True).document
        assert facts["memory"]["loop"]["peak_bytes"] > 5e7


class TestTables:
    def test_rows(self) -> None:
        done = bench("--each", "--dtype", "bfloat16")
        assert done.code == 0
        for expected in (
            "fused back end, approximate gradients",
            "1 step at learning rate 0.01 on all blocks",
            "1 x 15 tokens, 8 trained",
            "of fine-tuning the model directly by exact gradients",
            "choices calibration fixed; products: ",
            "is what the products take alone",
            "of the operators' time",
            "seconds of the first call",
            "check: optimizations",
            "check: approximation",
            "what the configured approximations change, no error",
            "of a product of 64 x 64 matrices",
            "seconds, median of 2",
            "ratio to all on",
            *OPTIMIZATION_NAMES,
            "all of them",
        ):
            assert expected in " ".join(done.out.split())
        assert "peak GB" not in done.out
        assert all(line == line.rstrip() for line in done.out.splitlines())
        assert done.err.startswith("measured in ")

    @pytest.mark.slow
    def test_quiet_transformer_with_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        figures = {"before_bytes": 10**9, "call_peak_bytes": None, "peak_bytes": 3 * 10**9}
        asked: list[tuple[str, Any]] = []

        def measure(side: str, settings: Any) -> Any:
            assert (
                json.loads((Path(settings["artifact"]) / "manifest.json").read_text())["share"]
                == "all"
            )
            asked.append((side, json.loads(json.dumps(settings))))
            return figures

        monkeypatch.setattr(bench_memory, "measure", measure)
        done = bench("--backend", "transformer", "--share", "all", "-q", memory=True)
        assert (done.code, done.err) == (0, "")
        assert "transformer back end" in done.out
        rows = [" ".join(line.split()) for line in done.out.splitlines()]
        assert {
            "GB before the call 1 1",
            "peak GB of the call - -",
            "peak GB of the process 3 3 1.000",
        } <= set(rows)
        assert [side for side, _ in asked] == ["simulator", "loop"]
        assert asked[0][1] == asked[1][1]
        assert (asked[0][1]["trained"], asked[0][1]["names"][0][:5]) == (8, "model")


class TestChecks:
    """What disagrees is one line and exit code 5, and nothing is timed."""

    @pytest.fixture(autouse=True)
    def _not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bench_report, "in_turn", lambda *_, **__: pytest.fail("timed"))

    def test_the_loop_has_other_results(self, monkeypatch: pytest.MonkeyPatch) -> None:
        simulate = agreement.simulate

        def wrong(simulator: Simulator, work: Any) -> Tensor:
            logits = simulate(simulator, work).clone()
            logits[1, -1, 0] += 1e-2 * logits.abs().max()
            return logits

        monkeypatch.setattr(agreement, "simulate", wrong)
        message = bench("--preset", "exact", "--json").refused(5)
        assert re.search(
            r"differs from the loop by 1\.0e-02 of the largest logit \(limit \de-0[34], float32\)",
            message,
        )

    def test_optimizations_change_the_result(self, monkeypatch: pytest.MonkeyPatch) -> None:
        variant = agreement.variant

        def other_rate(simulator: Simulator, names: Any) -> Simulator:
            other = variant(simulator, names)
            other._parameters = {
                **other._parameters,
                "inner_lr": torch.nn.Parameter(2 * other.inner_lr.detach()),
            }
            return other

        monkeypatch.setattr(agreement, "variant", other_rate)
        message = bench().refused(5)
        assert "the simulator differs from the simulator without optimizations by" in message
        assert "--dtype float64 tells an error from rounding" in message

    @pytest.mark.slow
    def test_rounding_of_a_large_update_is_no_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What float32 rounds of a gradient grows with the rate: of random weights at the default
        rate of every command it was more than the rest of the limit.
        """
        monkeypatch.setattr(bench_report, "in_turn", benchmark.in_turn)
        limits = [
            bench("--preset", "exact", "--inner-lr", rate, "--json").document["checks"][1]
            for rate in (1e-7, 1e-2)
        ]
        assert 1e-4 < limits[0]["tolerance"] < 1.01e-4 < limits[1]["tolerance"] < 3e-3
        float64 = bench("--preset", "exact", "--dtype", "float64", "--json").document["checks"]
        assert [found["tolerance"] for found in float64] == [1e-9, 1e-9]

    def test_training_that_diverges(self) -> None:
        assert (
            "by nan of the largest logit (limit 1e-04, float32); pass a smaller inner_lr"
            in bench("--inner-lr", 1e30).refused(5)
        )

    @pytest.mark.slow
    def test_float64_of_a_model_that_rounds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A model whose own code casts to float32 is compared as `tintc verify` does."""
        monkeypatch.setattr(bench_report, "in_turn", benchmark.in_turn)
        monkeypatch.setattr(
            agreement.Rounding,
            "found",
            property(lambda self: True, lambda self, value: None),
            raising=False,
        )
        facts = bench("--preset", "exact", "--dtype", "float64", "--json").document
        assert [found["tolerance"] for found in facts["checks"]] == [1e-9, 1e-5]


# What one process is asked for, of a source that there is not.
SETTINGS = {
    "seed": 0,
    "names": (),
    "against": "autograd",
    "kernels": "default",
    "predict": "all",
    "slice_memory": "auto",
    "optimize": (),
    "source": "absent-model",
    "options": {"offline": True},
    "config": {},
    "dtype": "float32",
    "device": "cpu",
    "backend": "fused",
    "share": "none",
    "threads": 1,
    "vocab_size": 9,
    "batch": 1,
    "tokens": 4,
    "trained": 2,
}


class TestMemory:
    @pytest.mark.slow
    def test_errors_of_the_process_come_back(self) -> None:
        with pytest.raises(TintcError, match="absent-model") as caught:
            bench_memory.measure("loop", SETTINGS)
        assert caught.value.exit_code == SourceError.exit_code

    @pytest.mark.parametrize(
        ("code", "out", "kind", "words"),
        [
            (-9, "", MemoryLimitError, "ended by signal 9: pass memory=False"),
            (1, "", TintcError, "of the loop failed: RuntimeError: no luck"),
            (0, '{"error": "full", "exit_code": 4}\n', TintcError, "full"),
        ],
    )
    def test_a_process_that_fails(
        self, code: int, out: str, kind: Any, words: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done = subprocess.CompletedProcess([], code, out, "Traceback\nRuntimeError: no luck\n")
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
        with pytest.raises(kind, match=words):
            bench_memory.measure("loop", SETTINGS)

    @pytest.mark.parametrize(
        ("error", "code"),
        [(MemoryError(), 4), (UsageError("bad"), 2), (RuntimeError("DefaultCPUAllocator"), 4)],
    )
    def test_what_the_process_says(
        self,
        error: Exception,
        code: int,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def fail(_: Any) -> None:
            raise error

        monkeypatch.setattr(bench_memory, "run", fail)
        monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115
        monkeypatch.setattr(json, "load", lambda _: {})
        bench_memory.main()
        assert json.loads(capsys.readouterr().out)["exit_code"] == code

    def test_where_the_system_tells_less(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bench_memory, "_status", lambda _: None)
        monkeypatch.setattr(bench_memory, "reset_peak", lambda _: False)
        monkeypatch.setattr(bench_memory, "_prepare", lambda _: lambda: None)
        found = bench_memory.run({"threads": torch.get_num_threads(), "device": "cpu"})
        assert found["call_peak_bytes"] is None
        assert 0 < found["before_bytes"] <= found["peak_bytes"]
        assert bench_memory.how_measured("cpu").endswith("ru_maxrss")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["tiny-opt", "--batch", "0"], 2, "batch is 0; expected at least 1"),
        (["tiny-opt", "--tokens", "0"], 2, "tokens is 0; expected 2 to"),
        (["tiny-opt", "--steps", "0"], 2, "steps is 0"),
        (["tiny-opt", "--pairs", "0"], 2, "pairs is 0; expected at least 1"),
        (["tiny-opt", "--seed", "-1"], 2, "seed is -1"),
        (["tiny-opt", "--train-fraction", "0"], 2, "train_fraction is 0.0"),
        (["tiny-opt", "--train-fraction", "1.5"], 2, "train_fraction is 1.5"),
        (
            ["tiny-opt", "--tokens", "9", "--train-fraction", "0.1"],
            2,
            "1 of 9 tokens is trained; expected at least 2",
        ),
        (["tiny-opt", "--device", "cuda:99"], 2, "device is cuda:99; this machine has"),
        (["tiny-opt", "--device", "tpu"], 2, "device is 'tpu'"),
        (["tiny-opt", "--dtype", "int8"], 2, "dtype is 'int8'"),
        (
            ["tiny-opt", "--against", "jax"],
            2,
            "against is 'jax'; expected one of autograd, compile, vmap",
        ),
        (
            ["tiny-opt", "--slice-memory", "2TB"],
            2,
            "memory is '2TB'; expected auto, lowest, or bytes above 0",
        ),
        (["tiny-opt", "--predict", "none"], 2, "predict is 'none'; expected one of all, rest"),
        (
            ["tiny-opt", "--predict", "rest", "--against", "onnxruntime"],
            2,
            "an exported simulator gives all logits; expected predict all",
        ),
        (["tiny-opt", "--kernels", "mine"], 2, "kernels is 'mine'; expected one of default, same"),
        (
            ["tiny-opt", "--kernels", "same", "--against", "vmap"],
            2,
            "same is for a loop that multiplies by torch.matmul; got against vmap: "
            "expected autograd, lora",
        ),
        (
            ["tiny-opt", "--against", "vmap", "--momentum", "0.9"],
            2,
            "against vmap takes plain sgd; got momentum",
        ),
        (
            ["tiny-opt", "--against", "lora", "--optimizer", "muon"],
            2,
            "against lora has no optimizer muon",
        ),
        (["tiny-opt", "--backend", "loop"], 2, "backend is 'loop'"),
        (["tiny-opt", "--preset", "fast"], 2, "preset is 'fast'"),
        (
            ["tiny-opt", "--without", "speed"],
            2,
            f"there is no optimization speed; they are {', '.join(OPTIMIZATION_NAMES)}",
        ),
        (
            ["tiny-opt", "--backend", "transformer", "--each"],
            2,
            "the transformer back end has no optimizations",
        ),
        (
            ["tiny-opt", "--each", *(f"--without={name}" for name in OPTIMIZATION_NAMES)],
            2,
            "without switches all off",
        ),
        (["shape:opt-1t"], 1, "there is no shape 'opt-1t'"),
        (
            ["nowhere/nothing", "--offline"],
            1,
            "neither a local directory nor complete in the cache",
        ),
        (["tiny-opt", "--revision", "main"], 2, "does not come from the hub"),
        ([], 2, "Missing argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(arguments: list[str], code: int, message: str) -> None:
    assert message in tintc("bench", *arguments).refused(code)


def test_inner_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag, else the config file's, else the default of every command."""
    found: list[float] = []
    monkeypatch.setattr(bench_report, "stages", lambda _: 0)

    def note(_: str, config: SimulatorConfig, *__: object, **___: object) -> None:
        found.append(config.inner_lr)
        raise UsageError("enough")

    monkeypatch.setattr(bench_report, "bench_report", note)
    (tmp_path / "config.json").write_text('{"inner_lr": 0.5}')
    for more in (
        (),
        ("--config", tmp_path / "config.json"),
        ("--config", tmp_path / "config.json", "--inner-lr", 0.25),
    ):
        assert "enough" in tintc("bench", "tiny-opt", *more).refused(2)
    assert found == [SimulatorConfig().inner_lr, 0.5, 0.25]


def test_refusals_of_what_a_model_has() -> None:
    assert f"tokens is {POSITIONS + 1}; expected 2 to {POSITIONS}" in bench(
        "--tokens", POSITIONS + 1
    ).refused(2)
    assert "layers is 3; expected 1 to 2" in bench("--layers", 3).refused(2)
