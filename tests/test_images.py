"""Any bytes are either a thumbnail or one fault of the list, and nothing else ever happens."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw

from model import images
from model.images import ImageFault, thumbnail

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
FAULTS = {images.EMPTY, images.TOO_LARGE, images.TOO_MANY_PIXELS, images.NOT_AN_IMAGE, images.TRUNCATED, images.CORRUPT}
ORIENTATION = 0x0112


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def quarters(size: tuple[int, int] = (120, 80)) -> Image.Image:
    """Red, green, blue and white, from the top left, row by row."""
    picture, (width, height) = Image.new("RGB", size, RED), size
    draw = ImageDraw.Draw(picture)
    draw.rectangle((width // 2, 0, width, height // 2 - 1), GREEN)
    draw.rectangle((0, height // 2, width // 2 - 1, height), BLUE)
    draw.rectangle((width // 2, height // 2, width, height), WHITE)
    return picture


def corners(small: np.ndarray) -> list[tuple[int, ...]]:
    """The colours in the middle of the four quarters, rounded to what survives lossy formats."""
    return [tuple(round(value / 255) * 255 for value in small[row, column]) for row in (16, 48) for column in (16, 48)]


def noise(size: tuple[int, int] = (90, 70)) -> Image.Image:
    return Image.frombytes("RGB", size, random.Random(1).randbytes(size[0] * size[1] * 3))


PICTURES = {
    "JPEG": encoded(quarters(), "JPEG"),
    "progressive JPEG": encoded(quarters(), "JPEG", progressive=True),
    "CMYK JPEG": encoded(quarters().convert("CMYK"), "JPEG"),
    "PNG": encoded(quarters(), "PNG"),
    "PNG with alpha": encoded(quarters().convert("RGBA"), "PNG"),
    "PNG with palette": encoded(quarters().convert("P"), "PNG"),
    "WEBP": encoded(quarters(), "WEBP"),
    "lossless WEBP": encoded(quarters(), "WEBP", lossless=True),
    "GIF": encoded(quarters(), "GIF"),
    "animated GIF": encoded(quarters(), "GIF", save_all=True, append_images=[Image.new("RGB", (120, 80))]),
    "BMP": encoded(quarters(), "BMP"),
    "TIFF": encoded(quarters(), "TIFF"),
    "TIFF with LZW": encoded(quarters(), "TIFF", compression="tiff_lzw"),
    "large JPEG": encoded(quarters((2400, 1600)), "JPEG"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_format_becomes_the_same_thumbnail(name: str) -> None:
    small = thumbnail(PICTURES[name])
    assert (small.shape, small.dtype, small.nbytes) == ((64, 64, 3), np.uint8, images.THUMBNAIL_BYTES)
    assert corners(small) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (3, 500), (500, 3)])
def test_any_shape_is_squeezed_to_a_square(size: tuple[int, int]) -> None:
    small = thumbnail(encoded(Image.new("RGB", size, BLUE), "PNG"))
    assert (small == BLUE).all()


def test_a_thumbnail_comes_back_from_a_thumbnail() -> None:
    small = thumbnail(encoded(noise(), "PNG"))
    assert (thumbnail(encoded(Image.fromarray(small), "PNG")) == small).all()


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, [RED, GREEN, BLUE, WHITE]),
        (2, [GREEN, RED, WHITE, BLUE]),
        (3, [WHITE, BLUE, GREEN, RED]),
        (4, [BLUE, WHITE, RED, GREEN]),
        (5, [RED, BLUE, GREEN, WHITE]),
        (6, [BLUE, RED, WHITE, GREEN]),
        (7, [WHITE, GREEN, BLUE, RED]),
        (8, [GREEN, WHITE, RED, BLUE]),
        (9, [RED, GREEN, BLUE, WHITE]),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_is_turned_as_its_exif_says(kind: str, orientation: int, expected: list[tuple[int, ...]]) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    assert corners(thumbnail(encoded(quarters(), kind, exif=exif))) == expected


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(("alpha", "expected"), [(0, (255, 255, 255)), (255, (255, 0, 0)), (128, (255, 127, 127))])
def test_transparency_lies_over_white(kind: str, alpha: int, expected: tuple[int, ...]) -> None:
    small = thumbnail(encoded(Image.new("RGBA", (10, 10), (*RED, alpha)), kind, lossless=True))
    assert small[32, 32] == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(("mode", "colour", "transparent"), [("P", 0, 0), ("L", 7, 7), ("RGB", (1, 2, 3), (1, 2, 3))])
def test_a_transparent_colour_is_white(mode: str, colour: int, transparent: int) -> None:
    assert (thumbnail(encoded(Image.new(mode, (10, 10), colour), "PNG", transparency=transparent)) == 255).all()


@pytest.mark.parametrize(("mode", "colour", "expected"), [("L", 128, 128), ("LA", (0, 128), 127), ("1", 1, 255), ("I;16", 0x8000, 128)])
def test_grey_is_grey(mode: str, colour: int, expected: int) -> None:
    assert thumbnail(encoded(Image.new(mode, (10, 10), colour), "PNG"))[32, 32] == pytest.approx([expected] * 3, abs=1)


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and holds nothing."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", images.EMPTY),
        (b"\x00" * (images.MAX_BYTES + 1), images.TOO_LARGE),
        (png_of(8193, 8192), images.TOO_MANY_PIXELS),
        (png_of(20_000, 20_000), images.TOO_MANY_PIXELS),
        (png_of(2**31 - 1, 2**31 - 1), images.TOO_MANY_PIXELS),
        (b"<html>404</html>", images.NOT_AN_IMAGE),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", images.NOT_AN_IMAGE),
        (b"%PDF-1.7", images.NOT_AN_IMAGE),
        (b"\x00", images.NOT_AN_IMAGE),
        (encoded(quarters(), "PPM"), images.NOT_AN_IMAGE),
        (encoded(noise(), "JPEG")[:-2000], images.TRUNCATED),
        (encoded(noise(), "PNG")[:-2000], images.TRUNCATED),
        (encoded(noise(), "BMP")[:-2000], images.TRUNCATED),
        (encoded(noise(), "GIF")[:-2000], images.TRUNCATED),
        (encoded(noise(), "WEBP")[:-2000], images.CORRUPT),
        (encoded(noise(), "PNG").replace(b"IDAT", b"IDAT\x00\x00\x00\x00", 1), images.CORRUPT),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_used_has_one_fault(data: bytes, fault: str) -> None:
    with pytest.raises(ImageFault) as found:
        thumbnail(data)
    assert found.value.fault == fault


def test_a_picture_of_as_many_bytes_as_allowed_is_looked_at() -> None:
    data = encoded(Image.new("RGB", (10, 10), BLUE), "JPEG")
    assert thumbnail(data + b"\x00" * (images.MAX_BYTES - len(data))).shape == (64, 64, 3)


@pytest.mark.filterwarnings("ignore")
def test_damaged_pictures_are_faults_and_never_other_exceptions() -> None:
    source = random.Random(11)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    originals = [*PICTURES.values(), *(encoded(noise(), kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP", "TIFF"))]
    found = set()
    for _ in range(300):
        data = bytearray(source.choice(originals))
        for _ in range(source.choice((1, 3, 30))):
            data[source.randrange(source.choice((len(data), min(200, len(data)))))] = source.randrange(256)
        if source.random() < 0.3:
            del data[source.randrange(len(data)) :]
        try:
            assert thumbnail(bytes(data)).shape == (64, 64, 3)
        except ImageFault as fault:
            found.add(fault.fault)
    assert found <= FAULTS
    assert {images.NOT_AN_IMAGE, images.TRUNCATED, images.CORRUPT} <= found
