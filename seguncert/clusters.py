"""Which images belong together: what resembles each other is drawn together, or an interval is too narrow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from seguncert.batch import sequences

FEWEST = 5  # sequences, below which their blocks are drawn
FEW = 10  # clusters, below which an interval is said to be too narrow


@dataclass(frozen=True)
class Clusters:
    """`of` names the cluster of each image, `about` says how they were chosen and what an interval then tells."""

    of: dict[str, str]
    about: str


def find_clusters(paths: Sequence[str]) -> Clusters:
    """Clusters for a bootstrap over the images at these paths, by their names alone.

    Images of one folder whose names differ only in their last number are taken for a sequence. With `FEWEST` sequences
    or more, these are the clusters: the interval tells of new sequences like them. With fewer, that cannot be told from
    them, and the clusters are blocks of neighbours, √n of a sequence of n: in longer sequences they grow both in
    length, which dependence between neighbours asks for, and in number, which the bootstrap asks for (Carlstein 1986;
    Künsch 1989). Where no name has a neighbour, each image is a cluster.

    >>> find_clusters(["a.png", "b.png"]).of
    {'a.png': 'a.png', 'b.png': 'b.png'}
    >>> find_clusters([f"drive_{k}.png" for k in range(5)]).of["drive_4.png"]
    'drive_3.png'
    """
    found = sequences(list(paths))
    if len(found) == len(paths):
        return Clusters(
            {path: path for path in paths}, "an image each, since no two names differ only in their last number"
        )
    if len(found) >= FEWEST:
        return Clusters(
            {path: frames[0] for frames in found for path in frames},
            "a sequence each: images whose names differ only in their last number",
        )
    of = dict[str, str]()
    for frames in found:
        length = math.isqrt(len(frames) - 1) + 1  # √n rounded up
        of |= {path: frames[number - number % length] for number, path in enumerate(frames)}
    several = f"only {len(found)} sequences" if len(found) > 1 else "only one sequence"
    return Clusters(
        of,
        f"blocks of neighbours (√n images of a sequence of n), since by their names there {'are' if len(found) > 1 else 'is'}"
        f" {several}; the intervals tell of more images of the same, not of other sequences, which may differ by more",
    )
