"""From an image's bytes to its thumbnail, or to one fault of a closed list."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

THUMBNAIL_SIZE = 64
THUMBNAIL_BYTES = THUMBNAIL_SIZE * THUMBNAIL_SIZE * 3
MAX_BYTES = 32 << 20
MAX_PIXELS = 64 << 20
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# What a row's `image_status` may say: OK, NO_IMAGE (the row names none), or a fault of the image that it names.
OK = "ok"
NO_IMAGE = "no_image"
MISSING = "missing"
EMPTY = "empty"
TOO_LARGE = "too_large"
TOO_MANY_PIXELS = "too_many_pixels"
NOT_AN_IMAGE = "not_an_image"
TRUNCATED = "truncated"
CORRUPT = "corrupt"


class ImageFault(ValueError):
    """An image that cannot be used; `fault` is one of the module's list."""

    def __init__(self, fault: str):
        super().__init__(fault)
        self.fault = fault


def thumbnail(data: bytes) -> np.ndarray:
    """The picture squeezed to a square, shape (64, 64, 3), dtype uint8, sRGB; transparency lies over white.

    Bytes and pixels are checked from the header, before anything is decoded.

    Raises:
        ImageFault: it cannot be used, and why.
    """
    if not data:
        raise ImageFault(EMPTY)
    if len(data) > MAX_BYTES:
        raise ImageFault(TOO_LARGE)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageFault(TOO_MANY_PIXELS)
            return _squeezed(image)
    except UnidentifiedImageError:
        raise ImageFault(NOT_AN_IMAGE) from None
    except Image.DecompressionBombError:
        raise ImageFault(TOO_MANY_PIXELS) from None
    except OSError as error:
        raise ImageFault(TRUNCATED if "truncated" in str(error) else CORRUPT) from None
    except ImageFault:
        raise
    # What Pillow's decoders raise on bytes that are not what their headers say.
    except (SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, OverflowError, struct.error, zlib.error, MemoryError):
        raise ImageFault(CORRUPT) from None


def _squeezed(image: Image.Image) -> np.ndarray:
    # A JPEG decodes at a fraction of its size for a fraction of the work.
    image.draft("RGB", (2 * THUMBNAIL_SIZE, 2 * THUMBNAIL_SIZE))
    picture = ImageOps.exif_transpose(image)
    if picture.mode.startswith("I;16"):
        # Pillow would clip 16 bits to 8, which leaves little but white.
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return np.asarray(picture.convert("RGB").resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BOX))
