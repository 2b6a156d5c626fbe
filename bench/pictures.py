"""Pictures of a size and in a number that would take hours to draw: some are drawn, and the others are these under other names and digests.

A comment in the JPEG tells copies apart, so that each is another content, and takes as long to decode as the picture it is of.
"""

import io
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from schemas.sample_images import Picture, draw
from schemas.storage import Storage

SIZE, NOISE = (1200, 628), 9.0
DRAWN = 100


def drawn(number: int, size: tuple[int, int] = SIZE, noise: float = NOISE) -> bytes:
    """A sample picture enlarged, with noise that makes it about as many bytes as a photograph of that size (160 KB)."""
    rng = np.random.default_rng(number)
    small = draw(Picture("", number, bool(number % 2), bool(number % 3), number % 9, number % 5, rng.random()))
    pixels = np.asarray(Image.open(io.BytesIO(small)).resize(size, Image.Resampling.BICUBIC)).astype(np.float32)
    noisy = (pixels + noise * rng.standard_normal(pixels.shape, np.float32)).clip(0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(stream := io.BytesIO(), "JPEG", quality=85)
    return stream.getvalue()


def named(data: bytes, comment: str) -> bytes:
    """A JPEG with a comment behind its first marker."""
    text = comment.encode()
    return data[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + data[2:]


def write(storage: Storage, pictures: Sequence[Picture], size: tuple[int, int] = SIZE, noise: float = NOISE) -> Iterator[int]:
    """In place of `sample_images.write_pictures`: pictures of that size under the same names."""
    bases = [drawn(number, size, noise) for number in range(min(DRAWN, len(pictures)))]
    for picture in pictures:
        # By its own number, so that a picture of last month is the same again.
        storage.write(picture.name, named(bases[picture.seed % len(bases)], f"{picture.seed}"))
    yield len(pictures)
