"""The deterministic part of a net on the engine that runs it fastest, if its maps agree with fp32 PyTorch.

A *part* is a module from pictures (1, 3, h, w) to one tensor: a whole net, or a net up to its dropout. An engine is chosen
by running it: on a picture of smooth noise its confidence map must differ from fp32 PyTorch's by at most `TOLERANCE` on
average; otherwise the next one is tried, and fp32 PyTorch is the last. Noise is a hard probe: nets are unsure of it, and
there rounding shows most (`street` in bf16: 0.017 on noise, 0.003 on CamVid val; `python tests/benchmarks/sampling.py
--agree IMAGES`). What was chosen, and how far off it was, is in `Chosen.about` and so in run.json.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor, nn

BACKENDS, PRECISIONS = ("auto", "torch", "openvino"), ("auto", "fp32", "bf16")
TOLERANCE = 0.025  # of the confidence, on average


@dataclass(frozen=True)
class Chosen:
    """A part on the engine that was chosen for it."""

    run: Callable[[Tensor], Tensor]
    about: str


def check_backend(backend: str, precision: str) -> None:
    """ValueError where one is unknown, or openvino is asked for and not installed."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}. Received: {backend!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}. Received: {precision!r}")
    if backend == "openvino" and not _installed():
        raise ValueError("backend: openvino is not installed: pip install 'seguncert[openvino]'")


def choose(
    part: nn.Module,
    confidence: Callable[[Tensor], Tensor],
    device: torch.device,
    divisor: int,
    backend: str,
    precision: str,
    streams: int = 1,
) -> Chosen:
    """Put `part` on the fastest engine allowed.

    Args:
        confidence: the map of what the part gives, to compare.
        divisor: of the sides of the pictures that the part takes.
        backend, precision: auto tries openvino in bf16 where the processor has it, then in fp32, then torch in fp32;
            torch in bf16 only if both are named.
        streams: how many threads will call it at once; each then gets one core, and one alone gets all.

    Raises:
        ValueError: what was asked for by name does not agree with fp32 PyTorch, or cannot run the part.
    """
    check_backend(backend, precision)
    candidates = _candidates(backend, precision, device)
    if candidates[0] == ("torch", "fp32"):
        return Chosen(part, "torch fp32")
    with torch.inference_mode():
        probe = _probe(divisor).to(device)
        expected = confidence(part(probe))
        failures = []
        for engine, bits in candidates:
            if (engine, bits) == ("torch", "fp32"):
                return Chosen(part, "torch fp32")
            try:
                run = _openvino(part, bits, streams, divisor) if engine == "openvino" else _autocast(part, device)
                off = (confidence(run(probe)) - expected).abs().mean().item()
            except Exception as error:  # whatever a converter makes of a net
                failures.append(f"{engine} {bits}: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
                continue
            if off <= TOLERANCE:
                return Chosen(run, f"{engine} {bits}, confidence {off:.1g} from torch fp32 on average")
            failures.append(
                f"{engine} {bits}: confidence is {off:.2g} from torch fp32 on average, more than {TOLERANCE}"
            )
    raise ValueError(f"backend: {'; '.join(failures)}. Set it to auto, or the precision to fp32.")


def _candidates(backend: str, precision: str, device: torch.device) -> list[tuple[str, str]]:
    found = []
    if backend in ("auto", "openvino") and _installed() and device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        found += [("openvino", "bf16")] if precision == "bf16" or (precision == "auto" and fast) else []
        found += [("openvino", "fp32")] if precision in ("auto", "fp32") else []
    if backend == "torch" and precision == "bf16":
        return [("torch", "bf16")]
    return found + ([("torch", "fp32")] if backend == "auto" or (backend == "torch" and precision != "bf16") else [])


def _installed() -> bool:
    return importlib.util.find_spec("openvino") is not None


def _probe(divisor: int) -> Tensor:
    """Smooth noise, about 256 × 320, of the range of a normalised picture."""
    size = tuple(divisor * math.ceil(side / divisor) for side in (320, 256))
    coarse = np.random.default_rng(0).normal(0, 1, (6, 8, 3)).astype(np.float32)
    return torch.from_numpy(cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC)).permute(2, 0, 1)[None]


def _autocast(part: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    def run(value: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return part(value).float()

    return run


def _openvino(part: nn.Module, bits: str, streams: int, divisor: int) -> Callable[[Tensor], Tensor]:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # or importing it reports to its maker
    import openvino

    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch.jit, which the converter uses
        converted = openvino.convert_model(part, example_input=_probe(divisor), input=[-1, 3, -1, -1])
    options: dict[str, object] = {"INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[bits]}
    if streams > 1:
        options |= {"NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": streams}
    compiled = openvino.Core().compile_model(converted, "CPU", options)
    of_thread = threading.local()

    def run(value: Tensor) -> Tensor:
        if not hasattr(of_thread, "request"):
            of_thread.request = compiled.create_infer_request()
        return torch.from_numpy(of_thread.request.infer([value.contiguous().numpy()])[0].copy())

    return run
