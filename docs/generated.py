"""Parts of pages that are made from the code: a page says `<!-- generated: NAME -->`, and `expand`
puts the Markdown of NAME there. conf.py does so when the site is built; nothing of it is stored.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
MEASURED = ROOT / "docs" / "measured"  # what slow commands printed with --json
_MARK = re.compile(r"^<!-- generated: ([a-z_]+)(?: ([\w.-]+))? -->$", re.MULTILINE)

# Every command that prints JSON on `tiny-opt` in seconds; each finds the files of those before it.
EXAMPLES = (
    "compile tiny-opt -o sim --json",
    "inspect sim --params --json",
    "inspect sim --slots --json",
    "inspect sim --stage lowered --json",
    "cost tiny-opt --breakdown --json",
    "page sim -o page --no-model --json",
    "run sim --text {text} --json",
    "run sim --text {text} --show --json",
    "run sim --text {text} --generate 4 --json",
    "run sim --file docs.jsonl --json",
    "run sim --file text.txt --stream --chunk 8 --context 8 --json",
    "run sim --each questions.jsonl --generate 4 --json",
    "adapt sim --file text.txt -o learned --json",
    "run sim --adapted learned --prompt Where? --generate 4 --json",
    "verify sim --json",
    "statistics tiny-opt --data text.txt --chunk 8 --context 8 -o rms --json",
    "export sim --onnx sim.onnx --json",
    "export sim --onnx pair --pair --json",
    "bench tiny-opt --tokens 32 --pairs 1 --no-memory --json",
    "bench tiny-opt --generate --tokens 16 --new-tokens 4 --batch 2 --pairs 1 --json",
    "bench tiny-opt --stream --chunk 8 --context 16 --batch 1 --pairs 1 --no-memory --json",
    "env --json",
)
_TEXT = "'The river rises in the hills above the town. It runs through the town, and then the sea.'"


def expand(page: str) -> str:
    """The page with every mark replaced. Raises KeyError for a name that is none of PARTS."""

    def made(mark: re.Match[str]) -> str:
        name, argument = mark.groups()
        return PARTS[name]() if argument is None else PARTS[name](argument)

    return _MARK.sub(made, page)


def operators() -> str:
    """Every operator of the dialect: schema, meaning, kind of its numbers."""
    from tintc.ir.ops import OPERATORS

    lines = []
    for operator in OPERATORS.values():
        lines += [f"`tint.{operator.name}`", f": {_sentence(operator.meaning)}"]
        lines += ["", f"  `{operator.schema}`", f"  ({operator.dtype})", ""]
    return "\n".join(lines)


def _orders() -> dict[str, tuple[Any, ...]]:
    """The passes in the order in which they run, by what they are part of."""
    from tintc.passes.lowering import DEFAULT_PIPELINE
    from tintc.passes.specializing import DECODE, OPTIMIZATIONS, STREAM

    lowered = {"pipeline": DEFAULT_PIPELINE}
    return {**lowered, "stream": STREAM, "decode": DECODE, "optimization": OPTIMIZATIONS}


def pipeline() -> str:
    """The passes in the order in which they run, with their contracts."""
    rows = []
    for kind, steps in _orders().items():
        for step in steps:
            contract = [", ".join(names) or "-" for names in (step.requires, step.ensures)]
            rows.append((f"[`{step.name}`](#{_anchor(step.name)})", kind, *contract))
    return _table(("pass", "of", "requires", "ensures"), rows)


def passes() -> str:
    """One section a pass: what its file says at the top."""
    parts = []
    for step in itertools.chain(*_orders().values()):
        module = inspect.getmodule(step.run)
        assert module is not None and module.__doc__ is not None
        where = module.__name__.removeprefix("tintc.").replace(".", "/") + ".py"
        text = module.__doc__.strip()
        parts.append(
            f"({_anchor(step.name)})=\n### {step.name}\n\n`{where}`\n\n```text\n{text}\n```"
        )
    return "\n\n".join(parts)


def properties() -> str:
    """What passes require and ensure, and `tintc.ir.contracts` checks."""
    from tintc.ir.contracts import PROPERTIES

    rows = [(f"`{name}`", _first(check.__doc__)) for name, check in PROPERTIES.items()]
    return _table(("property", "holds when"), rows)


def config() -> str:
    """The fields of a config with their types and what the presets set."""
    from tintc.ir.config import SimulatorConfig

    paper, exact = SimulatorConfig.paper(), SimulatorConfig.exact()
    hints = get_type_hints(SimulatorConfig)
    rows = []
    for field in dataclasses.fields(SimulatorConfig):
        values = [f"`{getattr(preset, field.name)}`" for preset in (paper, exact)]
        flag = "--" + field.name.replace("_", "-")
        rows.append((f"`{field.name}`", f"`{flag}`", _type(hints[field.name]), *values))
    return _table(("field", "flag", "values", "`paper`", "`exact`"), rows)


def exit_codes() -> str:
    """Which error ends the command line with which code."""
    from tintc.ir import errors

    rows = [("0", "", "The command did what was asked.")]
    found = [
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, errors.TintcError)
    ]
    for error in sorted(found, key=lambda error: error.exit_code):
        meaning = re.sub(r"\s*Exit code \d\.", "", " ".join((error.__doc__ or "").split()))
        rows.append((str(error.exit_code), f"{{py:class}}`tintc.{error.__name__}`", meaning))
    rows.append(("130", "", "Interrupted from the keyboard."))
    return _table(("code", "error", "meaning"), rows)


def optional_packages() -> str:
    """The extras of pyproject.toml."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    rows = [
        (f"`tintc[{name}]`", ", ".join(f"`{package}`" for package in packages))
        for name, packages in project["optional-dependencies"].items()
    ]
    return _table(("extra", "brings"), rows)


def help_texts() -> str:
    """What `tintc COMMAND --help` prints, for every command."""
    parts = [f"## tintc\n\n```text\n{_tintc('--help', ROOT)}\n```"]
    for name in commands():
        parts.append(f"## tintc {name}\n\n```text\n{_tintc(f'{name} --help', ROOT)}\n```")
    return "\n\n".join(parts)


def commands() -> tuple[str, ...]:
    """Names of all commands, as the help texts list them; in a group with the group's name."""

    def listed(text: str) -> Iterator[str]:
        for line in text.splitlines():
            found = re.match(r"^[\s│]+([a-z]+)\s{2,}\S", line)
            if found:
                yield found[1]

    names: list[str] = []
    for name in listed(_tintc("--help", ROOT)):
        below = [*listed(_tintc(f"{name} --help", ROOT))] if name == "eval" else []
        names += [f"{name} {part}" for part in below] or [name]
    return tuple(dict.fromkeys(names))


def json_outputs() -> str:
    """Keys, types and an example of what each command prints with `--json`, on `tiny-opt`; those of
    the experiments from the stored results.
    """
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "text.txt").write_text(_TEXT.strip("'"), encoding="utf-8")
        lines = [json.dumps({"text": _TEXT.strip("'")})] * 2
        Path(folder, "docs.jsonl").write_text("\n".join(lines), encoding="utf-8")
        question = {"id": 1, "context": _TEXT.strip("'"), "prompt": "Where?"}
        Path(folder, "questions.jsonl").write_text(json.dumps(question), encoding="utf-8")
        for example in EXAMPLES:
            command = example.format(text=_TEXT)
            document = json.loads(_tintc(command, Path(folder)))
            parts.append(f"## `tintc {example.format(text='TEXT')}`\n\n{_keys(document)}")
    for path in sorted(RESULTS.glob("*-tiny-opt.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        words = report["command"].split()
        at = words.index("--protocol") if "--protocol" in words else len(words)
        command = " ".join([*words[:3], *words[at : at + 2]])
        parts.append(f"## `{command} ... --json`\n\n{_keys(report)}")
    return "\n\n".join(parts)


def write_demo(target: Path) -> None:
    """The page of `tiny-opt`, in place of one that an earlier build left."""
    with tempfile.TemporaryDirectory() as folder:
        _tintc("compile tiny-opt -o sim", Path(folder))
        _tintc(f"page sim -o {shlex.quote(str(target.resolve()))} --force", Path(folder))


def result(name: str) -> str:
    """A stored report as its table, the command that printed it, and its picture."""
    from tintc.evaluate.tables import TABLES

    report = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    table = TABLES[report["experiment"]](report).markdown()
    return f"{table}\n`{report['command']}`\n\n![{name}](../results/{name}.png)"


def rules(name: str) -> str:
    """Stored reports of one model under several inner rules, one table: perplexity of the rest, and
    its change for true dynamic evaluation by the same rule and for the simulator.
    """
    from tintc.ir.rule_values import rule_text

    head = "| rule | steps | unmodified | dynamic evaluation | | simulator | | rate |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in _rule_reports(name)]
    for report in sorted(reports, key=lambda r: r["rows"][2]["config"]["steps"]):
        before, dynamic, simulator = report["rows"][:3]
        cells = [f"{each['perplexity']:.3f} | {_change(each)}" for each in (dynamic, simulator)]
        config = simulator["config"]
        lines.append(
            f"| {rule_text(simulator['rule']) or 'sgd'} | {config['steps']} "
            f"| {before['perplexity']:.3f} | {' | '.join(cells)} | {simulator['inner_lr']:g} |"
        )
    first = reports[0]["command"]
    return "\n".join(lines) + f"\n\n`{first}`, and the same with other rules and steps."


def _rule_reports(name: str) -> list[Path]:
    return sorted((RESULTS / name).glob("*.json"))


def _change(row: dict[str, Any]) -> str:
    return f"{row['change']:+.2f} ± {row['error']:.2f} %"


def cost_of_shapes() -> str:
    """The stored output of `tintc cost` over published shapes, as the table that it prints."""
    from tintc.commands.console import number

    report = json.loads((MEASURED / "cost.json").read_text(encoding="utf-8"))
    header = ("model", "auxiliary", "K", "D_sim", "H_sim", "pages", "`none`", "`layers`", "`all`")
    rows = []
    for facts in report["models"]:
        parameters, layout = facts["parameters"], facts["layout"]
        sizes = (layout[name] for name in ("prefix_tokens", "sim_hidden", "sim_heads", "pages"))
        rows.append(
            (
                facts["source"].removeprefix("shape:"),
                number(parameters["auxiliary"]),
                *map(str, sizes),
                *map(number, parameters["shares"].values()),
                number(facts["flops"]),
                f"{facts['flops'] / facts['direct_flops']:.2f}",
                *(f"{facts[name] / 1e9:,.4g}" for name in ("weight_bytes", "peak_bytes")),
                f"{facts['seconds']:.0f}",
            )
        )
    return _table((*header, "FLOP", "of direct", "weights GB", "peak GB", "s"), rows)


def coverage() -> str:
    """The stored lines of `python -m tests.coverage_table`: counts, equal ones, others."""
    report = json.loads((MEASURED / "coverage.json").read_text(encoding="utf-8"))
    lines = report["types"]
    counts = Counter(line["became"] for line in lines).most_common()
    said = ", ".join(f"{count} {became}" for became, count in counts)
    made = " and ".join(map(" ".join, report["versions"].items()))
    equal = [line for line in lines if line["became"] == "equal"]
    others = [line for line in lines if line["became"] != "equal"]
    header = ("equal autograd", "without casts", "as it is", "paper, as it is", "islands")
    rows = [(f"`{line['type']}`", *_figures(line)) for line in equal]
    left = [(f"`{line['type']}`", line["became"], _quoted(line["reason"])) for line in others]
    return (
        f"`{report['command']}` with {made}: {len(lines)} of {report['known']} types have a line, "
        f"{said}. {sum('paper' in line for line in equal)} were also compared as they are, by "
        f"`--complete`.\n\n{_table(header, rows)}\n\n{_table(('type', 'is', 'reason'), left)}"
    )


def _figures(line: dict[str, Any]) -> Iterator[str]:
    """Largest differences of a step of exact, and of paper's first logits; islands."""
    for preset, name in (("exact", "cast_free"), ("exact", "as_is"), ("paper", "as_is")):
        yield f"{line[preset][name]:.0e}" if name in line.get(preset, {}) else ""
    yield str(line["exact"]["islands"])


def _quoted(reason: str) -> str:
    words = reason.removeprefix("UnsupportedModelError: ").replace("`", "'")
    return f"`{words if len(words) <= 300 else words[:297] + '...'}`"


def _keys(document: Any) -> str:
    rows = [(f"`{path}`", kind, example) for path, kind, example in _walk(document, "")]
    return _table(("key", "type", "example"), rows)


def _walk(value: Any, path: str) -> Iterator[tuple[str, str, str]]:
    """Path, type and example of every leaf; of a list its first entry, of a table of names one."""
    if isinstance(value, dict) and value:
        names = list(value)
        if _are_names(value):
            yield from _walk(value[names[0]], f"{path}.*".lstrip("."))
            return
        for name in names:
            yield from _walk(value[name], f"{path}.{name}".lstrip("."))
    elif isinstance(value, list) and value and isinstance(value[0], (dict, list)):
        yield from _walk(value[0], f"{path}[]")
    else:
        text = json.dumps(value, ensure_ascii=False)
        text = text if len(text) <= 48 else text[:45] + "..."
        yield path, type(value).__name__.replace("NoneType", "null"), f"`{text}`"


def _are_names(value: dict[str, Any]) -> bool:
    """Whether the keys are data (slots, modules, operators) and not the names of fields."""
    same = len({type(entry) for entry in value.values()}) == 1
    entries = list(value.values())
    if same and isinstance(entries[0], dict):
        return len(value) > 1 and len({tuple(entry) for entry in entries}) == 1
    return same and len(value) > 12


def _tintc(arguments: str, folder: Path) -> str:
    """Standard output of a command in a process of its own, without a network."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    environment |= {"NO_COLOR": "1", "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        f"{sys.executable} -m tintc {arguments}",
        shell=True,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"tintc {arguments} ended with {done.returncode}: {done.stderr}")
    return done.stdout.rstrip()


def _type(hint: Any) -> str:
    choices = [repr(choice).strip("'") for choice in getattr(hint, "__args__", ())]
    if getattr(hint, "__origin__", None) is not None:  # a Literal
        return ", ".join(f"`{choice}`" for choice in choices)
    return f"`{hint.__name__ if isinstance(hint, type) else hint}`"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header)]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (*lines, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _anchor(name: str) -> str:
    return "pass-" + name.replace("_", "-")


def _first(text: str | None) -> str:
    return " ".join((text or "").split("\n\n")[0].split())


def _sentence(text: str) -> str:
    return " ".join(text.split())


PARTS: dict[str, Callable[..., str]] = {
    part.__name__: part
    for part in (
        operators,
        pipeline,
        passes,
        properties,
        config,
        exit_codes,
        optional_packages,
        help_texts,
        json_outputs,
        cost_of_shapes,
        coverage,
        result,
        rules,
    )
}
