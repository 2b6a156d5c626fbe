"""What is kept of the first epoch is read again whole, in another order each time, and nothing is kept where there is no room."""

import numpy as np
import pytest

from model import kept
from model.kept import Kept, raw_file

BLOCKS = [{"a": np.arange(i, i + 3, dtype=np.float32), "b": np.full((3, 2), i, np.int32)} for i in range(0, 30, 3)]
BYTES = 3 * 4 + 6 * 4


def test_blocks_come_again_whole_and_in_another_order() -> None:
    with raw_file() as file:
        held = Kept(file, 30)
        assert list(held.keep(BLOCKS)) == BLOCKS
        orders = []
        for seed in range(3):
            again = held.again(np.random.default_rng(seed))
            assert again is not None
            found = list(again)
            orders.append([int(block["a"][0]) for block in found])
            for block in found:
                expected = BLOCKS[int(block["a"][0]) // 3]
                assert block.keys() == expected.keys()
                assert all(block[name].dtype == array.dtype and np.array_equal(block[name], array) for name, array in expected.items())
    assert all(sorted(order) == list(range(0, 30, 3)) for order in orders) and len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize(("free", "room"), [(20 * BYTES + 1, True), (20 * BYTES - 1, False)])
def test_half_of_the_disk_is_left(monkeypatch: pytest.MonkeyPatch, free: int, room: bool) -> None:
    monkeypatch.setattr(kept.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
    with raw_file() as file:
        held = Kept(file, 30)
        assert list(held.keep(BLOCKS)) == BLOCKS
        assert (held.again(np.random.default_rng(0)) is not None) == room and (file.tell() > 0) == room
