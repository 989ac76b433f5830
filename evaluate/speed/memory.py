"""Peak memory of one call, in a process of its own that loads the model itself and makes that call
once.

    python -m tintc.evaluate.speed.memory < settings.json

On CPU the peak is Linux's VmHWM: `ru_maxrss` of a new process begins with what its parent held.
Elsewhere it is `ru_maxrss`. On CUDA it is what torch's allocator counts.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tintc import version
from tintc.compiler.autograd_rule import InnerRule
from tintc.evaluate.speed.workload import Workload, random_workload, simulate
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import MemoryLimitError, TintcError

SIDES = ("simulator", "loop")


def measure(side: str, settings: dict[str, Any]) -> dict[str, int | None]:
    """Bytes in a fresh process that runs the `simulator` or the `loop`:

    before_bytes: held right before the call. call_peak_bytes: the most during the call, None where
    the system cannot tell.
    peak_bytes: the most that the process ever held, loading (and compiling) included.

    settings: JSON values, see `_prepare`. Raises what the process raised, or MemoryLimitError if it
    was killed.
    """
    root = str(Path(version.__file__).absolute().parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps({**settings, "side": side}),
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode < 0:
        raise MemoryLimitError(
            f"the process that measures the memory of the {side} was ended by signal "
            f"{-done.returncode}: pass memory=False"
        )
    lines = done.stdout.splitlines()
    if not lines:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise TintcError(
            f"the process that measures the memory of the {side} failed: {reason[0][:300]}"
        )
    found = json.loads(lines[-1])
    if "error" in found:
        error = TintcError(found["error"])
        error.exit_code = found["exit_code"]
        raise error
    return {name: found[name] for name in ("before_bytes", "call_peak_bytes", "peak_bytes")}


def how_measured(device: str) -> str:
    """What the figures of `measure` are."""
    each = (
        "a fresh process for each, which loads the compiled simulator or the model, warms nothing "
        "up and makes one call"
    )
    if torch.device(device).type == "cuda":
        return f"{each}; bytes that torch's CUDA allocator handed out"
    return (
        f"{each}; resident memory of that process, {'VmHWM' if _status('VmHWM') else 'ru_maxrss'}"
    )


def run(settings: dict[str, Any]) -> dict[str, int | None]:
    """What the process does: prepares a call, makes it and reports."""
    torch.set_num_threads(settings["threads"])
    device = settings["device"]
    call = _prepare(settings)
    gc.collect()
    overall, before = peak(device), _held(device)
    resets = reset_peak(device)
    call()
    during = peak(device)
    return {
        "before_bytes": before,
        "call_peak_bytes": during if resets else None,
        "peak_bytes": max(overall, during),
    }


def _prepare(settings: dict[str, Any]) -> Callable[[], object]:
    """The call of one side. Settings: side, artifact (the simulator's, which also has what `rms`
    divides by), source and options of `load_source` (the loop's), dtype, config, matrices and
    aliases (of its `InnerRule`); optimize, torch_compile and slice_memory of the simulator; names
    of the loop's parameters, against and kernels, onnx (the exported simulator's file, if it is
    run); vocab_size, batch, tokens, trained, seed and predict of the workload; device; threads.
    Each side imports what it needs alone.
    """
    device = settings["device"]
    sizes = {name: settings[name] for name in ("batch", "tokens", "trained")}
    more = {name: settings[name] for name in ("seed", "predict")}
    work = random_workload(settings["vocab_size"], **sizes, **more).to(device)
    if settings["side"] == "loop":
        rival = _rival(settings)
        return lambda: rival(work)
    from tintc.compiler.artifact import load

    simulator = load(settings["artifact"], device=device)
    simulator.optimize(settings["optimize"], settings["torch_compile"])
    simulator.memory = settings["slice_memory"]
    return lambda: simulate(simulator, work)


def _rival(settings: dict[str, Any]) -> Callable[[Workload], object]:
    """What the simulator is timed against."""
    if settings["against"] == "onnxruntime":
        from tintc.evaluate.speed.exported import OnnxRuntime

        return OnnxRuntime(Path(settings["onnx"]), settings["config"]["inner_lr"])
    from tintc.compiler.frontend.sources import load_source
    from tintc.compiler.gradient_statistics import chosen_statistics
    from tintc.evaluate.speed.kernels import use_kernels
    from tintc.evaluate.speed.rivals import loop_against
    from tintc.runtime.calibration import speed_of

    options: dict[str, Any] = {
        **settings["options"],
        "dtype": getattr(torch, settings["dtype"]),
    }
    device = settings["device"]
    model = load_source(settings["source"], **options).model.to(device)
    config = SimulatorConfig.from_dict(settings["config"])
    gathered = chosen_statistics(settings["artifact"], None, config)
    tensors = {} if gathered is None else gathered.tensors
    rms = {name: value.to(device) for name, value in tensors.items()}
    rule = InnerRule(config, settings["matrices"], settings["aliases"], rms)
    loop = loop_against(settings["against"], model, settings["names"], rule)
    if settings["kernels"] == "same":
        speed = speed_of(next(model.parameters()))
        use_kernels(model, lambda *shape: speed.kernel(*shape) == "onednn")
    return loop


def _held(device: str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") or _most()


def peak(device: str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") or _most()


def reset_peak(device: str) -> bool:
    """Lets the peak begin at what is held now; whether that could be done."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _status("VmHWM") is not None


def _status(name: str) -> int | None:
    """A figure of /proc/self/status in bytes, where there is one."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None
    )


def _most() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """Reads the settings from standard input; the last line on standard output is the result or the
    error, as JSON.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        result: dict[str, Any] = run(json.load(sys.stdin))
    except TintcError as error:
        result = {"error": str(error), "exit_code": error.exit_code}
    except (MemoryError, RuntimeError) as error:
        out = isinstance(
            error, (MemoryError, torch.OutOfMemoryError)
        ) or "DefaultCPUAllocator" in str(error)
        if not out:
            raise
        result = {
            "error": "out of memory; use a smaller model, fewer tokens or a smaller dtype",
            "exit_code": 4,
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
