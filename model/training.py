"""Trains the two models from a stream of joined batches, in bounded memory and, for the same stream and seed, to the same bit.

Only TRAIN rows are learnt from, TUNE rows stop the training early, and gate rows are dropped by `features.learnable` before anything
reads an outcome. The loss is the binomial log loss per impression. Penalties are prior precisions: a weight of precision p is
drawn from a normal distribution of variance 1/p, and what is minimised is the negative log posterior per impression, so that the
pull towards 0 fades by itself as data grow.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from model import encoder, ranker, splits
from model.features import UNKNOWN, Arrays, Features, Survey, learnable, minibatches, outcomes, survey
from schemas.contract import Contract

Examples = Callable[[int], Iterator[pa.RecordBatch]]
Thumbnails = Callable[[], Iterator[pa.RecordBatch]]
Progress = Callable[[str], None]

_POOL_ROWS = 65_536
_POOL_THUMBNAILS = 4096
_TUNE_ROWS = 262_144
_TUNE_THUMBNAILS = 16_384
# Beyond so many expected clicks a creative weighs no more: what is left is not noise but what its image does not show.
_EXPECTED_CAP = 50.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a ranker is trained.

    Attributes:
        batch: rows a step, at most; small data take smaller steps.
        steps: steps from scratch, at least, unless that is more than `max_epochs`.
        epochs, max_epochs: passes over the TRAIN rows from scratch, at least and at most.
        refresh_epochs: passes when a parent's weights are the start.
        rate: highest learning rate; it falls to 0 along a cosine. A refresh takes a third.
        patience: epochs without a better TUNE loss before training stops.
        hidden_categories, hidden_images: shares of the values and of the images that training hides.
    """

    batch: int = 4096
    steps: int = 400
    epochs: int = 3
    max_epochs: int = 15
    refresh_epochs: int = 2
    rate: float = 8e-3
    patience: int = 2
    hidden_categories: float = 0.05
    hidden_images: float = 0.1


def train_ranker(
    examples: Examples,
    contract: Contract,
    seed: int,
    folder: pathlib.Path,
    encoder_version: str,
    encoder_digest: str,
    parent: pathlib.Path | None,
    progress: Progress,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Train a ranker, or refresh the parent's, and write its folder.

    Args:
        examples: from an epoch's number, the joined batches of the window in an order that only depends on that number.
        contract: the columns.
        seed: with the examples, it decides every bit of the weights.
        folder: where the model is written; local.
        encoder_version, encoder_digest: the encoder of the batches' embeddings.
        parent: folder of the ranker to start from; one of another contract or encoder is left aside.
        progress: takes a short line an epoch.
        settings: how to train.

    Returns:
        What the model's manifest shows: mode, rows, clicks, impressions, epochs, losses and speed.

    Raises:
        ValueError: the window has no click or only clicks among its TRAIN rows.
    """
    import keras

    settings = settings or Settings()
    _deterministic(seed)
    start = _parent(parent, contract, encoder_digest)
    found = survey(examples(0), contract, encoder.EMBEDDING_WIDTH, start)
    if start and parent:
        model = keras.models.load_model(parent / "model.keras", compile=False)
        epochs, rate = settings.refresh_epochs, settings.rate / 3
    else:
        model = ranker.build(found.features, found.base_rate)
        epochs, rate = 0, settings.rate
    progress(
        f"{'refresh' if start else 'scratch'}: {found.rows:,} rows, {found.clicks:,.0f} clicks in {found.impressions:,.0f} impressions"
    )
    summary = _fit_rows(model, examples, found, seed, settings, epochs, rate, progress)
    summary = {"mode": "refresh" if start else "scratch", **summary}
    spec = {
        "kind": "ranker",
        "fingerprint": contract.fingerprint,
        "features": found.features.to_json(),
        "base_rate": found.base_rate,
        "encoder_version": encoder_version,
        "encoder_digest": encoder_digest,
    }
    _write(model, folder, spec)
    return summary


def train_encoder(
    examples: Examples, thumbnails: Thumbnails, contract: Contract, seed: int, folder: pathlib.Path, progress: Progress, epochs: int = 16
) -> dict[str, Any]:
    """Train an encoder on what the columns and the position leave unexplained of each creative's clicks, and write its folder.

    Where no creative has both a thumbnail and TRAIN rows it is written untrained, since a model is needed all the same.

    Args:
        examples: as for `train_ranker`; the batches need no embedding.
        thumbnails: batches of `creative` (string) and `thumbnail` (fixed size binary, 64 x 64 x 3 bytes), each creative once.
        contract: the columns.
        seed: with the streams, it decides every bit of the weights.
        folder: where the model is written; local.
        progress: takes a short line an epoch.
        epochs: passes over the thumbnails, at most.

    Raises:
        ValueError: the window has no click or only clicks among its TRAIN rows.
    """
    _deterministic(seed)
    found = survey(examples(0), contract, 0, None)
    columns = ranker.build(found.features, found.base_rate)
    progress(f"columns: {found.rows:,} rows, {found.clicks:,.0f} clicks in {found.impressions:,.0f} impressions")
    settings = Settings(epochs=2, max_epochs=8, steps=200)
    _fit_rows(columns, examples, found, seed, settings, 0, settings.rate, progress)
    creatives = _sums(examples, found.features, columns)
    tune = list(itertools.islice(minibatches(_thumbnails(thumbnails, creatives, splits.TUNE), 256, 0, None), _TUNE_THUMBNAILS // 256))
    sizes = [(len(part["clicks"]), part["impressions"].sum(dtype=np.float64)) for part in _thumbnails(thumbnails, creatives, splits.TRAIN)]
    train, impressions = sum(rows for rows, _ in sizes), float(sum(shown for _, shown in sizes))
    model = encoder.build()
    spec = {"kind": "encoder", "fingerprint": contract.fingerprint, "features": found.features.to_json(), "base_rate": found.base_rate}
    counts = {"rows": found.rows, "clicks": found.clicks, "impressions": found.impressions, "creatives": train}
    if not train:
        progress("no creative with a picture and labelled rows to learn from: the encoder stays untrained, until a month has some")
        _write(model, folder, spec)
        return {"mode": "untrained", **counts, "epochs": 0, "tune_loss": None}
    size = min(64, train)

    def batches(epoch: int) -> Iterator[Arrays]:
        rng = np.random.default_rng([seed, epoch])
        for batch in minibatches(_thumbnails(thumbnails, creatives, splits.TRAIN), size, _POOL_THUMBNAILS, rng):
            yield {**batch, "thumbnail": encoder.augmented(batch["thumbnail"], rng)}

    penalties = [(weight, 1.0) for weight in model.trainable_variables if weight.path.endswith("kernel")]
    descent = _Descent(train, impressions, size, epochs, rate=3e-3, patience=6, penalties=penalties)
    descended = _descend(model, batches, tune, descent, progress)
    embeddings = [
        model({"thumbnail": batch["thumbnail"]}, training=False)["embedding"].numpy()[batch["impressions"] > 0]
        for batch in minibatches(_thumbnails(thumbnails, creatives, splits.TRAIN), 256, _POOL_THUMBNAILS, None)
    ]
    encoder.standardise(model, np.concatenate(embeddings))
    _write(model, folder, spec)
    return {"mode": "scratch", **counts, **descended}


def _deterministic(seed: int) -> None:
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(seed % (1 << 32))
    tf.config.experimental.enable_op_determinism()


def _parent(parent: pathlib.Path | None, contract: Contract, encoder_digest: str) -> Features | None:
    """The parent's features, if it can be refreshed."""
    if parent is None:
        return None
    spec = json.loads((parent / "spec.json").read_text())
    same = spec["fingerprint"] == contract.fingerprint and spec["encoder_digest"] == encoder_digest
    return Features.from_json(spec["features"]) if same else None


def _write(model: Any, folder: pathlib.Path, spec: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.save(folder / "model.keras")
    model.export(folder / "saved_model", verbose=False)
    (folder / "spec.json").write_text(json.dumps(spec, indent=1))


# Rows.


def _labelled(examples: Examples, features: Features, epoch: int) -> Iterator[tuple[Arrays, np.ndarray]]:
    """Inputs and outcomes of the labelled TRAIN and TUNE rows at their own positions, and which they are."""
    for batch in examples(epoch):
        kept, split = learnable(batch)
        clicks, impressions = outcomes(kept, features.contract)
        known = impressions > 0
        arrays = features.arrays(kept.filter(pa.array(known)), at_reference=False)
        yield {**arrays, "clicks": clicks[known], "impressions": impressions[known]}, split[known]


def _fit_rows(
    model: Any, examples: Examples, found: Survey, seed: int, settings: Settings, epochs: int, rate: float, progress: Progress
) -> dict[str, Any]:
    """Fit a ranker, with or without images, to the rows; `epochs` 0 leaves their number to the settings."""
    # Small data need small steps: about 50 in an epoch, unless that makes them smaller than 128 rows.
    size = min(settings.batch, max(128, 1 << round(math.log2(found.rows / 50 + 1))))
    enough = math.ceil(settings.steps / math.ceil(found.rows / size))
    epochs = epochs or min(settings.max_epochs, max(settings.epochs, enough))
    tune: list[Arrays] = []

    def train(epoch: int) -> Iterator[Arrays]:
        held = 0
        for arrays, split in _labelled(examples, found.features, epoch):
            if epoch == 0 and held < _TUNE_ROWS and (split == splits.TUNE).any():
                tune.append({name: array[split == splits.TUNE] for name, array in arrays.items()})
                held += len(tune[-1]["clicks"])
            yield {name: array[split == splits.TRAIN] for name, array in arrays.items()}

    def batches(epoch: int) -> Iterator[Arrays]:
        rng = np.random.default_rng([seed, epoch])
        for batch in minibatches(train(epoch), size, _POOL_ROWS, rng):
            if "categorical" in batch:
                batch["categorical"][rng.random(batch["categorical"].shape, np.float32) < settings.hidden_categories] = UNKNOWN
            if "embedding" in batch:
                shown = rng.random((size, 1), np.float32) >= settings.hidden_images
                batch |= {"embedding": batch["embedding"] * shown, "has_image": batch["has_image"] * shown}
                batch["creative"] = np.where(shown, batch["creative"], UNKNOWN)
            yield batch
        if epoch == 0:
            tune[:] = minibatches(tune[:], ranker.BATCH, 0, None)

    penalties = []
    for weight in model.trainable_variables:
        precision = next((value for name, value in ranker.PRECISIONS.items() if name in weight.path), 0.0)
        if precision:
            penalties.append((weight, precision))
    counts = {"rows": found.rows, "clicks": found.clicks, "impressions": found.impressions}
    descent = _Descent(found.rows, found.impressions, size, epochs, rate, settings.patience, penalties)
    return {**counts, **_descend(model, batches, tune, descent, progress)}


# Creatives.


def _sums(examples: Examples, features: Features, columns: Any) -> pa.Table:
    """Each creative with its labelled rows summed up: creative, split, clicks, impressions, offset (log-odds by columns and position).

    A creative's rows count if their split is the creative's own: TRAIN rows of TRAIN creatives, TUNE rows of TUNE creatives.
    """
    names = ("clicks", "impressions", "expected")
    sums = None
    for batch in examples(0):
        kept, split = learnable(batch)
        split_of_creative = splits.split_of_creatives(kept["creative"])
        clicks, impressions = outcomes(kept, features.contract)
        use = (impressions > 0) & (split == split_of_creative) & kept["creative"].is_valid().to_numpy(zero_copy_only=False)
        rows = kept.filter(pa.array(use))
        arrays = features.arrays(rows, at_reference=False)
        logits = [columns(part, training=False)["logit"].numpy() for part in minibatches([arrays], ranker.BATCH, 0, None)]
        expected = ranker.probabilities(np.concatenate(logits)[: len(rows), 0]) * impressions[use] if logits else np.zeros(0)
        values = (clicks[use].astype(np.float64), impressions[use].astype(np.float64), expected)
        part = pa.table({"creative": rows["creative"], **dict(zip(names, values, strict=True))})
        both = pa.concat_tables([sums, part]) if sums else part
        summed = both.group_by("creative", use_threads=False).aggregate([(name, "sum") for name in names])
        sums = summed.rename_columns(["creative", *names])
    if sums is None:
        raise ValueError("the window has no rows; expected labelled rows with images")
    impressions, expected = sums["impressions"].to_numpy(), sums["expected"].to_numpy()
    weight = np.minimum(1, _EXPECTED_CAP / expected)
    rate = expected / impressions
    return pa.table(
        {
            "creative": sums["creative"].combine_chunks(),
            "split": splits.split_of_creatives(sums["creative"].combine_chunks()),
            "clicks": (sums["clicks"].to_numpy() * weight).astype(np.float32),
            "impressions": (impressions * weight).astype(np.float32),
            "offset": np.log(rate / (1 - rate)).astype(np.float32),
        }
    )


def _thumbnails(thumbnails: Thumbnails, creatives: pa.Table, split: int) -> Iterator[Arrays]:
    """Thumbnails of the creatives of a split, each with its sums."""
    wanted = creatives.filter(pc.equal(creatives["split"], split)).combine_chunks()
    sums = {name: wanted[name].to_numpy() for name in ("clicks", "impressions", "offset")}
    side = encoder.THUMBNAIL_SIZE
    for batch in thumbnails():
        places = pc.index_in(batch["creative"], wanted["creative"])
        found = batch["thumbnail"].filter(places.is_valid())
        if not len(found):
            continue
        rows = pc.drop_null(places).to_numpy()
        pixels = np.frombuffer(found.buffers()[1], np.uint8)[found.offset * side * side * 3 :][: len(found) * side * side * 3]
        yield {"thumbnail": pixels.reshape(len(found), side, side, 3), **{name: array[rows] for name, array in sums.items()}}


# Descent.


@dataclasses.dataclass(frozen=True)
class _Descent:
    """How to minimise.

    Attributes:
        rows, impressions: in an epoch.
        size: rows in a batch.
        epochs: at most.
        rate: highest learning rate.
        patience: epochs without a better TUNE loss before it stops.
        penalties: weights and their prior precisions.
    """

    rows: int
    impressions: float
    size: int
    epochs: int
    rate: float
    patience: int
    penalties: list[tuple[Any, float]]


def _descend(
    model: Any, batches: Callable[[int], Iterator[Arrays]], tune: list[Arrays], descent: _Descent, progress: Progress
) -> dict[str, Any]:
    """Minimise the binomial log loss of the model's logits; the weights of the epoch with the least TUNE loss are kept.

    `batches` gives an epoch's batches, all of one shape. `tune` is read after the first epoch, so its batches may come up
    to fill it; when it stays empty, the last epoch's weights are kept.
    """
    import keras
    import tensorflow as tf

    steps = descent.epochs * math.ceil(descent.rows / descent.size)
    per_step = descent.size * descent.impressions / descent.rows
    schedule = keras.optimizers.schedules.CosineDecay(
        descent.rate / 10, steps, warmup_target=descent.rate, warmup_steps=max(1, steps // 20)
    )
    optimizer = keras.optimizers.Adam(schedule)
    weights = model.trainable_variables
    optimizer.build(weights)

    def loss(batch: dict[str, Any], training: bool) -> Any:
        inputs = {name: value for name, value in batch.items() if name not in ("clicks", "impressions", "offset")}
        logits = model(inputs, training=training)["logit"][:, 0]
        if "offset" in batch:
            logits += batch["offset"]
        return tf.reduce_sum(batch["impressions"] * tf.nn.softplus(logits) - batch["clicks"] * logits)

    @tf.function
    def step(batch: dict[str, Any]) -> Any:
        with tf.GradientTape() as tape:
            fit = loss(batch, True)
            prior = tf.add_n([precision / 2 * tf.reduce_sum(tf.square(weight.value)) for weight, precision in descent.penalties])
            objective = fit / per_step + prior / descent.impressions
        optimizer.apply(tape.gradient(objective, weights), weights)
        return fit

    evaluate = tf.function(lambda batch: loss(batch, False))
    best, best_epoch, best_weights = math.inf, 0, list[np.ndarray]()
    train_loss = tune_loss = math.nan
    trained, began = 0.0, time.monotonic()
    for epoch in range(descent.epochs):
        started, fits, rows = time.monotonic(), [], 0
        for batch in batches(epoch):
            fits.append(step(batch))
            rows += len(batch["clicks"])
        trained += rows
        train_loss = float(np.sum([float(fit) for fit in fits])) / descent.impressions
        rate_now = rows / (time.monotonic() - started)
        shown = sum(float(batch["impressions"].sum(dtype=np.float64)) for batch in tune)
        tune_loss = sum(float(evaluate(batch)) for batch in tune) / shown if shown else -float(epoch)
        said = f"tune loss {tune_loss:.5f}" if shown else "no tune rows"
        progress(f"epoch {epoch + 1}/{descent.epochs}: train loss {train_loss:.5f}, {said}, {rate_now:,.0f}/s")
        if tune_loss < best:
            best, best_epoch, best_weights = tune_loss, epoch, [weight.numpy() for weight in model.weights]
        elif epoch - best_epoch >= descent.patience:
            break
    for weight, value in zip(model.weights, best_weights, strict=True):
        weight.assign(value)
    return {
        "epochs": epoch + 1,
        "best_epoch": best_epoch + 1,
        "train_loss": train_loss,
        "tune_loss": best if tune else None,
        "examples_per_second": round(trained / (time.monotonic() - began)),
    }
