"""tintc run OUT, where OUT is what `tintc export --pair` wrote: the same as `tintc run DIR` by
numpy, onnxruntime and tokenizers alone; torch is never imported.

The text is trained on once; every token after that costs one step of decoding.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tintc import interrupts
from tintc.commands import console
from tintc.commands.generating import Sampling
from tintc.commands.prompt import Prompt
from tintc.commands.said import Said, Sampler, surprise
from tintc.commands.showing import Showing
from tintc.commands.text import (
    Reading,
    check_loss,
    check_rest,
    mean_of_rest,
    not_finite,
    outcome,
    room,
    show,
)
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import ArtifactError, InputError, NumericalError
from tintc.runtime.onnx_pair import ADAPT, DECODE, Decoding, OnnxPair, PairUpdates

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from tokenizers import Tokenizer

Array = np.ndarray[Any, Any]
_TOKENIZER = "tokenizer.json"
_PART = 256  # tokens that are read at a time: a long text has many logits


def run(
    path: Path,
    asked: Reading,
    how: Sampling,
    prompt: Prompt | None,
    showing: Showing,
    *,
    as_json: bool,
) -> None:
    """Prints the perplexity of the untrained part before and after, and what the updated weights
    generate, as it comes. prompt: what is continued in place of the text.
    """
    text = asked.prompt()
    loaded = _Loaded(path)
    pair = loaded.pair
    ids = np.array([asked.ids(text, loaded.tokenize, pair.longest)], np.int64)
    start = None if prompt is None else prompt.continued(loaded.tokenize, pair.longest)
    trained = asked.trained(ids.shape[1])
    predicted = check_rest(ids.shape[1], trained, asked.generate)
    rate = pair.inner_lr if asked.inner_lr is None else asked.inner_lr
    first = max(trained, 1) - 1 if predicted and not showing.names() else 0
    found = _Compared(loaded, ids, trained, rate, first)
    before, after = (mean_of_rest(each, trained - first) for each in (found.before, found.after))
    check_loss(after, rate)
    config = SimulatorConfig.from_dict(json.loads(pair.about["tintc.config"]))
    result = outcome(
        config,
        rate,
        tokens=ids.shape[1],
        trained=trained,
        predicted=predicted,
        before=before,
        after=after,
    )
    told = showing.told(ids[0].tolist(), loaded.decode, trained, found.before, found.after)
    result |= told.values()
    if asked.generate:
        if not as_json:
            show(result, as_json)
            told.print()
        if start is not None:
            found.read(np.array([start], np.int64))
        generation = _Generation(loaded, found, how, rate)
        go_on = generation.quietly if as_json else generation.aloud
        result |= {
            "adapt_seconds": found.adapt_seconds,
            "prompt_tokens": found.decoding.seen.shape[1],
            "generated": go_on(asked.generate),
            "first_token_seconds": found.read_seconds,
            **generation.speed(),
        }
    if as_json or not asked.generate:
        show(result, as_json)
    if not (as_json or asked.generate):
        told.print()


class _Compared:
    """A text under the weights before and after training on its first part. before, after: losses
    of the tokens behind the one at `first`. decoding, last: what has read the text, and its logits
    of the next token.
    """

    def __init__(self, loaded: _Loaded, ids: Array, trained: int, rate: float, first: int) -> None:
        self.pair = loaded.pair
        untrained = self.pair.decoding(loaded.adapt(ids, trained, 0.0))
        self.before, _ = _read(untrained, ids, first)
        start = time.perf_counter()
        self.updates = loaded.adapt(ids, trained, rate)
        adapted = time.perf_counter()
        self.decoding = self.pair.decoding(self.updates)
        self.after, self.last = _read(self.decoding, ids, first)
        self.adapt_seconds, self.read_seconds = adapted - start, time.perf_counter() - adapted

    def read(self, prompt: Array) -> None:
        """Another text in place of this one, under the weights after training."""
        start = time.perf_counter()
        self.decoding = self.pair.decoding(self.updates)
        self.last = self.decoding(prompt, logits_to_keep=1)[0, -1]
        self.read_seconds = time.perf_counter() - start


class _Loaded:
    """A pair and its tokenizer. Raises ArtifactError for a folder that holds none, InputError for
    one without a tokenizer.
    """

    def __init__(self, path: Path) -> None:
        root = path.expanduser()
        adapt, decode = (_session(root / name) for name in (ADAPT, DECODE))
        self.pair = OnnxPair(adapt, decode)
        self.tokenizer = _tokenizer(root)
        end = self.pair.about.get("tintc.eos_token_id")
        self.end = None if end is None else int(end)

    def tokenize(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer.encode(text).ids
        return found

    def decode(self, ids: list[int]) -> str:
        """The text, special tokens included."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def adapt(self, ids: Array, trained: int, rate: float) -> PairUpdates:
        """Trained on the first tokens. Optional inputs say nothing."""
        tokens = ids.shape[1]
        columns, ones = np.arange(tokens, dtype=np.int64)[None], np.ones_like(ids)
        pairs = len(self.pair.inputs["attention_mask"].shape) == 3 if self._masked else False
        optional = {
            "loss_mask": ones,
            "attention_mask": np.ones((1, tokens, tokens), np.int64) if pairs else ones,
            "position_ids": columns,
        }
        further = {name: value for name, value in optional.items() if name in self.pair.inputs}
        mask: Array = (columns < trained).astype(np.int64)
        return self.pair.adapt(ids, mask, rate, **further)

    @property
    def _masked(self) -> bool:
        return "attention_mask" in self.pair.inputs


class _Generation:
    """Tokens behind what was read. last: (V,) logits of the next one."""

    def __init__(self, loaded: _Loaded, read: _Compared, how: Sampling, rate: float) -> None:
        self.loaded, self.rate = loaded, rate
        self.decoding, self.last = read.decoding, read.last
        self.sampler = Sampler(how.temperature, how.top_p, how.seed)
        self.said = Said(loaded.tokenizer, how.stop or ())
        self.tokens, self.seconds = 0, 0.0  # seconds: behind the first token

    def speed(self) -> dict[str, Any]:
        """As JSON values."""
        timed = self.tokens - 1
        per_second = timed / self.seconds if timed > 0 and self.seconds else None
        return {"generated_tokens": self.tokens, "tokens_per_second": per_second}

    def quietly(self, count: int) -> str:
        """All of the text, under a bar."""
        with console.stages(count) as stage:
            for _ in self._chosen(count):
                stage(f"generating token {self.tokens}")
        return self.said.text

    def aloud(self, count: int) -> str:
        """The same, printed as it comes. A line is ended however it ends."""
        try:
            for new in self._chosen(count):
                console.write(new)
            console.write(self.said.rest())
        finally:
            console.write("\n")
        return self.said.text

    def _chosen(self, count: int) -> Iterator[str]:
        """What is settled of the text after each token, until one ends it."""
        start, seen = time.perf_counter(), self.decoding.seen.shape[1]
        fits = room(self.loaded.pair.longest, seen, count)
        while self.tokens < fits:
            interrupts.check()
            if not np.isfinite(self.last.max()):
                raise NumericalError(not_finite(self.rate))
            token = self.sampler.choose(self.last)
            if token == self.loaded.end:
                break
            self.tokens += 1
            if self.tokens == 1:
                start = time.perf_counter()
            new = self.said.add(token)
            self.seconds = time.perf_counter() - start
            yield new
            if self.said.ended:
                break
            if self.tokens < fits:
                self.last = self.decoding(np.array([[token]]))[0, -1]
        self.seconds = time.perf_counter() - start


def _read(decoding: Decoding, ids: Array, first: int) -> tuple[list[float], Array]:
    """(-log p of the tokens behind the one at `first`, logits behind the last token)."""
    losses: list[float] = []
    last = np.zeros(0)
    for begin in range(0, ids.shape[1], _PART):
        part = ids[:, begin : begin + _PART]
        end = begin + part.shape[1]
        targets = ids[0, max(begin, first) + 1 : end + 1]
        logits = decoding(part, logits_to_keep=max(1, min(end - first, end - begin)))[0]
        losses += surprise(logits[: len(targets)].astype(np.float64), targets).tolist()
        last = logits[-1]
    return losses, last


def _session(file: Path) -> InferenceSession:
    import onnxruntime

    if not file.is_file():
        raise ArtifactError(
            f"{file} does not exist; tintc export DIR --onnx {file.parent} --pair writes both "
            "models"
        )
    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Threads that spin between the many small products of a token take the cores from others,
        # and from each other: with four processes on two cores a token took twice as long.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class for every status
        raise ArtifactError(
            f"{file} cannot be read as an ONNX model: {' '.join(str(error).split())[:200]}"
        ) from error


def _tokenizer(root: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    file = root / _TOKENIZER
    if not file.is_file():
        raise InputError(
            f"{root} holds no {_TOKENIZER} (its source had none); call the pair from onnxruntime "
            "with token ids"
        )
    try:
        found = Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises a bare Exception
        raise ArtifactError(f"{file} cannot be read as a tokenizer: {error}") from error
    found.no_truncation()
    found.no_padding()
    return found
