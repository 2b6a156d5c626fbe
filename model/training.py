"""Trains the ranker from a stream of joined batches, in bounded memory and, for the same stream and seed, to the same bit.

Only TRAIN rows are learnt from, TUNE rows stop the training early and tell calibration its slope and how far images of new creatives are
to be trusted, and gate rows are dropped by `features.learnable` before anything reads an outcome. Each month of the window has log-odds of
its own, so that what is constant in time is not bent to explain what is not; the published model has the newest month's.
"""

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from model import calibration, encoder, position, ranker, splits
from model.descent import Descent, Progress, descend, deterministic, graph, inputs_of, write
from model.features import Arrays, Examples, Features, learnable, minibatches, month_of, outcomes
from model.kept import Kept, kept
from model.seen import OF_KEY_AND_CREATIVE, UNKNOWN, hashes_of_rows
from model.survey import Survey, survey
from schemas.ahead import ahead
from schemas.contract import Contract

LogOdds = Callable[[Arrays], np.ndarray]
_POOL_ROWS = 65_536
# A refresh begins with these weights of its parent made smaller, or it would go on to learn its rows by heart (Ash and Adams 2020).
_KEPT, _KEPT_OF_ANOTHER = 0.9, 0.7
_TUNE_ROWS = 262_144
_TRUST_STEP = 0.25
# Rows of the newest month that tell how high the log-odds should be, at most.
_HEIGHT_ROWS = 1 << 22


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a ranker is trained.

    Attributes:
        batch: rows a step, at most; small data take smaller steps.
        steps: steps from scratch, at least, unless that is more than `max_epochs`.
        epochs, max_epochs: passes over the TRAIN rows from scratch, at least and at most.
        refresh_epochs: passes over what a refresh reads.
        replay: share of the rows of months that the parent has learnt from which a refresh reads, others in each epoch.
        rate: highest learning rate.
        patience: epochs without a better TUNE loss before training stops.
        hidden_categories, hidden_images, hidden_creatives: shares of the values, of the images, and of what is known of a creative beside
            its image, that training hides.
        negatives: share of the impressions without a click that is learnt from.
    """

    batch: int = 4096
    steps: int = 540
    epochs: int = 3
    max_epochs: int = 15
    refresh_epochs: int = 2
    replay: float = 0.5
    rate: float = 4e-3
    patience: int = 3
    hidden_categories: float = 0.05
    hidden_images: float = 0.1
    hidden_creatives: float = 0.1
    negatives: float = 1.0


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
    mode: str = "auto",
) -> dict[str, Any]:
    """Train a ranker, or refresh the parent's, and write its folder.

    Args:
        examples: from an epoch's number, the joined batches of the window in an order that only depends on that number.
        contract: the columns.
        seed: with the examples, it decides every bit of the weights.
        folder: where the model is written; local.
        encoder_version, encoder_digest: the encoder of the batches' embeddings.
        parent: folder of the ranker to start from.
        progress: takes a short line an epoch.
        settings: how to train.
        mode: `scratch` leaves the parent aside, `refresh` insists on it where there is one, `auto` starts anew if the contract has changed.

    Returns:
        What the model's manifest shows: mode, rows, clicks, impressions, epochs, losses and speed.

    Raises:
        ValueError: the window has no click or only clicks among its TRAIN rows, or the parent cannot be refreshed.
        LeakageError: a column gives the outcome away.
    """
    settings = settings or Settings()
    deterministic(seed)
    start = _parent_spec(parent, contract, mode, progress)
    # Of another encoder's embeddings a parent knows nothing: its image side starts anew.
    same_encoder = start is not None and start["encoder_digest"] == encoder_digest
    before = Features.from_json(start["features"]) if start else None
    found = survey(examples(0), contract, encoder.EMBEDDING_WIDTH, before, with_history=True)
    months = sorted(found.months)
    first = np.full(len(months), start["level"] if start else 0.0, np.float32)
    model = ranker.build(found.features, found.base_rate)
    shares, epochs = np.ones(len(months)), 0
    if start and parent:
        _warm_start(model, parent, same_encoder, found)
        # Without its image side a parent has as much to learn of each month again.
        shares[[same_encoder and month <= start["newest_month"] for month in months]] = settings.replay
        epochs = settings.refresh_epochs * (1 if same_encoder else 2)
    kind = "scratch" if not start else "refresh" if same_encoder else "refresh with a new encoder"
    progress(f"{kind}: {found.rows:,} rows, {found.clicks:,.0f} clicks in {found.impressions:,.0f} impressions")
    summary, levels, tune = fit_rows(model, examples, found, seed, settings, epochs, progress, shares, first)
    log_odds, effects = log_odds_of(model, levels), _effects(model)
    rest, hats, clicks, impressions = _without_position(tune, log_odds, effects)
    # Where training was short, what it learnt of the position is as much too small as all the rest.
    scale, shift = calibration.fit(rest + hats @ effects, np.zeros(len(rest)), clicks, impressions)
    if contract.position:
        effects = position.within_keys(_by_key(examples, found, log_odds, effects), scale * effects).astype(np.float32)
        model.get_layer("position_effect").set_weights([effects[:, None]])
    cold = np.concatenate([np.zeros(0, bool), *(((b["creative"] == UNKNOWN) & (b["has_image"] > 0))[:, 0] for b in tune)])
    trust = (0.0, 0.0)
    if cold.any():
        # How log-odds change with the trust is looked at by how they do over a part of it.
        _set_trust(model, (-_TRUST_STEP, 0.0))
        less, *_ = _without_position(tune, log_odds, effects)
        told = (scale * rest + shift + hats @ effects, scale * (rest - less) / _TRUST_STEP, clicks, impressions)
        trust = calibration.trust(*(column[cold] for column in told))
        _set_trust(model, (trust[0], trust[1] / scale))
        rest, *_ = _without_position(tune, log_odds, effects)
    slope, shift = calibration.fit(rest, hats @ effects, clicks, impressions)
    # What is scored is the newest month, and months differ in height.
    newest = labelled(lambda epoch: (b for b in examples(epoch) if month_of(b) == months[-1]), found, 0)
    batches = itertools.islice(minibatches((arrays for arrays, _, _ in newest), ranker.BATCH), _HEIGHT_ROWS // ranker.BATCH)
    parts = (_without_position([batch], log_odds, effects) for batch in batches)
    shift += calibration.height((slope * rest + shift, hats @ effects, c, n) for rest, hats, c, n in parts)
    level = float(levels[-1]) + shift / slope
    model.get_layer("calibration").set_weights([np.array([[slope]], np.float32), np.array([slope * level], np.float32)])
    spec = {
        "kind": "ranker",
        "fingerprint": contract.fingerprint,
        "features": found.features.to_json(),
        "base_rate": found.base_rate,
        "encoder_version": encoder_version,
        "encoder_digest": encoder_digest,
        "newest_month": months[-1],
        "level": level,
        "slope": slope,
        "negatives": settings.negatives,
    }
    write(model, folder, spec)
    fitted = {"calibration_slope": round(slope, 4), "trust_of_unseen_creatives": round(1 + trust[0], 4)}
    return {"mode": "refresh" if start else "scratch", **summary, **fitted, "negatives": settings.negatives}


def _parent_spec(parent: pathlib.Path | None, contract: Contract, mode: str, progress: Progress) -> dict[str, Any] | None:
    """What `spec.json` of the parent holds, if it is to be refreshed."""
    if parent is None or mode == "scratch":
        return None
    spec: dict[str, Any] = json.loads((parent / "spec.json").read_text())
    if spec["fingerprint"] != contract.fingerprint:
        why = f"the contract has changed since the parent was trained, from {spec['fingerprint']} to {contract.fingerprint}"
        if mode == "refresh":
            raise ValueError(f"{why}, so it cannot be refreshed; use train.mode auto or scratch")
        progress(f"{why}, so training starts from scratch")
        return None
    return spec


def _warm_start(model: Any, parent: pathlib.Path, same_encoder: bool, found: Survey) -> None:
    """The parent's weights, those of new values as of the trained unknown, and with another encoder an image side that starts anew."""
    import keras

    before = keras.models.load_model(parent / "model.keras", compile=False)
    after = [array.copy() for array in before.get_weights()]
    for number, weight in enumerate(model.weights):
        if "bias" not in weight.path and any(part in weight.path for part in ("linear", "vectors", "pair", "cross", "deep", "head")):
            after[number] *= _KEPT if same_encoder else _KEPT_OF_ANOTHER
        if not same_encoder:
            ranker.forget_images(weight.path, after[number], found.features)
        ranker.begin_anew(weight.path, after[number], found.features, found.new_ids)
    model.set_weights(after)
    model.get_layer("calibration").set_weights([np.ones((1, 1), np.float32), np.zeros(1, np.float32)])
    _set_trust(model, (0.0, 0.0))


def _set_trust(model: Any, trust: tuple[float, float]) -> None:
    """How much more than any other's the embeddings of creatives without an id count, and what is added to the log-odds of their rows."""
    for name, value in zip(("trust", "trust_height"), trust, strict=True):
        model.get_layer(name).set_weights([np.full((1, 1), value, np.float32)])


def _by_key(examples: Examples, found: Survey, log_odds: LogOdds, effects: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """TRAIN and TUNE rows as `position.within_keys` wants them, without history: a key's has its earlier positions in it."""
    for arrays, _, rows in labelled(examples, found, 0):
        bare = {**arrays, "history": np.zeros_like(arrays["history"])}
        logits, *_ = _without_position(minibatches([bare], ranker.BATCH), log_odds, effects)
        yield hashes_of_rows(rows["key"], "key"), arrays["clicks"], arrays["impressions"], logits[: len(rows)], arrays["position"]


def _effects(model: Any) -> np.ndarray:
    """What the position adds to the log-odds, float32 (hats,); a model without one has a single 0."""
    return next((layer.get_weights()[0][:, 0] for layer in model.layers if layer.name == "position_effect"), np.zeros(1, np.float32))


def _without_position(batches: Iterable[Arrays], log_odds: LogOdds, effects: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of batches of `labelled` rows, as a whole: log-odds without the position's effects, its hats, (rows, hats), clicks, impressions."""
    none = np.zeros(0, np.float32)
    parts = [(none, np.zeros((0, len(effects)), np.float32), none, none)]
    for batch in batches:
        hats = batch.get("position", np.zeros((len(batch["clicks"]), 1), np.float32))
        parts.append((log_odds(batch) - hats @ effects, hats, batch["clicks"], batch["impressions"]))
    return tuple(map(np.concatenate, zip(*parts, strict=True)))


def log_odds_of(model: Any, levels: np.ndarray) -> LogOdds:
    """From a batch of `labelled` rows to its log-odds with their month's, float32 (rows,), by the weights that the model has then."""
    # As a graph: layer by layer from Python it takes several times as long.
    logit = graph(lambda inputs: model(inputs, training=False)["logit"][:, 0])
    return lambda batch: logit(inputs_of(batch)).numpy() + levels[batch["month"]]


def labelled(examples: Examples, found: Survey, epoch: int) -> Iterator[tuple[Arrays, np.ndarray, pa.RecordBatch]]:
    """Inputs, outcomes and month of the labelled TRAIN and TUNE rows at their own positions, which they are, and the rows."""
    months = sorted(found.months)
    for batch in examples(epoch):
        kept, split = learnable(batch)
        clicks, impressions = outcomes(kept, found.features.contract)
        if (use := impressions > 0).any():
            rows = kept if use.all() else kept.filter(pa.array(use))
            arrays = found.features.arrays(rows, at_reference=False)
            place = np.full(len(rows), min(int(np.searchsorted(months, month_of(batch))), len(months) - 1), np.int32)
            beside = {"clicks": clicks[use], "impressions": impressions[use], "month": place}
            yield {**arrays, **beside}, split[use], rows


def taken(arrays: Arrays, shares: np.ndarray, negatives: float, rng: np.random.Generator) -> Arrays:
    """What an epoch learns of TRAIN rows.

    Of each month that share of the rows is taken, by its place in `shares`, and weighs so much the more. Of the impressions without a click
    only a share w, `negatives`, is taken. He et al. 2014 train on such rows, and turn the model's p into q = p / (p + (1 - p) / w). In
    log-odds that is a shift by log w. It is made here, on the side of training: what is fitted to these rows is the model's log-odds less
    log w (`offset`), so the model itself says q, and nobody can forget it.
    """
    if negatives == 1 and (shares == 1).all():
        return arrays
    clicks, impressions, share = arrays["clicks"], arrays["impressions"], shares[arrays["month"]]
    use = rng.random(len(share)) < share
    if negatives < 1:
        impressions = clicks + rng.binomial((impressions - clicks).astype(np.int64), negatives).astype(np.float32)
        use &= impressions > 0
        arrays = {**arrays, "offset": np.full(len(share), -math.log(negatives), np.float32)}
    arrays = {**arrays, "clicks": (clicks / share).astype(np.float32), "impressions": (impressions / share).astype(np.float32)}
    return {name: array.compress(use, axis=0) for name, array in arrays.items()}


def fit_rows(
    model: Any,
    examples: Examples,
    found: Survey,
    seed: int,
    settings: Settings,
    epochs: int,
    progress: Progress,
    shares: np.ndarray,
    levels: np.ndarray,
) -> tuple[dict[str, Any], np.ndarray, list[Arrays]]:
    """Fit a ranker, with or without images, to the rows.

    Args:
        epochs: 0 leaves their number to the settings.
        shares: of each month's rows, what an epoch reads.
        levels: log-odds that each month starts with.

    Returns:
        What came of it, the months' log-odds, and batches of TUNE rows.
    """
    read = round(float(np.dot([found.months[month] for month in sorted(found.months)], shares)))
    # Small data need small steps: about 50 in an epoch, unless that makes them smaller than 128 rows.
    size = min(settings.batch, max(128, 1 << round(math.log2(read / 50 + 1))))
    enough = math.ceil(settings.steps / math.ceil(read / size))
    epochs = epochs or min(settings.max_epochs, max(settings.epochs, enough))
    tune: list[Arrays] = []
    # Impressions of rows whose value of a column shares the id of those that found no room, by column; and of all rows.
    shared = np.zeros(len(found.features.buckets) + 1)

    def train(epoch: int) -> Iterator[Arrays]:
        held = 0
        for arrays, split, _ in labelled(examples, found, epoch):
            if epoch == 0 and held < _TUNE_ROWS and (split == splits.TUNE).any():
                tune.append({name: array[split == splits.TUNE] for name, array in arrays.items()})
                held += len(tune[-1]["clicks"])
            learnt = {name: array.compress(split == splits.TRAIN, axis=0) for name, array in arrays.items()}
            if epoch == 0:
                shared[-1] += learnt["impressions"].sum()
                shared[:-1] += learnt["impressions"] @ (learnt["categorical"] == UNKNOWN) if len(shared) > 1 else 0.0
            yield learnt

    def blocks(made: Kept[Arrays], epoch: int, rng: np.random.Generator) -> Iterator[Arrays]:
        if epoch and (again := made.again(rng)):
            yield from again
            return
        for block in train(epoch):
            if epoch == 0 and len(block["clicks"]):
                made.put(block)
            yield block

    def batches(made: Kept[Arrays], epoch: int) -> Iterator[Arrays]:
        rng = np.random.default_rng([seed, epoch])
        for batch in minibatches(
            (taken(block, shares, settings.negatives, rng) for block in blocks(made, epoch, rng)), size, _POOL_ROWS, rng
        ):
            if "categorical" in batch:
                batch["categorical"][rng.random(batch["categorical"].shape, np.float32) < settings.hidden_categories] = UNKNOWN
            if "embedding" in batch:
                # A row with a creative that was never seen has an embedding alone, and that is what the trained unknown is for.
                drawn = rng.random((size, 1), np.float32)
                shown, known = drawn >= settings.hidden_images, drawn >= settings.hidden_images + settings.hidden_creatives
                batch |= {"embedding": batch["embedding"] * shown, "has_image": batch["has_image"] * shown}
                batch["creative"] = np.where(known, batch["creative"], UNKNOWN)
                # Nor does its key have a history then. After years of months, hardly a row would show what an image alone says.
                batch["history"][:, :OF_KEY_AND_CREATIVE] *= known
            yield batch
        if epoch == 0:
            tune[:] = minibatches(tune[:], ranker.BATCH)

    descent = Descent(read, found.impressions, size, epochs, settings.rate, settings.patience, ranker.PRECISIONS, levels)
    with kept() as made:
        # A pool ahead: while its batches are learnt, the next pool is brought together.
        told, levels = descend(model, lambda epoch: ahead(batches(made, epoch), _POOL_ROWS // size), tune, descent, progress)
    told |= {"values_sharing_an_id": float(shared[:-1].max(initial=0.0) / max(shared[-1], 1.0))}
    progress(f"values that share an id, in the column with the most: {told['values_sharing_an_id']:.2%} of impressions")
    return {"rows": found.rows, "clicks": found.clicks, "impressions": found.impressions, **told}, levels, tune
