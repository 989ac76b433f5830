"""The data of a page, as web/README.md says it, made from an artifact by the shortest way.

It stands in for the site that `tintc page` writes, so that the browser's half is tested by itself.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tintc.compiler.artifact import load
from tintc.compiler.artifact_reader import read_graph, read_manifest, read_report
from tintc.compiler.onnx import export_onnx
from tintc.compiler.onnx.pair import export_onnx_pair
from tintc.ir.layout import Layout
from tintc.ir.ops import OPERATORS
from tintc.ir.records import NodeRecord, to_records
from tintc.runtime.simulator import Simulator

STATIC = Path(__file__).parents[2] / "page" / "static"
STAGES = ("captured", "canonical", "lowered", "optimized", "emitted")
LIMIT = 300e6  # bytes of a model that a browser is asked to fetch


def write_site(artifact: Path, out: Path, *, model: bool = True) -> Path:
    """A site of this artifact in a folder that does not exist."""
    shutil.copytree(STATIC, out, ignore=shutil.ignore_patterns("*.gz"))
    for packed in (STATIC / "runtime").glob("*.gz"):
        target = out / "runtime" / packed.stem
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(gzip.decompress(packed.read_bytes()))
    simulator = load(artifact)
    data = out / "data"
    data.mkdir()
    stages = {
        **read_graph(artifact).records(),
        "optimized": to_records(simulator.optimized()),
        "emitted": to_records(simulator.emitted(differentiable=False).graph),
    }
    before: list[NodeRecord] = []
    for stage in STAGES:
        _write(data / f"graph-{stage}.json", graph(stage, stages[stage], before))
        before = stages[stage]
    reason = None if model else "The page was written without the model."
    if model and (artifact / "weights.safetensors").stat().st_size > LIMIT:
        reason = "The model is larger than 300 MB, which is more than a browser should fetch."
    if reason is None:
        _write(data / "run.json", _run(simulator, artifact, out))
    _write(data / "operators.json", operators())
    lowered = stages["lowered"]
    _write(data / "slots.json", slots(read_manifest(artifact).layout, lowered))
    report: Any = read_report(artifact)
    _write(data / "cost.json", _cost(report, lowered))
    views = {"graph": True, "slots": True, "cost": True}
    run = {"available": reason is None, "reason": reason}
    config = report["config"]
    _write(
        data / "site.json",
        {
            "format": 1,
            "title": report["source"]["name"],
            "tintc": "0",
            "summary": [
                ["auxiliary model", f"{report['auxiliary_parameters']:,} parameters"],
                ["inner training", f"{config['steps']} steps at {config['inner_lr']}"],
                ["back end", report["backend"]],
            ],
            "stages": list(STAGES),
            "default_stage": "lowered",
            "views": {**views, "run": run},
            "steps": config["steps"],
        },
    )
    return out


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, separators=(",", ":")))


def operators() -> dict[str, dict[str, str]]:
    found = {}
    for name, one in OPERATORS.items():
        formula = str(one.implementation.__doc__ or "").split("\n\n")[0]
        found[f"tint.{name}"] = {
            "formula": " ".join(formula.split()),
            "meaning": one.meaning,
            "family": one.kind,
        }
    return found


class _Table:
    def __init__(self) -> None:
        self.strings: dict[str, int] = {}

    def __call__(self, text: str | None) -> int:
        return -1 if text is None else self.strings.setdefault(text, len(self.strings))


def graph(stage: str, records: list[NodeRecord], before: list[NodeRecord]) -> dict[str, Any]:
    """The columns of one stage."""
    table = _Table()
    index = {record.name: number for number, record in enumerate(records)}
    old = {r.name: (r.operator, str(r.args)) for r in before}
    groups = _groups({r.info.get("module", "") for r in records})
    numbers = {group["path"]: number for number, group in enumerate(groups)}

    def column(read: Callable[[NodeRecord], Any]) -> list[Any]:
        return [read(record) for record in records]

    def text(read: Callable[[NodeRecord], Any]) -> list[int]:
        return [table(read(record)) for record in records]

    def change(record: NodeRecord) -> str:
        if not before or old.get(record.name) == (record.operator, str(record.args)):
            return "same"
        return "changed" if record.name in old else "new"

    nodes = {
        "name_s": text(lambda r: r.name),
        "operator_s": text(lambda r: r.operator),
        "kind_s": text(lambda r: r.kind),
        "phase_s": text(lambda r: r.info.get("phase", "")),
        "step": column(lambda r: r.info.get("step", -1) if r.info.get("phase") else -1),
        "module_s": text(lambda r: r.info.get("module", "")),
        "source_s": text(lambda r: r.info.get("source")),
        "shape_s": text(lambda r: "(" + ", ".join(map(str, r.shape)) + ")"),
        "dtype_s": text(lambda r: r.info.get("dtype")),
        "slot_s": text(lambda r: r.info.get("slot")),
        "memory_s": text(lambda r: r.name if stage == "lowered" else None),
        "trainable": column(lambda r: int(bool(r.info.get("trainable")))),
        "args_s": text(lambda r: _arguments(r)),
        "flops": column(_flops),
        "bytes": column(_bytes),
        "change_s": text(change),
        "group": column(lambda r: numbers.get(r.info.get("module", ""), -1)),
    }
    edges = [(index[name], index[r.name]) for r in records for name in r.inputs()]
    return {
        "stage": stage,
        "strings": list(table.strings),
        "nodes": nodes,
        "edges": {"from": [a for a, _ in edges], "to": [b for _, b in edges]},
        "removed": len(old.keys() - index.keys()),
        "note": f"What the passes before {stage} made.",
        "groups": groups,
    }


def _groups(modules: Iterable[str]) -> list[dict[str, Any]]:
    paths = sorted({".".join(m.split(".")[:n]) for m in modules if m for n in range(1, 20)})
    number = {path: place for place, path in enumerate(paths)}
    groups = []
    for path in paths:
        parts = path.split(".")
        block = next((int(part) for part in parts if part.isdigit()), -1)
        parent = number.get(".".join(parts[:-1]), -1)
        groups.append({"path": path, "parent": parent, "label": parts[-1], "block": block})
    return groups


def _arguments(record: NodeRecord) -> str:
    def one(value: Any) -> str:
        return str(value["node"]) if isinstance(value, dict) and "node" in value else str(value)

    return ", ".join(map(one, record.args))[:300]


def _size(record: NodeRecord) -> int:
    sizes = {"B": 1, "T": 256, "S": 128}
    size = 1
    for dim in record.shape:
        size *= sizes.get(dim, 1) if isinstance(dim, str) else int(dim)
    return size


def _flops(record: NodeRecord) -> int:
    products = ("linear", "attention", "onednn", "head", "loss")
    return 320 * _size(record) if any(name in record.operator for name in products) else 0


def _bytes(record: NodeRecord) -> int:
    return 4 * _size(record)


def _lane(record: NodeRecord, steps: int) -> str:
    step, phase = record.info.get("step"), record.info.get("phase")
    if phase is None:
        return ""
    return "last forward" if step == steps else f"step {step} {phase}"


def slots(layout: Layout, lowered: list[NodeRecord]) -> dict[str, Any]:
    steps = max(r.info.get("step", 0) for r in lowered)
    calls = [r for r in lowered if r.kind == "call" and r.info.get("phase")]
    at = {record.name: place for place, record in enumerate(calls)}
    index = {record.name: place for place, record in enumerate(lowered)}
    readers: dict[str, list[str]] = {}
    for record in lowered:
        for name in record.inputs():
            readers.setdefault(name, []).append(record.name)
    prefix = []
    for slot in layout.prefix.values():
        values = [r.name for r in lowered if r.info.get("slot") == slot.name]
        reads = {n for value in values for n in readers.get(value, ())} - {"output"}
        path = sorted({index[n] for n in (*values, *reads)})
        page = sum(t.tokens.size * t.coordinates.size for t in slot.tiles)
        numbers = sum(t.rows.size * t.columns.size for t in slot.tiles)
        prefix.append(
            {
                "name": slot.name,
                "parameter": slot.parameter,
                "shape": "(" + ", ".join(map(str, slot.shape)) + ")",
                "numbers": numbers,
                "updated": slot.updated,
                "trainable": slot.trainable,
                "tiles": [
                    {
                        "page": tile.page,
                        "tokens": [tile.tokens.start, tile.tokens.stop],
                        "groups": 1,
                        "coordinates": [tile.coordinates.start, tile.coordinates.stop],
                    }
                    for tile in slot.tiles
                ],
                "padding": page - numbers,
                "read_at": sorted(at[n] for n in reads if n in at),
                "written_at": sorted(at[n] for n in values if n in at),
                "path": path,
            }
        )
    memory = [
        {
            "name": held.name,
            "first": held.coordinates.start,
            "size": held.coordinates.size,
            "from": at.get(held.name, 0),
            "until": at.get(held.last, len(calls) - 1),
            "kept": held.kept,
        }
        for held in layout.memory.values()
    ]
    used = sum(one["numbers"] for one in prefix)
    return {
        "layout": {
            "prefix_tokens": layout.prefix_tokens,
            "sim_hidden": layout.sim_hidden,
            "sim_heads": layout.sim_heads,
            "pages": layout.pages,
            "memory_width": layout.memory_width,
        },
        "program": [{"name": r.name, "lane": _lane(r, steps)} for r in calls],
        "prefix": prefix,
        "memory": memory,
        "occupancy": {
            "prefix": used / (layout.pages * layout.prefix_tokens * layout.sim_hidden),
            "memory_peak": layout.memory_width,
        },
    }


def _cost(report: Any, lowered: list[NodeRecord]) -> dict[str, Any]:
    steps, estimate = report["config"]["steps"], report["estimate"]
    rows: dict[tuple[str, str], list[int]] = {}
    for record in lowered:
        if record.info.get("phase"):
            row = rows.setdefault((_lane(record, steps), record.operator), [0, 0, 0])
            for place, value in enumerate((_flops(record), _bytes(record), 1)):
                row[place] += value
    sizes: Counter[tuple[str, str]] = Counter()
    for record in lowered:
        if record.kind == "parameter":
            kind = "table" if "embed" in record.name else "matrix"
            kind = kind if len(record.shape) > 1 else "vector"
            sizes[record.info.get("parameter", record.name), kind] += _size(record)
    flops = sum(row[0] for row in rows.values())
    return {
        "parameters": report["parameters"],
        "auxiliary": [{"name": n, "count": c, "kind": k} for (n, k), c in sizes.items()],
        "call": {
            "batch": estimate["batch"],
            "tokens": estimate["tokens"],
            "trained": estimate["training_segment"],
        },
        "phases": [
            {"lane": lane, "operator": name, "flops": f, "bytes": b, "calls": n}
            for (lane, name), (f, b, n) in rows.items()
        ],
        "flops": flops,
        "direct_flops": int(flops * 0.92),
        "lower_bound": {"flops": int(flops * 0.8), "text": "a made-up bound for this test"},
        "weight_bytes": estimate["weight_bytes"],
        "peak_bytes": estimate["peak_bytes"],
    }


def _run(simulator: Simulator, artifact: Path, out: Path) -> dict[str, Any]:
    (out / "model").mkdir()
    target = out / "model" / "simulator.onnx"
    exported = export_onnx(
        simulator, target, outputs=("losses", "initial_losses"), check=False, force=True
    )
    shutil.copytree(artifact / "tokenizer", out / "tokenizer")
    pair = export_onnx_pair(simulator, out / "model" / "pair", check=False)
    facts: dict[str, Any] = json.loads((out / "model" / "pair" / "pair.json").read_text())
    rate = float(simulator.inner_lr)
    tokenizer: Any = simulator.tokenizer
    text = (Path(__file__).parents[2] / "examples" / "paragraph.txt").read_text()
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]
    prepend = tokenizer("x")["input_ids"][: -len(bare)]
    return {
        "model": "model/simulator.onnx",
        "external": [],
        "bytes": exported.file_bytes,
        "inputs": {name: {"dtype": "", "shape": []} for name in exported.inputs},
        "outputs": list(exported.outputs),
        "max_tokens": simulator.program.facts.longest,
        "inner_lr": rate,
        "vocab": simulator.program.facts.vocab_size,
        "dtype": "float32",
        "tokenizer": "tokenizer/tokenizer.json",
        "tokenizer_config": "tokenizer/tokenizer_config.json",
        "prepend": prepend,
        "examples": [{"name": "A hurricane", "text": text}],
        "pair": {
            **facts,
            "train": "model/pair/adapt.onnx",
            "decode": "model/pair/decode.onnx",
            "external": [{"path": "model/pair/weights.data", "bytes": pair.weight_bytes}],
        },
    }
