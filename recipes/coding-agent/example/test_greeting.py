from greeting import greeting


def test_plain():
    assert greeting("world") == "hello world"


def test_loud():
    assert greeting("world", loud=True) == "HELLO WORLD"
