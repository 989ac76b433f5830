"""Bad inputs: each is refused with one line that says what was got and what was expected."""

from typing import Any

import pytest
import torch

from tests.support.models import opt, ragged_train_mask, simulate, tokens
from tests.support.tolerances import SIMULATOR, error
from tests.support.toys import toy
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import InputError, UsageError
from tintc.runtime.simulator import Simulator

IDS, TRAIN = tokens(2, 9, 29), ragged_train_mask(2, 9)
ONES = torch.ones(2, 9)


@pytest.fixture(scope="module")
def simulator() -> Simulator:
    return simulate(opt(vocab=29, positions=16), SimulatorConfig.paper(inner_lr=0.01))


def spoiled(value: Any, at: tuple[int, ...], number: float) -> Any:
    changed = value.clone()
    changed[at] = number
    return changed


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "ids a list": ({"input_ids": [[1, 2]]}, r"input_ids is a list; expected a torch.Tensor"),
    "ids float": (
        {"input_ids": IDS.float()},
        r"input_ids has dtype float32; expected whole numbers",
    ),
    "ids bool": ({"input_ids": IDS.bool()}, r"input_ids has dtype bool; expected whole numbers"),
    "ids one row": (
        {"input_ids": IDS[0]},
        r"input_ids has shape \(9,\); expected \(batch, tokens\)",
    ),
    "ids empty": ({"input_ids": IDS[:, :0]}, r"input_ids has shape \(2, 0\)"),
    "ids no batch": ({"input_ids": IDS[:0]}, r"input_ids has shape \(0, 9\)"),
    "ids negative": (
        {"input_ids": spoiled(IDS, (0, 3), -1)},
        r"input_ids hold -1; this model's tokens are 0 to 28",
    ),
    "ids too high": (
        {"input_ids": spoiled(IDS, (1, 8), 29)},
        r"input_ids hold 29; this model's tokens are 0 to 28",
    ),
    "too long": (
        {"input_ids": tokens(1, 17, 29), "train_mask": torch.ones(1, 17)},
        r"the sequence has 17 tokens; this model has 16 positions",
    ),
    "train shape": (
        {"train_mask": TRAIN[:, :8]},
        r"train_mask has shape \(2, 8\); expected \(2, 9\)",
    ),
    "train one row": ({"train_mask": TRAIN[0]}, r"train_mask has shape \(9,\); expected \(2, 9\)"),
    "train cube": ({"train_mask": torch.ones(2, 9, 9)}, r"train_mask has shape \(2, 9, 9\)"),
    "train values": (
        {"train_mask": spoiled(TRAIN, (0, 0), 2)},
        r"train_mask holds values other than 0 and 1",
    ),
    "train fraction": ({"train_mask": ONES * 0.5}, r"train_mask holds values other than 0 and 1"),
    "train nan": (
        {"train_mask": spoiled(ONES, (1, 1), float("nan"))},
        r"train_mask holds values other than 0 and 1",
    ),
    "train None": ({"train_mask": None}, r"train_mask is a NoneType"),
    "train complex": ({"train_mask": ONES.to(torch.complex64)}, r"train_mask has dtype complex64"),
    "loss shape": ({"loss_mask": ONES[:1]}, r"loss_mask has shape \(1, 9\); expected \(2, 9\)"),
    "loss values": ({"loss_mask": ONES * -1}, r"loss_mask holds values other than 0 and 1"),
    "attention shape": (
        {"attention_mask": torch.ones(2, 9, 8)},
        r"attention_mask has shape \(2, 9, 8\); expected \(2, 9\) or \(2, 9, 9\)",
    ),
    "attention four": (
        {"attention_mask": torch.ones(2, 1, 9, 9)},
        r"attention_mask has shape \(2, 1, 9, 9\)",
    ),
    "attention additive": (
        {"attention_mask": ONES * -1e9},
        r"attention_mask holds values other than 0 and 1",
    ),
    "attention values": (
        {"attention_mask": torch.full((2, 9, 9), 3)},
        r"attention_mask holds values other than 0 and 1",
    ),
    "attention text": ({"attention_mask": "causal"}, r"attention_mask is a str"),
    "positions shape": (
        {"position_ids": torch.arange(9)[None]},
        r"position_ids has shape \(1, 9\); expected \(2, 9\)",
    ),
    "positions float": (
        {"position_ids": ONES},
        r"position_ids has dtype float32; expected whole numbers",
    ),
    "positions negative": (
        {"position_ids": spoiled(IDS * 0, (0, 0), -1)},
        r"position_ids hold -1; this model's positions are 0 to 15",
    ),
    "positions too high": (
        {"position_ids": spoiled(IDS * 0, (1, 2), 16)},
        r"position_ids hold 16; this model's positions are 0 to 15",
    ),
    "labels shape": ({"labels": IDS[:, 1:]}, r"labels have shape \(2, 8\)"),
    "labels float": (
        {"labels": IDS.float()},
        r"labels have shape .*float32; expected whole numbers",
    ),
    "labels too high": (
        {"labels": spoiled(IDS, (0, 0), 29)},
        r"labels hold 29; expected -100 or a token from 0 to 28",
    ),
    "labels negative": ({"labels": spoiled(IDS, (0, 0), -1)}, r"labels hold -1"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(simulator: Simulator, name: str) -> None:
    changed, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        simulator(**{"input_ids": IDS, "train_mask": TRAIN, **changed})
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, UsageError)


@pytest.mark.parametrize("index", [2, -3])
def test_no_such_sequence(simulator: Simulator, index: int) -> None:
    with pytest.raises(InputError, match=rf"index is {index}; the batch has 2 sequences"):
        simulator.updated_state_dict(IDS, TRAIN, index=index)


@pytest.mark.parametrize("method", ["predict_initial", "updates"])
def test_other_calls_check_too(simulator: Simulator, method: str) -> None:
    arguments = (IDS + 100,) if method == "predict_initial" else (IDS + 100, TRAIN)
    with pytest.raises(InputError, match="input_ids hold"):
        getattr(simulator, method)(*arguments)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool,
        torch.uint8,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.float32,
        torch.float64,
    ],
)
def test_masks_of_any_type_mean_the_same(simulator: Simulator, dtype: torch.dtype) -> None:
    attention = ONES.long()
    attention[1, 6:] = 0
    expected = simulator(IDS, TRAIN, loss_mask=TRAIN, attention_mask=attention).logits
    found = simulator(
        IDS.int(), TRAIN.to(dtype), loss_mask=TRAIN.to(dtype), attention_mask=attention.to(dtype)
    ).logits
    assert torch.equal(found, expected)


def test_a_long_sequence_runs_with_positions_that_restart(simulator: Simulator) -> None:
    """Two demonstrations of 12 tokens in a model of 16 positions: the second is what it is alone,
    apart from the first.
    """
    ids = tokens(1, 24, 29)
    block = torch.arange(24) // 12
    inputs = {
        "attention_mask": (block[:, None] == block)[None],
        "position_ids": (torch.arange(24) % 12)[None],
    }
    train = (torch.arange(24) < 12)[None]
    found = simulator(ids, train, **inputs).logits
    with torch.inference_mode():
        alone = simulator.predict(simulator.updates(ids[:, :12], train[:, :12]), ids[:, 12:])
    assert error(found[:, 12:], alone) < SIMULATOR[torch.float64]


def test_all_padding_of_a_two_dimensional_mask_is_hidden(simulator: Simulator) -> None:
    """A mask of ones changes nothing, nor does leaving it out."""
    assert torch.equal(
        simulator(IDS, TRAIN, attention_mask=ONES).logits, simulator(IDS, TRAIN).logits
    )
    assert torch.equal(
        simulator(IDS, TRAIN, attention_mask=torch.ones(2, 9, 9)).logits,
        simulator(IDS, TRAIN).logits,
    )


def test_given_positions_equal_the_default_ones(simulator: Simulator) -> None:
    given = torch.arange(9).expand(2, 9)
    assert torch.equal(
        simulator(IDS, TRAIN, position_ids=given).logits, simulator(IDS, TRAIN).logits
    )


def test_shorter_than_the_model_takes() -> None:
    """A guard of the model's own on short sequences: one clear line, and training passes see as
    many tokens as are needed.
    """
    model = toy(lambda m, x, ids: m.linear(x) if x.shape[1] > 4 else m.norm(x))
    simulator = simulate(model, SimulatorConfig.exact(inner_lr=0.1))
    ids, train = IDS % 19, torch.zeros_like(IDS)
    with pytest.raises(InputError, match=r"has 4 tokens; this model computes something else below"):
        simulator(ids[:, :4], train[:, :4])
    train[:, :2] = 1
    loss = torch.nn.functional.cross_entropy(model(ids[:1])[0, :1], ids[0, 1:2])
    (gradient,) = torch.autograd.grad(loss, [model.linear.weight])
    state = simulator.updated_state_dict(ids, train, 0)
    wanted = model.linear.weight - 0.1 * gradient
    assert error(state["linear.weight"], wanted.detach()) < SIMULATOR[torch.float64]
