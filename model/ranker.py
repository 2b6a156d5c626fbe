"""The ranker: a row and the embedding of its image become the probability of a click.

Deep & Cross Network v2 with low-rank cross layers (Wang et al. 2021, "DCN V2", https://arxiv.org/abs/2008.13535) beside a small deep tower,
on top of a linear weight for each category, and for each pair of categories of columns that are small enough. What is learnt of pairs is
scaled by a weight for each pair of columns, so that those that say nothing fade as a whole. The position only adds to the log-odds, so that
a score at the reference position is the row's own score moved by what was learnt about positions.
"""

import os
import pathlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from model.features import Features
from model.saved import SavedModel
from model.seen import UNKNOWN

BATCH = 8192
_CLIP = 1e-7
WIDTH, RANK, CROSSES, TOWER, DROPOUT = 8, 24, 2, (64, 32), 0.1
# Prior precisions of the weights by a part of their name; the first that fits counts.
PRECISIONS = {
    "creative_effect": 16.0,
    "linear": 12.0,
    "pair_effect": 80.0,
    "pair_scale": 1.0,
    "vectors": 60.0,
    "position_effect": 1.0,
    "kernel": 150.0,
}
# Pairs of values of one pair of columns, of all pairs of columns, and pairs of columns, at most.
_PAIR_VALUES, _ALL_PAIR_VALUES, _PAIRS = 1 << 17, 1 << 20, 24
# The inputs that crosses and tower begin with, in this order; the categories' vectors come after them.
_DENSE = ("numeric", "history", "embedding", "has_image", "constant")
_IMAGE_INPUTS = ("embedding", "has_image")


def build(features: Features, base_rate: float) -> Any:
    """The untrained network: the arrays of `Features.arrays` -> {"logit": float32 (n, 1), "calibrated": the same, calibrated}.

    Untrained, it says `base_rate` of any row.
    """
    import keras

    layers, initializers = keras.layers, keras.initializers
    inputs = {
        name: keras.Input((width,), name=name, dtype="int32" if name in ("categorical", "creative") else "float32")
        for name, width in features.widths.items()
    }
    added, seen = [], dict(inputs)
    if "embedding" in inputs:
        # Never trained: calibration sets them, and 0 is to trust the embedding of a creative without an id as that of any other.
        unseen = keras.ops.cast(keras.ops.equal(inputs["creative"], UNKNOWN), "float32") * inputs["has_image"]
        trust, height = (
            layers.Dense(1, use_bias=False, kernel_initializer="zeros", trainable=False, name=name)(unseen)
            for name in ("trust", "trust_height")
        )
        seen["embedding"] = layers.Multiply()([inputs["embedding"], trust + 1.0])
        added.append(height)
    parts = [seen[name] for name in _DENSE if name in seen]
    if "categorical" in inputs:
        # All columns share one table, each with its own range of rows: one gather instead of one a column.
        starts = np.cumsum((0, *features.buckets[:-1])).astype(np.int32)
        ids = keras.ops.add(inputs["categorical"], starts)
        vectors = layers.Embedding(sum(features.buckets), WIDTH, initializers.RandomNormal(stddev=0.05), name="vectors")(ids)
        parts.append(layers.Flatten()(vectors))
        linear = layers.Embedding(sum(features.buckets), 1, "zeros", name="linear")(ids)
        added.append(keras.ops.sum(linear, axis=1))
    if pairs := _pairs(features.buckets):
        left, right = (np.array(side, np.int32) for side in zip(*pairs, strict=True))
        sizes = np.array(features.buckets, np.int64)
        starts = np.cumsum((0, *(sizes[left] * sizes[right])[:-1])).astype(np.int32)
        both = keras.ops.take(inputs["categorical"], left, axis=1) * sizes[right].astype(np.int32)
        both = keras.ops.add(both + keras.ops.take(inputs["categorical"], right, axis=1), starts)
        effect = layers.Embedding(int((sizes[left] * sizes[right]).sum()), 1, initializers.RandomNormal(stddev=0.02), name="pair_effect")(
            both
        )
        scale = layers.Dense(1, use_bias=False, kernel_initializer=initializers.Constant(0.3), name="pair_scale")
        added.append(scale(layers.Reshape((len(pairs),))(effect)))
    if "creative" in inputs:
        own = layers.Embedding(features.vocabularies[-1].size, 1, "zeros", name="creative_effect")(inputs["creative"])
        added.append(layers.Flatten()(own))
    x0 = layers.Concatenate()(parts) if len(parts) > 1 else parts[0]
    x = x0
    for number in range(CROSSES):
        inner = layers.Dense(RANK, use_bias=False, name=f"cross_{number}_in")(x)
        x = layers.Add()([layers.Multiply()([x0, layers.Dense(x0.shape[-1], name=f"cross_{number}_out")(inner)]), x])
    deep = x0
    for number, units in enumerate(TOWER):
        deep = layers.Dropout(DROPOUT)(layers.Dense(units, activation="relu", kernel_initializer="he_normal", name=f"deep_{number}")(deep))
    bias = initializers.Constant(float(np.log(base_rate) - np.log1p(-base_rate)))
    head = layers.Dense(1, kernel_initializer="zeros", bias_initializer=bias, name="head")
    logit = layers.Add()([head(layers.Concatenate()([x, deep])), *added]) if added else head(layers.Concatenate()([x, deep]))
    # Never trained: calibration sets it.
    calibrated = layers.Dense(1, kernel_initializer="ones", trainable=False, name="calibration")(logit)
    if "position" in inputs:
        effect = layers.Dense(1, use_bias=False, kernel_initializer="zeros", name="position_effect")(inputs["position"])
        logit, calibrated = layers.Add()([logit, effect]), layers.Add()([calibrated, effect])
    return keras.Model(inputs, {"logit": logit, "calibrated": calibrated}, name="ranker")


def _pairs(buckets: tuple[int, ...]) -> list[tuple[int, int]]:
    """Pairs of categorical columns that have a weight for each pair of values, those with the fewest such pairs first."""
    sized = sorted((buckets[i] * buckets[j], i, j) for i in range(len(buckets)) for j in range(i))
    totals = np.cumsum([size for size, _, _ in sized])
    few = [pair for pair, total in zip(sized, totals, strict=True) if pair[0] <= _PAIR_VALUES and total <= _ALL_PAIR_VALUES]
    return [(i, j) for _, i, j in few[:_PAIRS]]


def begin_anew(path: str, weight: np.ndarray, features: Features, new_ids: list[np.ndarray]) -> None:
    """Give values that are new, in place, the weights of the trained unknown; `new_ids` by vocabulary."""
    buckets = features.buckets
    if "creative_effect" in path:
        weight[new_ids[-1]] = weight[UNKNOWN]
    elif "linear" in path or "vectors" in path:
        for start, ids in zip(np.cumsum((0, *buckets[:-1])), new_ids, strict=False):
            weight[start + ids] = weight[start + UNKNOWN]
    elif "pair_effect" in path:
        start = 0
        for left, right in _pairs(buckets):
            table = weight[start : start + buckets[left] * buckets[right]].reshape(buckets[left], buckets[right])
            table[new_ids[left]] = table[UNKNOWN]
            table[:, new_ids[right]] = table[:, [UNKNOWN]]
            start += table.size


def forget_images(path: str, weight: np.ndarray, features: Features) -> None:
    """Set to 0, in place, those weights that a picture's embedding goes through, or that a creative has of its own."""
    width, at = features.widths, 0
    if "creative_effect" in path:
        weight[:] = 0
    for name in _DENSE:
        span = slice(at, at + width.get(name, 0))
        at = span.stop
        if name in _IMAGE_INPUTS and path.endswith("kernel") and any(part in path for part in ("cross", "deep_0", "head")):
            # A cross layer's second matrix leads back to the inputs; all others lead away from them.
            weight[(slice(None), span) if "_out" in path else span] = 0


def probabilities(logits: np.ndarray) -> np.ndarray:
    """float64 probabilities strictly between 0 and 1."""
    return np.clip(1 / (1 + np.exp(-np.clip(logits.astype(np.float64), -40, 40))), _CLIP, 1 - _CLIP)


class Ranker:
    """A trained ranker, ready to run; safe to call from several threads.

    Attributes:
        features: how rows become its inputs.
        fingerprint: of the contract it was trained under; rows of another contract must not be given to it.
        base_rate: clicks an impression among the rows it was trained on.
        encoder_version, encoder_digest: the encoder whose embeddings it takes.
    """

    def __init__(self, folder: pathlib.Path | str) -> None:
        """Load a model folder.

        Raises:
            ValueError: not the folder of a ranker.
        """
        self._saved = SavedModel(folder, "ranker", "calibrated", 1, BATCH, compiled=True)
        # As many threads as cores, since several callers may share them.
        self._threads = ThreadPoolExecutor(os.cpu_count())
        spec = self._saved.spec
        self.features = Features.from_json(spec["features"])
        self.fingerprint: str = spec["fingerprint"]
        self.base_rate: float = spec["base_rate"]
        self.encoder_version: str = spec["encoder_version"]
        self.encoder_digest: str = spec["encoder_digest"]

    def predict(self, batch: pa.RecordBatch, at_reference: bool = True) -> np.ndarray:
        """Click probabilities of a joined batch, float64 (rows,): at the reference position, or at each row's own.

        NaN for a row of which the model says no number.

        Raises:
            ValueError: a column is missing that the contract has; `creative` and `embedding` may be.
        """
        return self._run(batch, at_reference, evidence=False)[0]

    def score(self, batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
        """Of a joined batch what `predict` gives, and int64 (rows, 2): impressions that each row's key and creative had in training."""
        return self._run(batch, at_reference=True, evidence=True)

    def _run(self, batch: pa.RecordBatch, at_reference: bool, evidence: bool) -> tuple[np.ndarray, np.ndarray]:
        none = np.zeros((0, 2), np.int64)

        def of(rows: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
            arrays = self.features.arrays(rows, at_reference, evidence)
            known = arrays.pop("evidence", none)
            return probabilities(self._saved.run(arrays, len(rows))[:, 0]), known

        found, known = zip(*self._threads.map(of, _halves(self._whole(batch))), strict=True)
        return np.concatenate(found), np.concatenate(known)

    def _whole(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The batch, rows without a picture where it has no `creative`."""
        there, contract = batch.schema.names, self.features.contract
        wanted = ["key", *(column.name for column in contract.features)]
        if missing := [name for name in wanted if name not in there]:
            raise ValueError(f"the batch has no column {missing[0]!r}; expected {', '.join(wanted)}, but has {', '.join(there)}")
        return batch if "creative" in there else batch.append_column("creative", pa.nulls(len(batch), pa.string()))


def _halves(batch: pa.RecordBatch) -> list[pa.RecordBatch]:
    """What two threads take of a batch: the model's batches evenly."""
    middle = -(-len(batch) // (2 * BATCH)) * BATCH
    return [batch[:middle], batch[middle:]] if middle < len(batch) else [batch]
