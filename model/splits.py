"""Which rows may be learnt from: two fixed salted hashes, the same in every month, set keys and creatives apart.

A row is a *gate* row if its key or its creative is; nothing that is trained, fitted, tuned or stopped early ever reads a gate row's
outcome. Of the others, a row is a *tune* row, for early stopping and calibration, if its key or its creative is one.
"""

import numpy as np
import pyarrow as pa

from schemas.hashing import hash64_column, salted

TRAIN, TUNE, GATE = 0, 1, 2
# Of 100 hash buckets, the first 10 are the gate's and the next 10 are for tuning.
_GATE_BELOW, _TUNE_BELOW = 10, 20


def split_of_rows(keys: pa.Array, creatives: pa.Array) -> np.ndarray:
    """TRAIN, TUNE or GATE for each row, shape (rows,), dtype int8; a row without a creative goes by its key alone."""
    by_creative = split_of_creatives(creatives)
    by_creative[creatives.is_null().to_numpy(zero_copy_only=False)] = TRAIN
    return np.maximum(_split(keys, "gate keys"), by_creative)


def split_of_creatives(creatives: pa.Array) -> np.ndarray:
    """TRAIN, TUNE or GATE for each creative (SHA-256 in hexadecimal), shape (creatives,), dtype int8."""
    return _split(creatives, "gate creatives")


def _split(values: pa.Array, salt: str) -> np.ndarray:
    bucket = hash64_column(values, salted(salt)) % np.uint64(100)
    return np.where(bucket < _GATE_BELOW, GATE, np.where(bucket < _TUNE_BELOW, TUNE, TRAIN)).astype(np.int8)
