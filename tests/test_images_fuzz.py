"""Odd and mutated images, looked at in a process of their own, so that a crash or a hang is a failure here.

`ADSTOCRAT_ODD_IMAGES` names a folder of more odd files; `ADSTOCRAT_LONG` makes the fuzz ten times as long.
"""

import io
import json
import os
import pathlib
import random
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from model import images

TOP = pathlib.Path(__file__).resolve().parent.parent
MUTATIONS = 5000 if os.environ.get("ADSTOCRAT_LONG") else 500
WARM = MUTATIONS // 10
MAX_SECONDS, MAX_MEMORY, MAX_GROWTH = 2.0, 3 << 29, 100 << 20
PNG = b"\x89PNG\r\n\x1a\n"


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (150, 110)) -> Image.Image:
    small = Image.frombytes("RGB", (15, 11), random.Random(3).randbytes(15 * 11 * 3))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def deep_png() -> bytes:
    """16 bits to a channel, with alpha, interlaced."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 6, 0, 0, 1))
    # Adam7's passes of an 8 x 8 picture: width and height of each.
    lines = [(1, 1), (1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4)]
    rows = b"".join((b"\0" + b"\xff\xff\x80\x00\x00\x00\x80\x00" * width) * height for width, height in lines)
    return PNG + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def odd_files() -> dict[str, tuple[bytes, str]]:
    """Name → bytes and status."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"0000").replace(b"gXYZ", b"rXYZ").replace(b"0000", b"gXYZ")
    exif = Image.Exif()
    exif[0x0112] = 8
    rgb, rgba, jpeg = noise(), noise("RGBA"), encoded(noise(), "JPEG")
    rgba.putalpha(noise("L"))
    lab = ImageCms.profileToProfile(rgb, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
    bomb = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 6, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
    text = encoded(rgb, "PNG")
    text = text[:33] + chunk(b"zTXt", b"bomb\0\0" + zlib.compress(bytes(80 << 20))) + text[33:]
    return {
        "cmyk-progressive.jpg": (encoded(noise("CMYK"), "JPEG", progressive=True), images.OK),
        "grey-turned.jpg": (encoded(noise("L"), "JPEG", exif=exif), images.OK),
        "swapped-profile.jpg": (encoded(rgb, "JPEG", icc_profile=swapped), images.OK),
        "no-profile.jpg": (encoded(rgb, "JPEG", icc_profile=b"\0" * 200), images.OK),
        "bad-exif.jpg": (encoded(rgb, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f"), images.OK),
        "cut-late.jpg": (jpeg[: len(jpeg) * 4 // 5], images.OK_TRUNCATED),
        "cut-early.jpg": (jpeg[: len(jpeg) * 2 // 5], images.TRUNCATED),
        "alpha-profile.png": (encoded(rgba, "PNG", icc_profile=swapped), images.OK),
        "palette.png": (encoded(noise("P"), "PNG", transparency=3, bits=8), images.OK),
        "grey16.png": (encoded(Image.fromarray(np.asarray(noise("L")).astype(np.uint16) << 8), "PNG"), images.OK),
        "deep.png": (deep_png(), images.OK),
        "animated.png": (encoded(rgba, "PNG", save_all=True, append_images=[rgba.rotate(90)]), images.OK),
        "bomb.png": (PNG + bomb + chunk(b"IEND", b""), images.TOO_MANY_PIXELS),
        "bomb-in-text.png": (text, images.CORRUPT),
        "animated.webp": (encoded(rgba, "WEBP", save_all=True, append_images=[rgba.rotate(90)]), images.OK),
        "animated.gif": (encoded(noise("P"), "GIF", save_all=True, append_images=[noise("P").rotate(90)], transparency=2), images.OK),
        "grey.bmp": (encoded(noise("1"), "BMP"), images.OK),
        "lab.tif": (encoded(lab, "TIFF"), images.OK),
        "cmyk-turned.tif": (encoded(noise("CMYK"), "TIFF", compression="tiff_lzw", exif=exif), images.OK),
        "fax.tif": (encoded(noise("1"), "TIFF", compression="group4"), images.OK),
        "cut.tif": (encoded(rgb, "TIFF", compression="tiff_adobe_deflate")[:-3000], images.CORRUPT),
        "icon.ico": (encoded(rgb, "ICO"), images.UNSUPPORTED_FORMAT),
        "page.jpg": (b"<!doctype html><title>404</title>", images.NOT_AN_IMAGE),
    }  # fmt: skip


def pillow_reading(path: pathlib.Path) -> np.ndarray | None:
    """The thumbnail by Pillow's full decoding; None where Pillow does not open the file without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            with Image.open(path) as image:
                picture = ImageOps.exif_transpose(image)
        except (OSError, SyntaxError, ValueError, Warning, Image.DecompressionBombError):
            return None
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    alpha = None
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        alpha = picture.convert("RGBA").getchannel("A")
    if picture.mode not in ("RGB", "L", "CMYK"):
        picture = picture.convert("RGBA").convert("RGB") if alpha else picture.convert("RGB")
    if profile := picture.info.get("icc_profile"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            picture = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (OSError, ImageCms.PyCMSError):
            # Not a profile of this picture's colours.
            pass
    picture = picture.convert("RGB")
    if alpha:
        picture = Image.composite(picture, Image.new("RGB", picture.size, "white"), alpha)
    return np.asarray(picture.resize((64, 64), Image.Resampling.BOX))


def memory(field: str) -> int:
    """Bytes of this process and the children that decode: VmRSS, or VmHWM, the most that each ever had."""
    total = 0
    for process in ["self", *(child.pid for child in images._idle)]:
        lines = pathlib.Path(f"/proc/{process}/status").read_text().splitlines()
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith(field))
    return total


def status_of(data: bytes) -> tuple[str, np.ndarray | None]:
    try:
        thumbnail, status = images.decode(data)
    except images.ImageFault as fault:
        return fault.fault, None
    return status, thumbnail


def look_at_folder(folder: pathlib.Path) -> dict:
    """Statuses by name, the longest time, the most memory, and by name how far thumbnails are from Pillow's reading (null: it has none)."""
    seen, seconds = {}, {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        started = time.monotonic()
        seen[path] = status_of(data)
        seconds[path.name] = time.monotonic() - started
    most = memory("VmHWM")
    distances: dict[str, float | None] = {}
    for path, (status, thumbnail) in seen.items():
        expected = pillow_reading(path) if status not in (images.UNSUPPORTED_FORMAT, images.TOO_MANY_PIXELS) else None
        if expected is not None:
            distances[path.name] = None if thumbnail is None else float(np.abs(thumbnail.astype(int) - expected).mean())
    statuses = {path.name: status for path, (status, _) in seen.items()}
    return {"statuses": statuses, "slowest": max((s, name) for name, s in seconds.items()), "memory": most, "distances": distances}


def checked(data: bytearray) -> bytearray:
    """A PNG whose chunks' checksums are right again, so that more than the checksum is tested."""
    at = 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        data[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return data


def mutated(originals: list[bytes], source: random.Random) -> bytes:
    """An image with flipped bits, overwritten words, another's header, a cut, or several of these."""
    data = bytearray(source.choice(originals))

    def flip() -> None:
        for _ in range(source.choice((1, 4, 40))):
            data[source.randrange(source.choice((len(data), min(len(data), 300))))] ^= 1 << source.randrange(8)

    def overwrite() -> None:
        at = source.randrange(min(len(data), 300))
        data[at : at + 4] = source.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\xff\xff", source.randbytes(4)))

    def swap() -> None:
        other, length = source.choice(originals), source.choice((8, 30, 200))
        data[:length] = other[:length]

    def cut() -> None:
        del data[source.randrange(len(data)) :]

    kinds: list[Callable[[], None]] = [flip, overwrite, swap, cut]
    for mutate in source.sample(kinds, source.choice((1, 1, 2))):
        if data:
            mutate()
    return bytes(checked(data) if data[:8] == PNG and source.random() < 0.8 else data)


def fuzz(folder: pathlib.Path, last: pathlib.Path) -> dict:
    """Statuses of mutated images, the longest time, and memory after a tenth and after all; `last` holds the newest image's bytes."""
    originals = [path.read_bytes() for path in sorted(folder.iterdir()) if path.stat().st_size <= 200_000]
    source, statuses, slowest, after = random.Random(5), Counter[str](), 0.0, 0
    for number in range(MUTATIONS):
        data = mutated(originals, source)
        last.write_bytes(data)
        started = time.monotonic()
        statuses[status_of(data)[0]] += 1
        slowest = max(slowest, time.monotonic() - started)
        if number == WARM:
            after = memory("VmRSS")
    return {"statuses": statuses, "slowest": slowest, "memory": [after, memory("VmRSS")]}


def in_a_process(*arguments: object, timeout: float) -> dict:
    command = [sys.executable, "-W", "ignore", "-m", "tests.test_images_fuzz", *map(str, arguments)]
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stderr[-2000:]}"
    print(done.stdout)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("odd")
    for name, (data, _) in odd_files().items():
        (folder / name).write_bytes(data)
    return folder


def check(found: dict) -> None:
    faults = {images.EMPTY, images.TOO_LARGE, images.NOT_AN_IMAGE, images.UNSUPPORTED_FORMAT, images.TOO_MANY_PIXELS, images.TRUNCATED}
    assert set(found["statuses"].values()) <= {*images.USABLE, *faults, images.CORRUPT, images.TOO_COSTLY}
    assert found["slowest"][0] <= MAX_SECONDS
    assert found["memory"] <= MAX_MEMORY
    near = [name for name, distance in found["distances"].items() if distance is not None and distance <= 3]
    assert len(near) >= 0.98 * len(found["distances"]), {name: d for name, d in found["distances"].items() if name not in near}


def test_odd_files_of_our_own(own: pathlib.Path) -> None:
    found = in_a_process("folder", own, timeout=120)
    assert found["statuses"] == {name: status for name, (_, status) in odd_files().items()}
    assert len(found["distances"]) >= 15
    check(found)


@pytest.mark.skipif("ADSTOCRAT_ODD_IMAGES" not in os.environ, reason="ADSTOCRAT_ODD_IMAGES names no folder")
def test_odd_files_of_others() -> None:
    folder = pathlib.Path(os.environ["ADSTOCRAT_ODD_IMAGES"])
    found = in_a_process("folder", folder.resolve(), timeout=600)
    assert len(found["statuses"]) == len(list(folder.iterdir())) > 0
    check(found)


def test_mutated_images_end_as_a_thumbnail_or_a_fault(own: pathlib.Path, tmp_path: pathlib.Path) -> None:
    last = tmp_path / "last"
    found = in_a_process("fuzz", own, last, timeout=60 + MUTATIONS)
    assert {images.OK, images.OK_TRUNCATED, images.TRUNCATED, images.CORRUPT, images.NOT_AN_IMAGE} <= set(found["statuses"])
    assert found["slowest"] <= 10
    first, end = found["memory"]
    assert end <= first + MAX_GROWTH


if __name__ == "__main__":
    task, *paths = sys.argv[1:]
    print(json.dumps({"folder": look_at_folder, "fuzz": fuzz}[task](*map(pathlib.Path, paths))))
