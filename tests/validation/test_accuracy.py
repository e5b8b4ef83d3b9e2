"""The intervals hold what they say, over every reference of docs/accuracy.md; and the file is what the tool writes."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from tools import accuracy
from tools.predictive import new_device_interval

pytestmark = pytest.mark.validation


@pytest.fixture(scope="module")
def covered(shared_dir: Path) -> list[accuracy.Covered]:
    assert shared_dir == accuracy.SHARED
    return accuracy.made()[1]


def test_between_70_and_90_percent_of_what_is_measured_lies_inside(covered: list[accuracy.Covered]) -> None:
    assert 0.7 <= sum(one.inside for one in covered) / sum(one.total for one in covered) <= 0.9
    assert 0.7 <= fmean(one.inside / one.total for one in covered) <= 0.9


def test_no_family_is_far_too_sure(covered: list[accuracy.Covered]) -> None:
    assert min(one.inside / one.total for one in covered) >= 0.65


def test_one_device_more_by_hand() -> None:
    # Two devices without spread of their own, 10 % apart in the logarithm: mean errors -0.05 and 0.05, so between
    # devices 0.05^2 x 2 = 0.005, pooled 0.0025.  Wider: sqrt(0.005 x (3.078 / 1.2816)^2 x 1.5 / 0.0025) = 4.160; the
    # pooled 10th percentile is -0.05, the median 0: +-0.208.
    low, high = new_device_interval([np.exp(np.full(10, -0.05)), np.exp(np.full(10, 0.05))])
    assert (np.log(low), np.log(high)) == (pytest.approx(-0.208, abs=1e-3), pytest.approx(0.208, abs=1e-3))


def test_many_devices_alike_are_no_wider_than_their_shapes() -> None:
    # Nine devices with the same normal errors of 10 %: 1.2816 x 0.1 either way, nearly.
    errors = 0.1 * np.array([-1.6449, -1.0364, -0.6745, -0.3853, -0.1257, 0.1257, 0.3853, 0.6745, 1.0364, 1.6449])
    low, high = new_device_interval([np.exp(errors)] * 9)
    assert (np.log(low), np.log(high)) == (pytest.approx(-0.128, abs=0.02), pytest.approx(0.128, abs=0.02))
