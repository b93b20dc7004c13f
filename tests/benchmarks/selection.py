"""What choosing costs: seguncert's greedy choice, a plain loop, and apricot-select, on embeddings of 64 numbers.

    python tests/benchmarks/selection.py [--rounds 3] [--million]

Every run is a process of its own, so that memory is its own; rounds are interleaved and medians are printed. apricot-select is
taken if it is installed. It has no k-center; its facility location, which also picks what represents a pool, is what people use
for this, and is run on as many as it can take. `--million` also makes a ledger of 1,000,000 images and runs `seguncert select`
on it, as a user would.
"""

from __future__ import annotations

import argparse
import base64
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

D, PICKS = 64, 1000


def pool(N):
    """Clustered embeddings, as scenes are: 2,000 places, and scores that differ."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((2000, D)).astype(np.float32)
    vectors = centres[rng.integers(0, 2000, N)] + 0.3 * rng.standard_normal((N, D), dtype=np.float32)
    return vectors.astype(np.float32), rng.random(N) ** 2


def ours(vectors, score, picks):
    from seguncert.diversity import Greedy, typical_distance

    vectors = vectors / np.float32(typical_distance(vectors))
    greedy = Greedy(vectors, score)
    return [greedy.take().index for _ in range(picks)]


def loop(vectors, score, picks):
    """Each step over all candidates, as one would write it with numpy."""
    first = int(score.argmax())
    taken, distance = [first], np.linalg.norm(vectors - vectors[first], axis=1)
    while len(taken) < picks:
        gain = distance * score
        gain[taken] = -1
        taken.append(int(gain.argmax()))
        distance = np.minimum(distance, np.linalg.norm(vectors - vectors[taken[-1]], axis=1))
    return taken


def apricot(vectors, score, picks):
    from apricot import FacilityLocationSelection

    return FacilityLocationSelection(picks, metric="euclidean", optimizer="lazy", random_state=0).fit(vectors).ranking


WAYS = {"ours": ours, "loop": loop, "apricot": apricot}


def one(way, N, picks):
    """Seconds and memory above the pool's own, in this process."""
    vectors, score = pool(N)
    if way == "ours":
        ours(vectors[:600], score[:600], 2)  # what is compiled is compiled
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    taken = WAYS[way](vectors, score, picks)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        json.dumps(
            {"seconds": seconds, "mib": (peak - before) / 1024, "all": peak / 1024, "taken": [int(i) for i in taken]}
        )
    )


def run(way, N, picks):
    command = [sys.executable, __file__, "--one", way, str(N), str(picks)]
    found = subprocess.run(command, capture_output=True, text=True)
    return json.loads(found.stdout.splitlines()[-1]) if found.returncode == 0 else None


def make_export(out, N):
    """What an export of N images leaves that `select` reads for the score entropy:mean."""
    vectors, score = pool(N)
    classes = [f"class {c}" for c in range(11)]
    model = {"name": "made up", "sha256": "0", "classes": classes, "colours": [[c * 20] * 3 for c in range(11)]}
    maps = {
        "entropy": {
            "title": "Entropy",
            "unit": "nat",
            "full_scale": 1.0,
            "sure_is": "low",
            "about": "",
            "drawn_to": 1.0,
        }
    }
    out.mkdir()
    (out / "run.json").write_text(json.dumps({
        "seguncert": "", "input": "nowhere", "model": model, "method": "none", "calibration": "none", "format": "png16", "maps": maps,
        "embedding": {"numbers": D},
    }))  # fmt: skip
    rng = np.random.default_rng(1)
    with open(out / "ledger.jsonl", "w") as ledger, open(out / "images.csv", "w") as table:
        table.write("path,status,error\n")
        for i in range(N):
            path = f"drive {i // 5000:03}/{i % 5000:05}.jpg"
            ledger.write(json.dumps({
                "path": path, "status": "ok", "error": "", "input": [100_000, i], "height": 360, "width": 480, "mean": {"entropy": score[i]},
                "histogram": {"entropy": [2700] * 64}, "areas": rng.integers(0, 30_000, 11).tolist(), "seconds": 0.1, "note": "",
                "embedding": base64.b64encode(vectors[i].tobytes()).decode(), "files": {"entropy.png": 290_000, "labels.png": 5000},
            }, separators=(",", ":")) + "\n")  # fmt: skip
            table.write(f"{path},ok,\n")


def whole(N):
    """The choice of `seguncert select` among N images, from their ledger; without the pictures, which are not there."""
    from seguncert.aggregate import parse_score
    from seguncert.candidates import AT_RANDOM, Wish, find_candidates
    from seguncert.choice import Asked, choose, in_order
    from seguncert.labelled import Labelled
    from seguncert.pool import read_pool

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        subprocess.run([sys.executable, __file__, "--make", str(out), str(N)], check=True)
        started = time.perf_counter()
        found = read_pool(out)
        read = time.perf_counter() - started
        asked = Asked(PICKS, score="entropy:mean")
        wish = Wish("image", "grid:64", parse_score(asked.score), "entropy", 20, 0, False, 0)
        candidates = find_candidates(found, wish, Labelled(), 2).candidates
        chosen = choose(found, asked, candidates)
        in_order(found, asked, candidates, AT_RANDOM, candidates.key_M, "random")
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps(
            {"seconds": seconds, "read": read, "all": peak, "picks": len(chosen.picks), "blocked": chosen.blocked_count}
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--million", action="store_true")
    parser.add_argument("--one", nargs=3)
    parser.add_argument("--make", nargs=2)
    parser.add_argument("--whole", type=int)
    given = parser.parse_args()
    if given.one:
        return one(given.one[0], int(given.one[1]), int(given.one[2]))
    if given.make:
        return make_export(Path(given.make[0]), int(given.make[1]))
    if given.whole:
        return whole(given.whole)
    sizes = {"ours": [5000, 20_000, 100_000, 1_000_000], "loop": [5000, 20_000, 100_000], "apricot": [5000, 20_000]}
    results: dict[tuple[str, int], list[dict]] = {}
    for _ in range(given.rounds):
        for N in (5000, 20_000, 100_000, 1_000_000):
            for way in WAYS:
                if N in sizes[way] and (found := run(way, N, PICKS)) is not None:
                    results.setdefault((way, N), []).append(found)
    print(f"{PICKS} picks, {D} numbers each, medians of {given.rounds} interleaved rounds, each a process")
    for (way, N), found in sorted(results.items(), key=lambda each: (each[0][1], each[0][0])):
        seconds, mib = (statistics.median(each[key] for each in found) for key in ("seconds", "mib"))
        print(f"{N:9,} {way:8} {seconds:8.2f} s  {mib:7.0f} MiB above the pool")
        if way == "ours" and (beside := results.get(("loop", N))):
            print(f"{'':9} the same picks as the loop: {found[0]['taken'] == beside[0]['taken']}")
    if given.million:
        command = [sys.executable, __file__, "--whole", "1000000"]
        told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(
            f"1,000,000 images from their ledger: {told['picks']} picks in {told['seconds']:.0f} s, {told['read']:.0f} s of it reading;"
            f" {told['all'] / 1024:.2f} GiB at most; {told['blocked']:,} left out for the gap in their videos"
        )


if __name__ == "__main__":
    main()
