"""`numbaloss doctor`: what this installation has, what it lacks, and what to do about that."""

import ctypes
import importlib.metadata
import importlib.util
import math
import os
import platform
import sys

_VECTORS = ("avx2", "avx512f", "avx512bf16", "fma", "f16c", "neon", "sve", "sve2")


def main():
    """Prints the report; always 0."""
    for name, report in (
        ("versions", _versions),
        ("kernels", _kernels),
        ("threads", _threads),
        ("processor", _processor),
        ("cache", _cache),
        ("GPU", _gpu),
    ):
        lines = []
        try:
            lines.extend(report())
        except Exception as error:  # a report that fails is a finding
            lines.append(f"! {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        for i, line in enumerate(lines):
            print(f"{'' if i else name:<12}{line}")
    return 0


def _versions():
    from . import __version__

    yield f"numbaloss {__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield ", ".join(f"{name} {_version(name) or 'missing'}" for name in ("numpy", "numba", "llvmlite"))
    for name, purpose, extra in (
        ("ml_dtypes", "bfloat16 arrays in NumPy", "ml_dtypes"),
        ("rich", "progress bars and tables", "'numbaloss[cli]'"),
    ):
        found = _version(name)
        yield f"{name} {found}" if found else f"{name}: missing ({purpose}); pip install {extra}"


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _kernels():
    """Computes one loss whose value is known, large enough to run in parallel."""
    import numpy

    yield _known_loss(numpy)


def _known_loss(xp):
    from . import cross_entropy

    loss = float(cross_entropy(xp.zeros((64, 1024), "float32"), xp.zeros(64, "int64")))
    good = abs(loss / math.log(1024) - 1) <= 4 * 2.0**-23
    return "compile and compute" if good else f"! expected a loss of {math.log(1024)}, got {loss}; please report this"


def _threads():
    import numba

    count = numba.get_num_threads()
    yield f"{count} of {os.cpu_count()} processors (NUMBA_NUM_THREADS, numba.set_num_threads)"
    if count == 1:
        yield "kernels run serially"
        return
    layer = numba.threading_layer()
    yield f"threading layer: {layer}"
    if layer == "workqueue":
        yield "  calls from several Python threads at once take turns; pip install tbb to run them side by side"


def _processor():
    from llvmlite import binding
    from numba.core import config

    features = binding.get_host_cpu_features()
    vectors = [name for name in _VECTORS if features.get(name)]
    yield f"{binding.get_host_cpu_name()} ({platform.machine()}): {' '.join(vectors) or 'no vector instructions known'}"
    if config.CPU_NAME or config.CPU_FEATURES:
        yield f"  compiled for {config.CPU_NAME or 'the host'} {config.CPU_FEATURES or ''} (NUMBA_CPU_NAME/_FEATURES)"


def _cache():
    from .cpu import _launch

    folder = getattr(_launch, "cache_folder", lambda: None)()
    if folder is None:
        yield "! no folder can be written: every process compiles anew; set NUMBA_CACHE_DIR to a folder that can"
        return
    existing = folder
    while not os.path.exists(existing) and os.path.dirname(existing) != existing:
        existing = os.path.dirname(existing)
    if os.access(existing, os.W_OK):
        yield f"{folder}"
    else:
        yield f"! {folder}: cannot be written; set NUMBA_CACHE_DIR to a folder that can"


def _gpu():
    driver, version, devices = _driver()
    if driver is None:
        yield "driver: none; for GPUs install NVIDIA's driver, everything else runs on the CPU"
    else:
        yield f"driver: CUDA {version // 1000}.{version % 1000 // 10}"
        yield f"devices: {', '.join(devices) or 'none that this process may use (CUDA_VISIBLE_DEVICES?)'}"
    extra = "numbaloss[cuda13]" if version >= 13000 or driver is None else "numbaloss[cuda12]"
    if importlib.util.find_spec("cupy") is None:
        yield f"CuPy: missing; for arrays on a GPU pip install '{extra}'"
        return
    try:
        import cupy

        yield f"CuPy: {cupy.__version__}, built for CUDA {cupy.cuda.runtime.runtimeGetVersion() // 1000}"
    except Exception as error:  # without its libraries it fails in many ways
        yield f"! CuPy: cannot be imported: {' '.join(str(error).split())[:200]}; pip install '{extra}'"
        return
    numba_cuda = _version("numba-cuda")
    yield f"numba-cuda: {numba_cuda}" if numba_cuda else f"! numba-cuda: missing; pip install '{extra}'"
    if numba_cuda and devices:
        yield f"kernels: {_known_loss(cupy)}"


def _driver():
    """(library, version, names of devices) of NVIDIA's driver, asked without any package; (None, 0, []) without it."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        version, count, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
        cuda.cuDriverGetVersion(ctypes.byref(version))
        if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
            return cuda, version.value, []
        names = []
        for device in range(count.value):
            cuda.cuDeviceGetName(name, len(name), device)
            names.append(name.value.decode(errors="replace"))
        return cuda, version.value, names
    except (OSError, AttributeError):
        return None, 0, []
