"""Examine this machine for `vitrail doctor`: its hardware and software, kernel timings, and advice."""

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
from vitrail.kernels.autotune import cache_file, fastest_of, machine_key, timings, writable
from vitrail.kernels.registry import Case, candidate_kernels
from vitrail.machine import memory_bytes, processor_name
from vitrail.models.kernel_choice import attention_cases
from vitrail.models.variants import variant_config


@dataclass(frozen=True)
class Finding:
    """One fact about this machine.

    Attributes:
        topic: the group it is printed in.
        name: what it is about, unique in its topic.
        value: the fact.
        advice: what would improve it; empty: nothing.
    """

    topic: str
    name: str
    value: str
    advice: str = ""


def examine(models: Iterable[str], *, fresh: bool = False) -> list[Finding]:
    """Return all findings on this machine; takes a few seconds.

    Args:
        models: variants whose attention is measured, at their own image size.
        fresh: measure attention again, also where times are cached.

    Raises:
        ValueError: a model's name is unknown.
    """
    configs = {name: variant_config(name) for name in models}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [
        *_machine(),
        *_gpus(),
        *_number_formats(device),
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


def _gpus() -> list[Finding]:
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "PyTorch sees none"
        return [Finding("GPU", "CUDA", f"no ({why})", "" if torch.version.cuda else "install a CUDA build of torch")]
    findings = []
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        value = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
        findings.append(Finding("GPU", f"cuda:{number}", value))
    return findings


def _number_formats(device: torch.device) -> list[Finding]:
    speeds = {"fp32": _gflops(device, torch.float32)}
    native = supports_bf16(device)
    if native:
        speeds["bf16"] = _gflops(device, torch.bfloat16)
    findings = [
        Finding("numbers", name, f"{speed:,.0f} GFLOP/s on {device.type} (matrix product of 1024, measured now)")
        for name, speed in speeds.items()
    ]
    if not native:
        advice = "bf16 would be emulated at a hundredth of the speed: keep --precision fp32, which auto chooses here"
        return [*findings, Finding("numbers", "bf16", f"no instructions for it on this {device.type}", advice)]
    return findings


def _gflops(device: torch.device, dtype: torch.dtype, side: int = 1024) -> float:
    """Return the speed of the fastest of some matrix products, in 10⁹ operations a second."""
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
    findings = [
        Finding(
            "compile",
            "C++ compiler",
            compiler or "none",
            "" if compiler else "--compile on CPUs needs one; without --compile nothing is missing",
        )
    ]
    if torch.cuda.is_available():
        missing = "" if _version("triton") else "--compile on GPUs needs it: pip install triton"
        findings.append(Finding("compile", "triton", _version("triton") or "not installed", missing))
    return findings


def _decoders() -> list[Finding]:
    import PIL
    from PIL import features

    turbo = features.version("libjpeg_turbo")
    advice = "" if turbo else "this Pillow decodes JPEG without libjpeg-turbo: pip install --force-reinstall pillow"
    formats = [name for name in ("jpg", "zlib", "webp", "avif", "jpg_2000", "libtiff") if features.check(name)]
    names = {"jpg": "JPEG", "zlib": "PNG", "webp": "WebP", "avif": "AVIF", "jpg_2000": "JPEG 2000", "libtiff": "TIFF"}
    return [
        Finding("images", "Pillow", f"{PIL.__version__}; libjpeg-turbo {turbo or 'missing'}", advice),
        Finding("images", "formats", ", ".join(names[name] for name in formats)),
    ]


def _packages() -> list[Finding]:
    findings = [Finding("packages", "python", platform.python_version())]
    for name in ("torch", "torchvision", "timm", "transformers", "vitrail"):
        version = _version(name)
        if version:
            findings.append(Finding("packages", name, version))
    return findings


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _attention(configs: dict[str, Any], device: torch.device, fresh: bool) -> list[Finding]:
    precisions = ["float32", "bfloat16"] if supports_bf16(device) else ["float32"]
    findings = []
    for name, config in configs.items():
        # Local attention is for grids that are much larger than its window.
        sides = (config.image_size, 2 * config.image_size) if config.window else (config.image_size,)
        for side, dtype, training in itertools.product(sides, precisions, (True, False)):
            for case in attention_cases(config, (side, config.patch_size), device.type, dtype, training=training):
                findings.append(Finding("attention", f"{name}: {case.key}", _fastest_kernel(case, fresh)))
    if device.type == "cpu":
        findings.append(
            Finding(
                "attention",
                "ms",
                "processor time of one thread for a measured batch (3 heads; about 4096 tokens in all, or one image)",
            )
        )
    cache = cache_file()
    if writable(cache):
        return [*findings, Finding("attention", "cached in", f"{cache} for {machine_key()}")]
    advice = f"{cache} cannot be written, so every run measures again; set VITRAIL_CACHE to a folder that can"
    return [*findings, Finding("attention", "cached in", "nothing", advice)]


def _fastest_kernel(case: Case, fresh: bool) -> str:
    """Return the fastest kernel of a case, with the times of all candidates."""
    if len(candidate_kernels(case)) == 1:
        return f"{candidate_kernels(case)[0]} (no other kernel is a candidate)"
    milliseconds = timings(case, cache_file(), fresh=fresh)
    return f"{fastest_of(milliseconds)} ({', '.join(f'{name} {ms:.2f} ms' for name, ms in milliseconds.items())})"
