"""A GPU's run in one go: checks first (the bits of the CPU backend, streams, graphs), then times.

python perf/on_device.py [--quick] [--seconds N] [--only check|time] [--sanitize] [--out DIR]

Needs CuPy and numba-cuda; the package need not be installed. Writes on_device-<GPU>.json into perf/results/ or DIR
after every check and shape. Exits with 1 if a check failed; the times are taken nevertheless.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import cupy
import numpy as np
from bench import RESULTS, F, torch
from common import BFLOAT16, DTYPES, make_labels

import numbaloss as nl

try:
    from liger_kernel.transformers.functional import liger_cross_entropy
except Exception:  # whatever its own imports raise
    liger_cross_entropy = None
if torch is not None and not torch.cuda.is_available():
    torch = None

TESTS = Path(__file__).resolve().parents[1] / "tests"
CHECKS = sorted(set(TESTS.glob("test_cuda*.py")) - {TESTS / "test_cuda_sass.py"})
SHAPES = [(4096, 32000), (65536, 1024), (262144, 256), (8192, 128256), (4096, 50257), (4096, 50256), (1 << 20, 10)]
SHAPES += [(16384, 8192), (1 << 18, 100), (1, 262144), (16, 262144), (4096, 262144)]
OTHERS = [
    ((4096, 32000), "bfloat16"),
    ((8, 128256), "bfloat16"),
    ((1024, 262144), "bfloat16"),
    ((4096, 32000), "float32"),
    ((1 << 20, 10), "float32"),
]
QUICK_SHAPES = SHAPES[:7]
COMPILED = SHAPES[:2]  # torch.compile takes up to a minute a shape
GRADIENTS = [((8192, 128256), "bfloat16"), ((4096, 32000), "bfloat16"), ((4096, 32000), "float32")]
GRADIENTS += [((4096, 50257), "bfloat16"), ((65536, 1024), "bfloat16"), ((1 << 20, 10), "float32")]
SIXTEEN_BITS = ("bfloat16", "float16")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
EPS = 2.0**-23


# -- checks ------------------------------------------------------------------------------------------------------


PYTEST = [sys.executable, "-m", "pytest", "-v", "-rfE", "-o", "addopts=", "-p", "no:cacheprovider", "--tb=short"]


def run_checks(report, seconds):
    """The tests of the CUDA backend, on this device, in as many processes as there are cores; what is not done after so
    many seconds has no result. The log lies beside the report."""
    workers = ["-n", str(os.cpu_count()), "--dist", "worksteal"] if find_spec("xdist") else []
    log, begin, why = report.path.with_suffix(".checks.log"), time.perf_counter(), None
    environment = {**os.environ, "NUMBA_NUM_THREADS": "4"}
    with open(log, "w") as file:
        try:
            subprocess.run([*PYTEST, *workers, *map(str, CHECKS)], stdout=file, timeout=seconds, env=environment)
        except subprocess.TimeoutExpired:
            why = f"ended after {seconds:.0f} s"
    text = log.read_text()
    found = re.findall(
        r"^(?:\[gw\d+\] .*(PASSED|FAILED|ERROR|SKIPPED)|tests/.* (PASSED|FAILED|ERROR|SKIPPED))", text, re.M
    )
    counts = Counter(a or b for a, b in found)
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)", text, re.M) or ["a test"] * (counts["FAILED"] + counts["ERROR"])
    line = {key.lower(): n for key, n in counts.items()} | {"seconds": round(time.perf_counter() - begin, 1)}
    if not counts["PASSED"]:
        failed.append("no test has passed")
    report.add("checks", {**line, "why": why, "failed": failed})
    print("checks", report.content["checks"][-1], flush=True)


def sanitize(report, budget):
    """A few calls of every kernel under each tool of compute-sanitizer, all tools at once."""
    program = shutil.which("compute-sanitizer")
    runs = {}
    for tool in TOOLS if program else ():
        command = [
            program,
            "--tool",
            tool,
            "--report-api-errors",
            "no",
            *PYTEST,
            str(TESTS / "test_cuda_device.py"),
            "-k",
            "few_calls",
        ]
        log = report.path.with_suffix(f".{tool}.log")
        runs[tool] = log, subprocess.Popen(command, stdout=open(log, "w"), stderr=subprocess.STDOUT)  # noqa: SIM115
    if program is None:
        report.add("sanitizer", {"tool": "compute-sanitizer", "errors": None, "why": "not on PATH"})
    for tool, (log, run) in runs.items():
        line = {"tool": tool, "errors": None}
        try:
            line["exit code"] = run.wait(max(1.0, budget.left()))
        except subprocess.TimeoutExpired:
            run.kill()
            line["why"] = "--seconds is used up"
        found = re.findall(r"SUMMARY: (\d+) (?:error|hazard)", log.read_text())
        line["errors"] = int(found[-1]) if found else None
        report.add("sanitizer", line)
        print("sanitizer", line, flush=True)


# -- times -------------------------------------------------------------------------------------------------------

READ = r"""
extern "C" __global__ void __launch_bounds__(512, 4) read16(const int4* x, long long n, int* out) {
    const long long step = (long long)gridDim.x * blockDim.x;
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    int sum = 0;
    for (; i + 3 * step < n; i += 4 * step) {
        const int4 a = x[i], b = x[i + step], c = x[i + 2 * step], d = x[i + 3 * step];
        sum += a.x + a.y + a.z + a.w + b.x + b.y + b.z + b.w + c.x + c.y + c.z + c.w + d.x + d.y + d.z + d.w;
    }
    for (; i < n; i += step) sum += x[i].x + x[i].y + x[i].z + x[i].w;
    if (sum == 0x5ca1ab1e) *out = sum;  // or the loads would go
}"""
FILL = """
    unsigned int h = (unsigned int)(i + first) * 2654435761u;
    h ^= h >> 16; h *= 0x85ebca6bu; h ^= h >> 13; h *= 0xc2b2ae35u; h ^= h >> 16;
    x = (h >> 8) * (16.0f / 16777216.0f) - 8.0f;"""


def random_logits(rows, classes, dtype):
    """Numbers in [-8, 8) made on the device, a few rows at a time: float32 ones would not fit beside large results."""
    fill = cupy.ElementwiseKernel("int64 first", "float32 x", FILL, "numbaloss_fill")
    out = cupy.empty((rows, classes), np.uint16 if dtype == "bfloat16" else DTYPES[dtype])
    step = max(1, (1 << 26) // classes)
    for begin in range(0, rows, step):
        part = cupy.empty((min(step, rows - begin), classes), np.float32)
        fill(begin * classes, part)
        out[begin : begin + step] = part.view(np.uint32) >> 16 if dtype == "bfloat16" else part
    return out.view(BFLOAT16) if dtype == "bfloat16" else out


def as_torch(x):
    """The same memory as a torch tensor; CuPy's bfloat16 is nothing that DLPack would know."""
    if x.dtype.name in SIXTEEN_BITS:
        return torch.from_dlpack(x.view(np.int16)).view(getattr(torch, x.dtype.name))
    return torch.from_dlpack(x)


class Device:
    """What timing needs of the device: the roofs, and a buffer that drives other data out of its caches."""

    def __init__(self):
        self.properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
        # longer to write than a call takes to reach the device: then events time kernels, not the host
        self.cold = cupy.empty(max(8 * self.properties["l2CacheSize"], 1 << 29), np.uint8)
        self.sum, self.kernel = cupy.zeros(1, np.int32), cupy.RawKernel(READ, "read16")

    def flush(self):
        self.cold.data.memset_async(1, self.cold.nbytes, cupy.cuda.get_current_stream())

    def read(self, x):
        """A kernel that reads the bytes of x, up to the last 15."""
        blocks, n = 4 * self.properties["multiProcessorCount"], np.int64(x.nbytes // 16)
        return lambda: self.kernel((blocks,), (512,), (x.data.ptr, n, self.sum))

    def copy(self, x):
        out, stream = cupy.empty(x.nbytes, np.uint8), cupy.cuda.get_current_stream()
        return lambda: out.data.copy_from_device_async(x.data, x.nbytes, stream)

    def times(self, contenders, seconds=0.4):
        """({name: seconds of each run}, {name: why it has none}), in turns, each from cold caches, by device events."""
        failed, working = {}, {}
        for name, call in contenders.items():
            try:
                begin = time.perf_counter()
                for _ in range(3):
                    self.flush()
                    call()
                    cupy.cuda.Device().synchronize()
                    begin, took = time.perf_counter(), time.perf_counter() - begin
                working[name] = took
            except Exception as problem:
                failed[name] = f"{type(problem).__name__}: {problem}"[:300]
        repeat = int(min(50, max(10, seconds * len(working) / max(sum(working.values()), 1e-9))))
        events = {name: [] for name in working}
        for _ in range(repeat):
            for name, pairs in events.items():
                pairs.append((cupy.cuda.Event(), cupy.cuda.Event()))
                self.flush()
                pairs[-1][0].record()
                contenders[name]()
                pairs[-1][1].record()
        cupy.cuda.Device().synchronize()
        elapsed = cupy.cuda.get_elapsed_time
        return {name: [elapsed(*pair) / 1e3 for pair in pairs] for name, pairs in events.items()}, failed


def check_losses(x, y):
    """Against float64 on the first and last rows, before anything is timed."""
    for part in (slice(0, 4), slice(-4, None)):
        bits = x[part].view(np.uint16).get().view(BFLOAT16) if x.dtype.name == "bfloat16" else x[part].get()
        wide, labels = bits.astype(np.float64), y[part].get()
        want = np.log(np.exp(wide - wide[np.arange(len(wide)), labels][:, None]).sum(1))
        np.testing.assert_allclose(nl.cross_entropy(x, y, reduction="none")[part].get(), want, rtol=4 * EPS)


def one_row(x):
    """x with its first row in place of all: it is read from the cache, and what is left is not memory's time."""
    return cupy.broadcast_to(x[:1], x.shape)


def cupy_formula(x, y):
    """What one would write in CuPy."""
    top = x.max(1)
    return cupy.log(cupy.exp(x - top[:, None]).sum(1)) + top - x[cupy.arange(len(x)), y]


def losses_of(x, y, shape, quick):
    """Contenders for the cross entropy of one input."""
    found = {"numbaloss": lambda: nl.cross_entropy(x, y, reduction="none")}
    found["numbaloss mean"] = lambda: nl.cross_entropy(x, y)
    found["numbaloss of one row"] = lambda: nl.cross_entropy(one_row(x), y, reduction="none")
    if torch is not None:
        a, b = as_torch(x), torch.from_dlpack(y)
        found["torch"] = lambda: F.cross_entropy(a, b, reduction="none")
        if shape in COMPILED[: 1 if quick else None] and x.dtype.name != "float16":
            compiled = torch.compile(lambda a, b: F.cross_entropy(a, b, reduction="none"), dynamic=False)
            found["torch.compile"] = lambda: compiled(a, b)
        if liger_cross_entropy is not None:
            mine = a.clone()  # some versions write the gradient over their input
            found["liger"] = lambda: liger_cross_entropy(mine, b, reduction="none")
    if x.dtype == np.float32:
        found["cupy"] = lambda: cupy_formula(x, y)
    return found


def time_case(device, report, case, contenders, x, nbytes, roof="read"):
    """Time the contenders beside the roofs, print a line, keep it. `nbytes` are those that must be moved."""
    roofs = {"read": device.read(x), "copy": device.copy(x)}
    times, failed = device.times({**contenders, **roofs})
    if failed.keys() & {"numbaloss", *roofs}:
        raise RuntimeError(f"expected times of numbaloss, read and copy, got {failed}")
    t = {name: statistics.median(all_) for name, all_ in times.items()}
    quarters = {name: statistics.quantiles(all_, n=4) for name, all_ in times.items()}
    rate = {"read": x.nbytes / t["read"], "copy": 2 * x.nbytes / t["copy"]}
    ours = t["numbaloss"]
    line = {"case": case, "bytes": nbytes, "ms": {k: round(v * 1e3, 5) for k, v in t.items()}}
    line["quartiles apart / median"] = {k: round((q[2] - q[0]) / t[k], 3) for k, q in quarters.items()}
    line["runs"] = len(times["numbaloss"])
    line["GB/s"] = round(nbytes / ours / 1e9, 1)
    line["roofs GB/s"] = {k: round(v / 1e9, 1) for k, v in rate.items()}
    line[f"share of {roof}"] = round(nbytes / ours / rate[roof], 3)
    line["times faster"] = {k: round(v / ours, 2) for k, v in t.items() if not k.startswith("numbaloss")}
    line["failed"] = failed
    report.add("table", line)
    ratios = "  ".join(f"{k} x{v}" for k, v in line["times faster"].items() if k not in roofs)
    share = f"{line[f'share of {roof}']:.2f} of {roof}"
    print(f"{case:44s} {ours * 1e3:9.4f} ms {line['GB/s']:7.0f} GB/s {share}  {ratios}", flush=True)


def free_memory():
    """Give unused memory back; how much there is."""
    cupy.get_default_memory_pool().free_all_blocks()
    if torch is not None:
        torch.cuda.empty_cache()
    return cupy.cuda.runtime.memGetInfo()[0]


def fits(rows, classes, dtype, free):
    """Whether there is room for the logits, a copy of them, and what the contenders allocate."""
    return 5 * rows * classes * np.dtype(DTYPES[dtype]).itemsize + (1 << 30) < free


def time_losses(device, report, shape, dtype, quick):
    """Cross entropy of integer labels."""
    rows, classes = shape
    x, y = random_logits(rows, classes, dtype), cupy.asarray(make_labels(rows, classes))
    check_losses(x, y)
    nbytes = x.nbytes + y.nbytes + 4 * rows
    time_case(device, report, f"CE {rows}x{classes} {dtype}", losses_of(x, y, shape, quick), x, nbytes)


def time_others(device, report, shape, dtype):
    """Scores, logsumexp, softmax and log_softmax."""
    rows, classes = shape
    x, y = random_logits(rows, classes, dtype), cupy.asarray(make_labels(rows, classes))
    name = f"{rows}x{classes} {dtype}"
    t = None if torch is None else as_torch(x)
    scores = {"numbaloss": lambda: nl.score_tokens(x, y)}
    scores["numbaloss rank, entropy"] = lambda: nl.score_tokens(x, y, rank=True, entropy=True)
    time_case(device, report, f"score_tokens {name}", scores, x, x.nbytes + 24 * rows)
    sums = {"numbaloss": lambda: nl.logsumexp(x)}
    if t is not None:
        sums["torch"] = lambda: torch.logsumexp(t.float(), -1)
    time_case(device, report, f"logsumexp {name}", sums, x, x.nbytes + 4 * rows)
    for function in ("softmax", "log_softmax"):
        contenders = {"numbaloss": lambda f=getattr(nl, function): f(x)}
        if t is not None:
            contenders["torch"] = lambda f=getattr(F, function): f(t, -1, dtype=torch.float32)
        written = 4 * rows * classes
        time_case(device, report, f"{function} {name}", contenders, x, x.nbytes + written, "copy")


def room_like(x):
    return cupy.empty(x.nbytes, np.uint8).view(x.dtype).reshape(x.shape)


def time_gradients(device, report, shape, dtype):
    """Value and gradient of the cross entropy of integer labels, plain and with options."""
    rows, classes = shape
    x, y = random_logits(rows, classes, dtype), cupy.asarray(make_labels(rows, classes))
    run, out = nl.value_and_grad(nl.cross_entropy), room_like(x)
    contenders = {"numbaloss": lambda: run(x, y, out=out)}
    contenders |= teams(lambda: run(x, y, out=out), classes)
    contenders["numbaloss of one row"] = lambda: run(one_row(x), y, out=out)
    contenders["numbaloss smoothing, z_loss"] = lambda: run(x, y, out=out, label_smoothing=0.1, z_loss=1e-4)
    contenders["numbaloss Hessian"] = lambda: nl.value_grad_hess(nl.cross_entropy)(x, y)
    if torch is not None:
        a, b = as_torch(x).clone().requires_grad_(), torch.from_dlpack(y)

        def backward(loss):
            a.grad = None
            loss(a, b).backward()

        contenders["torch"] = lambda: backward(F.cross_entropy)
        if liger_cross_entropy is not None:
            contenders["liger"] = lambda: backward(liger_cross_entropy)
    time_case(device, report, f"value and grad {rows}x{classes} {dtype}", contenders, x, 2 * x.nbytes, "copy")


def teams(call, classes):
    """The same with so many warps a row, of which team_for is to have found the fastest."""
    from numbaloss.cuda import _gradients, _rows, softmax

    def forced(warps):
        def run():
            with mock.patch.object(softmax, "team_for", lambda *_: warps):
                call()

        return run

    chunks = -(-classes // _rows.CHUNK)
    able = [n for n in (1, 2, 4, 8) if 1 < chunks >= n and chunks <= n * _gradients.TASKS]
    return {f"numbaloss {n} warps a row": forced(n) for n in able}


def time_divergences(device, report, shape, dtype):
    """Divergences of two arrays of logits."""
    rows, classes = shape
    x = random_logits(rows, classes, dtype)
    other, out = x[::-1], room_like(x)
    contenders = {"numbaloss": lambda: nl.kl_divergence(x, other, reduction="none")}
    contenders["numbaloss js"] = lambda: nl.js_divergence(x, other, reduction="none")
    run = nl.value_and_grad(nl.kl_divergence, wrt="logits_q")
    contenders["numbaloss value and grad"] = lambda: run(x, other, out=out)
    if torch is not None:
        a, b = as_torch(x), as_torch(x).flip(0)

        def kl():
            p, q = (F.log_softmax(t, -1, dtype=torch.float32) for t in (a, b))
            return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)

        contenders["torch"] = kl
    time_case(device, report, f"KL {rows}x{classes} {dtype}", contenders, x, 2 * x.nbytes)


def time_linear(device, report, rows=4096, features=2048, classes=32000):
    """linear_cross_entropy and its gradients against its matmuls alone, in the precision that CuPy takes for them."""
    hidden, weight = random_logits(rows, features, "float32"), random_logits(classes, features, "float32")
    y, logits = cupy.asarray(make_labels(rows, classes)), cupy.empty((rows, classes), np.float32)
    run = nl.value_and_grad(nl.linear_cross_entropy, wrt=("hidden", "weight"))
    value = {"numbaloss": lambda: nl.linear_cross_entropy(hidden, weight, y)}
    value["its matmul alone"] = lambda: cupy.matmul(hidden, weight.T, out=logits)
    both = {"numbaloss": lambda: run(hidden, weight, y)}
    both["its matmuls alone"] = lambda: (hidden @ weight.T, logits @ weight, logits.T @ hidden)
    for name, contenders in ("linear CE", value), ("value and grad of linear CE", both):
        case = f"{name} {rows}x{features}x{classes} float32"
        time_case(device, report, case, contenders, weight, hidden.nbytes + weight.nbytes)


def time_sigmoid(device, report, n=1 << 28):
    """Sigmoid cross entropy of n elements, no reduction."""
    x, z = random_logits(1 << 8, n >> 8, "float32"), random_logits(1 << 8, n >> 8, "float32")
    plain = {"numbaloss": lambda: nl.sigmoid_cross_entropy_with_logits(z, x)}
    weighted = {"numbaloss": lambda: nl.weighted_cross_entropy_with_logits(z, x, 2.0)}
    if torch is not None:
        a, b, q = as_torch(x), as_torch(z), torch.tensor(2.0, device="cuda")
        plain["torch"] = lambda: F.binary_cross_entropy_with_logits(a, b, reduction="none")
        weighted["torch"] = lambda: F.binary_cross_entropy_with_logits(a, b, pos_weight=q, reduction="none")
    time_case(device, report, f"sigmoid CE {n} float32", plain, x, 3 * x.nbytes, "copy")
    time_case(device, report, f"weighted CE {n} float32", weighted, x, 3 * x.nbytes, "copy")


def time_host(report, calls_each=2000):
    """What a call costs the host: many calls that nobody waits for, on an input so small that the device keeps up."""
    from numbaloss import _check
    from numbaloss.cuda import _launch, totals

    x, y, w = random_logits(4, 10, "float32"), cupy.arange(4), cupy.ones(4, np.float32)
    values = cupy.zeros(4, np.float32)
    kernel, arguments = totals._negate.of(np.float32(0)), (4, np.float32(0), values.data.ptr)
    contenders = {
        "cupy.empty": lambda: cupy.empty(4, np.float32),
        "current stream": cupy.cuda.get_current_stream,
        "a check of the labels": lambda: _check.labels(y, (4,), "labels", x),  # Python alone: how fast this host is
        "launch alone": lambda: _launch.launch(kernel, 1, totals.THREADS, values, *arguments),
        "sparse_softmax_cross_entropy_with_logits": lambda: nl.sparse_softmax_cross_entropy_with_logits(y, x),
        "cross_entropy none": lambda: nl.cross_entropy(x, y, reduction="none"),
        "cross_entropy mean, weights": lambda: nl.cross_entropy(x, y, weights=w),
        "score_tokens": lambda: nl.score_tokens(x, y),
        "cupy x + x": lambda: x + x,
    }
    if torch is not None:
        a, b = as_torch(x), torch.from_dlpack(y)
        contenders["torch cross_entropy"] = lambda: F.cross_entropy(a, b)
    line = {"case": f"host, microseconds a call, {calls_each} calls on (4, 10)", "us": {}}
    for name, call in contenders.items():
        rounds = []
        for _ in range(20):  # of so few calls that the device's queue never fills
            call()
            cupy.cuda.Device().synchronize()
            begin = time.perf_counter()
            for _ in range(calls_each // 20):
                call()
            rounds.append((time.perf_counter() - begin) / (calls_each // 20))
            cupy.cuda.Device().synchronize()
        line["us"][name] = round(statistics.median(rounds) * 1e6, 2)
        print(f"host  {name:44s} {line['us'][name]:9.2f} us a call", flush=True)
    report.add("table", line)


def all_times(quick):
    """(name, rows, classes, dtype, function(device, report)) of everything that is timed."""
    yield "host", 4, 10, "float32", lambda device, report: time_host(report)
    for shape in QUICK_SHAPES if quick else SHAPES:
        for dtype in ("bfloat16", "float32") if quick else (*SIXTEEN_BITS, "float32"):
            case = lambda device, report, s=shape, d=dtype: time_losses(device, report, s, d, quick)  # noqa: E731
            yield f"CE {shape} {dtype}", *shape, dtype, case
    yield "sigmoid", 1 << 8, 1 << 20, "float32", time_sigmoid
    for shape, dtype in OTHERS:
        case = lambda device, report, s=shape, d=dtype: time_others(device, report, s, d)  # noqa: E731
        yield f"scores and softmax {shape} {dtype}", *shape, dtype, case
    for shape, dtype in GRADIENTS[:4] if quick else GRADIENTS:
        for name, time_them in ("value and grad", time_gradients), ("KL", time_divergences):
            case = lambda device, report, f=time_them, s=shape, d=dtype: f(device, report, s, d)  # noqa: E731
            yield f"{name} {shape} {dtype}", *shape, dtype, case
    yield "linear CE", 4096, 32000, "float32", time_linear


def run_times(cases, report, budget):
    device = Device()
    for name, rows, classes, dtype, case in cases:
        free = free_memory()
        why = "--seconds is used up" if budget.spent() else None
        why = why or (
            None if fits(rows, classes, dtype, free) else f"needs more than the {free >> 20} MiB that are free"
        )
        if why is None:
            try:
                case(device, report)
                continue
            except Exception as problem:
                why = f"{type(problem).__name__}: {problem}"[:600]
        report.add("table", {"case": name, "failed": {"numbaloss": why}})
        print(f"{name:44s} not timed: {why}", flush=True)


# -- the report --------------------------------------------------------------------------------------------------


class Budget:
    """Seconds that a run may take."""

    def __init__(self, seconds):
        self.begin, self.seconds = time.perf_counter(), seconds

    def left(self):
        return self.begin + self.seconds - time.perf_counter()

    def spent(self):
        return self.left() < 0


def smi():
    """What nvidia-smi says of clocks and power at this moment, None without it."""
    fields = (
        "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu"
    )
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        return dict(zip(fields.split(","), (item.strip() for item in text.splitlines()[0].split(","))))
    return None


def versions():
    packages = ("numba", "numba-cuda", "llvmlite", "numpy", "cupy-cuda13x", "cupy-cuda12x", "torch", "triton")
    found = {"python": platform.python_version(), "numbaloss": nl.__version__}
    for package in (*packages, "liger-kernel", "ml_dtypes", "nvidia-cuda-nvrtc"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


class Report:
    """The JSON file, written anew with every line that is added."""

    def __init__(self, folder):
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
        name = properties["name"].decode()
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"on_device-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
        machine = {"gpu": name, "multiprocessors": properties["multiProcessorCount"], "L2": properties["l2CacheSize"]}
        machine |= {"memory": properties["totalGlobalMem"], "runtime": cupy.cuda.runtime.runtimeGetVersion()}
        machine |= {"driver": cupy.cuda.runtime.driverGetVersion(), "cores": os.cpu_count(), "at the start": smi()}
        note = "medians by device events, in turns, from a cold L2; 'times faster' is the contender's time over ours"
        self.content = {
            "command": "python " + " ".join(sys.argv),
            "date": date.today().isoformat(),
            "machine": machine,
            "versions": versions(),
            "note": note,
        }
        self.content |= {"checks": [], "sanitizer": [], "table": []}

    def add(self, part, line):
        self.content[part].append(line)
        self.write()

    def write(self):
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")

    def failed(self):
        """Names of what went wrong."""
        failed = [name for line in self.content["checks"] for name in line["failed"]]
        return failed + [line["tool"] for line in self.content["sanitizer"] if line["errors"] or line.get("exit code")]


def arguments(args=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two dtypes and fewer shapes: under five minutes")
    parser.add_argument("--seconds", type=float, help="start nothing after that long (default 1500, with --quick 270)")
    parser.add_argument("--only", choices=("check", "time"), help="leave the other out")
    parser.add_argument("--sanitize", action="store_true", help="also run a few calls under compute-sanitizer")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file (default perf/results)")
    options = parser.parse_args(args)
    if options.seconds is None:
        options.seconds = 270.0 if options.quick else 1500.0
    if not options.seconds > 0:
        parser.error(f"--seconds: expected a positive number, got {options.seconds}")
    return options


def main():
    options = arguments()
    try:
        cupy.cuda.runtime.getDevice()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        sys.exit(f"expected an NVIDIA GPU, found none: {error}")
    budget, report = Budget(options.seconds), Report(options.out)
    if options.only != "time":
        run_checks(report, options.seconds * (1.0 if options.only else 0.5))
    if options.sanitize:
        sanitize(report, budget)
    if options.only != "check":
        run_times(all_times(options.quick), report, budget)
    report.content["machine"]["at the end"], report.content["seconds"] = smi(), time.perf_counter() - budget.begin
    report.write()
    failed = report.failed()
    print(f"{report.path}: {len(failed)} checks failed", *failed, sep="\n  ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
