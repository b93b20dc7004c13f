"""image.py against pixels worked out by hand, Pillow's conversions, and damaged, lying and odd input."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import cv2
import imagecodecs
import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from hostile import encode, frames, make_hostile, png, scene, tiff, turned
from seguncert import image
from seguncert.image import IMAGE_SUFFIXES, ImageError, Photo, pad_to_divisor, read_image

RGB = scene()
GREY = RGB[..., 2]
DEEP = RGB.astype(np.uint16) * 257
CLEAR = np.dstack([RGB, GREY])
FEW = np.where(RGB > 127, 255, 0).astype(np.uint8)  # eight colours at most, so that a palette holds them


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(grey)[..., None], 3, axis=-1)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Compositing in floats; the reference for alpha in 0..1."""
    return np.rint(colour * alpha[..., None] + 255 * (1 - alpha[..., None]))


def bits16(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


def deep_png(array: np.ndarray) -> bytes:
    """A 16-bit PNG of a grey, RGB or RGBA array."""
    order = [2, 1, 0, 3][: array.shape[2]] if array.ndim == 3 else slice(None)
    return cv2.imencode(".png", array[..., order] if array.ndim == 3 else array)[1].tobytes()


PALETTE = (b"PLTE", bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9]))
RED, GREEN, BLUE, DARK, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9), (255, 255, 255)
WHITED, FULL16 = "transparency laid over white", "16-bit: 0..65535 scaled to 0..255"
ONE_LINE = {  # one line of pixels written by hand: file, its pixels, the note
    "1-bit grey": (png(3, 1, 1, 0, b"\0\xa0"), [(255,) * 3, (0,) * 3, (255,) * 3], ""),
    "2-bit grey": (png(4, 1, 2, 0, b"\0\x1b"), [(v,) * 3 for v in (0, 85, 170, 255)], ""),
    "4-bit grey": (png(2, 1, 4, 0, b"\0\x5f"), [(85,) * 3, (255,) * 3], ""),
    "8-bit grey": (png(2, 1, 8, 0, b"\0\x07\xc8"), [(7,) * 3, (200,) * 3], ""),
    "16-bit grey": (png(2, 1, 16, 0, b"\0" + bits16(257, 65535)), [(1,) * 3, (255,) * 3], FULL16),
    "1-bit grey, 1 clear": (png(2, 1, 1, 0, b"\0\x40", (b"tRNS", bits16(1))), [(0,) * 3, WHITE], WHITED),
    "2-bit grey, 1 clear": (png(3, 1, 2, 0, b"\0\x18", (b"tRNS", bits16(1))), [(0,) * 3, WHITE, (170,) * 3], WHITED),
    "4-bit grey, 3 clear": (png(2, 1, 4, 0, b"\0\x3f", (b"tRNS", bits16(3))), [WHITE, WHITE], WHITED),
    "8-bit grey, 7 clear": (png(2, 1, 8, 0, b"\0\x07\x08", (b"tRNS", bits16(7))), [WHITE, (8,) * 3], WHITED),
    "16-bit grey, 257 clear": (
        png(3, 1, 16, 0, b"\0" + bits16(257, 256, 65535), (b"tRNS", bits16(257))),
        [WHITE, (1,) * 3, (255,) * 3],
        f"{FULL16}; {WHITED}",
    ),
    "1-bit palette": (png(2, 1, 1, 3, b"\0\x40", PALETTE), [RED, GREEN], ""),
    "2-bit palette": (png(4, 1, 2, 3, b"\0\x1b", PALETTE), [RED, GREEN, BLUE, DARK], ""),
    "4-bit palette": (png(2, 1, 4, 3, b"\0\x21", PALETTE), [BLUE, GREEN], ""),
    "8-bit palette": (png(2, 1, 8, 3, b"\0\2\0", PALETTE), [BLUE, RED], ""),
    "palette, clear": (
        png(4, 1, 2, 3, b"\0\x1b", PALETTE, (b"tRNS", bytes([0, 51]))),
        [WHITE, (204, 255, 204), BLUE, DARK],
        WHITED,
    ),
    "palette, clear but unused": (png(2, 1, 8, 3, b"\0\1\2", PALETTE, (b"tRNS", b"\0")), [GREEN, BLUE], ""),
    "8-bit RGB": (png(2, 1, 8, 2, b"\0" + bytes([1, 2, 3, 4, 5, 6])), [(1, 2, 3), (4, 5, 6)], ""),
    "8-bit RGB, one clear": (
        png(2, 1, 8, 2, b"\0" + bytes([1, 2, 3, 4, 5, 6]), (b"tRNS", bits16(1, 2, 3))),
        [WHITE, (4, 5, 6)],
        WHITED,
    ),
    "16-bit RGB": (png(1, 1, 16, 2, b"\0" + bits16(65535, 384, 386)), [(255, 1, 2)], FULL16),
    "16-bit RGB, one clear": (
        png(2, 1, 16, 2, b"\0" + bits16(65535, 0, 1, 65535, 0, 2), (b"tRNS", bits16(65535, 0, 1))),
        [WHITE, RED],
        f"{FULL16}; {WHITED}",
    ),
    "8-bit grey, alpha": (png(2, 1, 8, 4, b"\0" + bytes([100, 255, 100, 51])), [(100,) * 3, (224,) * 3], WHITED),
    "16-bit grey, alpha": (
        png(2, 1, 16, 4, b"\0" + bits16(65535, 9, 0, 13107)),
        [(255,) * 3, (204,) * 3],
        f"{FULL16}; {WHITED}",
    ),
    "8-bit RGBA": (png(2, 1, 8, 6, b"\0" + bytes([9, 8, 7, 0, 0, 0, 255, 51])), [WHITE, (204, 204, 255)], WHITED),
    "8-bit RGBA, opaque": (png(1, 1, 8, 6, b"\0" + bytes([9, 8, 7, 255])), [(9, 8, 7)], ""),
    "16-bit RGBA": (
        png(2, 1, 16, 6, b"\0" + bits16(0, 0, 65535, 13107, 257, 514, 771, 65535)),
        [(204, 204, 255), (1, 2, 3)],
        f"{FULL16}; {WHITED}",
    ),
    "PBM": (b"P4 3 1 \x40", [WHITE, (0,) * 3, WHITE], ""),
    "ASCII PPM": (b"P3 1 1 255 1 2 3\n", [(1, 2, 3)], ""),
    "PGM of 10 bits": (b"P5 2 1 1023 " + bits16(0, 1023), [(0,) * 3, WHITE], FULL16),
    "PFM": (b"Pf 2 1 -1 " + np.array([0, 1], "<f4").tobytes(), [(0,) * 3, WHITE], "float: 0..1 scaled to 0..255"),
}


@pytest.mark.parametrize("kind", ONE_LINE)
def test_pixels_written_by_hand(kind):
    data, pixels, note = ONE_LINE[kind]
    photo = read_image(data)
    assert photo.rgb.tolist() == [[list(pixel) for pixel in pixels]]
    assert photo.note == note


def _bmp(**options) -> bytes:
    return encode(Image.fromarray(FEW).quantize(8), "BMP", **options)


EXACT = {  # lossless files: file, the picture, the note
    "PNG": (encode(RGB, "PNG"), RGB, ""),
    "PNG interlaced": (imagecodecs.png_encode(RGB), RGB, ""),
    "WebP lossless": (encode(RGB, "WEBP", lossless=True), RGB, ""),
    "WebP alpha": (
        encode(CLEAR, "WEBP", lossless=True, exact=True),
        over_white(RGB, GREY / 255),
        WHITED,
    ),
    "WebP animated": (frames("WEBP", 5, lossless=True), RGB, "first of 5 frames"),
    "APNG": (frames("PNG", 3), RGB, "first of 3 frames"),
    "GIF": (encode(Image.fromarray(FEW).quantize(8), "GIF"), FEW, ""),
    "GIF animated": (
        encode(Image.fromarray(FEW), "GIF", save_all=True, append_images=[Image.fromarray(255 - FEW)]),
        FEW,
        "first of 2 frames",
    ),
    "BMP": (encode(RGB, "BMP"), RGB, ""),
    "BMP palette": (_bmp(), FEW, ""),
    "BMP grey": (encode(GREY, "BMP"), three(GREY), ""),
    "PPM": (encode(RGB, "PPM"), RGB, ""),
    "JPEG 2000": (encode(RGB, "JPEG2000"), RGB, ""),
    "TIFF": (tiff(RGB), RGB, ""),
    "TIFF tiled": (tiff(RGB, tile=(16, 16)), RGB, ""),
    "TIFF planar": (tiff(np.moveaxis(RGB, -1, 0), planarconfig="separate"), RGB, ""),
    "TIFF LZW": (tiff(RGB, compression="lzw"), RGB, ""),
    "TIFF zstd": (tiff(RGB, compression="zstd"), RGB, ""),
    "TIFF alpha": (tiff(CLEAR, extrasamples=["unassalpha"]), over_white(RGB, GREY / 255), WHITED),
    "TIFF spare channel": (tiff(CLEAR, extrasamples=["unspecified"]), RGB, ""),
    "TIFF white is zero": (tiff(GREY, photometric="miniswhite"), three(255 - GREY), ""),
    "TIFF bilevel": (
        encode(Image.fromarray(GREY > 127), "TIFF", compression="group4"),
        three(np.where(GREY > 127, 255, 0)),
        "",
    ),
    "TIFF palette": (encode(Image.fromarray(FEW).quantize(8), "TIFF"), FEW, ""),
    "TIFF pages": (frames("TIFF", 4), RGB, "first of 4 frames"),
    "TIFF deep": (tiff(DEEP), RGB, FULL16),
    "TIFF deep, big-endian, LZW": (tiff(DEEP, byteorder=">", compression="lzw"), RGB, FULL16),
    "TIFF deep, tiles, deflate": (tiff(DEEP, tile=(16, 16), compression="zlib", predictor=True), RGB, FULL16),
    "TIFF deep, 64-bit offsets": (tiff(DEEP, bigtiff=True), RGB, FULL16),
    "TIFF deep, pages": (
        tiff(np.stack([DEEP[..., 0]] * 3), photometric="minisblack", metadata=None),
        three(RGB[..., 0]),
        f"first of 3 frames; {FULL16}",
    ),
    "TIFF deep, white is zero": (tiff(65535 - DEEP[..., 2], photometric="miniswhite"), three(GREY), FULL16),
    "TIFF deep, alpha": (
        tiff(np.dstack([DEEP, DEEP[..., 2]]), extrasamples=["unassalpha"]),
        over_white(RGB, GREY / 255),
        f"{FULL16}; {WHITED}",
    ),
    "TIFF deep, spare channel": (tiff(np.dstack([DEEP, DEEP[..., 2]]), extrasamples=["unspecified"]), RGB, FULL16),
    "TIFF packed 12 bits": (
        tiff(DEEP[..., 0] >> 4, bitspersample=12),
        three(np.rint((DEEP[..., 0] >> 4) * 16 / 257)),
        FULL16,
    ),
    "TIFF float alpha": (
        tiff(np.dstack([RGB, GREY]).astype(np.float32) / 255, extrasamples=["unassalpha"]),
        over_white(RGB, GREY / 255),
        f"float: 0..1 scaled to 0..255; {WHITED}",
    ),
}


@pytest.mark.parametrize("kind", EXACT)
def test_lossless_kinds(kind):
    data, expected, note = EXACT[kind]
    photo = read_image(data)
    assert photo.note == note
    np.testing.assert_array_equal(photo.rgb, expected)


@pytest.mark.parametrize(
    "data",
    [
        encode(RGB, "JPEG"),
        encode(RGB, "JPEG", progressive=True, subsampling=0),
        encode(GREY, "JPEG"),
        encode(RGB, "WEBP", quality=60),
        tiff(RGB, compression="jpeg"),
    ],
    ids=["JPEG", "progressive", "grey", "WebP", "TIFF"],
)
def test_lossy_kinds_agree_with_pillow(data):
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(read_image(data).rgb - expected).max() <= 2


@pytest.mark.parametrize("light", [(200, 40, 90, 230), (20, 250, 130, 100)])
@pytest.mark.parametrize("stored", ["CMYK", "YCCK"])
def test_cmyk_jpeg_is_inverted_as_adobe_does(stored, light):
    """Adobe stores 255 - ink, that is light: R = C' K' / 255. imagecodecs stores what it is given."""
    light = np.full((16, 16, 4), light, np.uint8)
    data = imagecodecs.jpeg8_encode(light, level=100, colorspace="CMYK", outcolorspace=stored)
    assert b"Adobe" in data
    expected = light[..., :3] / 255 * light[..., 3:]
    assert np.abs(read_image(data).rgb - expected).max() <= 2


def test_cmyk_tiff_is_not_inverted():
    ink = np.full((4, 4, 4), (200, 40, 90, 30), np.uint8)
    expected = (255 - ink[..., :3]) / 255 * (255.0 - ink[..., 3:])
    assert np.abs(read_image(tiff(ink, photometric="separated")).rgb - expected).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "palette PNG", "deep PNG", "CMYK JPEG", "deep TIFF"])
def test_exif_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind == "deep TIFF":
        stored, data = RGB, tiff(DEEP, extratags=[(0x0112, 3, 1, orientation, True)])
    elif kind == "deep PNG":
        chunk = (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
        lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in DEEP)
        stored, data = RGB, png(32, 24, 16, 2, lines, chunk)
    elif kind == "palette PNG":
        stored, data = FEW, encode(Image.fromarray(FEW).quantize(8), "PNG", exif=exif)
    elif kind == "CMYK JPEG":
        data = encode(Image.fromarray(RGB).convert("CMYK"), "JPEG", exif=exif)
        stored = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    else:
        data = turned(kind, orientation, **({"lossless": True} if kind == "WEBP" else {}))
        plain = encode(RGB, kind, **({"lossless": True} if kind == "WEBP" else {}))
        stored = np.array(Image.open(io.BytesIO(plain)).convert("RGB"))
    reference = Image.fromarray(stored)
    reference.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(reference))
    photo = read_image(data)
    assert np.abs(photo.rgb.astype(int) - expected).max() <= (2 if "JPEG" in kind else 0)
    assert photo.rgb.shape == ((32, 24, 3) if orientation >= 5 else (24, 32, 3))


@pytest.mark.parametrize(
    "values, expected, note",
    [
        ([0, 0], [0, 0], "16-bit: 0..255"),
        ([3, 255], [3, 255], "16-bit: 0..255"),
        ([0, 256], [0, 64], "16-bit: 0..1023"),
        ([512, 1023], [128, 255], "16-bit: 0..1023"),
        ([1024, 4095], [64, 255], "16-bit: 0..4095"),
        ([4096, 16383], [64, 255], "16-bit: 0..16383"),
        ([16384, 40000], [64, 156], "16-bit: 0..65535"),
    ],
)
def test_integers_are_divided_by_the_scale_that_holds_them(values, expected, note):
    line = np.array([values], np.uint16)
    for data in (deep_png(line), tiff(line), tiff(line.astype(np.int16)) if max(values) < 2**15 else tiff(line)):
        photo = read_image(data)
        assert photo.rgb[0, :, 0].tolist() == expected
        assert photo.note == f"{note} scaled to 0..255"


def test_one_scale_for_all_channels():
    photo = read_image(deep_png(np.array([[[100, 1000, 4000]]], np.uint16)))
    assert photo.rgb.tolist() == [[[6, 62, 249]]]  # 255 v / 4095
    assert photo.note == "16-bit: 0..4095 scaled to 0..255"


@pytest.mark.parametrize(
    "values, expected, note",
    [
        (np.array([0, 2**30, 2**31], np.uint32), [0, 128, 255], "32-bit: 0..2147483648"),
        (np.array([0, 65536], np.int32), [0, 255], "32-bit: 0..65536"),
        (np.array([0, 65535], np.int32), [0, 255], "32-bit: 0..65535"),
        (np.array([-100, 0, 155], np.int16), [0, 100, 255], "16-bit: -100..155"),
        (np.array([-7, -7], np.int32), [0, 0], "32-bit: -7..-7"),
        (np.array([0.25, 0.5], np.float32), [64, 128], "float: 0..1"),
        (np.array([0.0, 1.0], np.float64), [0, 255], "float: 0..1"),
        (np.array([0.5, 1.5, 2.5], np.float32), [0, 128, 255], "float: 0.5..2.5"),
        (np.array([-0.5, 0.0, 0.5], np.float32), [0, 128, 255], "float: -0.5..0.5"),
        (np.array([7.0, 7.0], np.float32), [0, 0], "float: 7..7"),
        (np.array([-1.5e308, 0, 1.5e308], np.float64), [0, 128, 255], "float: -1.5e+308..1.5e+308"),
    ],
    ids=lambda value: str(value.dtype) if isinstance(value, np.ndarray) else "",
)
def test_wide_values(values, expected, note):
    photo = read_image(tiff(values[None]))
    assert photo.rgb.tolist() == three(np.array([expected])).tolist()
    assert photo.note == f"{note} scaled to 0..255"


def test_tall_deep_images_are_scaled_whole():
    column = np.arange(1000, dtype=np.uint16)[:, None] * 4
    np.testing.assert_array_equal(read_image(tiff(column)).rgb[:, 0, 0], np.rint(column[:, 0] / 4095 * 255))


@pytest.mark.parametrize("bad, count", [([np.nan, 1], 1), ([np.inf, -np.inf], 2), ([np.nan, np.inf], 2)])
def test_not_a_number(bad, count):
    line = np.array([[0.5, *bad]], np.float32)
    with pytest.raises(ImageError, match=f"^values that are no numbers: .* received {count} of 3 NaN or infinite; "):
        read_image(tiff(line))


def test_photo_owns_writable_memory_and_content_beats_suffix(tmp_path):
    for name, data in {"a.png": encode(RGB, "JPEG"), "b.jpg": encode(RGB, "PNG"), "c": tiff(DEEP)}.items():
        (tmp_path / name).write_bytes(data)
        photo = read_image(tmp_path / name)
        np.testing.assert_array_equal(photo.rgb, read_image(str(tmp_path / name)).rgb)
        np.testing.assert_array_equal(photo.rgb, read_image(data).rgb)
        assert photo.rgb.flags.writeable and photo.rgb.flags.c_contiguous and photo.rgb.dtype == np.uint8


def test_ordinary_photos_are_decoded_by_opencv_alone(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("Pillow was asked")

    monkeypatch.setattr(Image, "open", refuse)
    lossless, progressive = {"lossless": True}, {"progressive": True}
    for kind, options in [("JPEG", {}), ("JPEG", progressive), ("PNG", {}), ("WEBP", {}), ("WEBP", lossless)]:
        assert read_image(encode(RGB, kind, **options)).rgb.shape == (24, 32, 3)
    for kind in ("JPEG", "PNG"):
        assert read_image(encode(GREY, kind)).rgb.shape == (24, 32, 3)


def test_a_picture_of_another_size_than_promised_is_refused(monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", lambda *_: np.zeros((12, 32, 3), np.uint8))
    with pytest.raises(ImageError, match="^cannot decode: "):
        read_image(encode(RGB, "PNG"))


def test_damaged_exif_leaves_the_picture():
    text = (b"tEXt", b"Raw profile type exif\0\nexif\n4\nno hex at all\n")
    assert read_image(png(2, 1, 8, 3, b"\0\2\0", PALETTE, text)).rgb.tolist() == [[list(BLUE), list(RED)]]


# What goes wrong, and what it says.


def test_errors_name_what_expected_received_and_remedy(tmp_path):
    cases = {
        tmp_path: "not a file: expected an image file, received a folder; give the path of an image file",
        tmp_path / "none.png": "cannot open: expected a readable file, received 'No such file or directory'; "
        "check the path and its permissions",
        "nul\0byte.png": "cannot open: expected a readable file, received 'no valid path'; "
        "check the path and its permissions",
        b"": "cannot decode: expected a complete JPEG, PNG, TIFF, WebP, BMP, GIF, PPM or JPEG 2000 image, "
        "received 0 bytes that begin with b''; copy it again or convert it to PNG",
        b"%PDF-1.7\n%": "cannot decode: expected a complete JPEG, PNG, TIFF, WebP, BMP, GIF, PPM or JPEG 2000 image, "
        "received 10 bytes that begin with b'%PDF-1.7'; copy it again or convert it to PNG",
        tiff(GREY.astype(np.float16)): "unsupported TIFF: expected grey or interleaved RGB of 16 or 32 bits, float32 "
        "or float64, with straight alpha if any, received 1 channels of 16 bits (sample format 3, photometric 1, "
        "planar 1, extra 0); convert it to 16-bit PNG",
    }
    for source, message in cases.items():
        with pytest.raises(ImageError) as caught:
            read_image(source)
        assert str(caught.value) == message


def test_caps_are_checked_before_anything_is_decoded(tmp_path, monkeypatch):
    files = [encode(RGB, "JPEG"), encode(RGB, "PNG"), encode(RGB, "WEBP"), encode(RGB, "WEBP", lossless=True)]
    files += [encode(RGB, "BMP"), encode(RGB, "GIF"), tiff(RGB), tiff(DEEP), deep_png(DEEP), encode(CLEAR, "WEBP")]
    for data in files:
        assert read_image(data, max_pixels=24 * 32).rgb.shape == (24, 32, 3)

    def refuse(*_, **__):
        raise AssertionError("decoded")

    monkeypatch.setattr(cv2, "imdecode", refuse)
    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    for data in files:
        with pytest.raises(ImageError, match="at most 767 pixels, received 768; make it smaller or raise max_pixels$"):
            read_image(data, max_pixels=767)
    path = tmp_path / "a.png"
    path.write_bytes(files[1])
    monkeypatch.setattr("builtins.open", refuse)
    for source in (path, files[1]):
        with pytest.raises(ImageError, match=f"at most 99 bytes, received {len(files[1])}; .* max_bytes$"):
            read_image(source, max_bytes=99)


def test_a_chunk_that_leaves_the_file_never_reaches_opencv(monkeypatch):
    """OpenCV sets aside what the chunk's length says, up to 2 GB, before it finds the data missing."""
    asked = []
    monkeypatch.setattr(cv2, "imdecode", lambda *_: asked.append("decoded"))
    before, _, after = encode(RGB, "PNG").partition(b"IDAT")
    photo = read_image(before[:-4] + b"\x7f\xff\xff\xffIDAT" + after)
    np.testing.assert_array_equal(photo.rgb, RGB)
    assert asked == []


def test_pillows_warnings_and_limits_stay_inside(monkeypatch):
    """Warnings are errors in these tests; each of these files makes Pillow warn when it is opened plainly."""
    broken = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 20
    exif = encode(Image.fromarray(RGB).convert("CMYK"), "JPEG", exif=broken)
    odd_tag = tiff(RGB).replace(struct.pack("<HHI", 296, 3, 1), struct.pack("<HHI", 296, 3, 2))  # two units
    for data in (exif, odd_tag):
        with pytest.warns(UserWarning), Image.open(io.BytesIO(data)) as plain:
            plain.load()
            plain.getexif()
        before = list(warnings.filters)
        with warnings.catch_warnings(record=True) as heard:
            assert read_image(data).rgb.shape == (24, 32, 3)
        assert heard == [] and list(warnings.filters) == before
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    for data in (exif, tiff(RGB), encode(CLEAR, "PNG")):  # 768 pixels: a warning
        assert read_image(data).rgb.shape == (24, 32, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with pytest.raises(
        ImageError, match="^image too large: expected at most 600 pixels, received more; make it smaller$"
    ):
        read_image(encode(CLEAR, "PNG"))
    assert read_image(encode(RGB, "PNG")).rgb.shape == (24, 32, 3)


def test_opencv_says_nothing_on_stderr():
    code = "from seguncert.image import *\nfor d in (b'\\x89PNG\\r\\n\\x1a\\n' + bytes(50), JPEG[:400], TIFF[:900]):\n"
    code += "    try: read_image(d)\n    except ImageError: continue\n    raise SystemExit('read')"
    code = f"JPEG, TIFF = {encode(RGB, 'JPEG')!r}, {tiff(DEEP)!r}\n{code}"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "kind", ["JPEG", "progressive JPEG", "grey JPEG", "PNG", "grey PNG", "turned JPEG", "WEBP", "RGBA PNG"]
)
def test_large_pictures_by_way_of_the_disk_are_the_same(kind, tmp_path, monkeypatch):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 29, 3), np.uint8)).resize((290, 700))
    picture = picture.convert("L") if "grey" in kind else picture.convert("RGBA") if "RGBA" in kind else picture
    more = {"progressive": True} if "progressive" in kind else {}
    if "turned" in kind:
        more["exif"] = Image.Exif()
        more["exif"][0x0112] = 6
    file, spill = tmp_path / "picture", tmp_path / "pixels"
    picture.save(file, kind.split()[-1], **more)
    monkeypatch.setattr(image, "LARGE", 1000)
    photo = read_image(file, spill=spill)
    assert spill.exists() == (kind.split()[0] not in ("turned", "WEBP", "RGBA"))
    assert np.array_equal(photo.rgb, read_image(file).rgb) and photo.note == read_image(file).note
    if spill.exists():
        file.write_bytes(file.read_bytes()[:-500])
        with pytest.raises(ImageError, match="cannot decode: expected a complete JPEG"):
            read_image(file, spill=spill)


def test_a_full_disk_is_no_fault_of_the_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(image, "LARGE", 1)
    png = cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1].tobytes()
    with pytest.raises(OSError, match="No such file or directory"):
        read_image(png, spill=tmp_path / "none" / "pixels")


def test_threads_agree():
    kinds = [data for data, _, _ in EXACT.values()] * 4
    alone = [read_image(data).rgb for data in kinds]
    with ThreadPoolExecutor(8) as pool:
        for expected, photo in zip(alone, pool.map(read_image, kinds), strict=True):
            np.testing.assert_array_equal(photo.rgb, expected)


def test_hostile_folder(tmp_path):
    expected = make_hostile(tmp_path / "hostile")
    assert len(expected) >= 45
    assert {path.split(".")[-1].lower() for path in expected} <= {suffix[1:] for suffix in IMAGE_SUFFIXES}
    found = {}
    for name, outcome in expected.items():
        try:
            photo = read_image(tmp_path / "hostile" / name)
            found[name] = "ok" if photo.rgb.size else "nothing"
        except ImageError as error:
            text = str(error)
            found[name] = outcome if outcome in text and text.isprintable() else text
    assert found == expected


def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="received a pipe, socket or device; "):
        read_image(tmp_path / "pipe.png")


STRESSED = {name: data for name, (data, _, _) in EXACT.items()} | {
    "JPEG": encode(RGB, "JPEG"),
    "JPEG progressive": encode(RGB, "JPEG", progressive=True),
    "JPEG CMYK": encode(Image.fromarray(RGB).convert("CMYK"), "JPEG"),
    "JPEG turned": turned("JPEG", 6),
    "WebP lossy": encode(RGB, "WEBP"),
    "PNG palette": encode(Image.fromarray(FEW).quantize(8), "PNG"),
    "PNG deep": deep_png(DEEP),
}


@pytest.mark.parametrize("kind", STRESSED)
def test_damage_gives_the_full_picture_or_an_error(kind):
    data = STRESSED[kind]
    whole = read_image(data).rgb
    cuts = sorted({len(data) * k // 20 for k in range(20)} | {len(data) - k for k in (1, 2, 4, 12, 13, 30)})
    refused = 0
    for cut in cuts:
        try:
            np.testing.assert_array_equal(read_image(data[:cut]).rgb, whole, err_msg=f"cut at {cut} of {len(data)}")
        except ImageError as error:
            assert str(error).isprintable()
            refused += 1
    assert refused >= 5  # what is cut within the pixels never passes
    rng = np.random.default_rng(len(data))
    for _ in range(20):
        damaged = bytearray(data)
        for at in rng.integers(0, rng.choice([100, len(data)]), size=3):
            damaged[at % len(data)] = rng.integers(256)
        try:
            photo = read_image(bytes(damaged), max_pixels=10**6)
            assert isinstance(photo, Photo) and photo.rgb.dtype == np.uint8 and photo.rgb.ndim == 3 and photo.rgb.size
        except ImageError as error:
            assert str(error).isprintable()


# Padding.


@pytest.mark.parametrize(
    "shape, divisor", [((5, 7), 4), ((5, 7, 3), 4), ((1, 1, 3), 32), ((1, 9), 4), ((3, 2, 1), 16), ((33, 31, 3), 32)]
)
def test_pad_reflects_at_the_bottom_and_right(shape, divisor):
    array = np.random.default_rng(0).random(shape).astype(np.float32)
    padded = pad_to_divisor(array, divisor)
    H, W = shape[:2]
    assert padded.shape == (-(-H // divisor) * divisor, -(-W // divisor) * divisor, *shape[2:])
    assert padded.dtype == array.dtype

    def mirrored(at: int, side: int) -> int:
        period = 2 * (side - 1) or 1
        return min(at % period, period - at % period) if side > 1 else 0

    for row in range(padded.shape[0]):
        for column in range(padded.shape[1]):
            np.testing.assert_array_equal(padded[row, column], array[mirrored(row, H), mirrored(column, W)])


def test_pad_returns_the_same_array_when_nothing_is_missing():
    array = np.zeros((64, 32, 3), np.uint8)
    assert pad_to_divisor(array, 32) is array
