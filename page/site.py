"""Writes the site: all of its files, whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tintc.compiler.artifact import load, malformed
from tintc.compiler.artifact_files import check_target, replacing, write_json
from tintc.compiler.artifact_schema import GRAPH
from tintc.compiler.node_costs import NodeCosts
from tintc.compiler.stages import stages_of
from tintc.ir.call_sizes import call_sizes
from tintc.ir.named import Stage
from tintc.ir.records import NodeRecord
from tintc.page.costs import cost_file
from tintc.page.graphs import graph_file
from tintc.page.operators import operators_file
from tintc.page.running import LIMIT_MB, Limits, write_model
from tintc.page.slots import slots_file
from tintc.page.stage_costs import stage_parts
from tintc.page.static import copy_static
from tintc.passes.lowering import CANONICAL_AFTER, DEFAULT_PIPELINE
from tintc.runtime.description import describe
from tintc.runtime.simulator import Simulator
from tintc.version import __version__

MANIFEST = "page.json"  # names the files: what may be replaced
KIND = "page of tintc's"
STAGES = 7  # calls of `progress`
_FORMAT = 1


@dataclass(frozen=True)
class Site:
    """path: of the folder. bytes, files: how much is in it. run: whether its model runs in the
    browser; reason: why not. seconds: all of it.
    """

    path: Path
    bytes: int
    files: int
    run: bool
    reason: str | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As one JSON document."""
        return {**asdict(self), "path": str(self.path)}


def write_site(
    simulator: Simulator | str | Path,
    out: str | Path,
    *,
    model: bool = True,
    limit_mb: float = LIMIT_MB,
    force: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> Site:
    """Writes a simulator's static site into the folder `out`, for any file server.

    simulator: itself, or the directory of an artifact. model: whether the exported model comes with
    it, so that the page can run a text; a larger one than limit_mb, or one that cannot be exported,
    does not, and the page says why. force: replace a page that is there, and nothing else.

    Raises UsageError for what cannot be asked for, ArtifactError for a damaged artifact or where
    `out` cannot be written; what was there stays as it was then.
    """
    start, out = time.monotonic(), Path(out).expanduser()
    limits = Limits(model, limit_mb)
    check_page_target(out, force=force)
    if not isinstance(simulator, Simulator):
        progress("load")
        simulator = load(simulator)
    with replacing(out) as root:
        reason = _write(simulator, root, limits, progress)
        files = sorted(f.relative_to(root).as_posix() for f in root.rglob("*") if f.is_file())
        size = sum((root / name).stat().st_size for name in files)
        about = {"format_version": _FORMAT, "tintc": __version__, "files": files}
        write_json(root / MANIFEST, about)
    seconds = round(time.monotonic() - start, 2)
    return Site(out, size, len(files) + 1, reason is None, reason, seconds)


def check_page_target(path: Path, *, force: bool) -> None:
    """Raises UsageError unless a page can be written to this folder."""
    check_target(path, force=force, manifest=MANIFEST, kind=KIND)


def is_page(path: Path) -> bool:
    """Whether a folder is a page that `write_site` wrote."""
    return (path / MANIFEST).is_file() and (path / "data" / "site.json").is_file()


def _write(
    simulator: Simulator, root: Path, limits: Limits, progress: Callable[[str], None]
) -> str | None:
    """All files but the manifest. Returns why *Run* is not there, or None."""
    data = root / "data"
    data.mkdir()
    stages, sizes = stages_of(simulator), call_sizes(simulator.program.facts)
    progress("count FLOPs and bytes")
    parts = {stage: stage_parts(simulator, stage) for stage in stages}
    progress("write the graphs")
    _write_graphs(simulator, data, parts)
    named = {record.operator for records, _ in parts.values() for record in records}
    write_json(data / "operators.json", operators_file(named), indent=None)
    write_json(data / "slots.json", slots_file(simulator.program), indent=None)
    progress("compare costs")
    cost = cost_file(simulator, sizes, parts["lowered"][1])
    write_json(data / "cost.json", cost, indent=None)
    about, reason = write_model(simulator, root, limits, progress)
    if about is not None:
        write_json(data / "run.json", about)
    site = _described(simulator, stages, cost, reason)
    write_json(data / "site.json", site)
    progress("copy the page")
    copy_static(root, runtime=about is not None)
    return reason


def _write_graphs(
    simulator: Simulator,
    data: Path,
    parts: dict[Stage, tuple[list[NodeRecord], NodeCosts]],
) -> None:
    program = simulator.program
    before: list[NodeRecord] | None = None
    for stage, (found, costs) in parts.items():
        with malformed(Path(GRAPH)):  # what the passes kept for a look is not checked by loading
            content = graph_file(
                stage,
                found,
                before,
                costs=costs,
                layout=program.layout if stage == "lowered" else None,
                facts=program.facts,
                note=_stage_note(simulator, stage),
            )
        write_json(data / f"graph-{stage}.json", content, indent=None)
        before = found


def _stage_note(simulator: Simulator, stage: Stage) -> str:
    """What made a stage, in one line."""
    names = [step.name for step in DEFAULT_PIPELINE]
    canonical = names.index(CANONICAL_AFTER) + 1
    if stage == "captured":
        return "torch.export: the model's own operators, batch and length left open"
    if stage == "canonical":
        return ", ".join(names[:canonical])
    if stage == "lowered":
        return ", ".join(names[canonical:])
    if stage == "optimized":
        return ", ".join(("dead_code", *simulator.optimizations))
    kind = "a module for each tile" if simulator.structure is not None else "plain torch calls"
    return f"every operator is written out as {kind}"


def _described(
    simulator: Simulator, stages: tuple[Stage, ...], cost: dict[str, Any], reason: str | None
) -> dict[str, Any]:
    """data/site.json."""
    facts, call = simulator.program.facts, cost["call"]
    description = describe(simulator, simulator.source)
    rows = {
        "model": f"{cost['parameters']['auxiliary']:,} parameters, {facts.blocks} blocks, "
        f"vocabulary {facts.vocab_size:,}",
        **dict(description.rows),
        "memory": f"{simulator.program.layout.memory_width:,} coordinates of an input token",
        "one call": f"{call['batch']} x {call['tokens']} tokens, {call['trained']} trained: "
        f"{cost['flops'] / 1e9:,.3g} GFLOP, peak {cost['peak_bytes'] / 1e6:,.3g} MB",
    }
    return {
        "format": _FORMAT,
        "title": str(simulator.source.get("name") or "A simulator"),
        "tintc": __version__,
        "summary": [[label, text] for label, text in rows.items()],
        "stages": list(stages),
        "default_stage": "lowered",
        "views": {
            "graph": True,
            "slots": True,
            "cost": True,
            "run": {"available": reason is None, "reason": reason},
        },
        "steps": simulator.config.unrolled_steps,  # that the graph holds: lanes count these
    }
