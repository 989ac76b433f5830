"""What compile checks: a program that is wrong anywhere does not come out of it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tintc
from tests.support.artifacts import source_directory
from tests.support.decoders import VOCAB, Decoder, FeedForward, MaskedAttention
from tests.support.models import opt
from tintc.compiler import checks
from tintc.ir.calibration import Calibration, fixed
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import NumericalError, UsageError
from tintc.ir.ops import activation
from tintc.runtime import calibration


class Halved(FeedForward):
    """A write in place through a view, in a layer that starts at zero."""

    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.view = view
        nn.init.zeros_(self.c_fc.weight)
        nn.init.zeros_(self.c_fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c_fc(x)
        self.view(y).mul_(0.5)
        out: Tensor = self.c_proj(F.gelu(y))
        return out


class Clamped(FeedForward):
    """All its activations are at the kink."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.c_fc.weight)
        nn.init.zeros_(self.c_fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(self.c_fc(x).clamp(min=0))
        return out


class Doubled(Clamped):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(2 * self.c_fc(x).clamp(min=0))
        return out


def decoder(ffn: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return Decoder(MaskedAttention, ffn).double().eval()


def exact_error(model: nn.Module, simulator: tintc.Simulator, rate: float) -> float:
    """Of one step's updates, relative to the largest, on every weight of the blocks."""
    ids = torch.randint(VOCAB, (1, 9), generator=torch.Generator().manual_seed(3))
    found = simulator.updated_state_dict(ids, torch.ones_like(ids))
    weights = {n: p for n, p in model.named_parameters() if n.startswith(("layers", "norm"))}
    out = model(ids)
    loss = F.cross_entropy(out[0, :-1], ids[0, 1:], reduction="sum")
    gradients = torch.autograd.grad(loss, list(weights.values()))
    scale = max(float(gradient.abs().max()) for gradient in gradients)
    return max(
        float(((weights[name].detach() - found[name]) / rate - gradient).abs().max()) / scale
        for name, gradient in zip(weights, gradients, strict=True)
    )


@pytest.mark.parametrize(
    "view",
    [lambda y: y.flatten(0, 1), lambda y: y.view_as(y), lambda y: y.expand_as(y)],
    ids=["flatten", "view_as", "expand_as"],
)
@pytest.mark.slow
def test_writes_through_views_of_layers_that_start_at_zero(
    view: Callable[[Tensor], Tensor],
) -> None:
    """The write was dropped, and the updates were twice too large."""
    model = decoder(lambda: Halved(view))
    simulator = tintc.compile(model, SimulatorConfig.exact(inner_lr=0.1))
    assert exact_error(model, simulator, 0.1) < 1e-9


def test_kinks() -> None:
    model = decoder(Clamped)
    simulator = tintc.compile(model, SimulatorConfig.exact(inner_lr=0.1))
    assert exact_error(model, simulator, 0.1) < 1e-9


def test_zeros_hide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another activation behind a layer that starts at zero has the same logits."""
    simulator, other = tintc.compile(decoder(Clamped), check="none"), decoder(Doubled)
    with pytest.raises(NumericalError, match="the compiled forward pass differs"):
        checks.check(simulator, other, "forward")
    monkeypatch.setattr(checks, "_perturbed", lambda weights: {})
    checks.check(simulator, other, "forward")


def test_a_wrong_backward_pass_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass is right."""
    monkeypatch.setattr(activation, "relu_slope", lambda x, kind: (x > 0) * 2.0)
    with pytest.raises(
        NumericalError, match=r"the compiled step of .* differs from torch.autograd"
    ):
        tintc.compile(opt())
    tintc.compile(opt(), check="forward")


def test_the_size_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    stepped: list[int] = []
    monkeypatch.setattr(checks, "check_step", lambda *_: stepped.append(1))
    tintc.compile(opt())
    monkeypatch.setattr(checks, "LARGEST_STEPPED", 10)
    tintc.compile(opt())
    assert stepped == [1]
    tintc.compile(opt(), check="step")
    assert stepped == [1, 1]


def test_nothing_is_checked_if_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(checks, "check_first_forward", never)
    tintc.compile(opt(), check="none")


def test_the_machine_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes seconds: it waits for the first call."""
    measured: list[str] = []

    def counted(device: torch.device, _: torch.dtype) -> Calibration:
        measured.append(device.type)
        return fixed(device.type)

    monkeypatch.setattr(calibration, "calibration_of", counted)
    simulator = tintc.compile(opt(), check="step")
    assert not measured
    with torch.inference_mode():
        simulator(torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64))
    assert set(measured) == {"cpu"}


def test_an_unknown_check() -> None:
    with pytest.raises(UsageError, match="check is 'all'; expected one of forward, step, none"):
        tintc.compile(str(source_directory()), check="all")  # type: ignore[arg-type]


def test_buffers_are_constants() -> None:
    """Positions in a buffer of the state dict: passes have computed with them."""
    tintc.compile(Decoder(MaskedAttention, FeedForward, positions="buffer").double().eval())
