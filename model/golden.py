"""Golden scores: rows and what a model said of them when it was trained, kept beside it, so that any other process can be held to them.

python -m model.golden FOLDER
"""

import pathlib
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from schemas.parquet import decoded

# Arrow itself: Parquet cannot read back lists of one size of which some are null.
FILE, ROWS = "golden.arrow", 1000
SCORE = "golden_score"
# Another type of machine adds up in another order; a weight that is another moves scores by far more.
_TOLERANCE = 1e-4


def write(folder: pathlib.Path, batches: Iterable[pa.RecordBatch]) -> None:
    """Leave the first rows of `batches`, joined ones, in a ranker's folder, without their outcomes and with the ranker's scores."""
    from model.ranker import Ranker

    ranker, left, parts = Ranker(folder), ROWS, []
    outcomes = [column.name for column in ranker.features.contract.outcomes]
    for batch in batches:
        inputs = batch.select([name for name in batch.schema.names if name not in outcomes]).slice(0, left)
        # Codes would need one dictionary for all batches.
        parts.append(decoded(inputs).append_column(SCORE, pa.array(ranker.predict(inputs), pa.float64())))
        left -= inputs.num_rows
        if not left:
            break
    # A batch is of one month, on which its history depends, so they stay apart.
    table = pa.Table.from_batches(parts)
    with pa.OSFile(str(folder / FILE), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def check(folder: pathlib.Path) -> str:
    """What is wrong with a ranker's folder, by loading it in a fresh process; empty if it gives its golden scores again."""
    done = subprocess.run([sys.executable, "-m", "model.golden", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    lines = [line for line in (done.stdout or done.stderr).splitlines() if line.strip()]
    return lines[-1] if lines else f"it ended the process that loaded it with status {done.returncode}"


def differences(ranker: Any, folder: pathlib.Path) -> str:
    """How a ranker that was loaded from the folder differs from its golden scores; empty where it gives them again."""
    try:
        table = pa.ipc.open_file(folder / FILE).read_all()
    except FileNotFoundError:
        return f"it has no {FILE}"
    expected = table[SCORE].to_numpy()
    batches = table.drop_columns(SCORE).to_batches()
    scores = np.concatenate([ranker.predict(batch) for batch in batches])
    off = np.flatnonzero(~np.isclose(scores, expected, rtol=_TOLERANCE, atol=0, equal_nan=True))
    if not len(off):
        return ""
    return f"{len(off):,} of {len(scores):,} golden scores are others: the first {scores[off[0]]:.9f}, expected {expected[off[0]]:.9f}"


def _main(folder: pathlib.Path) -> int:
    from model import tensorflow
    from model.ranker import Ranker

    tensorflow.load()
    wrong = differences(Ranker(folder), folder)
    print(wrong)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(_main(pathlib.Path(sys.argv[1])))
