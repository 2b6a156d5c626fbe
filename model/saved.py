"""A SavedModel that takes any number of rows: in batches of one shape, and past the rows and the sizes that make it fail."""

import contextlib
import json
import pathlib
from typing import Any

import numpy as np


class SavedModel:
    """One output of an exported model, as a function of arrays.

    A batch that the model fails on is halved until one row is left, and that row's output is NaN; a batch that does not fit into memory is
    halved as well, and the size that fitted is kept.

    Attributes:
        spec: what `spec.json` beside the model holds.
        batch: rows a call; the last call is padded to it, so that nothing is traced or tuned again.
    """

    def __init__(self, folder: pathlib.Path | str, kind: str, output: str, width: int, batch: int, compiled: bool = False) -> None:
        """Load a model folder; a local path, since TensorFlow reads nothing else here.

        The first call is made here: what is slow about it, and what is wrong with the machine, is found before there are rows. A `compiled`
        one is compiled by XLA, and runs on the CPU wherever it is: layers of a few dozen units take about half as long then, and
        convolutions longer.

        Raises:
            ValueError: the folder is no model, or one of another kind.
            tensorflow.errors.OpError: the model cannot be run here.
        """
        import tensorflow as tf

        folder = pathlib.Path(folder)
        try:
            self.spec: dict[str, Any] = json.loads((folder / "spec.json").read_text())
        except FileNotFoundError:
            raise ValueError(f"{str(folder)!r} is no model folder: it has no spec.json; expected what training wrote") from None
        if self.spec["kind"] != kind:
            raise ValueError(f"{str(folder)!r} holds a model of kind {self.spec['kind']!r}; expected {kind!r}")
        self._device = "/CPU:0" if compiled else None
        with tf.device(self._device):
            loaded = tf.saved_model.load(str(folder / "saved_model"))
        self._serve = tf.function(lambda arrays: loaded.serve(arrays)[output], jit_compile=compiled, autograph=False)
        self._by_size = dict[int, Any]()
        self._width, self.batch = width, batch
        _, inputs = loaded.signatures["serving_default"].structured_input_signature
        with contextlib.suppress(tf.errors.ResourceExhaustedError):
            self._call({name: np.zeros((1, *one.shape[1:]), one.dtype.as_numpy_dtype) for name, one in inputs.items()}, batch)

    def run(self, arrays: dict[str, np.ndarray], rows: int) -> np.ndarray:
        """The output for arrays of `rows` rows each, float32 (rows, width); NaN in the rows that the model fails on."""
        import tensorflow as tf

        out = np.full((rows, self._width), np.nan, np.float32)
        todo = [(start, min(start + self.batch, rows)) for start in range(0, rows, self.batch)]
        while todo:
            start, stop = todo.pop()
            # Another thread may change it meanwhile.
            middle, size = (start + stop) // 2, self.batch
            if stop - start > size:
                todo += [(start, middle), (middle, stop)]
                continue
            part = {name: array[start:stop] for name, array in arrays.items()}
            try:
                out[start:stop] = self._call(part, size)
            except tf.errors.ResourceExhaustedError:
                if size == 1:
                    raise
                self.batch = min(self.batch, size // 2)
                todo.append((start, stop))
            except tf.errors.OpError:
                if stop - start > 1:
                    todo += [(start, middle), (middle, stop)]
        return out

    def _call(self, part: dict[str, np.ndarray], size: int) -> np.ndarray:
        import tensorflow as tf

        rows, padded = len(next(iter(part.values()))), {name: _padded(array, size) for name, array in part.items()}
        with tf.device(self._device):
            # Looked up here, since a function that is traced for each size looks for its trace at every call, and warns of so many.
            if size not in self._by_size:
                arrays = {name: tf.TensorSpec(array.shape, array.dtype, name) for name, array in padded.items()}
                self._by_size[size] = self._serve.get_concrete_function(arrays)
            return self._by_size[size](padded).numpy()[:rows]


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    """`array` with zeros behind it up to that many rows."""
    missing = np.zeros((rows - len(array), *array.shape[1:]), array.dtype)
    return np.concatenate([array, missing]) if len(missing) else array
