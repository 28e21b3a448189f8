from fractions import Fraction

import pytest

from mathy import as_fraction, mean


def test_fractions_are_exact():
    assert as_fraction("1/3") + as_fraction("0.25") == Fraction(7, 12)


def test_mean_is_exact():
    assert mean([1, 2, 2]) == Fraction(5, 3)


def test_mean_of_nothing():
    with pytest.raises(ValueError):
        mean([])
