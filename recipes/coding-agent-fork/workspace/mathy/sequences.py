"""Sequences of numbers."""


def fibonacci(count):
    """The first Fibonacci numbers: 0, 1, 1, 2, ..."""
    numbers = [0, 1]
    while len(numbers) < count:
        numbers.append(numbers[-1] + numbers[-2])
    return numbers[:count]


def median(values):
    """The middle one of sorted values; of an even number of values, the mean of the two in the middle."""
    if not values:
        raise ValueError("the median of nothing")
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
