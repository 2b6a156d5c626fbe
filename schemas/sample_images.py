"""Ad pictures drawn to order: five planted properties among look-alikes, under JPEG noise.

Every picture has the same large elements, so that their colours say little: an oval that is a face or a plain decoy, a rectangle that
is a button or a plain decoy, a product of some hue. What differs is shape: eyes and mouth, round corners and a label, strokes of text,
the number of small distractors. A small convolutional network sees them on 64 x 64 thumbnails; colour statistics do not.
"""

import colorsys
import functools
import io
import itertools
import multiprocessing
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from schemas.storage import Storage

WIDTH, HEIGHT = 400, 210
BATCH, UPLOADS = 1_000, 16
_LABELS = ("BUY NOW", "SHOP", "SIGN UP", "TRY IT", "ORDER", "GO")

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]


class Picture(NamedTuple):
    """What is to be drawn.

    Attributes:
        name: where the JPEG is stored, relative to the lake.
        seed: decides all that the properties leave open: places, sizes, colours, JPEG quality.
        call_to_action: whether there is a button.
        face: whether there is a face.
        clutter: small distractors, 0 to 8.
        text: lines of text, 0 to 4.
        hue: the product's hue, 0 to 1 around the colour circle.
    """

    name: str
    seed: int
    call_to_action: bool
    face: bool
    clutter: int
    text: int
    hue: float


def write_pictures(storage: Storage, pictures: Sequence[Picture]) -> Iterator[int]:
    """Draw and store on all cores; yields now and then how many are done."""
    batches = [pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH)]
    if len(batches) == 1:
        yield _write_batch(storage, pictures)
        return
    # Spawned, since a fork of a process that runs TensorFlow or gRPC may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(batches), os.cpu_count() or 1), context) as pool:
        yield from itertools.accumulate(pool.map(_write_batch, itertools.repeat(storage), batches))


def _write_batch(storage: Storage, pictures: Sequence[Picture]) -> int:
    """Draw and store one after the other; uploads overlap the drawing. Returns how many."""
    with ThreadPoolExecutor(UPLOADS) as pool:
        for done in [pool.submit(storage.write, picture.name, draw(picture)) for picture in pictures]:
            done.result()
    return len(pictures)


def draw(picture: Picture) -> bytes:
    """The picture as a JPEG of 400 x 210 pixels, the same bytes for the same picture."""
    rng = random.Random(picture.seed)
    image, light = _background(rng)
    canvas = ImageDraw.Draw(image)
    taken: list[Box] = []
    tall = rng.uniform(0.32, 0.58) * HEIGHT
    oval = _place(rng, tall * rng.uniform(0.7, 0.85), tall, taken)
    button = _place(rng, rng.uniform(105, 150), rng.uniform(38, 54), taken)
    side = rng.uniform(56, 84)
    product = _place(rng, side, side, taken)
    text = _place(rng, rng.uniform(110, 150), 16 * picture.text, taken) if picture.text else None
    # Distractors are placed last but drawn first: they fill the gaps and never hide what matters.
    for _ in range(picture.clutter):
        _distractor(canvas, rng, _place(rng, rng.uniform(22, 38), rng.uniform(18, 30), taken))
    # A broad white rim tells the product from the blobs.
    canvas.rounded_rectangle(product, rng.randint(8, 26), _colour(rng, picture.hue, (0.8, 1.0), (0.75, 1.0)), (255, 255, 255), 7)
    _oval(canvas, rng, oval, picture.face)
    _rectangle(canvas, rng, button, picture.call_to_action)
    if text:
        _text(canvas, rng, text, picture.text, light)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=rng.randint(35, 90))
    return stream.getvalue()


def _background(rng: random.Random) -> tuple[Image.Image, bool]:
    """A soft colour field, and whether it is light."""
    light = rng.random() < 0.5
    base = _colour(rng, rng.random(), (0.05, 0.6), (0.75, 1.0) if light else (0.1, 0.4))
    cells = bytes(max(0, min(255, channel + rng.randint(-28, 28))) for _ in range(20) for channel in base)
    return Image.frombytes("RGB", (5, 4), cells).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR), light


def _place(rng: random.Random, width: float, height: float, taken: list[Box]) -> Box:
    """A box of that size where it covers the least of what is `taken`, and now taken itself."""
    best, least = (0, 0, 0, 0), WIDTH * HEIGHT * len(taken) + 1
    for _ in range(40):
        left, top = int(rng.uniform(4, WIDTH - 4 - width)), int(rng.uniform(4, HEIGHT - 4 - height))
        box = (left, top, left + int(width), top + int(height))
        covered = sum(
            max(0, min(box[2], other[2]) + 5 - max(left, other[0])) * max(0, min(box[3], other[3]) + 5 - max(top, other[1]))
            for other in taken
        )
        if covered < least:
            best, least = box, covered
        if not covered:
            break
    taken.append(best)
    return best


def _colour(rng: random.Random, hue: float, saturation: tuple[float, float], value: tuple[float, float]) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue, rng.uniform(*saturation), rng.uniform(*value))
    return int(255 * red), int(255 * green), int(255 * blue)


def _skin(rng: random.Random) -> Colour:
    return _colour(rng, rng.uniform(0.04, 0.1), (0.3, 0.6), (0.6, 1.0))


def _distractor(canvas: ImageDraw.ImageDraw, rng: random.Random, box: Box) -> None:
    left, top, right, bottom = box
    kind = rng.randrange(4)
    fill = _skin(rng) if kind == 3 else _colour(rng, rng.random(), (0.5, 1.0), (0.4, 1.0))
    if kind == 0:
        canvas.polygon([(left, bottom), (right, bottom), (rng.uniform(left, right), top)], fill, (30, 30, 30))
    elif kind == 1:
        canvas.rectangle(box, fill, (30, 30, 30))
    else:
        canvas.ellipse(box, fill, (30, 30, 30))


def _oval(canvas: ImageDraw.ImageDraw, rng: random.Random, box: Box, face: bool) -> None:
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    canvas.ellipse(box, _skin(rng), (60, 40, 30), 2)
    if not face:
        return
    dark = _colour(rng, rng.random(), (0.2, 0.8), (0.05, 0.2))
    radius = rng.uniform(0.09, 0.12) * width
    level = top + rng.uniform(0.36, 0.44) * height
    for share in (0.3, 0.7):
        x = left + share * width
        canvas.ellipse((x - 1.5 * radius, level - 1.2 * radius, x + 1.5 * radius, level + 1.2 * radius), (255, 255, 255))
        canvas.ellipse((x - radius, level - 1.2 * radius, x + radius, level + 1.2 * radius), dark)
    mouth = (left + 0.25 * width, top + 0.5 * height, right - 0.25 * width, top + rng.uniform(0.8, 0.88) * height)
    canvas.chord(mouth, 10, 170, (150, 20, 40))


def _rectangle(canvas: ImageDraw.ImageDraw, rng: random.Random, box: Box, button: bool) -> None:
    left, top, right, bottom = box
    bright = rng.random() < 0.5
    fill = _colour(rng, rng.random(), (0.6, 1.0), (0.8, 1.0) if bright else (0.3, 0.6))
    if not button:
        canvas.rectangle(box, fill)
        return
    height = bottom - top
    canvas.rounded_rectangle(box, int(0.45 * height), fill)
    label = rng.choice(_LABELS)
    font = _font(int(0.5 * height))
    ink = (0, 0, 0) if 299 * fill[0] + 587 * fill[1] + 114 * fill[2] > 140_000 else (255, 255, 255)
    canvas.text(((left + right) / 2, (top + bottom) / 2), label, ink, font, "mm", stroke_width=1)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _text(canvas: ImageDraw.ImageDraw, rng: random.Random, box: Box, lines: int, light: bool) -> None:
    """Words as strokes, on lines 16 pixels apart."""
    left, top, right, _ = box
    ink = _colour(rng, rng.random(), (0.0, 0.5), (0.0, 0.2) if light else (0.85, 1.0))
    for line in range(lines):
        x, y = left, top + 16 * line
        end = right - rng.randint(0, 20)
        while x < end - 8:
            word = min(rng.randint(14, 40), end - x)
            canvas.rectangle((x, y, x + word, y + 8), ink)
            x += word + 7
