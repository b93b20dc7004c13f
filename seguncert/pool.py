"""What an export left, as that from which to choose: means, areas and embeddings of all its images, and readers of their maps.

Letters: N images that are done, C classes, D numbers of an embedding.
"""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt8
from PIL import Image

from seguncert.image import ImageError, read_image
from seguncert.report import SUFFIXES


class PoolError(ValueError):
    """An export that cannot be chosen from; one line: what, expected, received, what to do."""


@dataclass(frozen=True, eq=False)
class Pool:
    """The images of one export that are done, in the order of their paths; `failed` are not among them.

    `means` are those of the maps, 0 to 1; `areas_NC` counts the pixels of each shown class; `disagreement_N` is there
    where the export had samples, `embeddings_ND` where it was asked for them.
    """

    out: Path
    run: dict[str, Any]
    paths: list[str]
    sizes_N2: Int64[np.ndarray, "N 2"]
    means: dict[str, Float64[np.ndarray, " N"]]
    areas_NC: Int64[np.ndarray, "N C"]
    disagreement_N: Float64[np.ndarray, " N"] | None
    embeddings_ND: Float32[np.ndarray, "N D"] | None
    failed: int

    @property
    def classes(self) -> list[str]:
        """Names of the C classes."""
        return list(self.run["model"]["classes"])

    def labels(self, image: int) -> UInt8[np.ndarray, "H W"]:
        """Shown classes of an image."""

        def decode(file: IO[bytes]) -> np.ndarray:
            with Image.open(file) as picture:
                return np.array(picture)

        return self._read(image, "labels.png", np.dtype(np.uint8), decode)

    def map(self, image: int, name: str) -> Float32[np.ndarray, "H W"]:
        """A map of an image, 0 to 1."""
        suffix = SUFFIXES[self.run["format"]]
        if suffix == ".png":
            found = self._read(
                image, name + suffix, np.dtype(np.uint16),
                lambda file: cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED),
            )  # fmt: skip
            return found.astype(np.float32) / np.float32(65535)
        read: Callable[[IO[bytes]], np.ndarray] = np.load
        if suffix == ".tiff":
            import tifffile

            read = tifffile.imread
        return self._read(image, name + suffix, np.dtype(np.float32), read)

    def photo(self, image: int) -> UInt8[np.ndarray, "H W 3"] | None:
        """The photo itself, where the export found it; None if it is not there any more, or not as it was."""
        H, W = self.sizes_N2[image]
        try:
            rgb = read_image(Path(self.run["input"]) / self.paths[image], max_pixels=int(H * W)).rgb
        except (ImageError, OSError):
            return None
        return rgb if rgb.shape[:2] == (H, W) else None

    def overlay(self, image: int) -> UInt8[np.ndarray, "h w 3"] | None:
        """The photo under the export's first map, without the legend below; None where it was made smaller."""
        H, W = self.sizes_N2[image]
        try:
            found = read_image(self.out / self.paths[image] / "overlay.jpg").rgb
        except (ImageError, OSError):
            return None
        return found[:H, :W] if found.shape[1] >= W and found.shape[0] >= H else None

    def _read(
        self, image: int, name: str, dtype: np.dtype, decode: Callable[[IO[bytes]], np.ndarray | None]
    ) -> np.ndarray:
        """A file of an image, decoded; PoolError where it is not there, or is not what export wrote."""
        file, size = self.out / self.paths[image] / name, tuple(self.sizes_N2[image].tolist())
        try:
            with open(file, "rb") as content:
                found = decode(content)
        except FileNotFoundError as error:
            raise PoolError(f"{file}: {error.strerror}. Run the same export again; it makes what is missing.") from None
        except Exception as error:  # decoders fail on damaged files in every way there is
            told = " ".join(str(error).split())[:200]
            raise PoolError(f"{file} is damaged ({told}): remove that folder and run the same export again") from None
        if found is None or found.shape != size or found.dtype != dtype:
            raise PoolError(
                f"{file} is damaged: expected {size[1]}x{size[0]} values of {dtype}: remove that folder and run the same export again"
            )
        return found


def read_pool(exported: Path) -> Pool:
    """The pool of a folder that `seguncert export` wrote.

    Raises PoolError where it is none, was not finished, or holds lines of another model.
    """
    run = _run_of(exported)
    C, names = len(run["model"]["classes"]), list(run["maps"])
    wanted, failed = _finished(exported)
    rows: dict[str, tuple[Any, ...]] = {}
    D = run["embedding"]["numbers"] if run.get("embedding") else 0
    for line in _lines(exported):
        path = line["path"]
        if line["status"] != "ok" or path not in wanted:
            rows.pop(path, None)
            continue
        areas, embedding = line.get("areas"), line.get("embedding")
        if areas is None:
            raise PoolError(f"{exported}: an older seguncert wrote it. Export the images again, into a new folder.")
        try:
            told = base64.b64decode(embedding) if embedding and D else b""
        except ValueError:
            told = b""
        if len(areas) != C or set(line["mean"]) != set(names) or len(told) != 4 * D:
            raise PoolError(
                f"{exported}: expected for {path} {C} classes, maps {', '.join(names)}, {D} numbers of an embedding, as run.json"
                f" says. Received: {len(areas)} classes, maps {', '.join(line['mean'])}, {len(told) // 4} numbers. Its ledger is"
                " of another model or export; export again, into a new folder."
            )
        size, means = (line["height"], line["width"]), np.array([line["mean"][name] for name in names])
        rows[path] = (size, means, np.array(areas, np.int64), line.get("disagreement"), told)
    if not rows:
        raise PoolError(f"{exported}: no image is done; nothing can be chosen. Its images.csv tells why they failed.")
    paths = sorted(rows)
    means_NM = np.array([rows[path][1] for path in paths], np.float64)
    disagreement = [rows[path][3] for path in paths]
    vectors = np.frombuffer(b"".join(rows[path][4] for path in paths), "<f4").reshape(len(paths), D) if D else None
    return Pool(
        exported,
        run,
        paths,
        np.array([rows[path][0] for path in paths], np.int64),
        {name: means_NM[:, m].copy() for m, name in enumerate(names)},
        np.array([rows[path][2] for path in paths], np.int64),
        None if None in disagreement else np.array(disagreement, np.float64),
        vectors,
        failed,
    )


def _run_of(exported: Path) -> dict[str, Any]:
    try:
        run = json.loads((exported / "run.json").read_text(encoding="utf-8"))
        run["model"]["classes"], run["maps"], run["format"], run["input"]
    except FileNotFoundError:
        raise PoolError(
            f"EXPORTED: expected a folder that `seguncert export` wrote. Received: {exported}, which has no run.json"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PoolError(f"{exported}/run.json is damaged ({error}). Export again, into a new folder.") from None
    return run


def _finished(exported: Path) -> tuple[set[str], int]:
    """The images that are done, and how many failed; an export that was stopped is an error: what it lacks cannot be chosen."""
    paths: dict[str, set[str]] = {"ok": set(), "failed": set(), "left": set()}
    try:
        with open(exported / "images.csv", newline="", encoding="utf-8", errors="surrogateescape") as table:
            for row in csv.DictReader(table):
                paths[row["status"]].add(row["path"] + "")
    except FileNotFoundError:
        raise PoolError(
            f"{exported}: the export is not finished: there is no images.csv. Give the same command again first."
        ) from None
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise PoolError(
            f"{exported}/images.csv is damaged ({error}). Give the same export command again first."
        ) from None
    if paths["left"]:
        total = sum(map(len, paths.values()))
        raise PoolError(
            f"{exported}: the export is not finished: {len(paths['left'])} of {total} images are left. Give the same command"
            " again first."
        )
    return paths["ok"], len(paths["failed"])


def _lines(exported: Path) -> Iterator[dict[str, Any]]:
    try:
        with open(exported / "ledger.jsonl", "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    found = json.loads(line)
                    found["path"], found["status"]
                except (ValueError, TypeError, KeyError):
                    raise PoolError(
                        f"{exported}/ledger.jsonl: line {number} is damaged. Give the same export command again first."
                    ) from None
                yield found
    except OSError as error:
        raise PoolError(f"{exported}/ledger.jsonl: {error.strerror}. Export again, into a new folder.") from None
