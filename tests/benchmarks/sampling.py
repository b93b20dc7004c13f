"""What 20 samples of MC dropout cost, in forward passes: moments of 20 samples over one eager fp32 forward pass.

    python tests/benchmarks/sampling.py [--samples 20] [--rounds 9] [--height 384] [--width 480] [--net NAME ...] [--full]

One process, interleaved, median of the rounds; the picture is noise, the nets have random weights (`street` its own).

forward   the net as its library builds it, torch, fp32, eager, all cores
sampled   photo in, moments of all samples at its own size out, on torch in fp32
fastest   the same on the backend that `auto` takes (OpenVINO, if it is installed)
full      the same by full passes and the plain sums, for comparison (--full)
--agree   instead: how far the confidence of `street` on each engine is from torch in fp32, on a folder of photos
memory    growth of the process's peak while it runs, MiB: forward, sampled, and with ten times as many samples; with what the
          process holds from the runs before; after that was given back to the system; and in use, which repeats: in a process
          of its own, whose allocator gives back at once what is freed
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import segmentation_models_pytorch as smp
import torch
import torchvision
from torch import nn

from seguncert.batch import list_images
from seguncert.dropout import Masks
from seguncert.image import read_image
from seguncert.model import Model, load_model, net_logits, wrap_model
from seguncert.moments import Moments
from seguncert.predict import net_input, on_backend, predict_logits
from seguncert.prefix import Session, in_session
from seguncert.sampling import DropoutSampler

CLASSES = [str(c) for c in range(11)]


def segformer() -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    return SegformerForSemanticSegmentation(SegformerConfig(num_labels=11))  # the defaults are b0


NETS: dict[str, Callable[[], Model]] = {
    "FPN resnet18": lambda: wrap_model(smp.FPN("resnet18", encoder_weights=None, classes=11).eval(), CLASSES),
    "street": lambda: load_model("street", "cpu"),
    "DeepLabV3+ mobilenet_v2": lambda: wrap_model(
        smp.DeepLabV3Plus("mobilenet_v2", encoder_weights=None, classes=11).eval(), CLASSES
    ),
    "torchvision deeplabv3": lambda: wrap_model(
        torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=11
        ).eval(),
        CLASSES,
    ),
    "transformers SegFormer-b0": lambda: wrap_model(segformer().eval(), CLASSES),
}


def clock(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def growth(function: Callable[[], object], trim: bool) -> float:
    """MiB by which the peak of the process's memory rises above what it holds before."""
    if trim:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, so that it is seen when it is taken again
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


@torch.inference_mode()
def measure_memory(name: str, model: Model, rgb: np.ndarray, samples: int) -> None:
    plain, module, sampler = net_input(model, rgb).contiguous(), model.module.eval(), DropoutSampler(model)
    runs = [
        lambda: module(plain),
        *(lambda n=n: sampler.moments(rgb, n, scale="native") for n in (samples, 10 * samples)),
    ]
    for run in runs:
        run()
    print(f"{name:26} memory in use {'/'.join(f'{growth(run, True):.0f}' for run in runs)} MiB", flush=True)


@torch.inference_mode()
def measure(name: str, model: Model, rgb: np.ndarray, samples: int, rounds: int, full: bool) -> None:
    height, width = rgb.shape[:2]
    value = net_input(model, rgb)
    plain = value.contiguous()
    module = model.module.eval()
    sampler = DropoutSampler(model)
    fastest = DropoutSampler(model, backend="auto", precision="auto")
    ways: dict[str, Callable[[], object]] = {
        "forward": lambda: module(plain),
        "sampled": lambda: sampler.moments(rgb, samples, scale="native"),
        "fastest": lambda: fastest.moments(rgb, samples, scale="native"),
    }

    def passes() -> None:
        session, moments = Session(sampler.plan), Moments.empty(len(model.classes), height, width)
        with sampler.ready():
            for sample in range(samples):
                session.begin(Masks(0, [sample]), full=True)
                with in_session(session):
                    moments.update(net_logits(model, value)[None, :, :height, :width])

    if full:
        ways["full"] = passes
    times: dict[str, list[float]] = {way: [] for way in ways}
    for function in ways.values():
        function()
    for _ in range(rounds):
        for way, function in ways.items():
            times[way].append(clock(function))
    forward = median(times["forward"])
    ratios = {way: median(each) / forward for way, each in times.items()}
    runs = (ways["forward"], ways["sampled"], lambda: sampler.moments(rgb, 10 * samples, scale="native"))
    kept, trimmed = ("/".join(f"{growth(run, trim):.0f}" for run in runs) for trim in (False, True))
    print(
        f"{name:26} forward {1000 * forward:6.1f} ms   sampled {ratios['sampled']:5.2f}   fastest {ratios['fastest']:5.2f}"
        + (f"   full {ratios['full']:5.1f}" if full else "")
        + f"   memory {kept}, {trimmed} MiB\n    {sampler.how['passes']}; {fastest.backend}",
        flush=True,
    )


@torch.inference_mode()
def agree(images: Path) -> None:
    model = load_model("street", "cpu")
    names = list_images(images)[0]
    for backend, precision in (("torch", "bf16"), ("openvino", "bf16"), ("openvino", "fp32")):
        try:
            other, _about = on_backend(model, backend, precision)
        except ValueError as error:
            print(f"{backend} {precision}: {error}")
            continue
        off = []
        for name in names:
            rgb = read_image(images / name).rgb
            one, two = (predict_logits(each, rgb).softmax(0) for each in (model, other))
            same = (one.argmax(0) == two.argmax(0)).float().mean().item()
            off.append([(one.amax(0) - two.amax(0)).abs().mean().item(), same])
        confidence, same = np.mean(off, axis=0)
        print(
            f"{backend} {precision}: confidence {confidence:.4f} off on average, {100 * same:.2f} % of the labels the same, {len(names)} photos"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--height", type=int, default=384)
    parser.add_argument("--width", type=int, default=480)
    parser.add_argument("--net", action="append", choices=NETS)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--agree", type=Path)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.agree:
        agree(options.agree)
        return
    coarse = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    rgb = cv2.resize(coarse, (options.width, options.height), interpolation=cv2.INTER_CUBIC)
    models: dict[str, Model] = {}
    for name in options.net or NETS:
        torch.manual_seed(0)
        try:
            models[name] = NETS[name]()
        except ImportError as error:
            print(f"{name}: not measured, {error.name} is not installed", file=sys.stderr)
    if options.memory:
        for name, model in models.items():
            measure_memory(name, model, rgb, options.samples)
        return
    print(
        f"{options.samples} samples, {options.width}x{options.height}, 11 classes, {torch.get_num_threads()} threads, {options.rounds} rounds"
    )
    for name, model in models.items():
        measure(name, model, rgb, options.samples, options.rounds, options.full)
    for name in models:  # each in a process of its own, where freed memory goes back at once
        size = f"--height={options.height}", f"--width={options.width}", f"--samples={options.samples}"
        command = [sys.executable, __file__, f"--net={name}", "--memory", *size]
        subprocess.run(command, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}, check=True)


if __name__ == "__main__":
    main()
