"""Images, features, encoder, ranker, evaluation and their registry; knows nothing of Beam.

    model.load("folder/of/a/ranker").predict(record_batch)

gives click probabilities in any Python program: the batch holds `key`, the contract's columns and, with images, `creative` and `embedding`.
"""

import pathlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.ranker import Ranker


def load(path: pathlib.Path | str, encoder_digest: str | None = None) -> "Ranker":
    """A ranker from its folder on this machine, ready to run.

    Args:
        path: the folder, as `registry.fetch` lays it out.
        encoder_digest: of the encoder that makes the embeddings, if it is to be checked.

    Raises:
        ValueError: not the folder of a ranker, or of one that takes another encoder's embeddings.
    """
    from model import tensorflow

    tensorflow.load()
    from model.ranker import Ranker

    ranker = Ranker(path)
    if encoder_digest is not None and encoder_digest != ranker.encoder_digest:
        raise ValueError(
            f"ranker {str(path)!r} takes embeddings of encoder {ranker.encoder_version!r}, digest {ranker.encoder_digest[:12]}, not of "
            f"one with digest {encoder_digest[:12]}; embed with its own encoder, or load the ranker of the other pair"
        )
    return ranker
