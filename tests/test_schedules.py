import math

import pytest

from common.schedules import cosine, warmup_cosine


def test_the_four_corners():
    at = [warmup_cosine(s, 450, 100, 0.3, 0.15, 1e-6) for s in range(450)]
    assert at[0] == 0.15 and at[50] == pytest.approx(0.225) and at[100] == 0.3
    assert at[-1] == pytest.approx(1e-6)
    middle = 100 + (449 - 100) / 2
    expected = 1e-6 + (0.3 - 1e-6) * (1 + math.cos(math.pi * (274 - 100) / 349)) / 2
    assert at[274] == pytest.approx(expected) and 274 == int(middle)
    assert at[:101] == sorted(at[:101]) and at[100:] == sorted(at[100:], reverse=True)
    assert max(abs(a - b) for a, b in zip(at, at[1:], strict=False)) < 0.002  # no jump


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (5, 5), (5, 4), (2, 1)])
def test_short_runs_do_not_divide_by_zero(total, warmup):
    at = [warmup_cosine(s, total, warmup, 0.3, 0.1, 0.01) for s in range(total)]
    assert all(0.01 <= lr <= 0.3 for lr in at)
    assert at[0] == (0.1 if warmup else 0.3)


def test_cosine_goes_from_start_to_end():
    assert cosine(0, 10, 0.996, 0.999) == pytest.approx(0.996)
    assert cosine(9, 10, 0.996, 0.999) == pytest.approx(0.999)
    assert cosine(4.5, 10, 1.0, 0.0) == pytest.approx(0.5)
