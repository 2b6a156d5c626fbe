"""The encoder: a thumbnail becomes an embedding that is about clicks.

A small convolutional network whose last hidden layer, and the log-odds it predicts, are the embedding, each coordinate
standardised over the creatives it was trained on. Scaling is inside the model, so it takes the bytes of a thumbnail as they are.
"""

import pathlib
import sys
import warnings
from typing import Any

import numpy as np

from model.images import THUMBNAIL_SIZE
from model.saved import SavedModel

EMBEDDING_WIDTH = 32
_BATCH = 256
_DROPOUT = 0.3
_SHIFT = 3


def build(backbone: tuple[str, pathlib.Path] | None = None) -> Any:
    """The untrained network: uint8 (n, 64, 64, 3) -> {"logit": float32 (n, 1), "embedding": float32 (n, EMBEDDING_WIDTH)}.

    `logit` is the effect of the image on the log-odds of a click; the embedding's last coordinate is the same, standardised. With a
    backbone, one of `keras.applications` and the file of its weights, what is trained begins behind it.

    Raises:
        ValueError: no such backbone, or weights that are not its own.
    """
    import keras

    layers = keras.layers
    pixels = keras.Input((THUMBNAIL_SIZE, THUMBNAIL_SIZE, 3), dtype="uint8", name="thumbnail")
    x = _pretrained(pixels, *backbone) if backbone else _convolutions(pixels)
    # The mean says how much of something there is (clutter, text), the maximum whether it is there at all (a face, a button).
    x = layers.Concatenate()([layers.GlobalAveragePooling2D()(x), layers.GlobalMaxPooling2D()(x)])
    x = layers.Dropout(_DROPOUT)(x)
    hidden = layers.Dense(EMBEDDING_WIDTH - 1, activation="gelu", name="hidden")(x)
    # Straight from the pooled features as well, which is learnt from fewer creatives.
    logit = layers.Dense(1, kernel_initializer="zeros", name="logit")(layers.Concatenate()([x, hidden]))
    # Never trained: `standardise` sets its mean and variance.
    scale = layers.BatchNormalization(center=False, scale=False, trainable=False, name="standardise")
    return keras.Model({"thumbnail": pixels}, {"logit": logit, "embedding": scale(layers.Concatenate()([hidden, logit]))}, name="encoder")


def _pretrained(pixels: Any, name: str, weights: pathlib.Path) -> Any:
    """What a network of `keras.applications` makes of the pixels; it is not trained."""
    import keras

    network = getattr(keras.applications, name, None)
    if not callable(network):
        raise ValueError(f"keras.applications has no network {name!r}; expected a name such as MobileNetV3Small or EfficientNetB0")
    try:
        with warnings.catch_warnings():
            # Keras leaves a layer that the file does not have as it was, and warns.
            warnings.simplefilter("error", UserWarning)
            body = network(include_top=False, weights=str(weights), input_shape=(THUMBNAIL_SIZE, THUMBNAIL_SIZE, 3))
    except (OSError, ValueError, UserWarning) as error:
        raise ValueError(f"{weights.name} has no weights of {name} without its top, as `save_weights` writes them: {error}") from error
    body.trainable = False
    # Each network has its own way with pixels, which stands beside it.
    return body(sys.modules[network.__module__].preprocess_input(keras.ops.cast(pixels, "float32")))


def _convolutions(pixels: Any) -> Any:
    from keras import layers

    x = layers.Rescaling(1 / 127.5, -1)(pixels)
    # At half the resolution strokes and eyes are still there; batch normalisation makes training several times faster.
    for number, (filters, size, strides) in enumerate(((16, 4, 2), (32, 3, 1), (48, 3, 1), (64, 3, 1))):
        x = layers.Conv2D(filters, size, strides, padding="same", use_bias=False, kernel_initializer="he_normal")(x)
        x = layers.Activation("relu")(layers.BatchNormalization(momentum=0.98)(x))
        if number in (1, 2):
            x = layers.MaxPool2D()(x)
    return x


def convolve_in(model: Any, policy: str) -> None:
    """Have the convolutions, which are nearly all the work, compute in a precision by Keras' name; their weights stay float32."""
    import keras

    for layer in (inner for outer in model.layers for inner in getattr(outer, "layers", [outer])):
        if isinstance(layer, keras.layers.Conv2D):
            layer.dtype_policy = policy


def standardise(model: Any, embeddings: np.ndarray) -> None:
    """Set the model's last layer so that these of its embeddings, float32 (n, EMBEDDING_WIDTH), would have mean 0 and variance 1."""
    layer = model.get_layer("standardise")
    mean, variance = (np.asarray(w) for w in layer.get_weights())
    raw = embeddings * np.sqrt(variance + layer.epsilon) + mean
    # A coordinate that hardly varies is left small rather than blown up.
    layer.set_weights([raw.mean(axis=0), np.maximum(raw.var(axis=0), 1e-4)])


def augmented(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The thumbnails, uint8 (n, 64, 64, 3), shifted by a few pixels each, and every second one mirrored."""
    rows, side = len(pixels), THUMBNAIL_SIZE
    mirrored = np.where(rng.random((rows, 1, 1, 1)) < 0.5, pixels[:, :, ::-1], pixels)
    padded = np.pad(mirrored, ((0, 0), (_SHIFT, _SHIFT), (_SHIFT, _SHIFT), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(1, 2))
    down, right = rng.integers(0, 2 * _SHIFT + 1, (2, rows))
    return np.ascontiguousarray(windows[np.arange(rows), down, right].transpose(0, 2, 3, 1))


class Encoder:
    """A trained encoder, ready to run; safe to call from several threads.

    Attributes:
        fingerprint: of the contract it was trained under.
    """

    def __init__(self, folder: pathlib.Path | str) -> None:
        """Load a model folder.

        Raises:
            ValueError: not the folder of an encoder.
        """
        self._saved = SavedModel(folder, "encoder", "embedding", EMBEDDING_WIDTH, _BATCH)
        self.fingerprint: str = self._saved.spec["fingerprint"]

    def embed(self, thumbnails: np.ndarray) -> np.ndarray:
        """Embeddings, float32 (n, EMBEDDING_WIDTH), of thumbnails, uint8 (n, 64, 64, 3); NaN for one that the model fails on."""
        expected = (THUMBNAIL_SIZE, THUMBNAIL_SIZE, 3)
        if thumbnails.dtype != np.uint8 or thumbnails.shape[1:] != expected:
            raise ValueError(f"thumbnails are {thumbnails.dtype} {thumbnails.shape}; expected uint8 (n, {', '.join(map(str, expected))})")
        return self._saved.run({"thumbnail": thumbnails}, len(thumbnails))
