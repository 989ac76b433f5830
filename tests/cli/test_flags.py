"""Options that derive from dataclasses: every field is a flag of every command that takes it, with
the one text that stands beside the field; only what is given overrides.
"""

import ast
import dataclasses
import importlib
import inspect
import json
import os
import pkgutil
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import process, tintc
from tintc import commands
from tintc.cli import app
from tintc.commands.flags import Flags, flags_of
from tintc.commands.options import COMMON
from tintc.commands.refused import as_flags
from tintc.evaluate import ablation_settings, language_settings, settings, stream_settings
from tintc.evaluate.ablation_grid import grid
from tintc.evaluate.speed import settings as speed
from tintc.ir import errors
from tintc.ir.call_sizes import CallShape
from tintc.ir.config import SimulatorConfig
from tintc.ir.described import flag_of, help_of
from tintc.runtime.backends.transformer.structure import BACKENDS, SHARES
from tintc.runtime.stream_settings import StreamSettings
from tintc.version import __version__

# Commands that take a config, and the fields that they set themselves.
CONFIGURED: dict[str, tuple[str, ...]] = {
    "compile": (),
    "cost": (),
    "bench": (),
    "eval lm": (),
    "eval classify": ("steps", "layers"),
    "ablate": tuple(name for name in ablation_settings.VARIED if name != "inner_lr"),
    "statistics": (),
}
OTHERS: dict[str, tuple[type[Any], tuple[str, ...]]] = {
    "eval lm ": (stream_settings.Settings, ("changes", "cut")),
    " eval lm": (StreamSettings, ()),
    "cost": (CallShape, ()),
    "bench": (speed.Options, ()),
    "eval lm": (language_settings.Settings, ("changes",)),
    "eval classify": (settings.Settings, ("changes",)),
    "ablate": (ablation_settings.Asked, ()),
}
# Same flag, but a text of the command's own.
TOLD_OTHERWISE = {"inner_lr", "steps", "layers"}


def filled(text: str) -> str:
    return " ".join(text.split())


class TestEveryFieldIsAFlag:
    @pytest.mark.parametrize("command", CONFIGURED)
    def test_of_the_config(self, command: str) -> None:
        text = filled(tintc(*command.split(), "--help").out)
        for each in dataclasses.fields(SimulatorConfig):
            assert (f" {flag_of(each)} " in text) == (each.name not in CONFIGURED[command])
            if each.name not in (*CONFIGURED[command], "inner_lr"):
                assert help_of(each) in text
        assert "--config FILE" in text

    @pytest.mark.parametrize("command", OTHERS)
    def test_of_what_the_command_measures(self, command: str) -> None:
        source, left_out = OTHERS[command]
        text = filled(tintc(*command.split(), "--help").out)
        for each in dataclasses.fields(source):
            if each.name not in left_out:
                assert f" {flag_of(each)}" in text
                assert each.name in TOLD_OTHERWISE or help_of(each) in text

    def test_a_new_one_is_there_at_once(self) -> None:
        """A field that SimulatorConfig gets before the commands are imported."""
        code = f"""
import contextlib, dataclasses, io
from tintc.ir import config
from tintc.ir.described import about

@dataclasses.dataclass(frozen=True, kw_only=True)
class Longer(config.SimulatorConfig):
    brand_new: int | None = dataclasses.field(default=7, metadata=about("Made for this test."))

config.SimulatorConfig = Longer
from tintc.cli import app
for command in {list(CONFIGURED)!r}:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        app([*command.split(), "--help"])
    text = " ".join(out.getvalue().split())
    assert "--brand-new INT Made for this test. [default: 7]" in text, (command, text)
"""
        done = process(code=code)
        assert (done.returncode, done.stderr) == (0, "")

    def test_one_that_does_not_say_what_it_is_for_is_refused(self) -> None:
        @dataclasses.dataclass(frozen=True)
        class Silent:
            speed: int = 1

        with pytest.raises(TypeError, match="the field speed does not say what it is for"):
            flags_of(Silent)(type("Some", (Flags,), {}))

    def test_choices_are_those_of_the_library(self) -> None:
        text = filled(tintc("compile", "--help").out)
        for choices in (BACKENDS, SHARES, ("paper", "exact"), ("first_order", "exact")):
            assert f"[{'|'.join(choices)}]" in text


class TestOnlyWhatIsGivenOverrides:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """What each command would have run with."""
        found: dict[str, Any] = {}
        for module, name in (
            ("compile", "run"),
            ("cost", "run"),
            ("bench", "run"),
            ("evaluate", "run_lm"),
            ("evaluate", "run_classify"),
            ("ablate", "run"),
        ):
            command = importlib.import_module(f"tintc.commands.{module}")

            def note(*given: Any, of: str = module, **more: Any) -> None:
                if of == "cost":  # a list of sources, each with a config
                    sources, configs, _ = zip(*given[0], strict=True)
                    given = (list(sources), configs[0])
                found.update(given=given, more=more)

            monkeypatch.setattr(command, name, note)
        return found

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"preset": "exact", "sim_heads": 3, "norm_update": "bias"}))
        return path

    def test_nothing(self, asked: dict[str, Any]) -> None:
        assert tintc("compile", "tiny-opt", "-o", "x").code == 0
        assert asked["given"][2] == SimulatorConfig()
        assert tintc("bench", "tiny-opt").code == 0
        assert asked["given"][1:] == (
            SimulatorConfig(),
            {
                "options": dict.fromkeys(("revision", "cache_dir"))
                | dict.fromkeys(("offline", "trust_remote_code"), False)
            },
        )
        assert tintc("eval", "lm", "m", "--data", "d").code == 0
        assert language_settings.Settings(**asked["given"][3]) == language_settings.Settings()
        assert tintc("eval", "classify", "m").code == 0
        assert settings.Settings(**asked["given"][1]) == settings.Settings()
        assert tintc("ablate", "m", "--data", "d").code == 0
        assert asked["given"][3:5] == (ablation_settings.Asked(), SimulatorConfig.exact())

    def test_one(self, asked: dict[str, Any]) -> None:
        assert tintc("bench", "tiny-opt", "--sim-heads", 4, "--without", "a,b").code == 0
        assert asked["given"][1] == SimulatorConfig(sim_heads=4)
        assert asked["given"][2]["without"] == ("a", "b")
        for command in ("compile tiny-opt -o x", "cost tiny-opt"):
            assert tintc(*command.split(), "--sim-heads", 4).code == 0
            assert SimulatorConfig(sim_heads=4) in asked["given"]

    def test_rules(self, asked: dict[str, Any]) -> None:
        """Of what may be given several times all counts; factors in their order."""
        patterns = ("--train", "*.mlp.*", "--train", "*.bias,*.norm.*")
        factors = ("--lr-scale", "*=2", "--lr-scale", "*.mlp.*=0.5,a=1e-3", "--lr-scale", "*=3")
        steps = ("--steps", 3, "--schedule", "1,.5,0", "--momentum", 0.9, "--nesterov")
        limits = ("--clip-norm", 0.5, "--decay", 0.1, "--max-drift", 2)
        assert tintc("cost", "m", *patterns, *factors, *steps, *limits).code == 0
        assert asked["given"][1] == SimulatorConfig(
            train=("*.mlp.*", "*.bias", "*.norm.*"),
            lr_scale=(("*.mlp.*", 0.5), ("a", 1e-3), ("*", 3.0)),
            steps=3,
            schedule=(1.0, 0.5, 0.0),
            momentum=0.9,
            nesterov=True,
            clip_norm=0.5,
            decay=0.1,
            max_drift=2.0,
        )
        adam = ("--optimizer", "adam", "--betas", ".5,.9", "--eps", "1e-6", "--schedule", "cosine")
        assert tintc("compile", "tiny-opt", "-o", "x", *adam, "--normalize", "weight").code == 0
        assert asked["given"][2] == SimulatorConfig(
            optimizer="adam", betas=(0.5, 0.9), eps=1e-6, schedule="cosine", normalize="weight"
        )

    def test_rules_in_a_file(self, asked: dict[str, Any], file: Path) -> None:
        fields: dict[str, Any] = {
            "steps": 2,
            "train": ["*.mlp.*", "*.bias"],
            "lr_scale": {"*.bias": 0.5, "*.mlp.*": 2},
            "schedule": [1, 0.5],
            "betas": [0.5, 0.9],
            "clip_norm": 0.5,
        }
        file.write_text(json.dumps({"preset": "exact", **fields}))
        assert tintc("compile", "tiny-opt", "-o", "x", "--config", file).code == 0
        assert asked["given"][2] == SimulatorConfig.exact(**fields)
        assert tintc("cost", "m", "--config", file, "--clip-norm", "none", "--train", "b").code == 0
        assert asked["given"][1].clip_norm is None
        assert asked["given"][1].train == ("b",)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ("--lr-scale *.bias", "lr_scale is '*.bias'; expected PATTERN=FACTOR"),
            ("--lr-scale *.bias=x", "lr_scale of *.bias is 'x'; expected a finite number"),
            ("--schedule 1,.5", "schedule has 2 factors; expected one for each of the 1 steps"),
            ("--schedule fast", "expected constant, linear, cosine, or a factor for each step"),
            ("--momentum 1", "momentum is 1.0; expected a number from 0 to below 1"),
            ("--nesterov", "the config has nesterov without momentum"),
            ("--betas 5,6", "one of betas is 5.0; expected a number from 0 to below 1"),
            ("--betas a,b", "betas are 'a,b'; expected numbers"),
            ("--clip-norm x", "Invalid value for '--clip-norm': 'x'; expected a number"),
            ("--train a --layers 1", "the config has train and layers"),
            ("--train a --norm-update all", "train and norm_update are both given"),
            ("--normalize all", "normalize is 'all'; expected one of none, weight"),
            ("--optimizer adam --momentum .5", "momentum and optimizer adam; expected sgd or muon"),
        ],
    )
    def test_rules_that_make_no_sense(
        self, arguments: str, words: str, asked: dict[str, Any]
    ) -> None:
        assert words in tintc("cost", "m", *arguments.split()).refused(2)

    def test_preset_then_file_then_flags(self, asked: dict[str, Any], file: Path) -> None:
        assert tintc("cost", "tiny-opt", "--config", file, "--sim-heads", 4).code == 0
        assert asked["given"][1] == SimulatorConfig.exact(sim_heads=4, norm_update="bias")
        assert tintc("cost", "m", "--config", file, "--preset", "paper").code == 0
        assert asked["given"][1] == SimulatorConfig.paper(sim_heads=3, norm_update="bias")

    def test_none_takes_back_what_the_file_says(self, asked: dict[str, Any], file: Path) -> None:
        assert tintc("cost", "tiny-opt", "--config", file, "--sim-heads", "none").code == 0
        assert asked["given"][1] == SimulatorConfig.exact(norm_update="bias")

    def test_a_flag_may_say_the_default(self, asked: dict[str, Any], file: Path) -> None:
        file.write_text('{"steps": 5, "inner_lr": 0.5}')
        assert tintc("cost", "m", "--config", file, "--steps", 1, "--inner-lr", "1e-4").code == 0
        assert asked["given"][1] == SimulatorConfig()

    def test_over_several_presets(self, asked: dict[str, Any], file: Path) -> None:
        common = ("eval", "lm", "m", "--data", "d", "--config", file)
        assert tintc(*common, "--steps", 3, "--seeds", "1,2", "--seeds", 5).code == 0
        found = language_settings.Settings(**asked["given"][3])
        assert (found.presets, found.steps, found.seeds) == (("exact",), 3, (1, 2, 5))
        assert found.changes == {"sim_heads": 3, "norm_update": "bias"}
        expected = SimulatorConfig.exact(steps=3, sim_heads=3, norm_update="bias")
        assert found.config("exact") == expected
        assert tintc(*common, "--preset", "paper,exact").code == 0
        assert asked["given"][3]["presets"] == ("paper", "exact")

    def test_classification(self, asked: dict[str, Any]) -> None:
        options = ("--attention-gradient", "full", "--inner-lr", "1e-3", "--no-in-context")
        assert tintc("eval", "classify", "m", *options).code == 0
        found = settings.Settings(**asked["given"][1])
        assert (found.inner_lr, found.in_context) == (1e-3, False)
        method = settings.method("simulator", "paper", "6x2", 1e-3, 24, found.changes)
        assert method.describe()["changes"] == {"attention_gradient": "full"}
        plain = settings.method("simulator", "paper", "6x2", 1e-3, 24)
        assert "changes" not in plain.describe()  # results of earlier runs are found again

    def test_ablation(self, asked: dict[str, Any]) -> None:
        options = ("--steps", 2, "--prefix-tokens", 7, "--inner-lr", "1e-3", "--only", "paper")
        assert tintc("ablate", "m", "--data", "d", *options, "--limit", 3).code == 0
        given, base = asked["given"][3:5]
        assert given == ablation_settings.Asked(only=("paper",), inner_lr=1e-3, limit=3)
        assert base == SimulatorConfig.exact(steps=2, prefix_tokens=7)
        variants = [dataclasses.asdict(variant.config) for variant in grid(base)]
        for name in dataclasses.asdict(base):
            same = all(config[name] == getattr(base, name) for config in variants)
            assert same == (name not in ablation_settings.VARIED or name == "inner_lr")

    @pytest.mark.parametrize(
        ("command", "words"),
        [
            ("eval classify m", "sets steps, which --budgets tells; leave that out"),
            ("ablate m --data d", "sets norm_update, which the variants of an ablation set"),
        ],
    )
    def test_a_file_cannot_say_what_is_told_elsewhere(
        self, command: str, words: str, tmp_path: Path
    ) -> None:
        file = tmp_path / "config.json"
        name = words.split()[1].rstrip(",")
        file.write_text(json.dumps({name: 1}))
        assert words in tintc(*command.split(), "--config", file).refused(2)

    def test_the_last_of_several_wins(self, asked: dict[str, Any]) -> None:
        assert tintc("cost", "m", "--steps", 2, "-q", "--steps=3", "n", "-q").code == 0
        assert (asked["given"][0], asked["given"][1].steps) == (["m", "n"], 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cost", "m", "--steps", "1.5"], "Invalid value for '--steps': '1.5'; expected a whole"),
        (["cost", "m", "--inner-lr", "x"], "Invalid value for '--inner-lr': 'x'; expected a num"),
        (["cost", "m", "--json=3"], "Invalid value for '--json': '3'; expected nothing"),
        (["cost", "m", "--steps"], "Option '--steps' requires an argument"),
        (["cost", "m", "--step", "1"], "No such option: --step, did you mean --steps?"),
        (["cost", "m", "--no-json"], "No such option: --no-json"),
        (["cost", "m", "-qz"], "No such option: -z"),
        (["compil"], "No such command 'compil', did you mean compile?"),
        (["eval", "x"], "No such command 'x'; `tintc eval --help`"),
        (["eval", "lm", "m"], "Missing option '--data'; `tintc eval lm --help`"),
        (["env", "x"], "unexpected argument 'x'; `tintc env --help`"),
        (["run", "x", "--generate", "-1"], "'-1'; expected at least 0"),
        (["verify", "x", "--tokens", "1"], "'1'; expected at least 2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_no_command_can_read(arguments: list[str], words: str) -> None:
    assert words in tintc(*arguments).refused(2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--json", "-q", "env"],
        ["-q", "env", "--json"],
        ["--debug", "--quiet", "--verbose", "env", "--json", "-v"],
    ],
    ids=" ".join,
)
def test_what_every_command_has_may_stand_in_front_of_it(arguments: list[str]) -> None:
    done = tintc(*arguments)
    assert (done.code, done.document["tintc"]) == (0, __version__)


def test_of_a_command_in_a_group_and_of_none() -> None:
    """In front of the group, of the command, behind it; and in front of what takes nothing."""
    for arguments in ("-q eval lm -h", "eval -q lm -h", "eval lm -q -h"):
        assert tintc(*arguments.split()).out == tintc("eval", "lm", "--help").out
    for arguments in ("-q", "--json --help", "-v -h"):
        assert tintc(*arguments.split()).out == tintc("--help").out
    assert tintc("-q", "--version").out == f"tintc {__version__}\n"
    assert "No such command 'nonsense'" in tintc("--json", "nonsense").refused(2)


def test_nothing_that_every_command_has_is_left_out_there() -> None:
    names = {
        name for argument in app["env"].assemble_argument_collection() for name in argument.names
    }
    own = {"*", "--calibrate"}
    assert {name for name in names - own if not name.startswith("--no-")} == set(COMMON)


@pytest.mark.slow
def test_one_name_for_one_thing() -> None:
    """The length of a text, the preset, and lists of several."""
    for command, option in {
        "run": "--tokens INT",
        "verify": "--tokens INT",
        "cost": "--tokens INT",
        "bench": "--tokens INT",
        "eval lm": "--tokens INT",
        "eval classify": "--tokens INT",
        "ablate": "--tokens INT",
        "compile": "--preset CHOICE",
        "eval  lm": "--preset NAME,...",
        "eval  classify": "--preset NAME,...",
        "export": "--with NAME,...",
    }.items():
        assert f" {option} " in filled(tintc(*command.split(), "--help").out), command
    for command in CONFIGURED:
        text = tintc(*command.split(), "--help").out
        assert not re.search(r"--(length|max-tokens|presets) ", text), command


class TestMessagesOfTheLibrary:
    """They name arguments as Python has them; on a command line they are flags."""

    def test_as_flags(self) -> None:
        said = "pass force=True, memory=False, data=FILE, cache_dir=DIR (dtype=float64): x=True"
        assert as_flags(said, app) == (
            "pass --force, --no-memory, --data FILE, --cache-dir DIR (--dtype float64): x=True"
        )

    def test_none_of_them_names_a_flag(self) -> None:
        """Of other programs it may."""
        root = Path(inspect.getfile(commands)).parents[2]
        kinds = {name for name in vars(errors) if name.endswith("Error")}
        found = set()
        for room in ("ir", "passes", "runtime", "compiler", "evaluate"):
            for path in (root / room).rglob("*.py"):
                for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                    if isinstance(call, ast.Call) and getattr(call.func, "id", "") in kinds:
                        said = " ".join(
                            part.value
                            for part in ast.walk(call)
                            if isinstance(part, ast.Constant) and isinstance(part.value, str)
                        )
                        found |= {(path.name, flag) for flag in re.findall(r"--[a-z][a-z-]+", said)}
        # Of llama-gguf-split, pip and the command line of lm-evaluation-harness.
        assert {flag for _, flag in found} <= {"--merge", "--no-deps", "--gen"}, found


def test_values_that_look_like_options(tmp_path: Path) -> None:
    assert "is no tintc artifact" in tintc("run", tmp_path, "--text", "-5 degrees").refused(1)
    assert "train-fraction is -0.1" in tintc(
        "run", tmp_path, "--text", "a", "--train-fraction", "-0.1"
    ).refused(2)


def test_groups() -> None:
    """Build, look, use, measure: every command once, with one line."""
    text = tintc("--help").out
    parts = [part.splitlines() for part in text.split("\n\n")]
    found = {
        lines[0].rstrip(":"): [line.split()[0] for line in lines[1:] if line[2] != " "]
        for lines in parts
        if lines and lines[0].endswith(":")
    }
    assert found == {
        "Build a simulator": ["compile", "export", "statistics"],
        "Look at it": ["inspect", "page", "cost", "env"],
        "Use it": ["run", "adapt"],
        "Measure it": ["verify", "bench", "eval", "ablate"],
        "Other": ["-h,", "--install-completion", "--version"],
    }
    rows = [line for lines in parts for line in lines[1:] if lines[0].endswith(":")]
    assert all(line[2] != " " and len(line) < 81 for line in rows)


def test_no_function_of_the_commands_takes_more_than_eight_parameters() -> None:
    folder = Path(inspect.getfile(commands)).parent
    files = [folder.parent / "cli.py", *folder.glob("*.py")]
    assert {path.stem for path in files} >= {
        module.name for module in pkgutil.iter_modules([folder])
    }
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                given = node.args
                every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg]
                names = [one.arg for one in every if one is not None]
                assert len([name for name in names if name != "self"]) <= 8, (path, node.name)


class TestCompletion:
    @pytest.fixture
    def script(self, tmp_path: Path) -> Path:
        path = tmp_path / "tintc.bash"
        done = tintc("--install-completion", "--shell", "bash", "--output", path)
        assert (done.code, done.err) == (0, "")
        assert done.out.startswith(f"{path}: start the shell anew")
        assert list(tmp_path.iterdir()) == [path]
        return path

    @pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["comp"], {"compile"}),
            (["compile", "--norm-g"], {"--norm-gradient"}),
            (["eval", "cl"], {"classify"}),
            (["compile", "--norm-gradient", ""], {"first_order", "exact"}),
        ],
    )
    def test_bash(self, words: list[str], expected: set[str], script: Path) -> None:
        line = " ".join(f"'{word}'" for word in ["tintc", *words])
        code = f"""source {script}
COMP_WORDS=({line}); COMP_CWORD={len(words)}
COMP_LINE="${{COMP_WORDS[*]}}"; COMP_POINT=${{#COMP_LINE}}
_tintc tintc "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD-1]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
        done = subprocess.run(
            ["bash", "--norc", "-c", code], capture_output=True, text=True, timeout=60, check=False
        )
        assert set(done.stdout.split()) == expected, done

    def test_where_the_shell_looks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Path, "home", lambda: tmp_path)
        monkeypatch.setitem(os.environ, "HOME", str(tmp_path))
        monkeypatch.delenv("XDG_DATA_HOME", raising=False)
        assert tintc("--install-completion", "--shell", "fish").code == 0
        (written,) = (path for path in tmp_path.rglob("*") if path.is_file())
        assert written.name == "tintc.fish"

    def test_no_shell(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from cyclopts.completion import detect

        def fail() -> None:
            raise detect.ShellDetectionError("none")

        monkeypatch.setattr(detect, "detect_shell", fail)
        assert "pass --shell bash, zsh" in tintc("--install-completion").refused(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chunk", "8"], "--chunk belong to protocol stream; expected --protocol stream"),
        (
            ["--protocol", "stream", "--train-fraction", "0.5", "--seeds", "1"],
            "--train-fraction, --seeds belong to protocol split; expected --protocol split",
        ),
        (["--protocol", "roll"], "protocol is 'roll'; expected one of split, stream"),
        (["--protocol", "stream", "--chunk", "0"], "chunk is 0; expected a whole number"),
    ],
)
def test_each_protocol_of_eval_lm_has_options_of_its_own(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("One day.", encoding="utf-8")
    data = ["--data", str(tmp_path / "a.txt"), "--inner-lr", "0.1"]
    found = tintc("eval", "lm", "tiny-opt", *data, *arguments)
    assert found.code == 2 and message in filled(found.err)
