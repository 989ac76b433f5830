"""tintc.runtime.slices: how many sequences go together, and that results come back in their
places.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tintc.ir.calibration import FULL_ROWS, fixed
from tintc.runtime.slices import Work, run_in_slices, slice_size


@given(st.integers(1, 300), st.integers(1, 3000), st.sampled_from(["cpu", "cuda", "other"]))
def test_slice_size(batch: int, tokens: int, device: str) -> None:
    """At least one sequence, no more tokens than are asked for, as few slices as that gives, and of
    about the same size.
    """
    size, most = (
        slice_size(batch, Work(tokens), fixed(device)),
        FULL_ROWS.get(device, FULL_ROWS["cuda"]),
    )
    assert 1 <= size <= batch
    assert size == 1 or size * tokens <= most
    slices = -(-batch // size)
    assert slices == -(-batch // max(1, most // tokens))
    assert size == 1 or -(-batch // (size - 1)) > slices  # a smaller size would need more slices


@pytest.mark.parametrize(
    ("batch", "tokens", "expected"), [(1, 4096, 1), (4, 64, 4), (5, 64, 3), (9, 64, 3), (8, 257, 1)]
)
def test_on_a_cpu(batch: int, tokens: int, expected: int) -> None:
    assert FULL_ROWS["cpu"] == 256
    assert slice_size(batch, Work(tokens), fixed("cpu")) == expected


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_results_come_back_in_their_places(batch: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "x": torch.randn(batch, 3, generator=generator),
        "mask": torch.randn(batch + 1, 3, generator=generator),  # for all: no row for each sequence
        "rate": torch.tensor(0.5, dtype=torch.float64),
    }
    seen: list[int] = []

    def run(given: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(len(given["x"]))
        assert torch.equal(given["mask"], tensors["mask"])
        assert given["rate"] is tensors["rate"]
        return {
            "double": given["x"] * 2,
            "sum": (given["x"].sum(-1) * given["rate"]),
            "sign": given["x"] > 0,
        }

    whole = run(tensors)
    seen.clear()
    found = run_in_slices(run, tensors, batch, size)
    assert seen == [min(size, batch - start) for start in range(0, batch, size)]
    assert set(found) == set(whole)
    assert all(
        torch.equal(found[name], whole[name]) and found[name].dtype == whole[name].dtype
        for name in whole
    )


def test_the_causal_mask_goes_to_every_slice() -> None:
    causal, own = torch.ones(1, 1, 4, 4), torch.arange(6).view(3, 2)
    shapes: list[tuple[int, ...]] = []

    def run(given: dict[str, Tensor]) -> dict[str, Tensor]:
        shapes.append((*given["attention_mask"].shape, *given["input_ids"].shape))
        return {"ids": given["input_ids"]}

    found = run_in_slices(run, {"attention_mask": causal, "input_ids": own}, 3, 2)
    assert shapes == [(1, 1, 4, 4, 2, 2), (1, 1, 4, 4, 1, 2)]
    assert torch.equal(found["ids"], own)
