"""The column hash is the one described, and never changes: shards, hold-outs and served lookups of all months rest on them."""

import random

import numpy as np
import pyarrow as pa
import pytest

from schemas.hashing import hash64, hash64_column, salted


def random_bytes(count: int, longest: int) -> list[bytes]:
    source = random.Random(7)
    return [source.randbytes(source.randrange(longest)) for _ in range(count)]


def mix(h: int) -> int:
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    h = (h ^ (h >> 27)) * 0x94D049BB133111EB % 2**64
    return h ^ (h >> 31)


def by_value(values: list[bytes | None], start: int) -> list[int]:
    """The hash as it is described, in Python's integers."""
    hashes = []
    for value in values:
        h = start
        for at in range(0, len(value or b""), 8):
            h = mix(h ^ int.from_bytes((value or b"")[at : at + 8], "little"))
        hashes.append(mix(h ^ len(value or b"")))
    return hashes


COLUMNS = {
    "random": pa.array(random_bytes(500, 40), pa.binary()),
    "every length around a word": pa.array([b"x" * n for n in range(34)], pa.binary()),
    "long": pa.array([b"y" * 10_000, b"", b"z" * 9_999], pa.binary()),
    "text": pa.array(["", "a", "ad-000000001", "Ünïcode – 広告 😀", "\x00", "\x00\x00"]),
    "large text": pa.array(["a", None, "long enough for two words"], pa.large_string()),
    "some null": pa.array([b"a", None, b"", b"b"], pa.binary()),
    "all null": pa.array([None, None], pa.binary()),
    "none": pa.array([], pa.string()),
    "null type": pa.nulls(3),
    "all empty": pa.array(["", "", ""]),
    "sliced": pa.array(random_bytes(50, 20), pa.binary()).slice(7, 30),
    "sliced with nulls": pa.array(["a", None, "c", None, "eeeeeeeeeeee"]).slice(1, 4),
    "sliced to nothing": pa.array(["a", "b"]).slice(2),
}


@pytest.mark.parametrize("salt", ["", "shard", "gate keys"])
@pytest.mark.parametrize("name", COLUMNS)
def test_the_column_hash_equals_the_one_described(name: str, salt: str) -> None:
    column = COLUMNS[name]
    values = column.cast(pa.large_binary()).to_pylist()
    hashes = hash64_column(column, salted(salt))
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == by_value(values, salted(salt))
    assert hash64_column(column.dictionary_encode(), salted(salt)).tolist() == hashes.tolist()


@pytest.mark.parametrize(
    ("value", "plain", "with_salt"),
    [
        (b"", 0xE220A8397B1DCDAF, 0x8D3484F0AF8F722F),
        (b"a", 0x2971C9EBFB09C2CA, 0x8918220EEEA5F001),
        (b"12345678", 0x8A5883D990A7FBAE, 0x520A492D77EC17CA),
        (b"123456789", 0xE02ADA9802917858, 0x238A545B90019B59),
        ("ü".encode(), 0x9F971B11AF9ACA1F, 0xE36FEEE95AA50F3),
        (b"ad-000000001", 0x94706C1989EEBBAA, 0x48E67694732DB1A1),
        (bytes(range(256)), 0x9178C21D5754E982, 0xC1B97BBD6B98D671),
    ],
)
def test_the_hash_never_changes(value: bytes, plain: int, with_salt: int) -> None:
    assert hash64(value) == plain
    assert hash64(value, salted("gate keys")) == with_salt


@pytest.mark.parametrize(("salt", "start"), [("", 0x9E3779B97F4A7C15), ("shard", 0x2862C6CCF52E7B9B)])
def test_a_salt_never_changes(salt: str, start: int) -> None:
    assert salted(salt) == start


def test_values_that_differ_in_trailing_zeros_or_length_have_different_hashes() -> None:
    values = [b"\x00" * n for n in range(20)] + [b"a" + b"\x00" * n for n in range(20)]
    assert len({hash64(value) for value in values}) == len(values)


def test_hashes_are_spread_evenly_over_buckets() -> None:
    buckets = hash64_column(pa.array([f"ad-{n:09d}" for n in range(50_000)])) % np.uint64(100)
    assert np.bincount(buckets.astype(int), minlength=100) == pytest.approx(500, abs=5 * 500**0.5)


def test_salts_are_independent_of_one_another() -> None:
    keys = pa.array([f"ad-{n:09d}" for n in range(50_000)])
    first, second = (hash64_column(keys, salted(salt)) % np.uint64(10) == 0 for salt in ("gate keys", "gate creatives"))
    # Independent tenths meet in a hundredth; five standard deviations either way.
    assert (first & second).sum() == pytest.approx(500, abs=112)
