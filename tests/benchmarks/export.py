"""What `export` costs beyond the net, in ratios measured in one run, interleaved, medians.

    python tests/benchmarks/export.py IMAGES [--model street] [--rounds 5] [--memory]

speed     images per second of `export`, from files to files, over images per second of the bare net on the same
          pictures already decoded, resized and normalised in memory. The bare net runs two ways, and the faster
          one counts: one picture after another on all cores, and as `export` runs it, one core a picture.
maps      time from the net's output to labels, confidence, entropy and margin at the photo's size, over the time of
          the net, both on one core.
--memory  peak memory of a process that exports 100 pictures against one that exports 1,000 (links to the same).
"""

from __future__ import annotations

import argparse
import itertools
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import cv2
import torch

from seguncert import predict
from seguncert.batch import export, list_images
from seguncert.image import read_image
from seguncert.job import available_cores
from seguncert.model import Model, load_model, net_logits
from seguncert.run import OF_ONE_PASS, describe_photo


def caught(model: Model, rgb) -> tuple[torch.Tensor, torch.Tensor]:
    """What the net is given for a picture, caught at its door, and what it gives."""
    seen: list[torch.Tensor] = []
    hook = model.module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    logits = predict.predict_logits(model, rgb)
    hook.remove()
    return seen[0], logits


def inputs(model: Model, images: Path) -> list[torch.Tensor]:
    """What the net sees of each picture."""
    return [caught(model, read_image(images / path).rgb)[0] for path in list_images(images)[0]]


def clock(function, *arguments) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


@torch.inference_mode()
def one_after_another(model: Model, pictures: list[torch.Tensor]) -> None:
    for picture in pictures:
        net_logits(model, picture)


def one_core_each(model: Model, pictures: list[torch.Tensor]) -> None:
    def run(picture: torch.Tensor) -> None:
        torch.set_num_threads(1)
        with torch.inference_mode():
            net_logits(model, picture)

    with ThreadPoolExecutor(available_cores()) as pool:
        list(pool.map(run, pictures))


def export_all(model: Model, images: Path, calibration: str) -> None:
    with tempfile.TemporaryDirectory() as out:
        result = export(images, out, model, calibration=calibration)
        assert result.failed == result.left == 0


def measure_speed(model: Model, images: Path, rounds: int) -> None:
    pictures = inputs(model, images)
    ways = {
        "net, all cores a picture": lambda: one_after_another(model, pictures),
        "net, one core a picture": lambda: one_core_each(model, pictures),
        "export, files to files": lambda: export_all(model, images, "none"),
        "the same, calibrated": lambda: export_all(model, images, "auto"),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(clock(way))
    speeds = {name: len(pictures) / median(values) for name, values in times.items()}
    print(
        f"{len(pictures)} pictures of {images}, net input {tuple(pictures[0].shape)}, {available_cores()} cores, {rounds} rounds"
    )
    for name, values in times.items():
        print(f"  {name:26} {speeds[name]:6.2f} images/s   (rounds {', '.join(f'{value:.1f}' for value in values)} s)")
    bare = max(speed for name, speed in speeds.items() if name.startswith("net"))
    print(f"  export / faster bare net   {speeds['export, files to files'] / bare:6.3f}")
    print(f"  with its calibration       {speeds['the same, calibrated'] / bare:6.3f}")


@torch.inference_mode()
def measure_maps(model: Model, images: Path, rounds: int) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rgb = read_image(images / list_images(images)[0][0]).rgb
    picture, logits = caught(model, rgb)
    h, w = logits.shape[1:]
    times: dict[str, list[float]] = {"net": [], "maps": []}
    for _ in range(4 * rounds):
        started = time.perf_counter()
        output = net_logits(model, picture)
        between = time.perf_counter()
        describe_photo(rgb, predict.planes(output[:, :h, :w]), None, OF_ONE_PASS)
        times["net"].append(between - started)
        times["maps"].append(time.perf_counter() - between)
    net, maps = median(times["net"]), median(times["maps"])
    print(f"maps at {rgb.shape[1]}x{rgb.shape[0]}, {len(model.classes)} classes, one core, {4 * rounds} rounds")
    print(f"  net {1000 * net:.1f} ms, labels + three maps {1000 * maps:.1f} ms, ratio {maps / net:.3f}")


def measure_memory(name: str, images: Path) -> None:
    originals = [images / path for path in list_images(images)[0]]
    for count in (100, 1000):
        with tempfile.TemporaryDirectory() as place:
            source = Path(place) / "in"
            source.mkdir()
            for k, original in zip(range(count), itertools.cycle(originals), strict=False):
                (source / f"{k:05}{original.suffix}").symlink_to(original.resolve())
            run = [sys.executable, __file__, str(source), "--model", name, "--only-export", str(Path(place) / "out")]
            print(
                f"  {count:5} pictures: {subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()}"
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("images", type=Path)
    parser.add_argument("--model", default="street")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--only-export", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only_export:
        export(arguments.images, arguments.only_export, arguments.model)
        print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    elif arguments.memory:
        print("peak memory of the whole process")
        measure_memory(arguments.model, arguments.images)
    else:
        model = load_model(arguments.model)
        measure_speed(model, arguments.images, arguments.rounds)
        measure_maps(model, arguments.images, arguments.rounds)


if __name__ == "__main__":
    main()
