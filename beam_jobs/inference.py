"""Beam RunInference over RecordBatches: the handlers that load one pinned version of a model, once a process.

Elements are (`unit@start`, batch): the name says where the batch belongs, so that its results can be written to the unit's file.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.ml.inference.base import ModelHandler

from model import registry
from model.features import embedding_column, pixels_of
from schemas.storage import Storage

Named = tuple[str, pa.RecordBatch]
OK, NO_IMAGE, FALLBACK = "ok", "no_image", "fallback"


class _BatchHandler(ModelHandler[Named, Named, Any]):
    """What both handlers share: batches are batches already, and a model is fetched, checked and loaded from local disk."""

    kind: str

    def __init__(self, storage: Storage, version: str):
        super().__init__()
        self._storage, self._version = storage, version

    def load_model(self) -> Any:
        return registry.load(self._storage, self.kind, self._version)

    def should_skip_batching(self) -> bool:
        return True

    def get_num_bytes(self, batch: Any) -> int:
        return batch[1].nbytes

    def get_metrics_namespace(self) -> str:
        return f"Adstocrat_{self.kind}"


class EncoderHandler(_BatchHandler):
    """Thumbnails → embeddings: batches of `creative` and `thumbnail` become `creative` and `embedding`."""

    kind = "encoder"

    def run_inference(self, batch: Any, model: Any, inference_args: Any = None) -> Iterable[Named]:
        name, thumbnails = batch
        columns = [thumbnails["creative"], embedding_column(model.embed(pixels_of(thumbnails["thumbnail"])))]
        return [(name, pa.RecordBatch.from_arrays(columns, ["creative", "embedding"]))]


class RankerHandler(_BatchHandler):
    """Joined rows → scores: the carried columns with `p_click`, `creative`, `image_status` and `score_status`."""

    kind = "ranker"

    def __init__(self, storage: Storage, version: str, carried: Sequence[str], encoder: str):
        super().__init__(storage, version)
        self._carried, self._encoder = list(carried), encoder

    def load_model(self) -> Any:
        ranker = super().load_model()
        if ranker.encoder_version != self._encoder:
            raise registry.ModelError(
                f"ranker {self._version!r} takes embeddings of encoder {ranker.encoder_version!r}, and was given those of {self._encoder!r}"
            )
        return ranker

    def run_inference(self, batch: Any, model: Any, inference_args: Any = None) -> Iterable[Named]:
        name, rows = batch
        return [(name, scored(rows, model, self._carried))]


def probabilities_of(rows: pa.RecordBatch, ranker: Any) -> np.ndarray:
    """Click probabilities of joined rows at their own positions, as scoring gives them at the reference; float64 (rows,)."""
    return _filled(rows, ranker.predict(rows, at_reference=False), ranker)[0]


def _filled(rows: pa.RecordBatch, probability: np.ndarray, ranker: Any) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities with the base rate where a row got none, or its image no embedding; and which rows have their own, bool (rows,)."""
    usable, embedded = (rows[name].is_valid().to_numpy(zero_copy_only=False) for name in ("creative", "embedding"))
    found = np.isfinite(probability) & (embedded | ~usable)
    return np.where(found, probability, ranker.base_rate), found


def scored(rows: pa.RecordBatch, ranker: Any, carried: Sequence[str]) -> pa.RecordBatch:
    """Score joined rows at the reference position; a row with the base rate instead says so."""
    probability, evidence = ranker.score(rows)
    probability, found = _filled(rows, probability, ranker)
    status = pc.if_else(pa.array(found), pc.if_else(rows["creative"].is_valid(), 0, 1), 2)
    columns = {
        "key": rows["key"],
        **{name: rows[name] for name in carried},
        "p_click": pa.array(probability),
        "creative": rows["creative"],
        "image_status": rows["image_status"],
        "score_status": pa.DictionaryArray.from_arrays(status, [OK, NO_IMAGE, FALLBACK]),
        "evidence_key": pa.array(evidence[:, 0]),
        "evidence_creative": pa.array(evidence[:, 1]),
    }
    return pa.RecordBatch.from_arrays(list(columns.values()), list(columns))
