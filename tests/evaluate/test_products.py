"""Which products a call runs, and where its time goes."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.support.models import opt, simulate
from tintc.evaluate.speed import products
from tintc.evaluate.speed.products import copies_share, product_facts, seen
from tintc.evaluate.speed.workload import random_workload
from tintc.evaluate.speed.workload import simulate as call
from tintc.ir.calibration import Calibration, Point
from tintc.ir.config import SimulatorConfig
from tintc.ir.ops.onednn import available, onednn_product


def test_every_kind_of_product() -> None:
    a, b, c = torch.ones(2, 5, 3), torch.ones(2, 3, 4), torch.ones(4, 3)
    q = torch.ones(2, 3, 7, 8)

    def some() -> None:
        torch.mm(a[0], b[0]), torch.addmm(torch.ones(4), a[0], b[0])
        torch.bmm(a, b), torch.baddbmm(torch.ones(2, 5, 4), a, b)
        F.scaled_dot_product_attention(q, q, q)
        F.linear(a, c)
        if available():
            onednn_product(a, c, None, None, False)

    found = seen(some)
    assert found["blas", (5, 3, 4)] == 2 + 2 + 2
    assert found["blas", (10, 3, 4)] == 1  # two sequences under one weight
    assert found["blas", (7, 8, 7)] == 2 * 3 * 2
    assert found["onednn", (10, 3, 4)] == available()


def test_counts_what_torch_does() -> None:
    """All FLOPs of a simulator, but for attention's, which torch counts on other devices only."""
    simulator = simulate(opt(), SimulatorConfig.exact(inner_lr=0.01))
    simulator.optimizations = ("low_rank_updates",)
    work = random_workload(29, batch=2, tokens=11, trained=7)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        simulator(work.ids_BT, work.train_mask)
    found = seen(lambda: call(simulator, work))
    flops = sum(2 * r * i * c * count for (_, (r, i, c)), count in found.items())
    # two layers, two sequences, three heads of four numbers: the segment, and the whole sequence
    attention = 2 * 2 * 3 * sum(2 * 2 * tokens * 4 * tokens for tokens in (6, 11))
    assert flops == counter.get_total_flops() + attention


def test_sum_over_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(device: str, dtype: torch.dtype, shapes: object, seconds: float) -> Calibration:
        assert (device, dtype, shapes) == ("cpu", torch.float64, [(4, 5, 6), (8, 5, 6)])
        points = (Point("blas", 4, 5, 6, 10.0), Point("blas", 8, 5, 6, 20.0))
        return Calibration("cpu", points, 1.0)

    monkeypatch.setattr(products, "measure", measure)
    x, y = torch.ones(4, 5, dtype=torch.float64), torch.ones(5, 6, dtype=torch.float64)

    def some() -> None:
        torch.mm(x, y), torch.mm(x, y), torch.mm(torch.cat([x, x]), y)

    found = product_facts(some, 100.0, "cpu", torch.float64)
    assert found["product_seconds"] == pytest.approx(2 * 240 / 10 + 480 / 20)
    assert found["share"] == pytest.approx(0.72)
    assert found["kernels"] == {"blas": 960}
    assert product_facts(lambda: None, 1.0, "cpu", torch.float64)["share"] == 0


def test_copies_are_told_from_products() -> None:
    large = torch.ones(4000, 4000)  # so that what is around the copy takes next to nothing
    assert copies_share(lambda: large.clone(), "cpu") > 0.5
    assert copies_share(lambda: torch.cat([large, large]), "cpu") > 0.5
    x = torch.ones(400, 400)
    assert copies_share(lambda: [x @ x for _ in range(9)], "cpu") == 0
