import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest

from beam_jobs.inference import EncoderHandler, RankerHandler, scored
from model import encoder, registry
from model.features import embedding_column, embedding_matrix, embedding_type
from schemas.storage import Folder

NAN, INF = float("nan"), float("inf")


@dataclasses.dataclass
class Says:
    """A ranker that says what it is told to."""

    probabilities: Sequence[float]
    base_rate: float = 0.02
    encoder_version: str = "e"

    def score(self, rows: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self.probabilities[: len(rows)], np.float64), np.arange(len(rows))[:, None] * [1, 2]


class Mean:
    """An encoder whose embedding is the thumbnail's mean, with its first pixel last."""

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        assert pixels.shape[1:] == (64, 64, 3) and pixels.dtype == np.uint8
        out = np.repeat(pixels.mean(axis=(1, 2, 3), dtype=np.float64)[:, None], encoder.EMBEDDING_WIDTH, axis=1).astype(np.float32)
        out[:, -1] = pixels[:, 0, 0, 0]
        return out


def joined(creatives: list[str | None]) -> pa.RecordBatch:
    rows = len(creatives)
    return pa.RecordBatch.from_pydict(
        {
            "key": [f"k{i}" for i in range(rows)],
            "format": pa.array(["banner", None] * rows, pa.string())[:rows],
            "bid": pa.array([1.5] * rows, pa.float64()),
            "creative": pa.array(creatives, pa.string()),
            "image_status": pa.array(["ok" if creative else "missing" for creative in creatives], pa.string()),
            # The encoder failed on the creative "x".
            "embedding": embedding_column(
                np.array([[1.0, np.nan if creative in (None, "x") else 2.0] for creative in creatives]).reshape(-1, 2)
            ),
        }
    )


CASES = [
    ("a", 0.5, 0.5, "ok"),
    (None, 0.25, 0.25, "no_image"),
    ("a", NAN, 0.02, "fallback"),
    (None, INF, 0.02, "fallback"),
    ("b", -INF, 0.02, "fallback"),
    ("x", 0.5, 0.02, "fallback"),
]


@pytest.mark.parametrize("cases", [CASES, CASES[::-1], CASES[2:3], []])
def test_scores_and_statuses(cases: list[tuple[str | None, float, float, str]]) -> None:
    rows = joined([creative for creative, *_ in cases])
    scores = scored(rows, Says([said for _, said, _, _ in cases]), ["format"])
    assert scores.schema.names == [
        "key",
        "format",
        "p_click",
        "creative",
        "image_status",
        "score_status",
        "evidence_key",
        "evidence_creative",
    ]
    assert scores["p_click"].to_pylist() == [expected for _, _, expected, _ in cases]
    assert scores["score_status"].to_pylist() == [status for *_, status in cases]
    assert scores["evidence_creative"].to_pylist() == [2 * number for number in scores["evidence_key"].to_pylist()]
    assert scores.schema.field("score_status").type.value_type == pa.string()
    for same in ("key", "format", "creative", "image_status"):
        assert scores[same] == rows[same]


def test_ranker_handler_keeps_the_batch_and_its_name(tmp_path: pathlib.Path) -> None:
    handler, rows, ranker = RankerHandler(Folder(str(tmp_path)), "v", ["bid"], "e"), joined(["a", None]), Says([0.1, 0.2])
    ((name, scores),) = handler.run_inference(("unit@7", rows), ranker)
    assert name == "unit@7" and scores == scored(rows, ranker, ["bid"])
    assert handler.should_skip_batching() and handler.get_num_bytes(("unit@7", rows)) == rows.nbytes


@pytest.mark.parametrize("part", [slice(0, 5), slice(1, 3), slice(0, 0)])
def test_encoder_handler_embeds_the_rows_it_got(tmp_path: pathlib.Path, part: slice) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    packed = pa.array([picture.tobytes() for picture in pixels], pa.binary(pixels[0].size))
    batch = pa.RecordBatch.from_pydict({"creative": list("abcde"), "thumbnail": packed}).slice(part.start, part.stop - part.start)
    ((name, embedded),) = EncoderHandler(Folder(str(tmp_path)), "v").run_inference(("pack@0", batch), Mean())
    assert name == "pack@0" and embedded["creative"] == batch["creative"]
    assert embedded.schema.field("embedding").type == embedding_type(encoder.EMBEDDING_WIDTH)
    np.testing.assert_array_equal(embedding_matrix(embedded["embedding"]), Mean().embed(pixels[part]))


@pytest.mark.parametrize(
    ("handler", "kind"), [(lambda s: RankerHandler(s, "v9", [], "e"), "ranker"), (lambda s: EncoderHandler(s, "v9"), "encoder")]
)
def test_a_version_that_is_not_there_is_named(tmp_path: pathlib.Path, handler: type, kind: str) -> None:
    with pytest.raises(registry.ModelError, match=f"no complete {kind} 'v9'"):
        handler(Folder(str(tmp_path))).load_model()


def test_a_ranker_refuses_another_encoders_embeddings(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "load", lambda *of: Says([]))
    assert isinstance(RankerHandler(Folder(str(tmp_path)), "v", [], "e").load_model(), Says)
    with pytest.raises(registry.ModelError, match="ranker 'v' takes embeddings of encoder 'e', and was given those of 'f'"):
        RankerHandler(Folder(str(tmp_path)), "v", [], "f").load_model()
