"""One 64-bit hash for sharding, hold-outs and hashed categories, the same in every month, process and language.

A value's bytes are taken as little-endian 64-bit words, the last padded with zeros; each word is folded in by `h = mix(h ^ word)`
and the length by a last fold. `mix` is the finaliser of SplitMix64 (Steele, Lea and Flood 2014). `hash64_column` hashes a whole
Arrow column with one NumPy pass a word.
"""

import functools

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_SEED = 0x9E3779B97F4A7C15


def mix_all(h: np.ndarray) -> np.ndarray:
    """The finaliser on each, uint64, in place: memory that is new costs more than what is done with it."""
    h ^= h >> np.uint64(30)
    h *= np.uint64(0xBF58476D1CE4E5B9)
    h ^= h >> np.uint64(27)
    h *= np.uint64(0x94D049BB133111EB)
    h ^= h >> np.uint64(31)
    return h


@functools.cache
def salted(salt: str) -> int:
    """The start value of a hash family: different salts are independent hashes."""
    return hash64(salt.encode()) if salt else _SEED


def hash64(value: bytes, start: int = _SEED) -> int:
    """`hash64_column` of one value, 0 to 2⁶⁴ − 1; `start` comes from `salted`."""
    return int(hash64_column(pa.array([value]), start)[0])


def hash64_column(column: pa.Array, start: int = _SEED) -> np.ndarray:
    """Hashes of a string or binary column, dictionary-encoded or not, shape (rows,), dtype uint64; a null hashes as the empty value."""
    if pa.types.is_dictionary(column.type):
        # The empty value has no word to fold in, and no length.
        hashes = np.append(hash64_column(column.dictionary, start), mix_all(np.array([start], np.uint64)))
        return hashes[pc.fill_null(column.indices, len(column.dictionary)).to_numpy(zero_copy_only=False)]
    rows = len(column)
    if not rows:
        return np.empty(0, np.uint64)
    column = column.cast(pa.large_binary())
    if column.null_count:
        column = pc.fill_null(column, b"")
    offsets = np.frombuffer(column.buffers()[1], np.int64, rows + 1, column.offset * 8)
    data = np.frombuffer(column.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
    first, lengths = offsets[:-1] - offsets[0], np.diff(offsets)
    padded = np.zeros(len(data) + 8, np.uint8)
    padded[: len(data)] = data
    # Overlapping view of the 8 bytes that start at each offset.
    words = np.ndarray((len(data) + 1,), "<u8", padded, strides=(1,))
    hashes = np.full(rows, start, np.uint64)
    shortest, longest = int(lengths.min()), int(lengths.max())
    for position in range(0, longest, 8):
        # Most columns have values of much the same length, and all rows at once need no gathering.
        active = slice(None) if shortest > position else np.flatnonzero(lengths > position)
        word = words[first[active] + position]
        if shortest < position + 8:
            shift = np.maximum(64 - 8 * (lengths[active] - position), 0).astype(np.uint64)
            word = (word << shift) >> shift
        hashes[active] = mix_all(hashes[active] ^ word)
    return mix_all(hashes ^ lengths.astype(np.uint64))


def shard_of_column(column: pa.Array, salt: str, shards: int) -> np.ndarray:
    """A shard for each value, by its hash under that salt: shape (rows,), dtype int64, in [0, shards)."""
    return (hash64_column(column, salted(salt)) % np.uint64(shards)).astype(np.int64)
