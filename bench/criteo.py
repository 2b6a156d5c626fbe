"""Real rows without images: ten folds over the Criteo rows, ours beside a tuned LightGBM and a tuned logistic regression."""

import functools
import pathlib
import tempfile
from collections.abc import Callable

import lightgbm
import numpy as np
import pyarrow as pa
import scipy.sparse as sparse
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold
from sklearn.preprocessing import OneHotEncoder

import model
from model.training import train_ranker
from schemas.contract import Column, Contract

NUMBERS, NAMES = [f"I{i}" for i in range(1, 14)], [f"C{i}" for i in range(1, 27)]
TRIALS = 30
CONTRACT = Contract(
    (
        Column("ad", "bytes", frozenset({"key"}), True),
        Column("clicked", "int", frozenset({"clicked"})),
        *(Column(name, "int") for name in NUMBERS),
        *(Column(name, "bytes") for name in NAMES),
    )
)


def log_loss(clicked: np.ndarray, p: np.ndarray) -> float:
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return float(-(clicked * np.log(p) + (1 - clicked) * np.log1p(-p)).mean())


def folds(folder: pathlib.Path) -> dict[str, float]:
    """Mean log loss of each model over ten folds."""
    lines = [line.split("\t") for part in ("train", "dev", "test") for line in (folder / f"criteo_{part}.tsv").read_text().splitlines()]
    clicked = np.array([int(line[0]) for line in lines])
    numbers = np.array([[float(value) if value else np.nan for value in line[1:14]] for line in lines])
    names = np.array([line[14:] for line in lines], object)
    losses: dict[str, list[float]] = {"ours": [], "lightgbm": [], "logistic regression": []}
    for number, (train, test) in enumerate(KFold(10, shuffle=True, random_state=0).split(lines)):
        rng = np.random.default_rng(number)
        inner = rng.permutation(len(train))
        fit, tune = train[inner[len(inner) // 5 :]], train[inner[: len(inner) // 5]]
        for name, peer in (("lightgbm", _trees), ("logistic regression", _regression)):
            losses[name].append(log_loss(clicked[test], _tuned(peer, rng, numbers, names, clicked, fit, tune, train, test)))
        losses["ours"].append(log_loss(clicked[test], _ours(numbers, names, clicked, train, test, number)))
        print(f"  fold {number}: {', '.join(f'{name} {values[-1]:.4f}' for name, values in losses.items())}", flush=True)
    return {name: round(float(np.mean(values)), 5) for name, values in losses.items()}


def _tuned(peer: Callable, rng: np.random.Generator, numbers, names, clicked, fit, tune, train, test) -> np.ndarray:  # type: ignore[no-untyped-def,type-arg]
    """Probabilities of the test rows, by what did best of the trials inside the training rows."""
    predict = peer(numbers, names, clicked, fit)
    trials = [[rng.random() for _ in range(6)] for _ in range(TRIALS)]
    scored = [(log_loss(clicked[tune], predict(trial, tune)), number) for number, trial in enumerate(trials)]
    return peer(numbers, names, clicked, train)(trials[min(scored)[1]], test)  # type: ignore[no-any-return]


def _trees(
    numbers: np.ndarray, names: np.ndarray, clicked: np.ndarray, rows: np.ndarray
) -> Callable[[list[float], np.ndarray], np.ndarray]:
    coded = np.column_stack([numbers, *(np.unique(column, return_inverse=True)[1] for column in names.T)])
    # Values that are seldom seen are one value, which helps trees a lot on so few rows.
    for column in range(len(NUMBERS), coded.shape[1]):
        values, counts = np.unique(coded[rows, column], return_counts=True)
        coded[~np.isin(coded[:, column], values[counts >= 10]), column] = -1

    def predict(u: list[float], wanted: np.ndarray) -> np.ndarray:
        fitted = lightgbm.LGBMClassifier(
            n_estimators=int(60 + 240 * u[0]), learning_rate=0.02 + 0.06 * u[1], num_leaves=int(4 + 28 * u[2]), n_jobs=1, verbose=-1,
            min_child_samples=int(10 + 90 * u[3]), reg_lambda=10 ** (3 * u[4] - 1), colsample_bytree=0.3 + 0.6 * u[5],
        )  # fmt: skip
        return fitted.fit(coded[rows], clicked[rows]).predict_proba(coded[wanted])[:, 1]  # type: ignore[no-any-return]

    return predict


def _regression(
    numbers: np.ndarray, names: np.ndarray, clicked: np.ndarray, rows: np.ndarray
) -> Callable[[list[float], np.ndarray], np.ndarray]:
    edges = [np.unique(np.nanquantile(column[rows], np.linspace(0, 1, 13)[1:-1])) for column in numbers.T]
    binned = [np.where(np.isnan(column), -1, np.digitize(column, edge)).astype(str) for column, edge in zip(numbers.T, edges, strict=True)]
    coded = np.column_stack([*binned, names])

    @functools.lru_cache
    def encoded(least: int) -> sparse.csr_matrix:
        return OneHotEncoder(handle_unknown="infrequent_if_exist", min_frequency=least).fit(coded[rows]).transform(coded)

    def predict(u: list[float], wanted: np.ndarray) -> np.ndarray:
        x = encoded(int(2 + 18 * u[1]))
        fitted = LogisticRegression(C=10 ** (-2.5 + 2.5 * u[0]), max_iter=1000, tol=1e-5).fit(x[rows], clicked[rows])
        return fitted.predict_proba(x[wanted])[:, 1]  # type: ignore[no-any-return]

    return predict


def _ours(numbers: np.ndarray, names: np.ndarray, clicked: np.ndarray, train: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    def batch(rows: np.ndarray, keys: list[str]) -> pa.RecordBatch:
        columns = {"key": keys, "creative": pa.nulls(len(rows), pa.string()), "clicked": clicked[rows]}
        columns |= {name: pa.array(numbers[rows, i], from_pandas=True).cast(pa.int64()) for i, name in enumerate(NUMBERS)}
        return pa.RecordBatch.from_pydict(columns | {name: pa.array(names[rows, i]) for i, name in enumerate(NAMES)})

    # The folds are the judges here, so no row is kept back for a gate: keys are drawn until none is the gate's.
    from model import splits

    keys = pa.array([f"row {i}" for i in range(3 * len(train))])
    open_keys = keys.filter(pa.array(splits.split_of_rows(keys, pa.nulls(len(keys), pa.string())) != splits.GATE))[: len(train)].to_pylist()
    learnt = batch(train, open_keys)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        train_ranker(lambda epoch: iter([learnt]), CONTRACT, seed, path, "none", "none", None, lambda line: None)
        return model.load(path).predict(batch(test, [f"test {i}" for i in test]))
