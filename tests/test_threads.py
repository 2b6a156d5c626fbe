"""Two elements of a bundle are worked on at a time, and what comes of them comes in their order."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from beam_jobs.threads import EachInThreads, InThreads


class Counted:
    """A function of elements that tells how many were worked on at a time, and what of each was made."""

    def __init__(self, parts: int | None) -> None:
        self.parts, self.most, self.made = parts, 0, list[tuple[int, int]]()
        self._now, self._lock = 0, threading.Lock()

    def __call__(self, element: int) -> Any:
        return self._whole(element) if self.parts is None else self._in_parts(element, self.parts)

    def _whole(self, element: int) -> int:
        list(self._in_parts(element, 1))
        return element

    def _in_parts(self, element: int, parts: int) -> Iterator[tuple[int, int]]:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        for part in range(parts):
            time.sleep(0.01)
            if element < 0:
                raise ValueError(f"element {element}")
            self.made.append((element, part))
            yield element, part
        with self._lock:
            self._now -= 1


def bundle(step: InThreads, elements: list[int]) -> list[Any]:
    step.start_bundle()
    found = [value for element in elements for value in step.process(element)]
    return found + [value.value for value in step.finish_bundle()]


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_all_come_in_their_order_two_at_a_time(count: int) -> None:
    whole, parts = Counted(None), Counted(20)
    assert bundle(InThreads(whole), list(range(count))) == list(range(count))
    assert bundle(EachInThreads(parts), list(range(count))) == [(element, part) for element in range(count) for part in range(20)]
    assert whole.most == parts.most == min(count, 2)


def test_few_parts_are_made_before_they_are_asked_for() -> None:
    parts = Counted(100)
    step = EachInThreads(parts)
    step.start_bundle()
    assert list(step.process(0)) == []
    time.sleep(0.5)
    assert 1 <= len(parts.made) <= 3


@pytest.mark.parametrize("step", [InThreads(Counted(None)), EachInThreads(Counted(3))])
def test_a_failure_fails_the_bundle(step: InThreads) -> None:
    with pytest.raises(ValueError, match="element -1"):
        bundle(step, [1, 2, -1, 4, 5])
