"""tintc run OUT, where OUT is what `tintc export --pair` wrote: the same as `tintc run DIR` by
numpy, onnxruntime and tokenizers alone; torch is never imported.

The text is trained on once; every token after that costs one step of decoding.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tintc import interrupts
from tintc.commands import console
from tintc.commands.prompt import Prompt
from tintc.commands.said import Said, Sampler
from tintc.commands.streams import writing
from tintc.commands.text import Reading, check_loss, check_rest, losses, show
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import ArtifactError, InputError, NumericalError
from tintc.runtime.onnx_pair import ADAPT, DECODE, Decoding, OnnxPair, PairUpdates

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from tokenizers import Tokenizer

Array = np.ndarray[Any, Any]
_TOKENIZER = Path("tokenizer", "tokenizer.json")
_PART = 256  # tokens that are read at a time: a long text has many logits


class Sampling(Protocol):
    """How tokens are chosen, and what ends them besides the end token."""

    @property
    def temperature(self) -> float | None: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def seed(self) -> int | None: ...
    @property
    def stop(self) -> list[str] | None: ...


@dataclass(frozen=True)
class Greedy:
    """The likeliest tokens, up to the end token."""

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: list[str] | None = None


def run(
    path: Path,
    asked: Reading,
    how: Sampling = Greedy(),
    prompt: Prompt | None = None,
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
    start = None if prompt is None else _prompt_ids(prompt, loaded)
    tokens = ids.shape[1]
    trained = round(asked.train_fraction * tokens)
    predicted = check_rest(tokens, trained, asked.generate)
    first = trained if predicted else 0  # with nothing left, all tell whether training diverged
    rate = pair.inner_lr if asked.inner_lr is None else asked.inner_lr
    before, _ = _read(pair.decoding(loaded.adapt(ids, trained, 0.0)), ids, first)
    begun = time.perf_counter()
    updates = loaded.adapt(ids, trained, rate)
    seconds = time.perf_counter() - begun
    decoding = pair.decoding(updates)
    after, last = _read(decoding, ids, first)
    check_loss(after, rate)
    config = SimulatorConfig.from_dict(json.loads(pair.about["tintc.config"]))
    result: dict[str, Any] = {
        "tokens": tokens,
        "trained_tokens": trained,
        "predicted_tokens": predicted,
        "inner_lr": rate,
        "steps": config.steps,
        "rule": config.rule,
        **(losses(before, after) if predicted else losses(None, None)),
    }
    if not asked.generate:
        show(result, as_json)
        return
    if not as_json:
        show(result, as_json)
    if start is not None:
        decoding = pair.decoding(updates)
        last = decoding(start, kept=[-1])[0, -1]
    generation = _Generation(loaded, decoding, last, how, rate)
    said = generation.quietly(asked.generate) if as_json else generation.aloud(asked.generate)
    if as_json:
        result |= {"generated": said, "generated_tokens": generation.tokens}
        result |= {"tokens_per_second": generation.per_second, "adapt_seconds": seconds}
        show(result, as_json)


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

    def __init__(
        self, loaded: _Loaded, decoding: Decoding, last: Array, how: Sampling, rate: float
    ) -> None:
        self.loaded, self.decoding, self.last, self.rate = loaded, decoding, last, rate
        self.sampler = Sampler(how.temperature, how.top_p, how.seed)
        self.said = Said(loaded.tokenizer, how.stop or ())
        self.tokens, self.seconds = 0, 0.0

    @property
    def per_second(self) -> float | None:
        """Tokens."""
        return self.tokens / self.seconds if self.seconds else None

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
                _write(new)
            _write(self.said.rest())
        finally:
            _write("\n")
        return self.said.text

    def _chosen(self, count: int) -> Iterator[str]:
        """What is settled of the text after each token, until one ends it."""
        start, room = time.perf_counter(), self._room(count)
        while self.tokens < room:
            interrupts.check()
            if not np.isfinite(self.last.max()):
                raise NumericalError(
                    f"the logits after the inner training are not finite at learning rate "
                    f"{self.rate:g}: the updated weights are too large; pass a smaller --inner-lr"
                )
            token = self.sampler.choose(self.last)
            if token == self.loaded.end:
                break
            self.tokens += 1
            new = self.said.add(token)
            self.seconds = time.perf_counter() - start
            yield new
            if self.said.ended:
                break
            if self.tokens < room:
                self.last = self.decoding(np.array([[token]]))[0, -1]
        self.seconds = time.perf_counter() - start

    def _room(self, count: int) -> int:
        longest, seen = self.loaded.pair.longest, self.decoding.seen.shape[1]
        if longest is None or seen + count <= longest:
            return count
        warnings.warn(
            f"this simulator takes {longest} tokens: there is room for {longest - seen} of {count} "
            "generated tokens",
            stacklevel=2,
        )
        return longest - seen


def _read(decoding: Decoding, ids: Array, trained: int) -> tuple[float, Array]:
    """(mean of -log p over the tokens behind the trained ones, logits behind the last token)."""
    tokens, first = ids.shape[1], max(trained, 1) - 1  # where the first of them is predicted
    total, last = 0.0, np.zeros(0)
    for begin in range(0, tokens, _PART):
        part = ids[:, begin : begin + _PART]
        kept = [at for at in range(part.shape[1]) if begin + at >= first] or [-1]
        logits = decoding(part, kept=kept)[0].astype(np.float64)
        last = logits[-1]
        targets = [ids[0, at] for k in kept if k >= 0 and (at := begin + k + 1) < tokens]
        total += _surprise(logits[: len(targets)], targets)
    return total / max(tokens - 1 - first, 1), last


def _surprise(z: Array, targets: Sequence[int]) -> float:
    """Sum of -log p."""
    top = z.max(-1, keepdims=True, initial=-np.inf)
    log_sum = top[:, 0] + np.log(np.exp(z - top).sum(-1))
    return float((log_sum - z[np.arange(len(targets)), targets]).sum()) if targets else 0.0


def _prompt_ids(prompt: Prompt, loaded: _Loaded) -> Array:
    longest = loaded.pair.longest
    found = prompt.ids(loaded.tokenize, None if longest is None else longest + 1)
    if longest is not None and len(found) > longest:
        raise InputError(
            f"the prompt has {len(found) if prompt.is_whole else f'more than {longest}'} tokens; "
            f"this simulator takes {longest}: pass a shorter one"
        )
    return np.array([found], np.int64)


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


def _write(text: str) -> None:
    with writing():
        sys.stdout.write(text)
        sys.stdout.flush()
