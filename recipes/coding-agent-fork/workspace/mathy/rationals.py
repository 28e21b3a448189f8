"""Exact arithmetic."""

from fractions import Fraction


def as_fraction(text):
    """`1/3`, `0.25` or `2` as a fraction."""
    return Fraction(text)


def mean(values):
    """The exact mean of numbers."""
    values = [Fraction(value) for value in values]
    if not values:
        raise ValueError("the mean of nothing")
    return sum(values) / len(values)
