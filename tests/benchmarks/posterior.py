"""How long an exact posterior of 256 x 256 pixels takes, scene by scene.

    python tests/benchmarks/posterior.py

There is no peer to be beside; the limit is the likelihood of each pixel under each class, whose time stands beside.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from seguncert.posterior import QuadTree
from seguncert.scenes import SCENES

SIDE = 256


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    large = {
        name: replace(scene, depth=SIDE.bit_length() - 1) if isinstance(scene, QuadTree) else replace(scene, shape=(SIDE, SIDE))
        for name, scene in SCENES.items()
    }  # fmt: skip
    images = {name: scene.sample(1, seed=0)[0][0] for name, scene in large.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in large}
    for _ in range(rounds + 1):  # interleaved; the first round makes tables of likelihoods
        for name, scene in large.items():
            likelihood = seconds(lambda scene=scene, name=name: scene.colours.log_likelihood(images[name]))
            times[name].append((likelihood, seconds(lambda scene=scene, name=name: scene.posterior(images[name]))))
    for name, found in times.items():
        likelihood, posterior = (1000 * statistics.median(each) for each in zip(*found[1:], strict=True))
        print(
            f"{name}: exact posterior of {SIDE}x{SIDE} in {posterior:.0f} ms, its likelihoods alone {likelihood:.0f} ms"
        )


if __name__ == "__main__":
    main()
