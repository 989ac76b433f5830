"""`python -m tests.coverage_table [TYPE ...]`: every causal type of the installed transformers as a
small random model, one line each: what became of its exact and paper simulators against autograd,
or why there is none.

A worker process builds, compiles and compares one type after another; one that takes too long is
ended, and the next type begins in a new one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import inspect
import json
import queue
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import psutil

SECONDS = 150  # of the processor, for one type: other work on the machine changes no result
LENGTH, TRAINED, RATE = 13, 8, 1e-2
EXACT, AS_IS = 1e-9, 1e-6  # limits of differences, without the reference's casts and with them


def compared(kind: str, *, quick: bool = False) -> dict[str, Any]:
    """The line of a type, as JSON values. quick: exact, without the reference's casts, alone."""
    from tests.support.toy_types import toy_model
    from tintc.compiler.casts import no_casts

    try:
        model = toy_model(kind)
        with no_casts():
            _logits(model, dict(model.named_parameters()), _ids()[:1])
    except Exception as error:  # of transformers
        return {"type": kind, "became": "not built", "reason": _short(error)}
    found: dict[str, Any] = {"type": kind, "became": "equal"}
    try:
        found["exact"] = _against_autograd(model, "exact", removed=True)
        return _judged(found if quick else _as_is(found, model))
    except Exception as error:
        return _raised(found, error)


def completed(found: dict[str, Any]) -> dict[str, Any]:
    """A line that was compared without the casts alone, with what the model gives as it is."""
    from tests.support.toy_types import toy_model

    known = {name: found[name] for name in ("type", "exact")}
    try:
        return _judged(_as_is(known, toy_model(found["type"])))
    except Exception as error:
        return _raised(known, error)


def _as_is(found: dict[str, Any], model: Any) -> dict[str, Any]:
    from tests.support.once import compiling_once

    try:
        _logits(model, dict(model.named_parameters()), _ids()[:1])
    except Exception as error:  # of transformers: it mixes types
        return {**found, "not_as_is": _short(error)}
    with compiling_once():
        exact = _against_autograd(model, "exact", removed=False)
        paper = _against_autograd(model, "paper", removed=False)
    cast_free = {name: found["exact"][name] for name in ("cast_free", "islands")}
    return {**found, "exact": {**exact, **cast_free}, "paper": paper}


def _casts(model: Any, trained: set[str]) -> float:
    """How much the model's own casts change of its logits after a step."""
    from tintc.compiler.casts import no_casts

    worst, weights = 0.0, dict(model.named_parameters())
    for ids in _ids().split(1):
        after = []
        for removed in (False, True):
            with no_casts(removed):
                stepped = _stepped(model, weights, trained, ids)
                after.append(_logits(model, stepped, ids).detach())
        worst = max(worst, _relative(*after))
    return worst


def _judged(found: dict[str, Any]) -> dict[str, Any]:
    """As it is, a model is no closer than what its own casts to float32 round."""
    figures = [found[preset] for preset in ("exact", "paper") if preset in found]
    rounded = 2 * found["exact"].get("casts", 0.0)
    limits = {"cast_free": EXACT, "as_is": max(AS_IS, rounded)}
    equal = all(
        each[name] <= limit for each in figures for name, limit in limits.items() if name in each
    )
    return {**found, "became": "equal" if equal else "differs"}


def _raised(found: dict[str, Any], error: Exception) -> dict[str, Any]:
    became = "refused" if type(error).__name__ == "UnsupportedModelError" else "failed"
    return {**found, "became": became, "reason": f"{type(error).__name__}: {_short(error)}"}


def _against_autograd(model: Any, preset: str, *, removed: bool) -> dict[str, Any]:
    """Largest relative difference of initial logits and, of exact, of one step; with the model's
    casts to float32, unless they are removed, also what these change.
    """
    import tintc
    from tintc.compiler.casts import no_casts
    from tintc.compiler.reports.islands import island_kinds

    with no_casts(removed):
        config = tintc.SimulatorConfig.preset(preset, inner_lr=RATE)
        simulator = tintc.compile(model, config, check="none")
        worst = _difference(model, simulator, _ids(), step=preset == "exact")
    islands = sum(kind["count"] for kind in island_kinds(simulator.program))
    if removed or preset == "paper":
        return {"cast_free" if removed else "as_is": worst, "islands": islands}
    return {"as_is": worst, "casts": _casts(model, _trained(simulator)), "islands": islands}


def _trained(simulator: Any) -> set[str]:
    return {s.parameter for s in simulator.program.layout.prefix.values() if s.trainable}


def _ids() -> Any:
    import torch

    return torch.randint(1, 29, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def _difference(model: Any, simulator: Any, ids: Any, *, step: bool) -> float:
    import torch

    train = (torch.arange(LENGTH) < TRAINED).long().expand(2, -1)
    with torch.inference_mode():
        found = simulator(ids, train, return_initial=True)
    trained, worst = _trained(simulator), 0.0
    for b in range(2):
        weights = dict(model.named_parameters())
        initial = _logits(model, weights, ids[b : b + 1])
        worst = max(worst, _relative(found.initial_logits[b], initial))
        if step:
            after = _stepped(model, weights, trained, ids[b : b + 1])
            worst = max(worst, _relative(found.logits[b], _logits(model, after, ids[b : b + 1])))
    return worst


def _logits(model: Any, weights: Any, ids: Any) -> Any:
    import torch

    takes = "use_cache" in inspect.signature(model.forward).parameters
    options = {"use_cache": False} if takes else {}
    with torch.set_grad_enabled(
        any(w.requires_grad and w.grad_fn is None for w in weights.values())
    ):
        found = torch.func.functional_call(model, weights, (ids,), options)
    return found.logits[0]


def _stepped(model: Any, weights: Any, trained: set[str], ids: Any) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F

    given = {n: w.detach().clone().requires_grad_() for n, w in weights.items()}
    logits = _logits(model, given, ids[:, :TRAINED])
    loss = F.cross_entropy(logits[:-1], ids[0, 1:TRAINED], reduction="sum")
    grads = torch.autograd.grad(loss, list(given.values()), allow_unused=True)
    return {
        n: (w - RATE * g if n in trained and g is not None else w).detach()
        for (n, w), g in zip(given.items(), grads, strict=True)
    }


def _relative(found: Any, expected: Any) -> float:
    return float((found - expected).abs().max() / max(1.0, float(expected.detach().abs().max())))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


# The parent


class Worker:
    """A process that answers types with lines; a new one after one that was ended."""

    def __init__(self, *, quick: bool) -> None:
        self.quick = quick
        self.process: subprocess.Popen[str] | None = None

    def ask(self, kind: str, known: dict[str, Any] | None = None) -> dict[str, Any]:
        """The line of a type; known: what is to be completed of it."""
        if self.process is None:
            command = [sys.executable, "-m", "tests.coverage_table", "--worker"]
            command += ["--quick"] if self.quick else []
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            self.answers: queue.Queue[str] = queue.Queue()
            threading.Thread(target=self._read, args=(self.process,), daemon=True).start()
        assert self.process.stdin is not None
        self.process.stdin.write(f"{json.dumps(known or {'type': kind})}\n")
        self.process.stdin.flush()
        answer = self._answer(psutil.Process(self.process.pid))
        if not answer:
            ended = self.process.poll()
            self.end()
            reason = f"it took more than {SECONDS} s of the processor"
            if ended is not None:
                reason = f"it ended the process ({ended})"
            return {"type": kind, "became": "too slow", "reason": reason}
        found: dict[str, Any] = json.loads(answer)
        return found

    def _answer(self, process: psutil.Process) -> str:
        """The worker's next line; "" if there is none, or not in time."""
        begin = sum(process.cpu_times()[:2])
        while True:
            with contextlib.suppress(queue.Empty):
                return self.answers.get(timeout=1)
            try:
                if sum(process.cpu_times()[:2]) - begin > SECONDS:
                    return ""
            except psutil.NoSuchProcess:
                return ""

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = None

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                self.answers.put(line)
        self.answers.put("")


def work(*, quick: bool) -> None:
    warnings.filterwarnings("ignore")
    for asked in map(json.loads, sys.stdin):
        known = "exact" in asked
        found = completed(asked) if known else compared(asked["type"], quick=quick)
        print(json.dumps(found), flush=True)


def types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def line(found: dict[str, Any]) -> str:
    """One type's line."""
    start = f"{found['type']:28} {found['became']:10}"
    if found["became"] not in ("equal", "differs"):
        return f"{start} {found['reason']}"
    exact, parts = found["exact"], []
    if "as_is" in exact:
        parts.append(f"exact as it is {exact['as_is']:.0e}")
    parts.append(f"exact without casts {exact['cast_free']:.0e}")
    if "paper" in found:
        parts.append(f"paper's first logits as it is {found['paper']['as_is']:.0e}")
    return f"{start} {', '.join(parts)}; {exact['islands']} islands"


def report(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What `--json` writes, and the page of the docs is made of."""
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "torch")}
    command = "python -m tests.coverage_table" + ("" if all(map(_whole, lines)) else " --quick")
    order = {kind: i for i, kind in enumerate(types())}
    found = sorted(lines, key=lambda each: order[each["type"]])
    return {"command": command, "versions": versions, "known": len(order), "types": found}


def _whole(found: dict[str, Any]) -> bool:
    """Whether there is nothing to complete."""
    became = found["became"]
    done = "paper" in found or "not_as_is" in found
    return became not in ("equal", "differs") or (became == "equal" and done)


def stored(path: Path | None) -> dict[str, dict[str, Any]]:
    """The lines of a file by type; none where there is no file."""
    if path is None or not path.exists():
        return {}
    return {found["type"]: found for found in json.loads(path.read_text())["types"]}


def store(path: Path, found: dict[str, Any], *, fresh: bool = False) -> None:
    """Puts a line into the file, in place of the type's earlier one; fresh: of all others. Others
    may write lines meanwhile, and whoever reads finds a whole file.
    """
    lines = {**({} if fresh else stored(path)), found["type"]: found}
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(report(list(lines.values())), indent=1) + "\n")
    beside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="default all")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="exact, without casts, alone")
    parser.add_argument(
        "--json", type=Path, help="write the lines; types named here replace theirs"
    )
    parser.add_argument("--rest", action="store_true", help="types that the file has no line of")
    parser.add_argument(
        "--complete", action="store_true", help="lines of the file that --quick found equal, whole"
    )
    asked = parser.parse_args()
    if asked.worker:
        work(quick=asked.quick)
        return
    worker, had, lines = Worker(quick=asked.quick), stored(asked.json), []
    wanted = [
        kind
        for kind in asked.types or types()
        if not (asked.rest and kind in had)
        and not (asked.complete and "exact" not in had.get(kind, {}))
        and not (asked.complete and not asked.types and _whole(had[kind]))
    ]
    for kind in wanted:
        lines.append(worker.ask(kind, had[kind] if asked.complete else None))
        print(line(lines[-1]), flush=True)
        if asked.json is not None:  # a run that is cut off leaves what it had
            all_anew = not (asked.types or asked.rest or asked.complete)
            store(asked.json, lines[-1], fresh=all_anew and len(lines) == 1)
    worker.end()
    equal = sum(found["became"] == "equal" for found in lines)
    print(f"{equal} of {len(lines)} equal autograd")


if __name__ == "__main__":
    main()
