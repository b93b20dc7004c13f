"""Bytes to RGB: the right picture, or one clear error. H height, W width, C channels."""

from __future__ import annotations

import io
import os
import stat
import struct
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Num, Shaped, UInt8
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2"}
    # not read, but a photo nonetheless: a row that says so is better than silence
    | {".heic", ".heif", ".avif", ".jxl", ".dng", ".cr2", ".nef", ".arw"}
)
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000")
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0")
DEEP_TIFF = {(1, 10), (1, 12), (1, 14), (1, 16), (1, 32), (2, 16), (2, 32), (3, 32), (3, 64)}  # sample format, bits
ORIENTATION = 0x0112  # EXIF tag
FULL_SCALES = (2**8 - 1, 2**10 - 1, 2**12 - 1, 2**14 - 1, 2**16 - 1)

# Pillow warns, and `warnings.catch_warnings` is not safe between threads: what Pillow decodes, it decodes in turn.
_PILLOW = threading.Lock()

# OpenCV's failures come back as None or as an exception; the log would repeat them without the file's name.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
MAX_PIXELS, MAX_BYTES = 100_000_000, 512 * 2**20  # of one file; callers may ask for more
LARGE = 64_000_000  # pixels of a picture that is better held on the disk


class ImageError(ValueError):
    """An image that cannot be read: what, expected, received, what to do; one line, without the path."""


@dataclass(frozen=True)
class Photo:
    """A picture, upright and opaque: `rgb` in 0..255; `note` says what was done to it, or is empty."""

    rgb: UInt8[np.ndarray, "H W 3"]
    note: str = ""


def read_image(
    source: str | os.PathLike | bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    spill: Path | None = None,
) -> Photo:
    """Read a file, or its bytes, as RGB (H, W, 3) uint8 in 0..255, turned upright as its EXIF says.

    The content decides the format, not the name. Values are scaled, never clipped:

    - Up to 8 bits: full scale is 255, as the file has it.
    - Integers of more bits: full scale is the smallest of 255, 1023, 4095, 16383 and 65535 that holds the largest
      value of all colour channels together (cameras store 10, 12 or 14 bits in 16).
    - Floats within [0, 1]: times 255. Other floats, and integers below zero or above 65535: linearly from the
      image's own minimum and maximum to 0..255; black where the two are equal.

    Transparency is laid over white; of several frames the first is taken; CMYK is converted without a profile.
    Given `spill`, the pixels of a JPEG or PNG of more than `LARGE` of them go into that new file and are mapped from it:
    half the memory.

    Raises ImageError for what is no regular file, no image, damaged or cut short, more than `max_bytes`, more than
    `max_pixels` by its header (before anything is decoded), of an unsupported kind, or holds NaN or infinity. Above
    179 million pixels Pillow's own limit stands, whatever `max_pixels` says, for what Pillow reads: not JPEG.

    >>> twelve_bits = cv2.imencode(".png", np.array([[0, 2048, 4095]], np.uint16))[1].tobytes()
    >>> photo = read_image(twelve_bits)
    >>> photo.rgb[..., 0].tolist(), photo.note
    ([[0, 128, 255]], '16-bit: 0..4095 scaled to 0..255')
    """
    data = source if isinstance(source, bytes) else _read_bytes(source, max_bytes)
    _check_cap(len(data), max_bytes, "bytes")
    try:
        size = _ordinary_size(data)
        if size is not None:
            _check_cap(size[0] * size[1], max_pixels, "pixels")
            large = spill if size[0] * size[1] > LARGE else None
            rgb = _spilled(data, large) if large else None
            return Photo(_imdecode(data, cv2.IMREAD_COLOR_RGB, size) if rgb is None else rgb)
        with _PILLOW, warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            decode = _decode_tiff if data.startswith(TIFF_STARTS) else _decode
            rgb, frames, *notes = decode(data, max_pixels)
        notes = [f"first of {frames} frames"] * (frames > 1) + notes
        return Photo(np.ascontiguousarray(rgb), "; ".join(filter(None, notes)))
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        cap = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or 0))
        raise ImageError(f"image too large: expected at most {cap} pixels, received more; make it smaller") from error
    except Exception as error:  # decoders fail on damaged data in every way there is
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of a decoder
            raise
        raise ImageError(
            "cannot decode: expected a complete JPEG, PNG, TIFF, WebP, BMP, GIF, PPM or JPEG 2000 image, received "
            f"{len(data)} bytes that begin with {data[:8]!r}; copy it again or convert it to PNG"
        ) from error


def pad_to_divisor(array_HWC: Shaped[np.ndarray, "H W *C"], divisor: int) -> Shaped[np.ndarray, "H2 W2 *C"]:
    """Pad (H, W) or (H, W, C) at the bottom and right by reflection until both sides divide; crop with [:H, :W].

    A side is reflected as often as needed, a side of 1 repeated. The same array comes back where nothing is missing.

    >>> pad_to_divisor(np.array([[1, 2, 3]]), 2).tolist()
    [[1, 2, 3, 2], [1, 2, 3, 2]]
    """
    H, W = array_HWC.shape[:2]
    missing = [(0, -H % divisor), (0, -W % divisor)] + [(0, 0)] * (array_HWC.ndim - 2)
    return np.pad(array_HWC, missing, mode="reflect") if np.any(missing) else array_HWC


def _read_bytes(path: str | os.PathLike, max_bytes: int) -> bytes:
    path = os.fspath(path)
    try:
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode):  # asked before opening: opening a pipe would wait for ever
            _check_cap(found.st_size, max_bytes, "bytes")
            with open(path, "rb") as file:
                return file.read(max_bytes + 1)
    except ImageError:
        raise
    except (OSError, ValueError) as error:
        answer = getattr(error, "strerror", None) or "no valid path"
        raise ImageError(
            f"cannot open: expected a readable file, received {answer!r}; check the path and its permissions"
        ) from error
    received = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
    raise ImageError(f"not a file: expected an image file, received {received}; give the path of an image file")


def _check_cap(count: int, cap: int, unit: str) -> None:
    if count > cap:
        raise ImageError(
            f"image too large: expected at most {cap} {unit}, received {count}; make it smaller or raise max_{unit}"
        )


def _ordinary_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) by the header of an opaque, still, 8-bit grey or RGB JPEG, PNG or WebP; None for any other.

    Nearly all photos are of that kind, and OpenCV alone decodes them right, EXIF rotation included.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        chunks, at = set(), 8
        while at + 12 <= len(data) and b"IEND" not in chunks:
            length, name = struct.unpack_from(">I4s", data, at)
            chunks.add(name)
            at += 12 + length  # one that leaves the file would have OpenCV set aside up to 2 GB for it
        plain = data[24:26] in (b"\x08\x00", b"\x08\x02") and not chunks & {b"tRNS", b"acTL"} and at <= len(data)
        return struct.unpack_from(">II", data, 16) if plain else None
    if data.startswith(b"RIFF") and data[8:16] == b"WEBPVP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    if data.startswith(b"RIFF") and data[8:16] == b"WEBPVP8L":
        bits = int.from_bytes(data[21:25], "little")
        return None if bits >> 28 & 1 else ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    at = 2 if data.startswith(b"\xff\xd8\xff") else len(data)
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length, bits, height, width, channels = struct.unpack_from(">xBHBHHB", data, at)
        if marker in (0xC0, 0xC1, 0xC2):  # baseline, extended, progressive
            return (width, height) if bits == 8 and channels in (1, 3) else None
        at += 2 + length
    return None


def _imdecode(data: bytes, flags: int, size: tuple[int, int]) -> Shaped[np.ndarray, "H W *C"]:
    array = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if array is None or array.shape[:2] not in (size, size[::-1]):  # a quarter turn swaps the sides
        raise ValueError("OpenCV did not decode what the header promised")
    return array


def _spilled(data: bytes, file: Path) -> UInt8[np.ndarray, "H W 3"] | None:
    """The pixels by way of a file; None of a kind that OpenCV must decode. OpenCV holds them twice for a time, Pillow once."""
    kind = JpegImageFile if data.startswith(b"\xff\xd8") else PngImageFile if data.startswith(b"\x89PNG") else None
    if kind is None:
        return None
    with _PILLOW, warnings.catch_warnings(), kind(io.BytesIO(data)) as image:  # Image.open has a limit of its own
        warnings.filterwarnings("ignore", module=r"PIL\.")
        if image.mode not in ("RGB", "L") or image.getexif().get(ORIENTATION, 1) != 1:
            return None
        W, H = image.size
        with open(file, "wb") as pixels:
            for top in range(0, H, 256):
                pixels.write(np.asarray(image.crop((0, top, W, min(H, top + 256))).convert("RGB")).data)
    return np.asarray(np.memmap(file, np.uint8, "r", shape=(H, W, 3)))


def _decode(data: bytes, max_pixels: int) -> tuple[UInt8[np.ndarray, "H W 3"], int, str, str]:
    """RGB, number of frames and two notes, of every kind but the deep TIFF."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_cap(image.width * image.height, max_pixels, "pixels")
        image.load()
        png_bits = data[24] if image.format == "PNG" else None
        key, alpha, scaled = image.info.get("transparency"), None, ""
        if png_bits == 16 and image.mode != "I;16":  # Pillow drops the lower byte of a colour
            rgb, alpha, scaled = _scale(_imdecode(data, cv2.IMREAD_UNCHANGED, image.size))
        elif image.mode in ("I", "I;16", "F"):
            grey = np.asarray(image)
            rgb, alpha, scaled = _scale(grey.astype(np.uint16) if image.mode == "I" else grey)
            alpha = alpha if key is None else np.where(grey == key, 0, 255)
        elif image.has_transparency_data:
            if png_bits in (2, 4) and image.mode == "L" and key is not None:
                # Pillow spreads the grey over 0..255, but not the key.
                image.info["transparency"] = key * 255 // (2**png_bits - 1)
            rgba = np.array(image.convert("RGBA"))
            rgb, alpha = rgba[..., :3], rgba[..., 3]
        else:
            rgb = np.array(image.convert("RGB"))
        rgb, laid = _over_white(rgb, alpha)
        return _upright(rgb, image), getattr(image, "n_frames", 1), scaled, laid


def _decode_tiff(data: bytes, max_pixels: int) -> tuple[UInt8[np.ndarray, "H W 3"], int, str, str]:
    """TIFF of more than 8 bits by OpenCV, for Pillow refuses it or drops bits; other TIFF by Pillow."""
    file, tags = io.BytesIO(data), ImageFileDirectory_v2(data[: 16 if data[2] == 43 else 8])
    frames = {tags.next}
    file.seek(tags.next)
    tags.load(file)
    defaults = {256: 0, 257: 0, 258: 1, 262: 1, 277: 1, 284: 1, 338: 0, 339: 1}
    values = [int(np.ravel(tags.get(tag, default))[0]) for tag, default in defaults.items()]
    width, height, bits, photometric, samples, planar, extra, sample_format = values
    if bits <= 8 and sample_format == 1:
        return _decode(data, max_pixels)
    _check_cap(width * height, max_pixels, "pixels")
    grey, colour = photometric in (0, 1) and samples == 1, photometric == 2 and samples in (3, 4) and planar == 1
    if (sample_format, bits) not in DEEP_TIFF or not (grey or colour) or extra == 1:
        raise ImageError(
            "unsupported TIFF: expected grey or interleaved RGB of 16 or 32 bits, float32 or float64, with straight "
            f"alpha if any, received {samples} channels of {bits} bits (sample format {sample_format}, photometric "
            f"{photometric}, planar {planar}, extra {extra}); convert it to 16-bit PNG"
        )
    rgb, alpha, scaled = _scale(_imdecode(data, cv2.IMREAD_UNCHANGED, (width, height)))
    rgb, laid = _over_white(255 - rgb if photometric == 0 else rgb, alpha if extra else None)
    while tags.next and tags.next not in frames:  # damage can make a ring of them
        frames.add(tags.next)
        file.seek(tags.next)
        tags.load(file)
    return rgb, len(frames), scaled, laid


def _scale(
    deep: Num[np.ndarray, "H W *C"],
) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"] | None, str]:
    """Grey, BGR or BGRA of any type to RGB and alpha in 0..255 by the rule of `read_image`, and a note on it."""
    wrong = deep.size - np.count_nonzero(np.isfinite(deep))
    if wrong:
        raise ImageError(
            f"values that are no numbers: expected finite ones, received {wrong} of {deep.size} NaN or infinite; "
            "replace them in the file"
        )
    colours, alpha = deep[..., None] if deep.ndim == 2 else deep[..., 2::-1], None
    low, high = colours.min().item(), colours.max().item()
    kind = "float" if deep.dtype.kind == "f" else f"{8 * deep.itemsize}-bit"
    if kind != "float" and low >= 0 and high <= FULL_SCALES[-1]:
        low, high = 0, next(full for full in FULL_SCALES if full >= high)
    elif kind == "float" and low >= 0 and high <= 1:
        low, high = 0, 1
    rgb = np.empty((*deep.shape[:2], 3), np.uint8)
    for rows in range(0, len(deep), 256):  # float64 of the whole would need eight times its memory
        half = colours[rows : rows + 256].astype(np.float64) / 2 - low / 2  # the span of a float64 may overflow
        rgb[rows : rows + 256] = np.rint(half / (high / 2 - low / 2 or 1) * 255)
    if deep.ndim == 3 and deep.shape[2] == 4:
        full = 1 if kind == "float" else np.iinfo(deep.dtype).max
        alpha = np.rint(255 * np.clip(deep[..., 3] / full, 0, 1)).astype(np.uint8)
    return rgb, alpha, f"{kind}: {low:.10g}..{high:.10g} scaled to 0..255"


def _over_white(
    rgb: UInt8[np.ndarray, "H W 3"], alpha: Num[np.ndarray, "H W"] | None
) -> tuple[UInt8[np.ndarray, "H W 3"], str]:
    """Lay RGB over white and say so, unless `alpha`, in 0..255, is None or opaque everywhere."""
    if alpha is None or alpha.min() == 255:
        return rgb, ""
    alpha = alpha.astype(np.uint16)[..., None]
    over = (rgb * alpha + 255 * (255 - alpha) + 127) // 255
    return over.astype(np.uint8), "transparency laid over white"


def _upright(rgb: UInt8[np.ndarray, "H W 3"], image: Image.Image) -> UInt8[np.ndarray, "H2 W2 3"]:
    try:
        orientation = image.getexif().get(ORIENTATION)  # gone where Pillow has turned the picture itself: TIFF
    except Exception:  # a damaged EXIF says nothing about the pixels
        return rgb
    rgb = rgb.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else rgb
    rgb = rgb[:, ::-1] if orientation in (2, 3, 6, 7) else rgb
    return rgb[::-1] if orientation in (3, 4, 7, 8) else rgb
