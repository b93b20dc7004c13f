"""A very large picture through `seguncert export`: seconds, and the peak of the process's memory.

    python tests/benchmarks/large.py [--side 20000] [--model nuclei] [--method mc-dropout] [--samples 20] [--backend auto]

The picture is a texture, side x side pixels, at its own size. The export runs in a process of its own; its peak is that of
resident memory, which counts what is mapped from files as well. The picture itself takes 3 bytes a pixel of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**40))

import cv2
import numpy as np


def texture(side: int) -> np.ndarray:
    """Smooth noise, the same every 2,000 pixels but for its brightness, so that it is made and stored fast."""
    coarse = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    tile = cv2.resize(coarse, (2000, 2000), interpolation=cv2.INTER_CUBIC)
    times = -(-side // 2000)
    return np.tile(tile, (times, times, 1))[:side, :side]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=20_000)
    parser.add_argument("--model", default="nuclei")
    parser.add_argument("--method", default="mc-dropout")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--maps", default="confidence,variance")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in", Path(folder) / "out"
        source.mkdir()
        cv2.imwrite(str(source / "large.jpg"), texture(options.side), [cv2.IMWRITE_JPEG_QUALITY, 95])
        command = [
            sys.executable,
            "-m",
            "seguncert.cli",
            "export",
            source,
            out,
            "--model",
            options.model,
            "--scale",
            "native",
        ]
        command += ["--method", options.method, "--maps", options.maps, "--device", "cpu"]
        command += ["--max-pixels", options.side**2, "--backend", options.backend, "--workers", 1]
        command += ["--samples", options.samples] if "mc-dropout" in options.method else []
        started = time.perf_counter()
        process = subprocess.Popen([str(each) for each in command])
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        line = json.loads((out / "ledger.jsonl").read_text().splitlines()[-1])
        files = {name: f"{size >> 20} MiB" for name, size in line.get("files", {}).items()}
        print(f"{options.side}x{options.side}, {options.model}, {options.method}: status {os.waitstatus_to_exitcode(status)},"
              f" {line['status']} {line.get('error', '')}, {seconds:.0f} s, peak {usage.ru_maxrss / 2**20:.2f} GiB, {files}")  # fmt: skip


if __name__ == "__main__":
    main()
