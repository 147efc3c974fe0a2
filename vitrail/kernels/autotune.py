"""Measure which kernel is fastest, once for each machine, shape and number format, and cache the times in a file."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vitrail.files import cache_folder, write_text
from vitrail.kernels.registry import GLOBAL_KERNELS, KERNELS, LOCAL_KERNELS, Case, Kernels, can_run, candidate_kernels
from vitrail.machine import processor_name

# The default kernel stays unless another is faster by more than noise: choices should not change from run to run.
_MARGIN = 0.8
_ROUNDS = 5
_BUDGET_S = 0.3  # for all candidates of one case; a large shape gets fewer rounds
_REVISION = (
    1  # raise it when a change makes a kernel of `vitrail.kernels` faster or slower, which voids all cached times
)
_TOKENS = 4096  # of one measurement on a CPU, in all its samples and heads


def fastest_kernels(
    cases: Iterable[Case],
    *,
    cache: Path | None,
    known: Any = None,
    global_attention: str = "auto",
    local_attention: str = "auto",
    measuring: bool = True,
) -> Kernels:
    """Return the kernels for some cases.

    Args:
        cases: the attention that a model will compute.
        cache: file of cached times; None: measure anew, and cache nothing.
        known: kernels to use again, by case: those of a run that is resumed, as its file has them.
        global_attention: name of the kernel for global attention; `auto` measures.
        local_attention: the same for local attention.
        measuring: whether a case without cached times may be measured; if not, it gets its default kernel.

    Raises:
        ValueError: a kernel that was given by name cannot compute one of the cases, or there is no such case; `known` has
            a kernel that cannot compute its case.
    """
    requested, cases = {"global": global_attention, "local": local_attention}, list(cases)
    for kind, request in requested.items():
        if request != "auto" and kind not in {case.kind for case in cases}:
            raise ValueError(
                f"kernels.{kind}_attention {request!r} has no effect: at this image size the model has no {kind} attention (a "
                "window over the whole grid is global attention); leave it auto"
            )
    chosen = _checked({} if known is None else known, cases)
    for case in cases:
        request = requested[case.kind]
        if request != "auto":
            if not can_run(request, case):
                able = [name for name in KERNELS[case.kind] if can_run(name, case)]
                raise ValueError(
                    f"kernels.{case.kind}_attention is {request!r}, which cannot compute {case.key}; expected one of: "
                    f"{', '.join(['auto', *able])}"
                )
        elif case.key not in chosen and len(candidate_kernels(case)) > 1:
            milliseconds = timings(case, cache) if measuring else _cached(cache, case)
            if milliseconds:
                chosen[case.key] = fastest_of(milliseconds)
    named = {kind: "" if request == "auto" else request for kind, request in requested.items()}
    return Kernels(chosen, global_attention=named["global"], local_attention=named["local"])


def _checked(known: Any, cases: Iterable[Case]) -> dict[str, str]:
    """Return the choices of a run that is resumed, checked.

    Raises:
        ValueError: they are no names of kernels, or one cannot compute its case.
    """
    remedy = "restore the file, or start a new run"
    if not isinstance(known, Mapping):
        raise ValueError(f"kernels in run.json is {known!r}; expected a kernel's name for each case; {remedy}")
    able = {case.key: [name for name in KERNELS[case.kind] if can_run(name, case)] for case in cases}
    for key, name in known.items():
        names = able.get(key, [*dict.fromkeys([*GLOBAL_KERNELS, *LOCAL_KERNELS])])
        if name not in names:
            raise ValueError(
                f"kernels in run.json has {name!r} for {key!r}, which cannot compute it here; expected one of: "
                f"{', '.join(names)}; {remedy}"
            )
    return dict(known)


def timings(case: Case, cache: Path | None, *, fresh: bool = False) -> dict[str, float]:
    """Return the milliseconds that each kernel takes for a case: cached ones, else measured now and cached.

    Args:
        fresh: measure also what is cached.
    """
    milliseconds = {} if fresh else _cached(cache, case)
    if not milliseconds:
        milliseconds = measure(case)
        if cache is not None:
            _write(cache, {case.key: milliseconds})
    return milliseconds


def fastest_of(milliseconds: Mapping[str, float]) -> str:
    """Return the fastest kernel, or the first, which is the default kernel, where none is faster by more than noise."""
    default, best = next(iter(milliseconds)), min(milliseconds, key=milliseconds.__getitem__)
    return best if milliseconds[best] < _MARGIN * milliseconds[default] else default


def measure(case: Case) -> dict[str, float]:
    """Return the median milliseconds that each candidate takes for a case, the default kernel first.

    On CPUs they are processor time of one thread: where other programs are busy, threads that wait for one another take
    many times as long, and such times would stay in the cache (docs/log.md).
    """
    names = candidate_kernels(case)
    device, dtype = torch.device(case.device), getattr(torch, case.dtype)
    heads = 3
    batch = max(1, (_TOKENS if device.type == "cpu" else 64 * _TOKENS) // case.tokens // heads)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.inference_mode(False):
        packed = torch.randn(batch, case.tokens, 3, heads, case.width, dtype=dtype, device=device)
        q, k, v = (x.transpose(1, 2).detach().requires_grad_(case.training) for x in packed.unbind(2))
        seconds: dict[str, list[float]] = {name: [] for name in names}
        started = time.perf_counter()
        with _one_thread(device):
            for number in range(_ROUNDS + 1):  # the first warms up
                for name in names:
                    seconds[name].append(_seconds(name, case, q, k, v))
                if number and time.perf_counter() - started > _BUDGET_S:
                    break
    return {name: round(1000 * statistics.median(times[1:]), 3) for name, times in seconds.items()}


def _seconds(name: str, case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    """Return the seconds of one call, with its backward pass where the case trains."""
    dropout = 0.1 if case.dropout else 0.0
    clock = time.thread_time
    if case.device == "cuda":
        clock = time.perf_counter
        torch.cuda.synchronize()
    started = clock()
    with torch.set_grad_enabled(case.training), torch.autocast(case.device, enabled=False):
        if case.grid is None:
            out = GLOBAL_KERNELS[name](q, k, v, dropout=dropout)
        else:
            out = LOCAL_KERNELS[name](q, k, v, case.grid, case.window, case.num_prefix, dropout=dropout)
        if case.training:
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    if case.device == "cuda":
        torch.cuda.synchronize()
    return clock() - started


@contextlib.contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Let PyTorch compute on the calling thread only, on CPUs."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cache_file() -> Path:
    """Return the path of the file of cached times."""
    return cache_folder() / "kernels.json"


def machine_key() -> str:
    """Return the key under which times are cached: processor, GPU, and the versions of torch and of Vitrail's kernels."""
    names = [processor_name(), f"torch {torch.__version__}", f"kernels {_REVISION}"]
    if torch.cuda.is_available():
        names.append(torch.cuda.get_device_name())
    return ", ".join(names)


def _cached(cache: Path | None, case: Case) -> dict[str, float]:
    """Return the cached milliseconds of a case on this machine, the default kernel first; empty unless all are there."""
    of_machine = _read(cache).get(machine_key())
    of_case = of_machine.get(case.key) if isinstance(of_machine, dict) else None
    if not isinstance(of_case, dict):
        return {}
    times = {name: of_case.get(name, math.nan) for name in candidate_kernels(case)}
    valid = all(type(ms) in (int, float) and math.isfinite(ms) and ms >= 0 for ms in times.values())
    return times if valid else {}


def _read(cache: Path | None) -> dict[str, Any]:
    """Return the cached times by machine; a file that cannot be read counts as empty."""
    try:
        content = {} if cache is None else json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def writable(cache: Path) -> bool:
    """Whether times can be cached in a file."""
    return _write(cache, {})


def _write(cache: Path, measured: dict[str, dict[str, float]]) -> bool:
    """Add times to the cache, and return whether that worked; without a cache they are measured again."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with _locked(cache):
            content = _read(cache)
            known = content.get(machine_key())
            content[machine_key()] = (known if isinstance(known, dict) else {}) | measured
            write_text(cache, json.dumps(content, indent=2) + "\n")
    except OSError:
        return False
    return True


_THREADS = threading.Lock()


@contextlib.contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Lock the cache against other threads and processes; where there are no file locks, against threads alone."""
    with _THREADS, contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):
            import fcntl  # not on Windows

            handle = stack.enter_context(cache.with_name(f".{cache.name}.lock").open("a"))
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
