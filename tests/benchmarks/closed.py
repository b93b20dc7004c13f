"""How close sampling-free maps are to those of 1,000 samples of MC dropout, and what they cost in forward passes.

    python tests/benchmarks/closed.py IMAGES [--model street] [--images 20] [--samples 1000] [--rounds 9]

Every so many photos of a folder, all pixels of each. Beside the closed formulas stand 20 samples, and as many other samples
as the reference has: no map can agree with a reference better than another reference does. The time is of moments of one
photo over one eager fp32 forward pass of the same input, interleaved, median of the rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from scipy.stats import spearmanr

from seguncert.batch import list_images
from seguncert.image import read_image
from seguncert.maps import describe, describe_spread
from seguncert.model import load_model
from seguncert.moments import Moments
from seguncert.predict import at_scale, net_input
from seguncert.sampling import DropoutSampler, SamplingFree

MAPS = ("variance", "mutual_information", "confidence", "entropy")


def maps_of(moments: Moments) -> dict[str, np.ndarray]:
    found = describe(moments.log_mean_CHW(), MAPS)[1] | describe_spread(moments, MAPS)
    return {name: map_HW.numpy().ravel() for name, map_HW in found.items()}


def clock(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--model", default="street")
    parser.add_argument("--images", dest="count", type=int, default=20)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    model = load_model(options.model, "cpu")
    free, drawn = SamplingFree(model), DropoutSampler(model)
    names = list_images(options.images)[0]
    photos = [
        read_image(options.images / name).rgb for name in names[:: max(1, len(names) // options.count)][: options.count]
    ]

    value, module = net_input(model, at_scale(model, photos[0])).contiguous(), model.module.eval()
    ways: dict[str, Callable[[], object]] = {
        "forward": lambda: module(value),
        "sampling-free": lambda: free.moments(photos[0]),
        "20 samples": lambda: drawn.moments(photos[0], 20),
    }
    times: dict[str, list[float]] = {way: [clock(function) for _ in range(2)][2:] for way, function in ways.items()}
    for _ in range(options.rounds):
        for way, function in ways.items():
            times[way].append(clock(function))
    forward = median(times["forward"])
    print(f"{options.model}, {len(photos)} photos; forward pass {1000 * forward:.0f} ms at {value.shape[3]}x{value.shape[2]};"
          + ",".join(f" {way} {median(each) / forward:.2f}" for way, each in times.items() if way != "forward"))  # fmt: skip

    against: dict[str, Callable[[np.ndarray], Moments]] = {
        "sampling-free": lambda rgb: free.moments(rgb),
        "20 samples": lambda rgb: drawn.moments(rgb, 20, seed=1),
        f"{options.samples} others": lambda rgb: drawn.moments(rgb, options.samples, seed=2),
    }
    ranks: dict[tuple[str, str], list[float]] = {}
    off: dict[tuple[str, str], list[float]] = {}
    for rgb in photos:
        reference = maps_of(drawn.moments(rgb, options.samples, seed=0))
        for way, moments in against.items():
            for name, map_N in maps_of(moments(rgb)).items():
                ranks.setdefault((name, way), []).append(spearmanr(map_N, reference[name]).statistic)
                off.setdefault((name, way), []).append(
                    float(np.abs(map_N - reference[name]).mean() / reference[name].mean())
                )
    for name, way in ranks:
        rank, each = ranks[name, way], off[name, way]
        print(f"{name:20} {way:14} rank correlation {np.mean(rank):.4f}, lowest {min(rank):.4f};"
              f" mean difference {100 * np.mean(each):.1f} % of the mean")  # fmt: skip


if __name__ == "__main__":
    main()
