from mathy import factors, is_prime


def test_primes_below_thirty():
    assert [number for number in range(30) if is_prime(number)] == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]


def test_squares_are_not_prime():
    assert not any(is_prime(number * number) for number in range(2, 50))


def test_factors_multiply_to_the_number():
    assert factors(360) == [2, 2, 2, 3, 3, 5]
    assert factors(97) == [97]
    assert factors(1) == []
