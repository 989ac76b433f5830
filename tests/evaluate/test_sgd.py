"""One step of SGD, against torch.optim."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tintc.evaluate.sgd import step, step_in_place, summed_loss


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {"w": (5, 3), "b": (5,)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in made.items()
    }


def loss(of: dict[str, Tensor]) -> Tensor:
    x = torch.arange(12, dtype=torch.float64).view(4, 3) / 7
    return summed_loss(F.linear(x, of["w"], of["b"]), torch.tensor([0, 4, 1, 1]))


@pytest.mark.parametrize("rate", [0.3, -0.3])
def test_equals_torch_s_optimizer(rate: float) -> None:
    expected = weights()
    optimizer = torch.optim.SGD(expected.values(), lr=abs(rate), maximize=rate < 0)
    for _ in range(3):
        optimizer.zero_grad()
        loss(expected).backward()
        optimizer.step()
    before = weights()
    first = step(loss(before), before, rate)
    assert all(torch.equal(before[name], weights()[name]) for name in before)
    for _ in range(2):
        step_in_place(loss(first), first, rate)
    for name, value in expected.items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-14)
        assert first[name].requires_grad and first[name].is_leaf and first[name].grad is None


def test_the_loss_is_a_sum_in_float32_at_least() -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    targets = torch.tensor([1, 0, 5, 2])
    log_p = logits.double().log_softmax(-1)
    expected = -sum(log_p[t, int(target)] for t, target in enumerate(targets))
    found = summed_loss(logits, targets)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
