"""What every benchmark needs: timing in turns, ratios of medians, and where the numbers came from.

All figures of one table come from one run, every contender timed in turn (A A B B C C A A ..., the first of two calls
not counted), so that a machine whose speed drifts changes them alike.
`read`, `copy` and `add` are the roofs: plain loops over the same bytes.
"""

import json
import os
import platform
import statistics
import sys
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numba
import numpy as np
from numba import njit, prange

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    torch = F = None

RESULTS = Path(__file__).parent / "results"


@njit(parallel=True, fastmath=True)  # a sum in any order, or the adds and not the memory would set its pace
def read(x):
    """Every word of x, once, by all threads."""
    blocks = 16
    total = np.zeros(blocks, x.dtype)
    n = x.size // blocks
    for b in prange(blocks):
        s = x[0]
        for i in range(np.uint64(b * n), np.uint64((b + 1) * n)):
            s += x[i]
        total[b] = s
    return total.sum()


@njit(parallel=True)
def copy(x, out):
    for b in prange(16):
        n = x.size // 16
        out[b * n : (b + 1) * n] = x[b * n : (b + 1) * n]


@njit(parallel=True)
def add(a, b, out):
    for k in prange(16):
        n = a.size // 16
        for i in range(np.uint64(k * n), np.uint64((k + 1) * n)):
            out[i] = a[i] + b[i]


def roof_read(x):
    """A plain parallel read of the bytes of x."""
    return lambda: read(x.reshape(-1).view(np.float32))


def medians(contenders, seconds=1.5, at_least=5):
    """{name: median seconds} of callables, in turns, after one call of each that does not count."""
    for call in contenders.values():
        call()
    times = {name: [] for name in contenders}
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds * len(contenders) or len(next(iter(times.values()))) < at_least:
        for name, call in contenders.items():
            call()  # not timed: threads of the contender before may still spin, and our own sleep
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def row(table, case, contenders, nbytes):
    """Time the contenders of one case, print a line, keep it."""
    t = medians(contenders)
    ours = t["numbaloss"]
    line = {"case": case, "ms": {k: round(v * 1e3, 4) for k, v in t.items()}, "GB/s": round(nbytes / ours / 1e9, 2)}
    line["times faster"] = {k: round(v / ours, 2) for k, v in t.items() if k != "numbaloss"}
    table.append(line)
    ratios = "  ".join(f"{k} x{v}" for k, v in line["times faster"].items())
    print(f"{case:42s} {ours * 1e3:9.3f} ms {line['GB/s']:7.2f} GB/s   {ratios}", flush=True)


def write(name, table):
    """Print nothing more; write the table with machine, versions and date into perf/results/."""

    def have(package):
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = ("numbaloss", "numba", "llvmlite", "numpy", "torch", "ml_dtypes", "scipy")
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            cpu = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), cpu)
    result = {
        "command": "python " + " ".join(sys.argv),
        "date": date.today().isoformat(),
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "threads": numba.get_num_threads()},
        "versions": {p: have(p) for p in packages} | {"python": platform.python_version()},
        "note": "ratios are medians of calls taken in turns; 'times faster' is the contender's time over ours",
        "table": table,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
