"""What islands cost: public decoders that passes recognise whole, and the same models with their
attention, or all but their layers, left to islands.

    python -m tests.support.island_speed

Both compute the same; calls are timed in turn, and of each the median counts. Sizes are larger than
in tests, where little but the number of operators would be seen.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from unittest import mock

import torch
from torch import Tensor

import tintc
from tests.support import public_decoders
from tests.support.models import randomized
from tintc.compiler import driver
from tintc.compiler.frontend.capture import capture
from tintc.compiler.reports.islands import islands
from tintc.ir.pass_manager import Pass
from tintc.passes.lowering import DEFAULT_PIPELINE
from tintc.passes.recognize.recognize_activation import recognize_activation
from tintc.passes.recognize.recognize_arithmetic import recognize_arithmetic
from tintc.passes.recognize.recognize_attention import recognize_attention
from tintc.passes.recognize.recognize_norm import recognize_norm

NAMES = ("tables in a cache", "norms on both sides", "nn.TransformerEncoder")
SIZES = {"D": 128, "E": 32, "H": 4, "N": 2, "V": 512}
LEFT: dict[str, tuple[Pass, ...]] = {
    "attention": (recognize_attention,),
    "all but layers": (
        *(recognize_attention, recognize_norm, recognize_activation, recognize_arithmetic),
    ),
}
CALL = (4, 64)  # sequences and tokens


@contextmanager
def sized(**sizes: int) -> Iterator[None]:
    """In it, the decoders are of these sizes."""
    with mock.patch.multiple(public_decoders, **sizes):
        yield


def compiled(model: torch.nn.Module, without: tuple[Pass, ...] = ()) -> tintc.Simulator:
    """A simulator of one exact step, made without some passes."""
    captured = capture(model)
    pipeline = [each for each in DEFAULT_PIPELINE if each not in without]
    with mock.patch.object(driver, "DEFAULT_PIPELINE", pipeline):
        program = driver.lower(captured, tintc.SimulatorConfig.exact(inner_lr=0.01))
    return tintc.Simulator(program, captured.tensors)


def compare(name: str, left: str, rounds: int = 11) -> tuple[float, list[float], float]:
    """(share of the FLOPs in islands, median milliseconds of a call recognised and in islands, the
    largest difference of the two's logits relative to the largest logit).
    """
    torch.manual_seed(1)
    model = randomized(public_decoders.DECODERS[name]()).eval()
    both = [compiled(model), compiled(model, LEFT[left])]
    assert not islands(both[0])["kinds"]
    ids = torch.randint(public_decoders.V, CALL, generator=torch.Generator().manual_seed(0))
    times: list[list[float]] = [[], []]
    logits: list[Tensor] = []
    with torch.inference_mode():
        for number in range(rounds + 2):
            for simulator, found in zip(both, times, strict=True):
                start = time.perf_counter()
                logits.append(simulator(ids, torch.ones_like(ids)).logits)
                if number > 1:
                    found.append(1e3 * (time.perf_counter() - start))
    differ = float((logits[-1] - logits[-2]).abs().max() / logits[-2].abs().max())
    return 1 - islands(both[1])["recognized"], [median(each) for each in times], differ


def main() -> None:
    print(f"{'decoder':<23}{'in islands':<16}{'FLOPs':>7}{'recognised':>13}{'islands':>11}  ratio")
    with sized(**SIZES):
        for name in NAMES:
            for left in LEFT:
                share, (plain, own), _ = compare(name, left)
                print(
                    f"{name:<23}{left:<16}{share:>7.1%}{plain:>10.1f} ms{own:>8.1f} ms"
                    f"{own / plain:>7.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
