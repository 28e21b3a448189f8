"""Prime numbers."""


def is_prime(number):
    """Whether an integer is prime."""
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def factors(number):
    """The prime factors of a positive integer, in order, as often as they occur."""
    found, divisor = [], 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    if number > 1:
        found.append(number)
    return found
