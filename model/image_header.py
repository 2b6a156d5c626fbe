"""What an image's first bytes say of it, before any decoder sees them."""

import numpy as np

# The first bytes, and what begins so. The decoders' names are Pillow's.
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    # Both byte orders, BigTIFF too, and two headers that careless writers make and every reader takes.
    *((magic, "TIFF") for magic in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"II\0*", b"MM*\0")),
    (b"\0\0\1\0", "ICO"),
    (b"\0\0\2\0", "CUR"),
    (b"8BPS", "PSD"),
    (b"%PDF-", "PDF"),
    (b"%!PS", "EPS"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"DDS ", "DDS"),
    (b"qoif", "QOI"),
    (b"icns", "ICNS"),
    (b"gimp xcf", "XCF"),
    (b"v/1\1", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"\xd7\xcd\xc6\x9a", "WMF"),
    (b"\x8aMNG\r\n\x1a\n", "MNG"),
    *((b"P" + bytes([digit, space]), "PNM") for digit in b"1234567" for space in b" \t\r\n"),
)
# Brands of still pictures in the container that MP4 uses.
_STILL_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")


def kind(data: bytes) -> str | None:
    """The image format that the bytes say they are: Pillow's name where we decode it; None where they are no image that we know."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp" and data[8:12] in _STILL_BRANDS:
        return "HEIF"
    found = next((name for magic, name in _MAGIC if data.startswith(magic)), None)
    if found is None and data.endswith(b"TRUEVISION-XFILE.\0"):
        return "TGA"
    text = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if found is None and text.startswith((b"<svg", b"<?xml", b"<!doctype svg", b"<!--")) and b"<svg" in text and b"<html" not in text:
        return "SVG"
    return found


def webp_pixels(data: bytes) -> int:
    """Pixels of a WebP's canvas by its header; libwebp makes room for it as soon as it is opened."""

    def number(start: int, end: int) -> int:
        return int.from_bytes(data[start:end], "little")

    if data[12:16] == b"VP8X":
        return (number(24, 27) + 1) * (number(27, 30) + 1)
    if data[12:16] == b"VP8L":
        return ((number(21, 25) & 0x3FFF) + 1) * ((number(21, 25) >> 14 & 0x3FFF) + 1)
    return (number(26, 28) & 0x3FFF) * (number(28, 30) & 0x3FFF)


def webp_is_cut(data: bytes) -> bool:
    """Whether a WebP's bytes end before its header says that they do."""
    return len(data) < 8 + int.from_bytes(data[4:8], "little")


def scans(data: bytes) -> int:
    """Scans of a JPEG, an embedded preview's among them: inside a scan's own data no 0xFF comes before a marker's byte."""
    # NumPy takes a quarter of the time of `bytes.count`, and other threads run meanwhile.
    array = np.frombuffer(data, np.uint8)
    return int(np.count_nonzero((array[:-1] == 0xFF) & (array[1:] == 0xDA)))
