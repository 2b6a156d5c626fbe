"""From an image's bytes to its thumbnail, or to one fault of a closed list.

No bytes can crash or hang this process, or take it over its memory: an ordinary picture is decoded here, and one that is large, or of a
format whose decoder has a history of crashes, in a child process that may be lost.
"""

import contextlib
import functools
import io
import os
import pathlib
import resource
import signal
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageFile

from model import image_header

THUMBNAIL_SIZE = 64
THUMBNAIL_BYTES = THUMBNAIL_SIZE * THUMBNAIL_SIZE * 3
MAX_BYTES = 32 << 20
MAX_PIXELS = 64 << 20
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# What a row's `image_status` may say: one of USABLE, NO_IMAGE (the row names none), or a fault of the image that it names.
OK = "ok"
OK_TRUNCATED = "ok_truncated"
USABLE = (OK, OK_TRUNCATED)
NO_IMAGE = "no_image"
MISSING = "missing"
EMPTY = "empty"
TOO_LARGE = "too_large"
TOO_MANY_PIXELS = "too_many_pixels"
NOT_AN_IMAGE = "not_an_image"
UNSUPPORTED_FORMAT = "unsupported_format"
TRUNCATED = "truncated"
CORRUPT = "corrupt"
TOO_COSTLY = "too_costly"

# Up to here a picture takes at most some tens of megabytes and well under a second, whatever its bytes are.
_ORDINARY_BYTES = 1 << 20
_ORDINARY_PIXELS = 4 << 20
_ORDINARY_SCANS = 32
# What decoding one picture may take of a child: seconds of its processor, and its address space.
_MAX_SECONDS = 20.0
_MAX_MEMORY = 3 << 29
_MAX_PROFILE = 2 << 20
_READY = b"ready\n"
# What Pillow's decoders raise on bytes that are not what their headers say.
_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, AssertionError, struct.error, zlib.error)
_PROGRESSIVE, _END = b"\xff\xc2", b"\xff\xd9"
_PROFILE_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
_SRGB = ImageCms.createProfile("sRGB")
_COLOURS = np.stack(np.meshgrid(*[np.arange(0, 256, 15, dtype=np.uint8)] * 3), -1).reshape(18, -1, 3)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageFault(ValueError):
    """An image that cannot be used; `fault` is one of the module's list."""

    def __init__(self, fault: str):
        super().__init__(fault)
        self.fault = fault


def decode(data: bytes) -> tuple[np.ndarray, str]:
    """The picture squeezed to a square, and its status: OK, or OK_TRUNCATED for a cut JPEG that shows at least half of its rows.

    The thumbnail has shape (64, 64, 3), dtype uint8, and is sRGB; what is transparent is white, what was cut off grey. Bytes and pixels are
    checked from the header, before anything is decoded.

    Raises:
        ImageFault: it cannot be used, and why.
    """
    if not data:
        raise ImageFault(EMPTY)
    if len(data) > MAX_BYTES:
        raise ImageFault(TOO_LARGE)
    kind = image_header.kind(data)
    if kind not in FORMATS:
        raise ImageFault(UNSUPPORTED_FORMAT if kind else NOT_AN_IMAGE)
    if kind == "WEBP" and image_header.webp_pixels(data) > MAX_PIXELS:
        raise ImageFault(TOO_MANY_PIXELS)
    if kind == "WEBP" and image_header.webp_is_cut(data):
        raise ImageFault(TRUNCATED)
    if kind == "TIFF" or len(data) > _ORDINARY_BYTES or (kind == "JPEG" and image_header.scans(data) > _ORDINARY_SCANS):
        return _decode_apart(data)
    return _decode(data, kind, _ORDINARY_PIXELS) or _decode_apart(data)


def aspect(data: bytes) -> float:
    """Width over height, as stored, of bytes that `decode` takes; from their header."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return image.width / image.height


def _decode(data: bytes, kind: str, most_pixels: int) -> tuple[np.ndarray, str] | None:
    """See `decode`; None where the picture has more than `most_pixels`, and yet not too many."""
    try:
        with Image.open(io.BytesIO(data), formats=(kind,)) as image:
            pixels = image.width * image.height
            if pixels > MAX_PIXELS:
                raise ImageFault(TOO_MANY_PIXELS)
            if pixels > most_pixels:
                return None
            if kind != "JPEG":
                image.load()
                return _squeezed(image), OK
            # A JPEG decodes at a fraction of its size for a fraction of the work.
            image.draft("RGB", (2 * THUMBNAIL_SIZE, 2 * THUMBNAIL_SIZE))
            status = _load_jpeg(image, data)
            return _squeezed(image), status
    except ImageFault:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageFault(TOO_MANY_PIXELS) from None
    except MemoryError:
        raise ImageFault(TOO_COSTLY) from None
    except _DAMAGE as error:
        raise ImageFault(TRUNCATED if "truncated" in str(error).lower() else CORRUPT) from None


def _load_jpeg(image: ImageFile.ImageFile, data: bytes) -> str:
    """Load an opened JPEG; of one that ends too early what is there, and below it the decoder's grey.

    Raises:
        OSError: it shows less than half of its rows, or cannot be decoded.
    """
    try:
        image.load()
        return OK
    except OSError as error:
        if "truncated" not in str(error) or not _shows_half(image, data):
            raise
    image.fp = io.BytesIO(data + _END)
    image.load()
    return OK_TRUNCATED


def _shows_half(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Whether a JPEG that ends too early shows half of its rows."""
    if image.info.get("progressive"):
        # All rows are there with the first of its scans, however coarse.
        return image_header.scans(data[data.rfind(_PROGRESSIVE) :]) > 1
    # Rows that the decoder does not reach keep a value that no picture is full of.
    untouched = Image.new(image.mode, image.size, 1)
    image.im = untouched.im.copy()
    with contextlib.suppress(OSError):
        image.load()
    reached = Image.new(image.mode, image.size)
    reached.im = image.im
    same = np.asarray(reached).reshape(image.height, -1) == np.asarray(untouched).reshape(image.height, -1)
    return 2 * int(np.count_nonzero(same.all(axis=1))) <= image.height


def _squeezed(image: Image.Image) -> np.ndarray:
    """A loaded picture's thumbnail. What can be done after squeezing is done then, when it costs next to nothing."""
    profile, turn, picture = image.info.get("icc_profile"), _TURNS.get(_orientation(image)), image
    if picture.mode.startswith("I;16"):
        # Pillow would clip 16 bits to 8, which leaves little but white.
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    elif "transparency" in picture.info or picture.mode == "PA":
        picture = picture.convert("RGBA")
    elif picture.mode in ("1", "P"):
        # Pillow would squeeze these without averaging.
        picture = picture.convert("RGB")
    small = picture.resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BOX)
    alpha = small.getchannel("A") if small.mode in ("RGBA", "LA") else None
    small = _in_srgb(small.convert(small.mode.removesuffix("A")) if alpha else small, profile)
    if alpha:
        small = Image.composite(small, Image.new("RGB", small.size, "white"), alpha)
    return np.asarray(small.transpose(turn) if turn is not None else small)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DAMAGE:
        return 1


def _in_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """The picture in RGB, by its profile where it has one that can be used."""
    if profile and len(profile) <= _MAX_PROFILE and picture.mode in _PROFILE_SPACES:
        transform = _transform(profile, picture.mode)
        if transform:
            return transform.apply(picture)
    return picture.convert("RGB")


@functools.lru_cache(16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _PROFILE_SPACES[mode]:
            return None
        # Threads share it, so it keeps no last pixel.
        transform = ImageCms.buildTransform(source, _SRGB, mode, "RGB", flags=ImageCms.Flags.NOCACHE)
        # Most profiles are sRGB under one name or another.
        same = mode == "RGB" and np.allclose(np.asarray(transform.apply(Image.fromarray(_COLOURS))), _COLOURS, rtol=0, atol=1)
        return None if same else transform
    except (ImageCms.PyCMSError, *_DAMAGE):
        return None


# Children that wait for a picture. Few, since each may take _MAX_MEMORY.
_idle: list[subprocess.Popen] = []
_slots = threading.BoundedSemaphore(min(4, os.cpu_count() or 1))


def _decode_apart(data: bytes) -> tuple[np.ndarray, str]:
    """See `decode`; in a child process."""
    with _slots:
        # A child may have been lost to something else than this picture: only the second loss is held against it.
        for _ in range(2):
            child = _idle.pop() if _idle else _start_child()
            assert child.stdin and child.stdout
            status, pixels = "", b""
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(struct.pack(">I", len(data)) + data)
                child.stdin.flush()
                status = child.stdout.readline().decode().strip()
                pixels = child.stdout.read(THUMBNAIL_BYTES) if status in USABLE else b""
            if len(pixels) == THUMBNAIL_BYTES * (status in USABLE) and status:
                _idle.append(child)
                if status in USABLE:
                    return np.frombuffer(pixels, np.uint8).reshape(THUMBNAIL_SIZE, THUMBNAIL_SIZE, 3), status
                raise ImageFault(status)
            with contextlib.suppress(BrokenPipeError), child:
                pass
            if child.returncode == -signal.SIGPROF:
                raise ImageFault(TOO_COSTLY)
    raise ImageFault(CORRUPT)


def _start_child() -> subprocess.Popen:
    path = os.pathsep.join((str(pathlib.Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")))
    # NumPy would set memory aside for a thread on each core.
    environment = {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-W", "ignore", "-c", f"from model import images; images.serve({_MAX_SECONDS}, {_MAX_MEMORY})"]
    child = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdout
    # Else each picture would be taken for a corrupt one.
    if child.stdout.readline() != _READY:
        raise RuntimeError(f"the process that decodes large images ended with {child.wait()} as it started; try it: {command}")
    return child


def serve(seconds: float, memory: int) -> None:
    """A child's life: length and bytes of an image in; its status and, where that is usable, its thumbnail out.

    Args:
        seconds: of processor time for an image; the process ends with the first that takes more.
        memory: bytes that its address space may have.
    """
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout.buffer.write(_READY)
    sys.stdout.buffer.flush()
    while size := sys.stdin.buffer.read(4):
        data, pixels = sys.stdin.buffer.read(*struct.unpack(">I", size)), b""
        # The signal ends the process, in whichever library it is.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            found = _decode(data, image_header.kind(data) or "", MAX_PIXELS)
            assert found
            pixels, status = found[0].tobytes(), found[1]
        except ImageFault as fault:
            status = fault.fault
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(status.encode() + b"\n" + pixels)
        sys.stdout.buffer.flush()
