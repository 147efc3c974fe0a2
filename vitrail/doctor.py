"""`vitrail doctor`: what this machine can do, what was measured of it, and what would make it better."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from vitrail.device import supports_bf16
from vitrail.kernels.autotune import cache_file, fastest, machine_key, timings, writable
from vitrail.kernels.registry import Case, candidates
from vitrail.machine import memory_bytes, processor_name
from vitrail.models.kernel_choice import attention_cases
from vitrail.models.variants import variant_config


@dataclass(frozen=True)
class Finding:
    """One line of the page.

    Attributes:
        advice: what would make it better; empty: nothing.
    """

    topic: str
    name: str
    value: str
    advice: str = ""


def examine(models: Iterable[str], *, fresh: bool = False) -> list[Finding]:
    """Return what this machine is and can do; takes a few seconds.

    Args:
        models: variants whose attention is measured, at their own image size.
        fresh: measure attention again, also where it is known.

    Raises:
        ValueError: a model's name is unknown.
    """
    configs = {name: variant_config(name) for name in models}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [
        *_machine(),
        *_graphics(),
        *_formats(device),
        *_compiler(),
        *_decoders(),
        *_packages(),
        *_attention(configs, device, fresh),
    ]


def _machine() -> list[Finding]:
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    advice = ""
    if threads < usable and "OMP_NUM_THREADS" in os.environ:
        advice = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} leaves cores unused; unset it for training alone"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    busy = "other programs are busy; training on shared cores can be several times slower" if load > cores / 2 else ""
    return [
        Finding("machine", "system", platform.platform()),
        Finding("machine", "processor", f"{processor_name()}, {cores} cores"),
        Finding("machine", "threads", f"{threads} of {usable} usable cores compute", advice),
        Finding("machine", "memory", f"{memory_bytes() / 2**30:.1f} GiB"),
        Finding("machine", "load", f"{load:.1f} processes in the last minute", busy),
    ]


def _graphics() -> list[Finding]:
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "PyTorch sees none"
        return [Finding("GPU", "CUDA", f"no ({why})", "" if torch.version.cuda else "install a CUDA build of torch")]
    found = []
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        value = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, compute capability {about.major}.{about.minor}"
        found.append(Finding("GPU", f"cuda:{number}", value))
    return found


def _formats(device: torch.device) -> list[Finding]:
    speeds = {"fp32": _gflops(device, torch.float32)}
    native = supports_bf16(device)
    if native:
        speeds["bf16"] = _gflops(device, torch.bfloat16)
    found = [
        Finding("numbers", name, f"{speed:,.0f} GFLOP/s on {device.type} (matrix product of 1024, measured now)")
        for name, speed in speeds.items()
    ]
    if not native:
        advice = "bf16 would be emulated at a hundredth of the speed: keep --precision fp32, which auto chooses here"
        return [*found, Finding("numbers", "bf16", f"no instructions for it on this {device.type}", advice)]
    return found


def _gflops(device: torch.device, dtype: torch.dtype, side: int = 1024) -> float:
    """Return the best of some matrix products, in 10⁹ operations a second."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2e-9 * side**3 / best


def _compiler() -> list[Finding]:
    compiler = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    found = [
        Finding(
            "compile",
            "C++ compiler",
            compiler or "none",
            "" if compiler else "--compile on CPUs needs one; without --compile nothing is missing",
        )
    ]
    if torch.cuda.is_available():
        missing = "" if _version("triton") else "--compile on GPUs needs it: pip install triton"
        found.append(Finding("compile", "triton", _version("triton") or "not installed", missing))
    return found


def _decoders() -> list[Finding]:
    import PIL
    from PIL import features

    turbo = features.version("libjpeg_turbo")
    advice = "" if turbo else "this Pillow decodes JPEG without libjpeg-turbo: pip install --force-reinstall pillow"
    formats = [name for name in ("jpg", "zlib", "webp", "avif", "jpg_2000", "libtiff") if features.check(name)]
    names = {"jpg": "JPEG", "zlib": "PNG", "webp": "WebP", "avif": "AVIF", "jpg_2000": "JPEG 2000", "libtiff": "TIFF"}
    return [
        Finding("images", "Pillow", f"{PIL.__version__}; libjpeg-turbo {turbo or 'missing'}", advice),
        Finding("images", "formats", ", ".join(names[each] for each in formats)),
    ]


def _packages() -> list[Finding]:
    found = [Finding("packages", "python", platform.python_version())]
    for name in ("torch", "torchvision", "timm", "transformers", "vitrail"):
        version = _version(name)
        if version:
            found.append(Finding("packages", name, version))
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _attention(configs: dict[str, Any], device: torch.device, fresh: bool) -> list[Finding]:
    precisions = ["float32", "bfloat16"] if supports_bf16(device) else ["float32"]
    found = []
    for name, config in configs.items():
        # Local attention is for grids that are much larger than its window.
        sides = (config.image_size, 2 * config.image_size) if config.window else (config.image_size,)
        for side, dtype, training in itertools.product(sides, precisions, (True, False)):
            for case in attention_cases(config, (side, config.patch_size), device.type, dtype, training=training):
                found.append(Finding("attention", f"{name}: {case.key}", _choice(case, fresh)))
    if device.type == "cpu":
        found.append(
            Finding(
                "attention",
                "ms",
                "processor time of one thread for a measured batch (3 heads; about 4096 tokens in all, or one image)",
            )
        )
    cache = cache_file()
    if writable(cache):
        return [*found, Finding("attention", "kept in", f"{cache} for {machine_key()}")]
    advice = f"{cache} cannot be written, so every run measures anew; set VITRAIL_CACHE to a folder that can"
    return [*found, Finding("attention", "kept in", "nothing", advice)]


def _choice(case: Case, fresh: bool) -> str:
    if len(candidates(case)) == 1:
        return f"{candidates(case)[0]} (nothing else fits)"
    taken = timings(case, cache_file(), fresh=fresh)
    return f"{fastest(taken)} ({', '.join(f'{name} {ms:.2f} ms' for name, ms in taken.items())})"
