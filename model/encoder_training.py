"""Trains the encoder on what the columns and the position leave unexplained of each creative's clicks.

As for the ranker, only TRAIN creatives are learnt from, TUNE creatives stop the training early, and gate rows are never looked at.
"""

import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from model import encoder, ranker, splits
from model.descent import Descent, Progress, descend, deterministic, write
from model.features import Arrays, Examples, minibatches, pixels_of
from model.seen import among
from model.survey import NothingToLearnError, Survey, survey
from model.training import Settings, fit_rows, labelled, log_odds_of
from schemas.contract import Contract
from schemas.hashing import hash64_column

Thumbnails = Callable[[], Iterator[pa.RecordBatch]]

_POOL_THUMBNAILS = 4096
_TUNE_THUMBNAILS = 16_384
# A creative weighs at most as so many expected clicks: past that, what is left of it is not noise but what its image does not show.
_EXPECTED_CAP = 10.0
_BATCH, _STEPS, _LEAST_EPOCHS, _MOST_EPOCHS = 64, 2_700, 16, 28
# Of very many creatives fewer passes do: so many steps are enough, and every picture is seen a few times at least.
_ENOUGH_STEPS, _FEWEST_EPOCHS = 4_000, 4
_COLUMNS = Settings(steps=360, max_epochs=10)


def train_encoder(
    examples: Examples,
    thumbnails: Thumbnails,
    contract: Contract,
    seed: int,
    folder: pathlib.Path,
    progress: Progress,
    epochs: int = 0,
    backbone: tuple[str, pathlib.Path] | None = None,
) -> dict[str, Any]:
    """Train an encoder and write its folder.

    Where no creative has both a thumbnail and TRAIN rows it is written untrained, since a model is needed all the same.

    Args:
        examples: as for `train_ranker`; the batches need no embedding.
        thumbnails: batches of `creative` (string) and `thumbnail` (fixed size binary, 64 x 64 x 3 bytes; null where the image has none, or
            is of a creative that has it in another row), among them each creative of the examples once.
        contract: the columns.
        seed: with the streams, it decides every bit of the weights.
        folder: where the model is written; local.
        progress: takes a short line an epoch.
        epochs: passes over the thumbnails, at most; 0 leaves their number to how many there are.
        backbone: as for `encoder.build`.

    Raises:
        ValueError: the window has no click or only clicks among its TRAIN rows, or the backbone cannot be had.
    """
    import tensorflow

    deterministic(seed)
    found = survey(examples(0), contract, 0, None)
    columns = ranker.build(found.features, found.base_rate)
    progress(f"columns: {found.rows:,} rows, {found.clicks:,.0f} clicks in {found.impressions:,.0f} impressions")
    all_rows, none = np.ones(len(found.months)), np.zeros(len(found.months), np.float32)
    _, levels, _ = fit_rows(columns, examples, found, seed, _COLUMNS, 0, progress, all_rows, none)
    creatives = _sums(examples, found, columns, levels)
    tune = list(itertools.islice(minibatches(_thumbnails(thumbnails, creatives, splits.TUNE), 256), _TUNE_THUMBNAILS // 256))
    sizes = [(len(part["clicks"]), part["impressions"].sum(dtype=np.float64)) for part in _thumbnails(thumbnails, creatives, splits.TRAIN)]
    train, impressions = sum(rows for rows, _ in sizes), float(sum(shown for _, shown in sizes))
    model = encoder.build(backbone)
    spec = {"kind": "encoder", "fingerprint": contract.fingerprint, "base_rate": found.base_rate}
    counts = {"rows": found.rows, "clicks": found.clicks, "impressions": found.impressions, "creatives": train}
    if not train:
        progress("no creative with a picture and labelled rows to learn from: the encoder stays untrained, until a month has some")
        write(model, folder, spec)
        return {"mode": "untrained", **counts, "epochs": 0, "tune_loss": None}
    size = min(_BATCH, train)
    epochs = epochs or passes(train)

    def batches(epoch: int) -> Iterator[Arrays]:
        rng = np.random.default_rng([seed, epoch])
        for batch in minibatches(_thumbnails(thumbnails, creatives, splits.TRAIN), size, _POOL_THUMBNAILS, rng):
            yield {**batch, "thumbnail": encoder.augmented(batch["thumbnail"], rng)}

    descent = Descent(train, impressions, size, epochs, rate=3e-3, patience=6, penalties={"kernel": 1.0})
    # On a GPU products of half the bits, whose exponents have the range of float32; what is written and embeds is float32 everywhere.
    encoder.convolve_in(model, "mixed_bfloat16" if tensorflow.config.list_physical_devices("GPU") else "float32")
    descended, _ = descend(model, batches, tune, descent, progress)
    encoder.convolve_in(model, "float32")
    embeddings = [
        model({"thumbnail": batch["thumbnail"]}, training=False)["embedding"].numpy()[batch["impressions"] > 0]
        for batch in minibatches(_thumbnails(thumbnails, creatives, splits.TRAIN), 256)
    ]
    encoder.standardise(model, np.concatenate(embeddings))
    write(model, folder, spec)
    return {"mode": "scratch", **counts, **descended}


def passes(creatives: int) -> int:
    """Over that many creatives, at most."""
    # What is small in a picture, such as a label, is seen late; a few pictures would be learnt by heart before that.
    least = max(_FEWEST_EPOCHS, min(_LEAST_EPOCHS, _ENOUGH_STEPS * _BATCH // creatives))
    return max(least, min(_MOST_EPOCHS, _STEPS * _BATCH // creatives, creatives // 150))


def _sums(examples: Examples, found: Survey, columns: Any, levels: np.ndarray) -> pa.Table:
    """Each creative with its labelled rows summed up: creative, split, clicks, impressions, offset (log-odds by columns and position).

    A creative's rows count if their split is the creative's own: TRAIN rows of TRAIN creatives, TUNE rows of TUNE creatives.
    """
    names = ("clicks", "impressions", "expected")
    sums, log_odds = None, log_odds_of(columns, levels)
    for arrays, split, rows in labelled(examples, found, 0):
        use = (split == splits.split_of_creatives(rows["creative"])) & rows["creative"].is_valid().to_numpy(zero_copy_only=False)
        logits = [log_odds(part) for part in minibatches([arrays], ranker.BATCH)]
        expected = ranker.probabilities(np.concatenate(logits)[: len(rows)]) * arrays["impressions"]
        values = (arrays["clicks"].astype(np.float64)[use], arrays["impressions"].astype(np.float64)[use], expected[use])
        part = pa.table({"creative": rows["creative"].filter(pa.array(use)).cast(pa.string()), **dict(zip(names, values, strict=True))})
        both = pa.concat_tables([sums, part]) if sums else part
        summed = both.group_by("creative", use_threads=False).aggregate([(name, "sum") for name in names])
        sums = summed.rename_columns(["creative", *names])
    if sums is None:
        raise NothingToLearnError("the window has no rows; expected labelled rows with images")
    impressions, expected = sums["impressions"].to_numpy(), sums["expected"].to_numpy()
    weight = 1 / (1 + expected / _EXPECTED_CAP)
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
    # By hash: Arrow would build its table of all creatives anew for each batch. Of 100 M creatives two share 64 bits once in 3,700 times.
    hashes = hash64_column(wanted["creative"].combine_chunks())
    order = np.argsort(hashes)
    known = hashes[order]
    sums = {name: wanted[name].to_numpy()[order] for name in ("clicks", "impressions", "offset")}
    for batch in thumbnails():
        there, places = among(known, hash64_column(batch["creative"]))
        there &= batch["thumbnail"].is_valid().to_numpy(zero_copy_only=False)
        if there.any():
            pixels = pixels_of(batch["thumbnail"].filter(pa.array(there)))
            yield {"thumbnail": pixels, **{name: array[places[there]] for name, array in sums.items()}}
