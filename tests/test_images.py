"""Any bytes are either a thumbnail or one fault of the list, and nothing else ever happens."""

import io
import random
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw

from model import images
from model.images import ImageFault

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
FAULTS = {
    *(images.EMPTY, images.TOO_LARGE, images.TOO_MANY_PIXELS, images.NOT_AN_IMAGE, images.UNSUPPORTED_FORMAT),
    *(images.TRUNCATED, images.CORRUPT, images.TOO_COSTLY),
}
ORIENTATION = 0x0112


def thumbnail(data: bytes) -> np.ndarray:
    return images.decode(data)[0]


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
    "progressive CMYK JPEG": encoded(quarters().convert("CMYK"), "JPEG", progressive=True),
    "PNG": encoded(quarters(), "PNG"),
    "PNG with alpha": encoded(quarters().convert("RGBA"), "PNG"),
    "PNG with palette": encoded(quarters().convert("P"), "PNG"),
    "WEBP": encoded(quarters(), "WEBP"),
    "animated PNG": encoded(quarters(), "PNG", save_all=True, append_images=[Image.new("RGB", (120, 80))]),
    "animated WEBP": encoded(quarters(), "WEBP", save_all=True, append_images=[Image.new("RGB", (120, 80))]),
    "lossless WEBP": encoded(quarters(), "WEBP", lossless=True),
    "GIF": encoded(quarters(), "GIF"),
    "animated GIF": encoded(quarters(), "GIF", save_all=True, append_images=[Image.new("RGB", (120, 80))]),
    "BMP": encoded(quarters(), "BMP"),
    "TIFF": encoded(quarters(), "TIFF"),
    "TIFF with LZW": encoded(quarters(), "TIFF", compression="tiff_lzw"),
    "TIFF in CMYK": encoded(quarters().convert("CMYK"), "TIFF", compression="tiff_adobe_deflate"),
    "TIFF with JPEG": encoded(quarters(), "TIFF", compression="jpeg"),
    "BMP with palette": encoded(quarters().convert("P"), "BMP"),
    "PNG larger than ordinary": encoded(quarters((3000, 2000)), "PNG"),
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


def webp_of(width: int, height: int) -> bytes:
    """A WebP that says it is an animation on so large a canvas, and holds nothing."""
    canvas = b"\x02\x00\x00\x00" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", len(canvas)) + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", images.EMPTY),
        (b"\x00" * (images.MAX_BYTES + 1), images.TOO_LARGE),
        (png_of(8193, 8192), images.TOO_MANY_PIXELS),
        (png_of(20_000, 20_000), images.TOO_MANY_PIXELS),
        (png_of(2**31 - 1, 2**31 - 1), images.TOO_MANY_PIXELS),
        (b"<html>404</html>", images.NOT_AN_IMAGE),
        (b"<!-- <svg> --><html>", images.NOT_AN_IMAGE),
        (b"\x00", images.NOT_AN_IMAGE),
        (b"\x00\x00\x00\x20ftypisom", images.NOT_AN_IMAGE),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", images.UNSUPPORTED_FORMAT),
        (b"\xef\xbb\xbf\n<?xml version='1.0'?><svg/>", images.UNSUPPORTED_FORMAT),
        (b"%PDF-1.7", images.UNSUPPORTED_FORMAT),
        (b"%!PS-Adobe-3.0 EPSF-3.0", images.UNSUPPORTED_FORMAT),
        (b"8BPS\x00\x01", images.UNSUPPORTED_FORMAT),
        (b"\x00\x00\x00\x20ftypavif", images.UNSUPPORTED_FORMAT),
        (b"\x00\x00\x00\x20ftypheic", images.UNSUPPORTED_FORMAT),
        (encoded(quarters(), "ICO"), images.UNSUPPORTED_FORMAT),
        (encoded(quarters(), "TGA"), images.UNSUPPORTED_FORMAT),
        (encoded(quarters(), "PPM"), images.UNSUPPORTED_FORMAT),
        (webp_of(1 << 14, 1 << 14), images.TOO_MANY_PIXELS),
        (b"\xff\xd8\xff", images.CORRUPT),
        (b"II*\x00", images.CORRUPT),
        (encoded(noise(), "JPEG")[:2000], images.TRUNCATED),
        (encoded(noise(), "PNG")[:-2000], images.TRUNCATED),
        (encoded(noise(), "BMP")[:-2000], images.TRUNCATED),
        (encoded(noise(), "GIF")[:-2000], images.TRUNCATED),
        (encoded(noise(), "WEBP")[:-2000], images.TRUNCATED),
        (encoded(noise(), "PNG").replace(b"IDAT", b"IDAT\x00\x00\x00\x00", 1), images.CORRUPT),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_used_has_one_fault(data: bytes, fault: str) -> None:
    with pytest.raises(ImageFault) as found:
        thumbnail(data)
    assert found.value.fault == fault


def swapped_profile() -> bytes:
    """A profile in which what others call red is green, and the other way round."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"0000").replace(b"gXYZ", b"rXYZ").replace(b"0000", b"gXYZ")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_profile_says_what_the_colours_are(kind: str) -> None:
    data = encoded(quarters(), kind, icc_profile=swapped_profile())
    assert corners(thumbnail(data)) == [GREEN, RED, BLUE, WHITE]


def test_a_profile_counts_under_transparency() -> None:
    data = encoded(Image.new("RGBA", (10, 10), (*RED, 128)), "PNG", icc_profile=swapped_profile())
    assert thumbnail(data)[32, 32] == pytest.approx((127, 255, 127), abs=2)


def test_a_profile_of_srgb_changes_nothing() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert (thumbnail(encoded(noise(), "PNG", icc_profile=profile)) == thumbnail(encoded(noise(), "PNG"))).all()


@pytest.mark.parametrize(
    "profile", [b"no profile", swapped_profile()[:300], ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()]
)
def test_a_profile_that_cannot_be_used_is_passed_over(profile: bytes) -> None:
    assert corners(thumbnail(encoded(quarters(), "JPEG", icc_profile=profile))) == [RED, GREEN, BLUE, WHITE]


def test_damaged_exif_does_not_cost_the_picture() -> None:
    assert corners(thumbnail(encoded(quarters(), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00"))) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("turn", [1, 6])
def test_a_cut_jpeg_shows_what_is_there_over_grey(mode: str, turn: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    # Dark noise: what is missing is lighter, and the same share of the bytes and of the rows is missing.
    whole = encoded(noise((256, 256)).point(lambda value: value // 4).convert(mode), "JPEG", exif=exif)
    small, status = images.decode(whole[: len(whole) * 3 // 4])
    expected = thumbnail(whole)
    if turn == 6:
        small, expected = np.rot90(small), np.rot90(expected)
    assert status == images.OK_TRUNCATED
    assert np.abs(small[:44].astype(int) - expected[:44]).mean() < 1
    assert (small[52:] > expected[52:] + 10).all()


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_a_cut_jpeg_that_shows_too_little_is_a_fault(share: float) -> None:
    whole = encoded(noise((256, 256)), "JPEG")
    with pytest.raises(ImageFault, match=images.TRUNCATED):
        images.decode(whole[: int(len(whole) * share)])


def test_a_jpeg_without_its_end_shows_all() -> None:
    small, status = images.decode(PICTURES["JPEG"][:-2])
    assert status == images.OK_TRUNCATED and (small == thumbnail(PICTURES["JPEG"])).all()


def test_a_cut_progressive_jpeg_is_used_from_its_first_scan_on() -> None:
    data = encoded(quarters((640, 480)), "JPEG", progressive=True)
    second = data.index(b"\xff\xda", data.index(b"\xff\xda") + 1)
    small, status = images.decode(data[: second + 12])
    assert status == images.OK_TRUNCATED and corners(small) == [RED, GREEN, BLUE, WHITE]
    with pytest.raises(ImageFault, match=images.TRUNCATED):
        images.decode(data[: second - 40])


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Children started in the test are its own."""
    monkeypatch.setattr(images, "_idle", [])
    return monkeypatch


def scan_bomb(scans: int) -> bytes:
    """A progressive JPEG of a few kilobytes for each second that it takes."""
    data = encoded(Image.new("L", (4000, 4000), 128), "JPEG", progressive=True)
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[last:end] * scans + data[end:]


def test_what_takes_too_long_is_stopped(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(images, "_MAX_SECONDS", 0.3)
    with pytest.raises(ImageFault, match=images.TOO_COSTLY):
        images.decode(scan_bomb(20_000))
    assert corners(thumbnail(PICTURES["TIFF"])) == [RED, GREEN, BLUE, WHITE]


def test_what_takes_too_much_memory_is_stopped(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(images, "_MAX_MEMORY", 400 << 20)
    with pytest.raises(ImageFault, match=images.TOO_COSTLY):
        images.decode(encoded(Image.new("P", (8192, 8192)), "PNG", transparency=0))
    assert corners(thumbnail(PICTURES["TIFF"])) == [RED, GREEN, BLUE, WHITE]


def test_a_lost_child_is_replaced(fresh: pytest.MonkeyPatch) -> None:
    expected = thumbnail(PICTURES["TIFF"])
    images._idle[0].kill()
    assert (thumbnail(PICTURES["TIFF"]) == expected).all() and len(images._idle) == 1


def test_a_picture_that_crashes_its_decoder_twice_is_corrupt(fresh: pytest.MonkeyPatch) -> None:
    started, start = [], images._start_child

    def crashing() -> object:
        started.append(start())
        started[-1].kill()
        return started[-1]

    fresh.setattr(images, "_start_child", crashing)
    with pytest.raises(ImageFault, match=images.CORRUPT):
        thumbnail(PICTURES["TIFF"])
    assert len(started) == 2 and images._idle == []


def test_children_that_cannot_start_are_no_fault_of_the_picture(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(images, "_MAX_MEMORY", "nothing")
    with pytest.raises(RuntimeError, match="ended with 1 as it started"):
        thumbnail(PICTURES["TIFF"])


def test_threads_share_children(fresh: pytest.MonkeyPatch) -> None:
    names = ["TIFF", "TIFF with LZW", "PNG larger than ordinary", "JPEG"] * 20
    alone = {name: thumbnail(PICTURES[name]) for name in set(names)}
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda name: thumbnail(PICTURES[name]), names))
    assert all((alone[name] == small).all() for name, small in zip(names, together, strict=True))
    assert 1 <= len(images._idle) <= 4


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
