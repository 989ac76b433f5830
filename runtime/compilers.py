"""What torch.compile needs of a machine."""

from __future__ import annotations

import torch

from tintc.ir.errors import UsageError


def check_compiler(device: str) -> None:
    """Raises UsageError where programs for a CPU cannot be compiled: torch.compile writes C++."""
    if torch.device(device).type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UsageError(
            "torch.compile needs a C++ compiler on a CPU, and none was found; install one (g++), "
            "name it in the environment variable CXX, or do without torch.compile"
        ) from error
