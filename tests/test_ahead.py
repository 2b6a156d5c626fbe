"""What is made ahead comes in its order, is few at a time, and fails where it would have failed."""

import threading
from collections.abc import Iterator

import pytest

from schemas.ahead import ahead


def test_order_and_thread() -> None:
    assert list(ahead(range(100))) == list(range(100))
    assert list(ahead([])) == []
    assert set(ahead(threading.get_ident() for _ in range(3))) != {threading.get_ident()}


def test_few_are_made_ahead() -> None:
    made = []

    def numbers() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    some = ahead(numbers(), depth=2)
    assert next(some) == 0
    some.close()  # type: ignore[attr-defined]
    assert len(made) <= 3


def test_a_failure_is_raised_behind_what_was_made() -> None:
    def numbers() -> Iterator[int]:
        yield 1
        raise ValueError("two")

    some = ahead(numbers())
    assert next(some) == 1
    with pytest.raises(ValueError, match="two"):
        next(some)


def test_it_begins_before_anything_is_asked_for() -> None:
    begun = threading.Event()

    def numbers() -> Iterator[int]:
        begun.set()
        yield 1

    some = ahead(numbers())
    assert begun.wait(10) and list(some) == [1]
