"""Time a simulator against the fine-tuning loop that one would write by hand, in turn, in one process.

    python examples/compare_with_loop.py shape:opt-125m --preset paper --tokens 256

The loop is a fair one: forward and backward on the training half only, gradients for exactly the weights
that the simulator updates, one SGD step, and a forward pass on the whole sequence with `functional_call`.
Prints one JSON document: medians in seconds and the median of the ratios, pair by pair.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.func import functional_call

import tintc
from tintc.compiler.sources import load_source


def timed(function: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--preset", choices=("paper", "exact"), default="paper")
    parser.add_argument("--backend", choices=("fused", "transformer"), default="fused")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--inner-lr", type=float, default=1e-5)
    parser.add_argument("--pairs", type=int, default=11)
    args = parser.parse_args()

    model = load_source(args.source).model.requires_grad_(False)
    simulator = tintc.compile(model, tintc.SimulatorConfig.preset(args.preset, inner_lr=args.inner_lr), backend=args.backend)
    ids = torch.randint(simulator.program.facts.vocab_size, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    half = args.tokens // 2
    train_mask = (torch.arange(args.tokens) < half).long()[None]

    with torch.inference_mode():
        updated = simulator.updates(ids, train_mask)
    slots = simulator.program.layout.prefix
    weights = {name: model.get_parameter(name) for name in dict.fromkeys(slots[slot].parameter for slot in updated)}
    del updated

    def loop() -> torch.Tensor:
        for weight in weights.values():
            weight.requires_grad_()
        logits = model(input_ids=ids[:, :half], use_cache=False).logits
        loss = F.cross_entropy(logits[0, :-1], ids[0, 1:half], reduction="sum")
        gradients = torch.autograd.grad(loss, list(weights.values()))
        with torch.no_grad():
            after = {name: weight - args.inner_lr * g for (name, weight), g in zip(weights.items(), gradients, strict=True)}
            return functional_call(model, after, (ids,), {"use_cache": False}).logits

    @torch.inference_mode()
    def simulate() -> torch.Tensor:
        return simulator(ids, train_mask).logits

    difference = float((loop() - simulate()).abs().max() / loop().abs().max())  # also the warm-up
    pairs = [(timed(loop), timed(simulate)) for _ in range(args.pairs)]
    result = {
        "source": args.source,
        "preset": args.preset,
        "backend": args.backend,
        "tokens": args.tokens,
        "pairs": args.pairs,
        "threads": torch.get_num_threads(),
        "loop_seconds": round(statistics.median(a for a, _ in pairs), 4),
        "simulator_seconds": round(statistics.median(b for _, b in pairs), 4),
        "simulator_parameters": sum(parameter.numel() for parameter in simulator.parameters()),
        "ratio": round(statistics.median(b / a for a, b in pairs), 3),
        "logits_difference": difference,  # relative to the largest; the paper preset approximates
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
