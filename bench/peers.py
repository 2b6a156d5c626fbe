"""What the ranker has to beat: logistic regression and boosted trees, tuned on TUNE rows, given columns, colours or planted properties."""

import pathlib
from collections.abc import Sequence

import lightgbm
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import scipy.sparse as sparse
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import OneHotEncoder

from bench.months import CONTRACT, Month
from model import splits
from schemas import lake

CATEGORIES = [column.name for column in CONTRACT.features if column.categorical]
Parts = dict[int, np.ndarray]


def colour_statistics(thumbnails: pa.Table) -> np.ndarray:
    """Mean and spread of each channel, a histogram of hues, and the direction of the most vivid pixels' hue, float (creatives, 24)."""
    pixels = np.frombuffer(b"".join(thumbnails["thumbnail"].to_pylist()), np.uint8).reshape(-1, 64 * 64, 3) / 255.0
    high, low = pixels.max(axis=2), pixels.min(axis=2)
    angle = np.arctan2(np.sqrt(3) * (pixels[:, :, 1] - pixels[:, :, 2]), 2 * pixels[:, :, 0] - pixels[:, :, 1] - pixels[:, :, 2])
    bins = ((angle + np.pi) / (2 * np.pi) * 16).astype(int) % 16
    hues = np.stack([((bins == number) * (high - low)).mean(axis=1) for number in range(16)], axis=1)
    vivid = (high - low) ** 4
    vivid /= vivid.sum(axis=1, keepdims=True) + 1e-9
    turns = np.stack([(vivid * turn(angle)).sum(axis=1) for turn in (np.cos, np.sin)], axis=1)
    return np.concatenate([pixels.mean(axis=1), pixels.std(axis=1), hues, turns], axis=1)


def planted(folder: pathlib.Path, months: Sequence[Month], thumbnails: pa.Table) -> np.ndarray:
    """The properties that were planted in each picture, float (creatives, 6)."""
    known: dict[str, list[float]] = {}
    for month in months:
        table = pq.read_table(folder / lake.truth(month.name).replace(month.name, f"creatives-{month.name}"))
        for row in table.to_pylist():
            known[row["name"]] = [row[name] for name in ("call_to_action", "face", "clutter", "text", "warmth", "hue")]
    return np.array([known[name] for name in thumbnails["name"].to_pylist()])


class Peers:
    """The window's rows as matrices, split as the ranker's are."""

    def __init__(self, folder: pathlib.Path, months: Sequence[Month], thumbnails: pa.Table) -> None:
        self.planted = planted(folder, months, thumbnails)
        rows = pa.concat_tables([month.rows for month in months]).combine_chunks()
        split = splits.split_of_rows(rows["key"].combine_chunks(), rows["creative"].combine_chunks())
        shown = pc.fill_null(rows["impressions"], 0).to_numpy()
        last = np.arange(len(rows)) >= len(rows) - len(months[-1].rows)
        keep = ((split != splits.GATE) & (shown > 0)) | (last & (split == splits.GATE))
        self.split, rows = split[keep], rows.filter(pa.array(keep))
        self.truth = np.concatenate([month.truth["p_click"].to_numpy() for month in months])[keep]
        self.clicks, self.shown = (pc.fill_null(rows[name], 0).to_numpy().astype(float) for name in ("clicks", "impressions"))
        self._categories = np.stack(
            [pc.fill_null(rows[name].cast(pa.string()), "").to_numpy(zero_copy_only=False) for name in CATEGORIES], 1
        )
        self._bid, self._position = pc.fill_null(rows["bid"], 0).to_numpy(), rows["position"].to_numpy()
        number = np.concatenate([np.full(len(month.rows), i) for i, month in enumerate(months)])[keep]
        places = np.digitize(self._bid, np.quantile(self._bid, np.linspace(0, 1, 17)[1:-1]))
        coded = np.column_stack([self._categories, places.astype(str), self._position.astype(str), number.astype(str)])
        self._columns = OneHotEncoder(handle_unknown="ignore").fit(coded[self.split == splits.TRAIN]).transform(coded)
        self._months = number
        where = pc.index_in(rows["creative"], thumbnails["creative"].combine_chunks())
        self._where = pc.fill_null(where, len(thumbnails)).to_numpy()

    def _of_rows(self, of_creatives: np.ndarray) -> np.ndarray:
        """With a column that says whether there is a picture."""
        scaled = (of_creatives - of_creatives.mean(axis=0)) / of_creatives.std(axis=0)
        return np.column_stack([np.vstack([scaled, np.zeros(scaled.shape[1])])[self._where], self._where < len(of_creatives)])

    def _doubled(self, part: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, labels and weights: each row once as clicks and once as impressions without."""
        rows = np.flatnonzero(self.split == part)
        labels = np.repeat([1, 0], len(rows))
        weights = np.concatenate([self.clicks[rows], self.shown[rows] - self.clicks[rows]])
        both = np.concatenate([rows, rows])
        return both[weights > 0], labels[weights > 0], weights[weights > 0]

    def _tune_loss(self, p: np.ndarray) -> float:
        tune = self.split == splits.TUNE
        return -float((self.clicks[tune] * np.log(p[tune]) + (self.shown - self.clicks)[tune] * np.log1p(-p[tune])).sum())

    def regression(self, of_creatives: np.ndarray | None, penalties: Sequence[float] = (0.03, 0.1, 0.3)) -> tuple[float, np.ndarray]:
        """TUNE loss, and probabilities of the gate rows of the last month, by the best of a few penalties."""
        x = self._columns if of_creatives is None else sparse.hstack([self._columns, self._of_rows(of_creatives)]).tocsr()
        rows, labels, weights = self._doubled(splits.TRAIN)
        found = []
        for penalty in penalties:
            # With scikit-learn's own tolerance it stops after ten steps, far from done.
            fitted = LogisticRegression(C=penalty, max_iter=1000, tol=1e-6).fit(x[rows], labels, weights)
            found.append((self._tune_loss(p := fitted.predict_proba(x)[:, 1]), p[self.split == splits.GATE]))
        return min(found, key=lambda pair: pair[0])

    def trees(self, of_creatives: np.ndarray) -> tuple[float, np.ndarray]:
        coded = [np.unique(column, return_inverse=True)[1] for column in self._categories.T]
        x = np.column_stack([*coded, self._bid, self._position, self._months, self._of_rows(of_creatives)])
        rows, labels, weights = self._doubled(splits.TRAIN)
        tune_rows, tune_labels, tune_weights = self._doubled(splits.TUNE)
        found = []
        for leaves in (15, 63):
            model = lightgbm.LGBMClassifier(
                n_estimators=800,
                learning_rate=0.05,
                num_leaves=leaves,
                min_child_samples=200,
                cat_smooth=50,
                cat_l2=50,
                n_jobs=1,
                verbose=-1,
            )
            stop = lightgbm.early_stopping(25, verbose=False)
            model.fit(
                x[rows], labels, sample_weight=weights, eval_set=[(x[tune_rows], tune_labels)], eval_sample_weight=[tune_weights],
                categorical_feature=list(range(len(coded))), callbacks=[stop],
            )  # fmt: skip
            found.append((self._tune_loss(p := model.predict_proba(x)[:, 1]), p[self.split == splits.GATE]))
        return min(found, key=lambda pair: pair[0])
