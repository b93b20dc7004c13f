"""A folder of inputs that break careless readers: damaged, odd, lying, strangely named, and good ones between."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import tifffile
from PIL import Image


def scene(height: int = 24, width: int = 32) -> np.ndarray:
    """A smooth RGB picture (height, width, 3) uint8 without symmetry."""
    rows, columns = np.mgrid[0:height, 0:width] / (max(height, width) - 1 or 1)
    waves = np.stack([rows, columns, 0.5 + 0.5 * np.sin(5 * rows + 9 * columns)], axis=-1)
    return np.rint(255 * waves).astype(np.uint8)


def encode(picture: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    """`picture` as Pillow writes it."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(array: np.ndarray, **options) -> bytes:
    """`array` as tifffile writes it."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **{"photometric": "rgb" if array.ndim == 3 else "minisblack", **options})
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, lines: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand: `lines` with their filter bytes, `chunks` before the pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    extra = b"".join(chunk(*pair) for pair in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def frames(kind: str, count: int = 3, **options) -> bytes:
    """A file of `count` different frames, the scene first."""
    rest = [Image.fromarray(np.roll(scene(), 5 * k, axis=1)) for k in range(1, count)]
    return encode(scene(), kind, save_all=True, append_images=rest, **options)


def turned(kind: str, orientation: int, **options) -> bytes:
    """The scene stored as it is, with an EXIF orientation of 1 to 8."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(scene(), kind, exif=exif, **options)


def make_hostile(root: Path) -> dict[str, str]:
    """Fill the folder `root`; returns relative path -> "ok", or a part of the one-line error it must lead to.

    Beside `root` a folder `<root>-outside` is made, into which one of its links points.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    expected: dict[str, str] = {}

    def put(name: str, data: bytes, outcome: str = "ok") -> Path:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        expected[name] = outcome
        return path

    rgb = scene()
    grey, deep = rgb[..., 2], rgb.astype(np.uint16) * 257
    jpeg, good = encode(rgb, "JPEG"), encode(rgb, "PNG")
    clear = Image.fromarray(np.dstack([rgb, grey]))

    # Good, of many kinds.
    put("good.jpg", jpeg)
    put("good.png", good)
    put("good.webp", encode(rgb, "WEBP"))
    put("good.bmp", encode(rgb, "BMP"))
    put("good.ppm", encode(rgb, "PPM"))
    put("good.gif", encode(rgb, "GIF"))
    put("good.tif", tiff(rgb))
    put("one_pixel.png", encode(rgb[:1, :1], "PNG"))
    put("wide_1x20000.png", encode(scene(1, 20000), "PNG"))
    put("tall_20000x1.png", encode(scene(20000, 1), "PNG"))
    put("grey16.png", encode(Image.fromarray(deep[..., 0]), "PNG"))
    put("rgb16.png", cv2.imencode(".png", deep[..., ::-1])[1].tobytes())
    put("rgba.png", encode(clear, "PNG"))
    put("grey_alpha.png", encode(clear.convert("LA"), "PNG"))
    put("one_bit.png", encode(Image.fromarray(grey).convert("1"), "PNG"))
    put("palette_clear.png", encode(Image.fromarray(rgb).quantize(8), "PNG", transparency=bytes([0, 128, 255])))
    put("cmyk.jpg", encode(Image.fromarray(rgb).convert("CMYK"), "JPEG"))
    put("progressive.jpg", encode(rgb, "JPEG", progressive=True))
    put("turned.jpg", turned("JPEG", 6))
    put("damaged_exif.jpg", encode(rgb, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 20))
    put("animated.gif", frames("GIF"))
    put("animated.webp", frames("WEBP"))
    put("animated_apng.png", frames("PNG"))
    put("pages.tif", frames("TIFF"))
    put("bilevel.tif", encode(Image.fromarray(grey).convert("1"), "TIFF", compression="group4"))
    put("cmyk.tif", encode(Image.fromarray(rgb).convert("CMYK"), "TIFF"))
    put("twelve_bits.tif", tiff(deep >> 4))
    put("float_unit.tif", tiff(rgb.astype(np.float32) / 255))
    put("float_wide.tif", tiff(grey.astype(np.float32) * 1e6 - 1e7))
    put("float_constant.tif", tiff(np.full((9, 9), 7.0, np.float32)))
    put("float64.tif", tiff(rgb.astype(np.float64) * 1e300))
    put("int32.tif", tiff(grey.astype(np.int32) * 1000))
    put("negative.tif", tiff(grey.astype(np.int16) - 100))

    # Damaged.
    put("zero_bytes.png", b"", "cannot decode")
    for suffix in ("jpg", "png", "webp", "bmp", "ppm", "gif", "tif"):
        whole = (root / f"good.{suffix}").read_bytes()
        put(f"half.{suffix}", whole[: len(whole) // 2], "cannot decode")
        put(f"header_only.{suffix}", whole[:12], "cannot decode")
    put("half_grey16.png", (root / "grey16.png").read_bytes()[:-40], "cannot decode")
    put("half_float.tif", (root / "float_unit.tif").read_bytes()[:2000], "cannot decode")
    put("almost.png", good[:-60], "cannot decode")
    put("nan.tif", tiff(np.where(grey == 0, np.nan, grey / 255).astype(np.float32)), "NaN or infinite")
    put("infinite.tif", tiff(np.where(grey == 0, np.inf, grey).astype(np.float32)), "NaN or infinite")
    before, _, after = good.partition(b"IDAT")
    endless = before[:-4] + b"\x7f\xff\xff\xff" + b"IDAT" + after
    put("chunk_of_2_gb.png", endless)  # all pixels are there
    put(
        "text_for_a_number.tif",
        tiff(deep).replace(struct.pack("<HHI", 277, 3, 1), struct.pack("<HHI", 277, 2, 1)),
        "cannot decode",
    )
    put("random.webp", np.random.default_rng(0).bytes(4096), "cannot decode")

    # More than it seems: the headers promise gigapixels.
    zeros = bytes(1 << 20)
    put("bomb.png", png(50_000, 50_000, 8, 2, zeros), "image too large")
    put("bomb_palette.png", png(50_000, 50_000, 8, 3, zeros, (b"PLTE", bytes(768))), "image too large")
    put(
        "bomb.bmp",
        b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, 40_000, 40_000, 1, 24, *[0] * 6),
        "image too large",
    )
    put("bomb.gif", b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x02\x02L\x01\0;", "image too large")
    put(
        "bomb.jpg",
        jpeg.replace(struct.pack(">BHH", 8, 24, 32), struct.pack(">BHH", 8, 65500, 65500)),
        "image too large",
    )
    put("bomb.tif", _tiff_header(60_000, 60_000, 16), "image too large")
    put(
        "bomb.webp",
        b"RIFF\x20\0\0\0WEBPVP8L\x14\0\0\0\x2f" + struct.pack("<I", 0x0FFFFFFF) + bytes(20),
        "image too large",
    )

    # Nothing this program reads.
    put("half_float16.tif", tiff(grey.astype(np.float16)), "unsupported TIFF")
    put("signed_bytes.tif", tiff(grey.astype(np.int8)), "unsupported TIFF")
    put("planar16.tif", tiff(np.moveaxis(deep, -1, 0), planarconfig="separate"), "unsupported TIFF")
    put("premultiplied16.tif", tiff(np.dstack([deep, deep[..., 0]]), extrasamples=["assocalpha"]), "unsupported TIFF")
    put("cmyk16.tif", tiff(np.dstack([deep, deep[..., 0]]), photometric="separated"), "unsupported TIFF")
    put("six_bands.tif", tiff(np.dstack([rgb, rgb]), photometric="minisblack", planarconfig="contig"), "cannot decode")
    put("text.png", b"not a picture\n", "cannot decode")
    put("page.jpg", b"<!doctype html><html><body>404</body></html>", "cannot decode")
    put("drawing.png", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "cannot decode")
    put("document.tif", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "cannot decode")
    put("postscript.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "cannot decode")

    # Names.
    put("png_inside.jpg", good)
    put("jpeg_inside.png", jpeg)
    put("same.png", good)
    put("same.jpg", jpeg)
    put("LOUD.PNG", good)
    put("a/b/c/d/e/f/g/deep.png", good)
    put("-r.png", good)
    put(".hidden.png", good)
    put("new\nline.png", good)
    put("<b>&\"'.png", good)
    put("=1+1,;.png", good)
    put("[a]*? %2e $HOME `x` \\.png", good)
    put("Zürich 東京 \U0001f6b2 \u202egnp.png", good)
    put("e\u0301 decomposed.png", good)
    put("x" * 236 + ".png", good)
    try:
        put(os.fsdecode(b"caf\xe9.png"), good)
    except (OSError, UnicodeError):
        pass  # this file system takes UTF-8 only

    # Not files, or not ours.
    (root / "folder.png").mkdir(exist_ok=True)
    expected["folder.png"] = "not a file"
    outside = root.parent / f"{root.name}-outside"
    outside.mkdir(exist_ok=True)
    (outside / "elsewhere.png").write_bytes(good)
    links = {
        "link.png": (outside / "elsewhere.png", "ok"),
        "dangling.png": (outside / "nothing.png", "cannot open"),
        "ring.png": (root / "ring.png", "cannot open"),
        "device.png": (Path(os.devnull), "not a file"),
    }
    for name, (target, outcome) in links.items():
        (root / name).symlink_to(target)
        expected[name] = outcome
    os.mkfifo(root / "pipe.png")
    expected["pipe.png"] = "not a file"
    put("secret.png", good, "ok" if os.geteuid() == 0 else "cannot open").chmod(0)
    return expected


def _tiff_header(width: int, height: int, bits: int) -> bytes:
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 16}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
