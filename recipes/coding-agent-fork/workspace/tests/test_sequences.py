import pytest

from mathy import fibonacci, median


def test_fibonacci():
    assert fibonacci(8) == [0, 1, 1, 2, 3, 5, 8, 13]
    assert fibonacci(1) == [0]


def test_median_of_an_odd_number():
    assert median([9, 1, 2]) == 2
    assert median([7]) == 7


def test_median_of_an_even_number():
    assert median([4, 1, 3, 2]) == 2.5
    assert median([1, 1]) == 1


def test_median_leaves_its_values_as_they_were():
    values = [3, 1, 2, 4]
    assert median(values) == 2.5
    assert values == [3, 1, 2, 4]


def test_median_of_nothing():
    with pytest.raises(ValueError):
        median([])
