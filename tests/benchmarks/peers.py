"""What 20 samples of MC dropout cost with other packages, in forward passes: the counterpart of `sampling.py`.

    python3 -m venv peers
    peers/bin/pip install seggnosis "torch-uncertainty[cpu]" baal segmentation-models-pytorch
    peers/bin/pip install -e ".[openvino]"     # optional: this package, in the same run
    peers/bin/python tests/benchmarks/peers.py [--samples 20] [--rounds 9] [--height 384] [--width 480]

One process, interleaved, median of the rounds. FPN resnet18 with random weights and a dropout of 0.2 before the last
convolution, 11 classes, batch 1, CPU, fp32. Each way of sampling ends with three maps: the mean of the softmax, the
predictive entropy, and a spread: the variance, averaged over the classes, or for torch-uncertainty, which has none, the
mutual information. A package makes them itself where it has a function for it; softmax and mean are torch's where not.

default, cheapest   with the settings that the package has by itself; with those that it offers and that take least time
ratio               time of the way over that of a plain eager forward pass, which is taken before each
memory              growth of the process's peak while it runs, MiB
entropy, spread     means over a photo; from one seed of torch's all ways of the peers agree (seguncert has its own)
                    and a spread of 0 everywhere is no sampling

Two photos take turns, round by round: a cache must not live on what the round before left there. The machine has to be
quiet: threads of torch that wait for a busy core make a plain pass several times slower, and large batches look cheap.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

CLASSES = 11
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

Maps = tuple[Tensor, ...]  # mean (C, H, W), entropy (H, W), spread (H, W)
Run = Callable[[Tensor, Tensor], Maps]  # of a photo, uint8 (H, W, 3), and the same as the net wants it, (1, 3, H, W)


def seggnosis(net: nn.Module, samples: int) -> Iterator[tuple[str, Run]]:
    from seggnosis import wrap  # type: ignore[import-not-found]
    from seggnosis.utils import pixelwise_variance  # type: ignore[import-not-found]

    wrapper = wrap(copy.deepcopy(net), n_samples=samples)  # a copy, for it leaves the dropout on

    def run(rgb_HW3: Tensor, input_13HW: Tensor) -> Maps:
        result = wrapper.predict(input_13HW)
        made = result.probs, result.uncertainty_map, pixelwise_variance(result.raw["samples"])
        return tuple(map(torch.from_numpy, made))

    yield "default, none is cheaper: predict(), and the variance of its raw samples", run


def torch_uncertainty(net: nn.Module, samples: int) -> Iterator[tuple[str, Run]]:
    from torch_uncertainty.methods import mc_dropout  # type: ignore[import-not-found]
    from torch_uncertainty.metrics import Entropy, MutualInformation  # type: ignore[import-not-found]

    def way(**settings: bool) -> Run:
        wrapper = mc_dropout(copy.deepcopy(net), samples, task="segmentation", **settings).eval()  # else one plain pass

        def run(rgb_HW3: Tensor, input_13HW: Tensor) -> Maps:
            probs_SCHW = wrapper(input_13HW).softmax(1)
            mean_CHW = probs_SCHW.mean(0)
            entropy, mutual_information = Entropy(reduction="none"), MutualInformation(reduction="none")
            entropy.update(mean_CHW.flatten(1).T)  # given all samples, it gives the mean of their entropies
            mutual_information.update(probs_SCHW.flatten(2).permute(2, 0, 1))
            return mean_CHW, *(each.compute().view(mean_CHW.shape[1:]) for each in (entropy, mutual_information))

        return run

    yield "default: mc_dropout(on_batch=True)", way()
    yield "cheapest: mc_dropout(on_batch=False)", way(on_batch=False)


def baal(net: nn.Module, samples: int) -> Iterator[tuple[str, Run]]:
    from baal.active.heuristics import Entropy, Variance  # type: ignore[import-not-found]
    from baal.bayesian.caching_utils import MCCachingModule  # type: ignore[import-not-found]
    from baal.bayesian.dropout import MCDropoutModule  # type: ignore[import-not-found]
    from baal.modelwrapper import ModelWrapper, TrainingArgs  # type: ignore[import-not-found]

    heuristics = Entropy(), Variance(reduction=lambda variance_1CHW: variance_1CHW.mean(1))

    def way(module: nn.Module, **settings: bool) -> Run:
        wrapper = ModelWrapper(module.eval(), TrainingArgs(use_cuda=False, **settings))

        def run(rgb_HW3: Tensor, input_13HW: Tensor) -> Maps:
            probs_1CHWS = wrapper.predict_on_batch(input_13HW, samples).softmax(1)
            # given logits, Entropy takes the softmax of their mean, and Variance that of the logits
            made = (heuristic.get_uncertainties(probs_1CHWS)[0] for heuristic in heuristics)
            return probs_1CHWS.mean(-1)[0], *map(torch.from_numpy, made)

        return run

    plain, looped, cached = (MCDropoutModule(copy.deepcopy(net)) for _ in range(3))
    yield "default: predict_on_batch(), replicate_in_memory=True", way(plain)
    yield "cheaper: replicate_in_memory=False", way(looped, replicate_in_memory=False)
    yield "cheapest: the same in an MCCachingModule", way(MCCachingModule(cached), replicate_in_memory=False)


def seguncert(net: nn.Module, samples: int) -> Iterator[tuple[str, Run]]:
    from seguncert.model import wrap_model
    from seguncert.sampling import DropoutSampler

    model = wrap_model(copy.deepcopy(net), [str(c) for c in range(CLASSES)])
    for about, backend, precision in (("default", "torch", "fp32"), ("cheapest: all auto", "auto", "auto")):
        sampler = DropoutSampler(model, backend=backend, precision=precision)

        def run(rgb_HW3: Tensor, input_13HW: Tensor, sampler: DropoutSampler = sampler) -> Maps:
            moments = sampler.moments(rgb_HW3.numpy(), samples, scale="native")
            return moments.mean_CHW, moments.predictive_entropy_HW(), moments.variance_CHW().mean(0)

        yield f"{about}, on {sampler.backend}", run


PACKAGES = {"seggnosis": seggnosis, "torch-uncertainty": torch_uncertainty, "baal": baal, "seguncert": seguncert}


def clock(function: Callable[..., object], *arguments: Tensor) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def growth(function: Callable[..., object], *arguments: Tensor) -> float:
    """MiB by which the peak of the process's memory rises above what it holds before."""
    ctypes.CDLL(None).malloc_trim(0)  # what others left free would hide it
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = status("VmRSS")
    function(*arguments)
    return status("VmHWM") - before


def status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


def photo(height: int, width: int) -> tuple[Tensor, Tensor]:
    coarse_13hw = torch.randint(0, 256, (1, 3, 24, 30)).float()
    smooth_13HW = nn.functional.interpolate(coarse_13hw, (height, width), mode="bicubic")
    rgb_HW3 = smooth_13HW[0].permute(1, 2, 0).clamp(0, 255).byte().contiguous()
    return rgb_HW3, ((rgb_HW3 / 255 - MEAN) / STD).permute(2, 0, 1)[None].contiguous()


@torch.inference_mode()
def measure(net: nn.Module, ways: dict[str, Run], photos: list[tuple[Tensor, Tensor]], rounds: int) -> None:
    levels = {}
    for name, run in ways.items():
        torch.manual_seed(0)
        levels[name] = [each.mean().item() for each in run(*photos[1])[1:]]
    forwards: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        rgb, value = photos[turn % 2]
        for name, run in ways.items():
            forwards.append(clock(net, value))
            times[name].append(clock(run, rgb, value))
    forward, (rgb, value) = median(forwards), photos[rounds % 2]
    print(f"forward {1000 * forward:.1f} ms, memory {growth(net, value):.0f} MiB")
    for name, run in ways.items():
        entropy, spread = levels[name]
        print(
            f"{name}\n    ratio {median(times[name]) / forward:5.2f}   memory {growth(run, rgb, value):5.0f} MiB"
            f"   entropy {entropy:.4f}   spread {spread:.5f}"
            + ("" if spread > 0 else "   ZERO EVERYWHERE: not sampled"),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, value in {"samples": 20, "rounds": 9, "height": 384, "width": 480}.items():
        parser.add_argument(f"--{option}", type=int, default=value)
    options = parser.parse_args()
    torch.manual_seed(0)
    net = smp.FPN("resnet18", encoder_weights=None, classes=CLASSES, decoder_dropout=0.2).eval()
    ways: dict[str, Run] = {}
    for package, make in PACKAGES.items():
        try:
            ways |= {f"{package} {version(package)}, {about}": run for about, run in make(net, options.samples)}
        except ImportError as error:
            print(f"{package}: not measured, {error.name} is not installed", file=sys.stderr)
    print(
        f"FPN resnet18, {options.samples} samples, {options.width}x{options.height}, {CLASSES} classes,"
        f" {torch.get_num_threads()} threads, {options.rounds} rounds, torch {torch.__version__}"
    )
    measure(net, ways, [photo(options.height, options.width) for _ in range(2)], options.rounds)


if __name__ == "__main__":
    main()
