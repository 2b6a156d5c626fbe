"""Decoders of a JPEG of 1200 x 628: which is quickest to a thumbnail that is the same.

    scripts/bench decoders [-- --pictures 100 --rounds 5]

Each decodes at the fraction of the size that its library offers and shrinks the rest by the mean of its pixels, on one core. Thumbnails
are compared with ours, and with those of a decoder that uses no such fraction: all pixels, averaged. `ours` is what creatives are decoded
with, all checks in.
"""

import argparse
import io
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from bench import harness
from bench.pictures import drawn
from model import images

SIDE = images.THUMBNAIL_SIZE


def squeezed(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX))


def decoders() -> dict[str, Callable[[bytes], np.ndarray]]:
    import pyvips
    import simplejpeg
    import tensorflow as tf

    def pillow(data: bytes, draft: bool) -> np.ndarray:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            if draft:
                image.draft("RGB", (2 * SIDE, 2 * SIDE))
            return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))

    def simple(data: bytes, fast: bool) -> np.ndarray:
        least = 2 * SIDE
        pixels = simplejpeg.decode_jpeg(data, min_height=least, min_width=least, min_factor=1, fastdct=fast, fastupsample=fast)
        return squeezed(pixels)

    def tensorflow(data: bytes, method: str) -> np.ndarray:
        return squeezed(tf.io.decode_jpeg(data, channels=3, ratio=4, dct_method=method).numpy())

    def vips(data: bytes) -> np.ndarray:
        image = pyvips.Image.thumbnail_buffer(data, SIDE, height=SIDE, size="force")
        return np.ndarray((image.height, image.width, image.bands), np.uint8, image.write_to_memory())

    def vips_shrunk(data: bytes) -> np.ndarray:
        image = pyvips.Image.jpegload_buffer(data, shrink=4, access="sequential")
        return squeezed(np.ndarray((image.height, image.width, image.bands), np.uint8, image.write_to_memory()))

    return {
        "all pixels (Pillow)": lambda data: pillow(data, False),
        "ours": lambda data: images.decode(data)[0],
        "Pillow draft": lambda data: pillow(data, True),
        "simplejpeg": lambda data: simple(data, False),
        "simplejpeg, fast": lambda data: simple(data, True),
        "TensorFlow ratio=4, accurate": lambda data: tensorflow(data, "INTEGER_ACCURATE"),
        "TensorFlow ratio=4, fast": lambda data: tensorflow(data, "INTEGER_FAST"),
        "libvips thumbnail": vips,
        "libvips shrink=4": vips_shrunk,
    }


def bench(flags: argparse.Namespace) -> None:
    os.environ["VIPS_CONCURRENCY"] = "1"
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    pictures = [drawn(number) for number in range(flags.pictures)]
    known, seconds = decoders(), dict[str, list[float]]()
    thumbnails = {name: np.stack([decode(data) for data in pictures]).astype(int) for name, decode in known.items()}
    for _ in range(flags.rounds):
        for name, decode in known.items():
            started = time.process_time()
            for data in pictures:
                decode(data)
            seconds.setdefault(name, []).append(time.process_time() - started)
    exact, mine = thumbnails["all pixels (Pillow)"], thumbnails["ours"]
    rates = {name: flags.pictures / statistics.median(some) for name, some in seconds.items()}
    lines = [
        "| decoder | images/s of a core | of ours | largest difference from all pixels | mean | largest from ours |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    off = {name: np.abs(thumbnails[name] - exact) for name in known}
    for name, rate in sorted(rates.items(), key=lambda one: one[1]):
        from_ours = np.abs(thumbnails[name] - mine).max()
        lines.append(f"| {name} | {rate:,.0f} | {rate / rates['ours']:.2f} | {off[name].max()} | {off[name].mean():.2f} | {from_ours} |")
    equal = {name: rate for name, rate in rates.items() if np.abs(thumbnails[name] - mine).max() <= 2}
    best = max(equal, key=lambda name: equal[name])
    fraction = [name for name in known if not name.startswith("all") and name != "libvips thumbnail"]
    apart = max(float(np.abs(thumbnails[name] - mine).max()) for name in fraction)
    bars = [
        harness.Bar("largest difference of thumbnails among those that decode at a quarter, of 255", apart, 2, at_least=False),
    ]
    size = sum(map(len, pictures)) / len(pictures)
    parts = [
        f"{len(pictures)} JPEGs of 1200 x 628, {size / 1000:.0f} KB each. Quickest of those within 2 of ours: {best}.",
        "\n".join(lines),
    ]
    harness.report("4a", "decoders", parts, bars, ["pillow", "simplejpeg", "pyvips", "tensorflow"])


if __name__ == "__main__":
    harness.run_bench(__doc__, {}, bench, lambda parser: parser.add_argument("--pictures", type=int, default=100))
