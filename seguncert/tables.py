"""What a batch shows when it stops, of what the ledger says: images.csv, report.html, and embeddings.npy if asked for."""

from __future__ import annotations

import base64
import csv
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float32

from seguncert import render
from seguncert.report import render_report
from seguncert.store import Store, stamp_of, write_file

BINS = 64  # of the histograms in the ledger and the report
NOT_REACHED = "not reached yet; the same command goes on"
GALLERY = 200  # thumbnails inside report.html; the rest is loaded from beside it


def write_tables(store: Store, source: Path, paths: list[str]) -> dict[str, int]:
    """The files, of what the ledger says of `paths` as far as it still holds; how many images are ok, failed and left."""
    stamps = {path: stamp_of(source / path) for path in paths}
    names = list(store.settings["maps"])
    errors = [f"{name}_error" for name in store.settings.get("errors", [])]
    counted = ["samples"] if store.settings.get("samples") == "auto" else []
    compared = ["disagreement"] if store.settings["method"] != "none" and "carry" not in store.settings else []
    columns = ["path", "status", "error", "height", "width", "seconds", *(f"{name}_mean" for name in names)]
    columns += [*errors, *counted, *compared, "note"]
    untold: dict[str, Any] = dict.fromkeys(columns) | {"status": "left", "error": NOT_REACHED, "note": ""}
    rows = {path: untold | {"path": path} for path in paths}
    numbers = store.settings.get("embedding", {}).get("numbers", 0)
    embeddings_ND = np.full((len(paths), numbers), np.nan, np.float32)
    number_of = {path: number for number, path in enumerate(paths)}
    histograms = {name: np.zeros(BINS, np.int64) for name in names}
    for line in store.latest():
        path, stamp = line["path"], stamps.get(line["path"])
        if stamp is None or not (store.done(path, stamp) or (line["status"] == "failed" and line["input"] == stamp)):
            continue
        for name, counts in line.get("histogram", {}).items():
            histograms[name] += counts
        rows[path] = (
            _row(line, names)
            | {column: line.get("errors", {}).get(column) for column in errors}
            | {column: line.get(column) for column in counted}
            | {column: round(line[column], 6) if column in line else None for column in compared}
        )
        if numbers and line["status"] == "ok":
            embeddings_ND[number_of[path]] = np.frombuffer(base64.b64decode(line["embedding"]), "<f4")

    table = io.StringIO(newline="")
    plain, quoted = (
        csv.DictWriter(table, columns, lineterminator="\n", quoting=each) for each in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
    )
    plain.writeheader()
    for row in rows.values():  # a bare \r would end a line, and only quoting all of a row quotes it
        (quoted if "\r" in row["path"] else plain).writerow(row)
    write_file(store.out / "images.csv", table.getvalue())

    first, sign = names[0], 1 if store.settings["maps"][names[0]]["sure_is"] == "high" else -1
    reached = [row for row in rows.values() if row["status"] != "left"]
    done = [row for row in reached if row["status"] == "ok"]
    gallery = sorted(done, key=lambda row: (sign * row[f"{first}_mean"], row["path"]))[:GALLERY]
    with ThreadPoolExecutor() as pool:  # OpenCV lets go of the interpreter lock
        pictures = pool.map(lambda row: _thumbnail(store.out / row["path"] / "overlay.jpg", row), gallery)
        thumbnails = {row["path"]: picture for row, picture in zip(gallery, pictures, strict=True)}
    untimed = [{key: value for key, value in row.items() if key != "seconds"} for row in reached]
    counts = {name: each.tolist() for name, each in histograms.items()}
    write_file(store.out / "report.html", render_report(store.settings, untimed, counts, thumbnails))
    if numbers:
        _write_array(store.out / "embeddings.npy", embeddings_ND)
    return {"ok": len(done), "failed": len(reached) - len(done), "left": len(paths) - len(reached)}


def _row(line: dict[str, Any], names: list[str]) -> dict[str, Any]:
    keys = ("path", "status", "error", "height", "width", "seconds")
    means = {f"{name}_mean": round(line["mean"][name], 6) if "mean" in line else None for name in names}
    return {key: line.get(key) for key in keys} | means | {"note": line.get("note", "")}


def _write_array(file: Path, embeddings_ND: Float32[np.ndarray, "N D"]) -> None:
    """As np.save does, without a second copy of the numbers."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(embeddings_ND))
    write_file(file, header.getvalue(), embeddings_ND.data)


def _thumbnail(file: Path, row: dict[str, Any]) -> bytes:
    """JPEG of the overlay without its legend."""
    overlay = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert overlay is not None, "the ledger says that this file is whole"
    return render.encode_jpeg(render.thumbnail(overlay[: row["height"], : row["width"]], 320), 80)
