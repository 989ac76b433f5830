"""tintc.ir.calibration: rates between measured points, and what follows from them."""

import pytest

from tests.support.speeds import SPEEDS, by_rows, full_at, only, speed
from tintc.ir.calibration import FULL_ROWS, OPERATIONS_PER_BYTE, Calibration, Point, fixed


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
def test_the_fixed_one_says_what_no_machine_changes(device: str) -> None:
    known, alike = fixed(device), "cpu" if device == "cpu" else "cuda"
    assert fixed(device) is known and not known.measured
    assert known.one_kernel == known.kernel(7, 5, 3) == "onednn"
    assert known.slowness(1, 2, 3) == 1
    assert known.operations_per_byte == OPERATIONS_PER_BYTE[alike]
    assert known.full_rows(768, 768) == FULL_ROWS[alike]
    assert known.rate(1, 1, 1) == 0


def test_rates_between_points() -> None:
    """Along the logarithm of the rows, at the nearest width, no further than the last."""
    points = [Point("blas", rows, 8, 8, rate) for rows, rate in ((4, 1e9), (16, 3e9))]
    found = Calibration("cpu", (*points, Point("blas", 4, 64, 64, 9e9)), 1e9)
    expected = {1: 1e9, 4: 1e9, 8: 2e9, 16: 3e9, 1000: 3e9}
    assert {rows: found.rate(rows, 8, 9) for rows in expected} == pytest.approx(expected)
    assert found.rate(8, 70, 50) == 9e9
    assert found.one_kernel == "blas"  # the only one on offer


def test_more_rows_are_never_slower() -> None:
    """A point below an earlier one was measured while something else ran."""
    points = tuple(
        Point("blas", rows, 8, 8, rate) for rows, rate in ((1, 1.0), (4, 3.0), (16, 2.0), (64, 5.0))
    )
    speed = Calibration("cpu", points, 1.0)
    assert [speed.rate(rows, 8, 8) for rows in (4, 8, 16, 64)] == [3.0, 3.0, 3.0, 5.0]


def test_kernels() -> None:
    """oneDNN, unless the other is clearly faster."""
    assert [only(name).one_kernel for name in ("blas", "onednn")] == ["blas", "onednn"]
    assert speed(lambda name, rows: 1.09e9 if name == "blas" else 1e9).one_kernel == "onednn"
    assert speed(lambda name, rows: 1.2e9 if name == "blas" else 1e9).one_kernel == "blas"
    assert by_rows().one_kernel is None
    assert [by_rows().kernel(rows, 8, 8) for rows in (1, 16, 64, 300)] == [
        *("blas", "blas", "onednn", "onednn")
    ]
    assert speed(lambda name, rows: 1e9, kernels=("blas",)).kernel(1, 1, 1) == "blas"


def test_full_rows_and_bytes() -> None:
    assert [full_at(rows).full_rows(16, 16) for rows in (1, 16, 256)] == [1, 16, 256]
    assert full_at(16).slowness(4, 8, 8) == pytest.approx(10)
    assert only("blas", bandwidth=1e7).operations_per_byte == pytest.approx(200)


def test_they_differ() -> None:
    """The fakes that other tests force choices with do force them."""
    assert len({each.one_kernel for each in SPEEDS.values()}) == 3
