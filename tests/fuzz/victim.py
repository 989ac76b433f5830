"""A small artifact to be spoiled, and what is done with a spoiled one."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import FrameType

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tintc
from tests.support.artifacts import copy_of
from tests.support.counted import counted
from tests.support.models import gpt2
from tintc.compiler.artifact_reader import read_manifest, read_report
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import TintcError

PATIENCE_S = 30
TRAP = "__import__('pathlib').Path('executed').touch()"
_WORDS = [f"w{number}" for number in range(28)]
_KINDS = [("fused", "paper", 1), ("fused", "exact", 2), ("transformer", "exact", 1)]


class Hang(BaseException):
    """It took longer than PATIENCE_S. No Exception, so that nothing on the way takes it for its
    own."""


@lru_cache(maxsize=8)
def artifact(kind: int) -> Path:
    """Read only. kind: which of a few back ends, presets and steps."""
    backend, preset, steps = _KINDS[kind]
    folder = Path(tempfile.mkdtemp(prefix="tintc-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    gpt2(layers=1).float().save_pretrained(folder / "model")
    words = models.WordLevel({"?": 0} | {word: i + 1 for i, word in enumerate(_WORDS)}, "?")
    inside = Tokenizer(words)
    inside.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inside, unk_token="?")
    tokenizer.save_pretrained(folder / "model")
    config = SimulatorConfig.preset(preset, steps=steps)
    return tintc.save(
        tintc.compile(str(folder / "model"), config, backend=backend, check="none"), folder / "sim"
    )


@contextmanager
def spoiled(case: int, where: Path) -> Iterator[tuple[Path, random.Random]]:
    """A copy of an artifact, and the random numbers of this case."""
    numbers = random.Random(case)
    folder = copy_of(artifact(numbers.randrange(len(_KINDS))), where / f"case-{case}")
    try:
        yield folder, numbers
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def use(folder: Path) -> None:
    """What commands do with an artifact: read, load, run."""
    read_manifest(folder)
    read_report(folder)
    simulator = tintc.load(folder)
    ids = torch.arange(10)[None] % min(simulator.program.facts.vocab_size, 29)
    with torch.inference_mode():
        simulator(ids, (torch.arange(10) < 6).long()[None], return_initial=True)
    if simulator.tokenizer is not None:
        simulator.tokenizer("w1 w2 nobody")


def attacked(of: str, action: Callable[[], None]) -> None:
    """Counts how it ends: well, or with a TintcError of one line. Anything else is raised."""
    with _patient():
        try:
            action()
        except TintcError as error:
            said = str(error)
            counted(of, "refused")
        else:
            said = ""
            counted(of, "ran")
    assert "\n" not in said and len(said) < 2000, said[:3000]
    assert not os.path.exists("executed"), "code out of the artifact ran"


@contextmanager
def _patient() -> Iterator[None]:
    def hang(number: int, frame: FrameType | None) -> None:
        raise Hang(f"longer than {PATIENCE_S} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(PATIENCE_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
