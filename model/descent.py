"""Minimises a model's binomial log loss per impression, in one way for encoder and ranker.

Penalties are prior precisions: a weight of precision p is drawn from a normal distribution of variance 1/p, and what is minimised is the
negative log posterior per impression, so that the pull towards 0 fades by itself as data grow.
"""

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from model.features import Arrays

Progress = Callable[[str], None]
# What is beside a model's inputs in a batch: outcomes, what is added to the log-odds, and the place of the row's month among the window's.
_BESIDE = ("clicks", "impressions", "offset", "month")
_MONTH_PRECISION = 30.0


@dataclasses.dataclass(frozen=True)
class Descent:
    """How to minimise.

    Attributes:
        rows, impressions: in an epoch.
        size: rows in a batch.
        epochs: at most.
        rate: highest learning rate; it rises at first, then falls to 0 along a cosine.
        patience: epochs without a better TUNE loss before it stops.
        penalties: a prior precision by a part of a weight's path; the first that fits counts.
        months: log-odds that each month starts with, float32 (months,), where batches have a `month`; they are learnt beside the model.
    """

    rows: int
    impressions: float
    size: int
    epochs: int
    rate: float
    patience: int
    penalties: dict[str, float]
    months: np.ndarray | None = None


def descend(
    model: Any, batches: Callable[[int], Iterator[Arrays]], tune: list[Arrays], descent: Descent, progress: Progress
) -> tuple[dict[str, Any], np.ndarray]:
    """Minimise the loss of the model's `logit`; the weights of the epoch with the least TUNE loss are kept.

    `batches` gives an epoch's batches, all of one shape. `tune` is read after the first epoch, so its batches may come up
    to fill it; when it stays empty, the last epoch's weights are kept.

    Returns:
        Epochs, losses and speed; and the months' log-odds.
    """
    import keras
    import tensorflow as tf

    steps = descent.epochs * math.ceil(descent.rows / descent.size)
    per_step = descent.size * descent.impressions / descent.rows
    schedule = keras.optimizers.schedules.CosineDecay(
        descent.rate / 10, steps, warmup_target=descent.rate, warmup_steps=max(1, steps // 20)
    )
    optimizer = keras.optimizers.Adam(schedule)
    months = keras.Variable(np.zeros(1, np.float32) if descent.months is None else descent.months, name="months")
    weights = [*model.trainable_variables, *([] if descent.months is None else [months])]
    kept = [*model.weights, months]
    precisions = [(months, _MONTH_PRECISION)]
    for weight in model.trainable_variables:
        precisions += [(weight, precision) for name, precision in descent.penalties.items() if name in weight.path][:1]
    optimizer.build(weights)

    def loss(batch: dict[str, Any], training: bool) -> Any:
        logits = model(inputs_of(batch), training=training)["logit"][:, 0]
        if "offset" in batch:
            logits += batch["offset"]
        if "month" in batch:
            logits += tf.gather(months.value, batch["month"])
        return tf.reduce_sum(batch["impressions"] * tf.nn.softplus(logits) - batch["clicks"] * logits)

    @graph
    def step(batch: dict[str, Any]) -> Any:
        with tf.GradientTape() as tape:
            fit = loss(batch, True)
            # The months are held to what they start with, the model's weights to 0.
            prior = tf.add_n([p / 2 * tf.reduce_sum(tf.square(w.value - (start if w is months else 0.0))) for w, p in precisions])
            objective = fit / per_step + prior / descent.impressions
        optimizer.apply(tape.gradient(objective, weights), weights)
        return fit

    start = months.numpy()
    evaluate = graph(lambda batch: loss(batch, False))
    best, best_epoch, best_weights = math.inf, 0, list[np.ndarray]()
    train_loss = tune_loss = math.nan
    trained, began = 0.0, time.monotonic()
    for epoch in range(descent.epochs):
        started, fits, rows, impressions = time.monotonic(), [], 0, 0.0
        for batch in batches(epoch):
            fits.append(step(batch))
            rows += len(batch["clicks"])
            impressions += float(batch["impressions"].sum(dtype=np.float64))
        trained += rows
        train_loss = float(np.sum([float(fit) for fit in fits])) / max(impressions, 1.0)
        rate_now = rows / (time.monotonic() - started)
        shown = sum(float(batch["impressions"].sum(dtype=np.float64)) for batch in tune)
        tune_loss = sum(float(evaluate(batch)) for batch in tune) / shown if shown else -float(epoch)
        said = f"tune loss {tune_loss:.5f}" if shown else "no tune rows"
        progress(f"epoch {epoch + 1}/{descent.epochs}: train loss {train_loss:.5f}, {said}, {rate_now:,.0f}/s")
        if tune_loss < best:
            best, best_epoch, best_weights = tune_loss, epoch, [weight.numpy() for weight in kept]
        elif epoch - best_epoch >= descent.patience:
            break
    for weight, value in zip(kept, best_weights, strict=True):
        weight.assign(value)
    told = {
        "epochs": epoch + 1,
        "best_epoch": best_epoch + 1,
        "train_loss": train_loss,
        "tune_loss": best if tune else None,
        "examples_per_second": round(trained / (time.monotonic() - began)),
    }
    return told, months.numpy()


def graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a TensorFlow graph; it must have no Python branches on tensors, since looking for them in Keras takes a second."""
    import tensorflow as tf

    return tf.function(function, autograph=False)


def inputs_of(batch: dict[str, Any]) -> dict[str, Any]:
    """What of a batch its model is given."""
    return {name: value for name, value in batch.items() if name not in _BESIDE}


def deterministic(seed: int) -> None:
    """Everything random from here on follows from the seed, and layers are named as in a new process.

    TensorFlow orders the terms of a sum by the names of its operations, and `add_10` comes before `add_9`: a model that is built behind
    others would differ in its last bits.
    """
    import keras
    import tensorflow as tf

    keras.utils.clear_session()
    keras.utils.set_random_seed(seed % (1 << 32))
    tf.config.experimental.enable_op_determinism()


def write(model: Any, folder: pathlib.Path, spec: dict[str, Any]) -> None:
    """Write a model's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save(folder / "model.keras")
    model.export(folder / "saved_model", verbose=False)
    (folder / "spec.json").write_text(json.dumps(spec, indent=1))
