"""Runs a page as its reader would: every Python block and every console block, top to bottom.

A page is one Python session and one directory, which holds `examples` and `docs` of the repository.

    ```python     is executed; a ```text block directly below it is what it must print
    ```console    `$ COMMAND` is run, and must succeed; lines below it are what it must print
    *Not run ...* a paragraph in italics directly above a block says why it is not run

Printed output is compared word for word, but: `...` stands for any text (times, paths, the middle
of something long), runs of spaces count as one, and numbers with a decimal point agree to 1 %.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch
from sybil import Document, Example, Sybil
from sybil.parsers.myst import CodeBlockParser

from tests.support.command import tintc

ROOT = Path(__file__).parents[2]
_NOT_RUN = re.compile(r"\*Not run [^*]+\*\s*\Z")
_NUMBER = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?")
_RELATIVE = 0.01


def run_page(page: Path, folder: Path) -> int:
    """Runs a page's blocks in `folder` and returns how many ran. Raises AssertionError for output
    that is not as printed, and whatever a block raises.
    """
    for name in ("examples", "docs"):
        (folder / name).symlink_to(ROOT / name)
    kinds = {"python": _python, "text": _text, "console": _console}
    parsers = [CodeBlockParser(language, run) for language, run in kinds.items()]
    document = Sybil(parsers).parse(page)
    document.namespace["ran"] = 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small calls; other tests want the other cores
    try:
        # Passes have tests of their own: here they run as they do for a reader.
        with contextlib.chdir(folder), mock.patch.dict(os.environ, {"TINTC_VERIFY": "0"}):
            for example in document.examples():
                example.evaluate()
    finally:
        torch.set_num_threads(threads)
    return int(document.namespace["ran"])


def skipped(document: Document, start: int) -> bool:
    """Whether the paragraph above a block says that it is not run."""
    return _NOT_RUN.search(document.text[:start]) is not None


def _python(example: Example) -> None:
    if skipped(example.document, example.region.start):
        return
    printed = io.StringIO()
    space = example.namespace.setdefault("python", {"__name__": "__main__"})
    code = compile("\n" * example.line + example.parsed, example.path, "exec")
    with contextlib.redirect_stdout(printed):
        exec(code, space)
    example.namespace |= {"printed": printed.getvalue(), "end": example.region.end}
    example.namespace["ran"] += 1


def _text(example: Example) -> None:
    """Output, if the block stands directly below a Python block that was run; else prose."""
    end = example.namespace.get("end")
    if end is not None and not example.document.text[end : example.region.start].strip():
        check(example.parsed, example.namespace["printed"], f"{example.path}:{example.line}")


def _console(example: Example) -> None:
    if skipped(example.document, example.region.start):
        return
    for command, expected in commands(example.parsed):
        printed = run(command)
        if expected:
            check(expected, printed, f"{example.path}:{example.line}: {command}")
        example.namespace["ran"] += 1


def commands(block: str) -> list[tuple[str, str]]:
    """Commands of a console block, each with the output that is printed below it."""
    parts = re.split(r"^\$ ", block.replace("\\\n", " "), flags=re.MULTILINE)
    assert not parts[0].strip(), f"a console block starts with a command: {block}"
    return [(head, tail) for head, _, tail in (part.partition("\n") for part in parts[1:])]


def run(command: str) -> str:
    """Standard output of one command; a plain `tintc ...` runs in this process, which is quick."""
    words = shlex.split(command, comments=True)
    if words[0] == "tintc" and not set("|<>;&$") & set(command):
        done = tintc(*words[1:])
        assert done.code == 0, f"{command}: exit code {done.code}: {done.err}"
        return done.out
    there = (
        f'tintc() {{ "{sys.executable}" -m tintc "$@"; }}; python() {{ "{sys.executable}" "$@"; }}'
    )
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    environment["OMP_NUM_THREADS"] = "1"
    with mock.patch.dict(os.environ, environment):
        shell = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {there}; {command}"],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
    assert shell.returncode == 0, f"{command}: exit code {shell.returncode}: {shell.stderr}"
    return shell.stdout


def check(expected: str, printed: str, where: str) -> None:
    """Raises AssertionError unless the output is as printed on the page (see the first lines)."""
    wanted, got = (" ".join(text.split()) for text in (expected, printed))
    pattern = re.escape(_NUMBER.sub("\0", wanted)).replace(re.escape("..."), ".*?")
    found = re.fullmatch(pattern.replace(re.escape("\0"), f"({_NUMBER.pattern})"), got)
    message = f"{where}\nthe page says:\n{expected}\nprinted was:\n{printed}"
    assert found is not None, message
    for want, have in zip(_NUMBER.findall(wanted), found.groups(), strict=True):
        assert math.isclose(float(want), float(have), rel_tol=_RELATIVE), message
