"""A little arithmetic."""

from mathy.primes import factors, is_prime
from mathy.rationals import as_fraction, mean
from mathy.sequences import fibonacci, median

__all__ = ["as_fraction", "factors", "fibonacci", "is_prime", "mean", "median"]
