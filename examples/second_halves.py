"""Train on the first half of each sequence and measure the perplexity of its second half, for several inner learning rates.

    python examples/second_halves.py tiny-opt test.txt --choose valid.txt --rates 1e-5,3e-5,1e-4

A text file becomes `--sequences` sequences of `--length` tokens, spread evenly over it. Each is trained on by itself, from the
model's own weights. A perplexity is that of all tokens of the second halves together. With `--choose` every rate is tried on that
file, and the main file is measured with the best one only.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import tintc

HEADER = f"{'file':<20} {'inner lr':>9} {'initial':>10} {'updated':>10} {'change':>9} {'seconds':>9}"


@dataclass(frozen=True)
class Row:
    """Perplexities of the second halves before and after training on the first ones; the change is in per cent."""

    file: str
    inner_lr: float
    initial: float
    updated: float
    change: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.file:<20} {self.inner_lr:9.3g} {self.initial:10.3f} {self.updated:10.3f} {self.change:+8.2f}% {self.seconds:9.1f}"


def read_sequences(simulator: tintc.Simulator, path: Path, count: int, length: int) -> Tensor:
    """(count, length) token ids: pieces of the text at equal distances, which do not overlap."""
    encoded = simulator.tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)
    ids = torch.tensor(encoded["input_ids"])
    if len(ids) < count * length:
        raise SystemExit(f"error: {path} has {len(ids)} tokens; {count} sequences of {length} need {count * length}")
    starts = [piece * (len(ids) - length) // max(1, count - 1) for piece in range(count)]
    return torch.stack([ids[start : start + length] for start in starts])


def second_half_loss(logits_BTV: Tensor, ids_BT: Tensor) -> float:
    """Sum of the cross-entropies of the second half's tokens."""
    half = ids_BT.shape[1] // 2
    return float(F.cross_entropy(logits_BTV[:, half - 1 : -1].flatten(0, 1).float(), ids_BT[:, half:].flatten(), reduction="sum"))


def perplexity(total: float, targets: int) -> float:
    """exp of the mean loss; infinite where a learning rate was so large that there is none."""
    return math.exp(total / targets) if total / targets < 700 else math.inf  # a NaN is not below 700


@torch.inference_mode()
def measure(simulator: tintc.Simulator, path: Path, rates: list[float], ids_NT: Tensor, batch: int, quiet: bool) -> list[Row]:
    """One row for each rate, printed as soon as it is known."""
    half = ids_NT.shape[1] // 2
    targets = ids_NT[:, half:].numel()
    initial = perplexity(sum(second_half_loss(simulator.predict_initial(ids), ids) for ids in ids_NT.split(batch)), targets)
    rows = []
    for rate in rates:
        simulator.inner_lr.fill_(rate)
        start, total = time.perf_counter(), 0.0
        for index, ids in enumerate(ids_NT.split(batch)):
            show(f"{path.name}, rate {rate:g}: {index * batch} of {len(ids_NT)} sequences")
            train_mask = (torch.arange(ids.shape[1]) < half).long().expand_as(ids)
            total += float(simulator.losses(ids, train_mask, labels=ids.masked_fill(train_mask.bool(), -100)).losses.sum())
        show("")
        updated = perplexity(total, targets)
        rows.append(Row(path.name, rate, initial, updated, 100 * (updated / initial - 1), time.perf_counter() - start))
        if not quiet:
            print(rows[-1], flush=True)
    return rows


def show(progress: str) -> None:
    """Replaces the line of progress on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{progress}", end="", file=sys.stderr, flush=True)


def finite(row: Row) -> dict[str, str | float | None]:
    """The row as JSON has it, which knows no infinity."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in asdict(row).items()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="as for `tintc compile`, with a tokenizer")
    parser.add_argument("text", type=Path)
    parser.add_argument("--choose", type=Path, metavar="TEXT", help="a file to choose the rate on")
    parser.add_argument("--rates", default="1e-6,3e-6,1e-5,3e-5,1e-4", help="inner learning rates, with commas between them")
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--length", type=int, default=512, help="of a sequence, in tokens; half of them are trained on")
    parser.add_argument("--batch", type=int, default=1, help="sequences at a time; each needs its own copy of the trained weights")
    parser.add_argument("--preset", choices=("paper", "exact"), default="paper")
    parser.add_argument("--norm-update", choices=("bias", "all"), help="what learns in a norm: its shift, or all (default: the preset's)")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--layers", type=int, help="trained blocks, from the top; default all")
    parser.add_argument("--backend", choices=("fused", "transformer"), default="fused")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    args = parser.parse_args()
    try:
        args.rates = [float(rate) for rate in args.rates.split(",")]
    except ValueError:
        parser.error(f"--rates is {args.rates!r}; expected numbers with commas between them, such as 1e-5,3e-5")
    if args.sequences < 1 or args.length < 2 or args.batch < 1:
        parser.error("expected at least 1 sequence of at least 2 tokens, and a batch of at least 1")
    for path in filter(None, (args.text, args.choose)):
        if not path.is_file():
            parser.error(f"there is no file {path}")
    return args


def main() -> None:
    args = arguments()
    overrides = {} if args.norm_update is None else {"norm_update": args.norm_update}
    config = tintc.SimulatorConfig.preset(args.preset, steps=args.steps, layers=args.layers, **overrides)
    simulator = tintc.compile(args.source, config, backend=args.backend, progress=lambda stage: show(f"{args.source}: {stage}"))
    show("")
    if simulator.tokenizer is None:
        raise SystemExit(f"error: {args.source} has no tokenizer")
    texts = [args.text] if args.choose is None else [args.choose, args.text]
    ids = {path: read_sequences(simulator, path, args.sequences, args.length) for path in texts}  # a short file is refused at once
    if not args.json:
        print(HEADER, flush=True)
    rates, tried = args.rates, []
    if args.choose is not None:
        tried = measure(simulator, args.choose, rates, ids[args.choose], args.batch, args.json)
        rates = [min(tried, key=lambda row: row.updated).inner_lr]
    rows = measure(simulator, args.text, rates, ids[args.text], args.batch, args.json)
    if args.json:
        asked = ("source", "preset", "norm_update", "steps", "layers", "backend", "sequences", "length")
        settings = {key: getattr(args, key) for key in asked}
        found = {"tried": [finite(row) for row in tried], "rows": [finite(row) for row in rows]}
        print(json.dumps({**settings, "threads": torch.get_num_threads(), **found}))


if __name__ == "__main__":
    try:
        main()
    except (tintc.TintcError, OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"error: {error}") from None
