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
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import cupy
import numpy as np
from bench import RESULTS, F, torch
from common import BFLOAT16, DTYPES, assert_same_bits, flat_results, make_labels, make_logits

import numbaloss as nl

try:
    import test_hashes
except ModuleNotFoundError:  # no pytest, whose marks are all that it needs here
    with mock.patch.dict(sys.modules, pytest=mock.MagicMock()):
        import test_hashes
try:
    from liger_kernel.transformers.functional import liger_cross_entropy
except Exception:  # whatever its own imports raise
    liger_cross_entropy = None
if torch is not None and not torch.cuda.is_available():
    torch = None

CLASSES = [1, 2, 3, 10, 100, 128, 129, 255, 256, 257, 1000, 1023, 1024, 1025]
CLASSES += [8191, 8192, 8193, 50257, 128256, 262144]
QUICK_CLASSES = [3, 100, 129, 1024, 8193, 50257, 262144]
SHAPES = [(4096, 32000), (65536, 1024), (262144, 256), (8192, 128256), (4096, 50257), (4096, 50256), (1 << 20, 10)]
SHAPES += [(16384, 8192), (1 << 18, 100), (1, 262144), (16, 262144), (4096, 262144)]
QUICK_SHAPES = SHAPES[:7]
COMPILED = SHAPES[:2]  # torch.compile takes up to a minute a shape
SIXTEEN_BITS = ("bfloat16", "float16")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
NAN = {"check_labels": "nan"}
EPS = 2.0**-23


# -- arrays ------------------------------------------------------------------------------------------------------


def to_device(x):
    """A NumPy array as CuPy's, contiguous; anything else as it is."""
    if not isinstance(x, np.ndarray):
        return x
    return cupy.asarray(x.view(np.uint16)).view(BFLOAT16) if x.dtype == BFLOAT16 else cupy.asarray(x)


def to_host(x):
    """CuPy's arrays as NumPy's, those in tuples too; waits for the device."""
    if isinstance(x, tuple):
        return type(x)(*map(to_host, x))
    return x.get() if isinstance(x, cupy.ndarray) else x


def one_nan(x):
    """Arrays of a result with every NaN the same one: which of them comes out is not promised."""
    arrays = [np.asarray(a) for a in flat_results(x)]
    return tuple(np.where(a == a, a, a.dtype.type(np.nan)) if a.dtype.kind == "f" else a for a in arrays)


def compare(function, *arrays, name=""):
    """function(CuPy arrays) must have the bits of function(NumPy arrays)."""
    got = function(*map(to_device, arrays))
    assert all(isinstance(a, cupy.ndarray) for a in flat_results(got)), f"{name}: expected CuPy arrays, got {got!r}"
    assert_same_bits(one_nan(to_host(got)), one_nan(function(*arrays)), name)


# -- checks: hashes and bits -------------------------------------------------------------------------------------


class MovedEvaluation(nl.Evaluation):
    def update(self, *arrays):
        return super().update(*map(to_device, arrays))


class Moved:
    """numbaloss with its arguments moved to the device and its results back, for test_hashes."""

    Evaluation = MovedEvaluation

    def __getattr__(self, name):
        def call(*args, **options):
            options = {key: to_device(value) for key, value in options.items()}
            return to_host(getattr(nl, name)(*map(to_device, args), **options))

        return call


def check_hashes(name, dtype):
    """The hashes of tests/hashes.json for one function and dtype."""
    kept = json.loads(test_hashes.FILE.read_text())["hashes"]
    with mock.patch.object(test_hashes, "nl", Moved()):
        function = test_hashes.functions()[name]
        got = {V: test_hashes.sha256(function(*test_hashes.logits_for(dtype, V))) for V in test_hashes.CLASSES}
    wrong = [V for V in test_hashes.CLASSES if got[V] != kept[f"{name} {dtype} {V}"]]
    assert not wrong, f"expected the hashes of tests/hashes.json, got others for {wrong} classes"


# f(logits, labels, weights, class weights, class probabilities); the first four also for very many logits
FUNCTIONS = {
    "cross_entropy none": lambda x, y, w, c, z: nl.cross_entropy(x, y, reduction="none", **NAN),
    "cross_entropy mean": lambda x, y, w, c, z: nl.cross_entropy(x, y, weights=w, class_weights=c, **NAN),
    "score_tokens": lambda x, y, w, c, z: nl.score_tokens(x, y, rank=True, entropy=True, **NAN),
    "logsumexp": lambda x, y, w, c, z: nl.logsumexp(x),
    "weighted none": lambda x, y, w, c, z: nl.cross_entropy(x, y, weights=w, class_weights=c, reduction="none", **NAN),
    "cross_entropy sum": lambda x, y, w, c, z: nl.cross_entropy(x, y, reduction="sum", **NAN),
    "ignore_index=0": lambda x, y, w, c, z: nl.cross_entropy(x, y, ignore_index=0, reduction="none", **NAN),
    "softmax": lambda x, y, w, c, z: nl.softmax(x),
    "log_softmax": lambda x, y, w, c, z: nl.log_softmax(x),
    "dense": lambda x, y, w, c, z: nl.softmax_cross_entropy_with_logits(z, x),
    "dense mean": lambda x, y, w, c, z: nl.cross_entropy(x, z, weights=w, class_weights=c),
    "sigmoid": lambda x, y, w, c, z: nl.sigmoid_cross_entropy_with_logits(z, x),
    "weighted sigmoid": lambda x, y, w, c, z: nl.weighted_cross_entropy_with_logits(z, x, 3.0),
    "weighted sigmoid, array": lambda x, y, w, c, z: nl.weighted_cross_entropy_with_logits(z, x, c),
    "sequence_loss": lambda x, y, w, c, z: nl.sequence_loss(x[None], y[None], w[None]),
    "sequence_loss by step": lambda x, y, w, c, z: nl.sequence_loss(x[None], y[None], w[None], False),
}


def inputs(rows, classes, dtype, seed=0):
    """(logits, labels, weights, class weights, class probabilities): finite losses, with -inf in every fourth row, the
    label -100 and weight 0 in every fifth."""
    rng = np.random.default_rng([rows, classes, seed])
    x, y = make_logits(rows, classes, DTYPES[dtype], seed), make_labels(rows, classes, seed)
    w, c = rng.integers(1, 9, rows).astype(np.float32) / 4, rng.integers(0, 5, classes).astype(np.float64) / 4
    z = rng.random((rows, classes), dtype=np.float32)
    x[1::4, 1::3], z[:, 1::3] = -np.inf, 0
    y[1::4] -= y[1::4] % 3
    y[2::5], w[2::5] = -100, 0
    return x, y, w, c, z


def many_rows(classes):
    """Enough rows for the kernels that take several, and for those of long rows that fill a device."""
    return 9000 if classes <= 1025 else 600 if classes <= 8192 else 300


def check_bits(dtype, classes, rows):
    names = list(FUNCTIONS)[: 4 if rows * classes > 1 << 24 else None]
    arrays = inputs(rows, classes, dtype)
    for name in names:
        compare(FUNCTIONS[name], *arrays, name=f"{name} {rows}x{classes} {dtype}")


def check_special_rows(dtype, sizes=(2, 10, 129, 1024, 8193, 20000)):
    """NaN, infinities, nothing but -inf, large numbers, and labels out of range."""
    for classes in sizes:
        arrays = x, y, *_ = inputs(16, classes, dtype)
        x[0, 0], x[1, -1], x[2] = np.nan, np.inf, -np.inf
        x[3], x[4, : classes // 2], x[5] = 0, 3e4, -3e4
        x[6, 0], x[6, 1:] = -np.nan, -np.inf
        y[8], y[9] = classes, -1
        for name in ("cross_entropy none", "weighted none", "score_tokens", "logsumexp", "softmax", "log_softmax"):
            compare(FUNCTIONS[name], *arrays, name=f"{name} 16x{classes} {dtype}")


def check_layouts(dtype, sizes=(10, 130, 1001, 8200)):
    """Views that are read where they lie, and some that must be copied."""
    loss = lambda x, y, **options: nl.cross_entropy(x, y, reduction="none", **options)  # noqa: E731
    for classes in sizes:
        x, y, *_ = inputs(24, classes, dtype)
        y[y < 0] = 0
        y = np.minimum(y, 8)
        tokens = y.reshape(4, 6)
        views = {
            "x[:, 1:]": lambda x, y: loss(x[:, 1:], y),
            "x[::2]": lambda x, y: loss(x[::2], y[::2]),
            "x[:, ::-1]": lambda x, y: loss(x[:, ::-1], y),
            "transposed": lambda x, y: loss(x[:, :9].T, y[:9]),
            "softmax transposed": lambda x, y: nl.softmax(x.T),
            "softmax of axis 0": lambda x, y: nl.softmax(x, axis=0),
        }
        for name, function in views.items():
            compare(function, x, y, name=f"{name} {classes} {dtype}")
        shifted = {
            "tokens[:, 1:]": lambda x, y: loss(x[:, :-1], y[:, 1:]),
            "three axes": lambda x, y: loss(x[1:, ::2, 1:], y[1:, ::2]),
            "classes first": lambda x, y: loss(x.transpose(2, 0, 1), y, axis=0),
            "class axis 1": lambda x, y: loss(x.transpose(0, 2, 1), y, axis=1),
        }
        for name, function in shifted.items():
            for kind in (np.int64, np.int32, np.uint8):
                what = f"{name} {classes} {dtype} {kind.__name__}"
                compare(function, x.reshape(4, 6, classes), tokens.astype(kind), name=what)


# -- checks: what only a device has ------------------------------------------------------------------------------


def spin(seconds):
    """Keep the current stream busy."""
    code = r"""extern "C" __global__ void spin(unsigned long long nanoseconds) {
        unsigned long long now, start;
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
        do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)); while (now - start < nanoseconds);
    }"""
    cupy.RawKernel(code, "spin")((1,), (1,), (np.uint64(seconds * 1e9),))


def calls(x, y, w, z):
    """Public calls that allocate, launch once or twice, and reduce."""
    return {
        "none": lambda: nl.cross_entropy(x, y, reduction="none", **NAN),
        "mean": lambda: nl.cross_entropy(x, y, weights=w, **NAN),
        "score": lambda: nl.score_tokens(x, y, rank=True, entropy=True, **NAN),
        "log_softmax": lambda: nl.log_softmax(x),
        "dense": lambda: nl.softmax_cross_entropy_with_logits(z, x),
        "sigmoid": lambda: nl.sigmoid_cross_entropy_with_logits(z, x),
        "sequence": lambda: nl.sequence_loss(x[None], y[None], w[None]),
    }


def device_inputs(rows=64, classes=1000, seed=0):
    x, y, w, _, z = inputs(rows, classes, "float32", seed)
    return [to_device(a) for a in (x, y, w, z)]


def check_device():
    """Results lie on the device of their inputs, also where it is not the current one."""
    for number in range(min(2, cupy.cuda.runtime.getDeviceCount())):
        with cupy.cuda.Device(number):
            made = calls(*device_inputs())
            want = to_host(made["none"]())
        for name, call in made.items():
            places = {a.device.id for a in flat_results(call())}
            assert places == {number}, f"{name}: expected results on device {number}, got {places}"
        with cupy.cuda.Device(number):
            assert_same_bits(to_host(made["none"]()), want, f"device {number}")


def check_stream():
    """On a stream of its own: calls return while it is busy, their work waits there, and gives the same bits."""
    arrays = device_inputs()
    wants = {name: one_nan(to_host(call())) for name, call in calls(*arrays).items()}
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for name, call in calls(*arrays).items():
            call()  # compiled and allocated before
            stream.synchronize()
            spin(0.5)
            begin = time.perf_counter()
            got = call()
            took, busy = time.perf_counter() - begin, not stream.done
            assert busy and took < 0.25, f"{name}: expected a call that returns at once, got {took:.3f} s"
            stream.synchronize()
            assert_same_bits(one_nan(to_host(got)), wants[name], name)


def check_graph():
    """Captured after a call of each, replayed twice on other numbers."""
    others, stream = device_inputs(seed=1), cupy.cuda.Stream(non_blocking=True)
    for name, other in calls(*others).items():
        want = one_nan(to_host(other()))
        with stream:
            arrays = device_inputs()
            call = calls(*arrays)[name]
            call()
            stream.synchronize()
            stream.begin_capture()
            got = call()
            graph = stream.end_capture()
            for a, b in zip(arrays, others):
                cupy.copyto(a, b)
            for _ in range(2):
                graph.launch(stream)
            stream.synchronize()
            assert_same_bits(one_nan(to_host(got)), want, name)


def check_labels(sizes=(10, 1000, 20000)):
    """A label out of range is NaN by default and an error on demand."""
    for classes in sizes:
        x, y, *_ = inputs(8, classes, "float32")
        y[3] = classes
        x, y = to_device(x), to_device(y)
        loss = to_host(nl.cross_entropy(x, y, reduction="none"))
        assert np.isnan(loss).tolist() == [i == 3 for i in range(8)], f"expected NaN at 3, got {loss}"
        try:
            nl.cross_entropy(x, y, check_labels="raise")
        except ValueError as error:
            assert "position (3,)" in str(error), f"expected position (3,), got {error}"
        else:
            raise AssertionError("expected a ValueError from check_labels='raise', got none")


def check_evaluation(tokens=3000):
    """Exact totals: the same state as NumPy's, in one batch or three, and merged with NumPy's."""
    x, y, w, *_ = inputs(tokens, 300, "float32")
    want = nl.Evaluation().update(x, y, w)
    moved = MovedEvaluation()
    for part in (slice(tokens // 3, None), slice(0, 7), slice(7, tokens // 3)):
        moved.update(x[part], y[part], w[part])
    assert moved.to_json() == want.to_json(), f"expected {want}, got {moved}"
    assert moved.merge(want).result().tokens == 2 * want.result().tokens


def check_torch():
    """A torch tensor on the GPU is read through DLPack."""
    x, y, _, _ = device_inputs()
    want = to_host(nl.cross_entropy(x, y, reduction="none"))
    got = nl.cross_entropy(torch.from_dlpack(x), torch.from_dlpack(y), reduction="none")
    assert_same_bits(to_host(got), want, "torch")


def all_checks(quick):
    """(name, function without arguments), one after the other."""
    yield "labels out of range", check_labels
    yield "device of the results", check_device
    yield "stream, and calls that do not wait", check_stream
    yield "CUDA graph", check_graph
    yield "Evaluation", check_evaluation
    if torch is not None:
        yield "torch tensors", check_torch
    dtypes = ("bfloat16", "float32") if quick else DTYPES
    for dtype in dtypes:
        for name in test_hashes.functions():
            yield f"hashes {name} {dtype}", lambda name=name, dtype=dtype: check_hashes(name, dtype)
    for dtype in dtypes:
        yield f"special rows {dtype}", lambda dtype=dtype: check_special_rows(dtype)
        yield f"layouts {dtype}", lambda dtype=dtype: check_layouts(dtype)
        for classes in QUICK_CLASSES if quick else CLASSES:
            for rows in (3, many_rows(classes)):
                name = f"bits {rows}x{classes} {dtype}"
                yield name, lambda dtype=dtype, V=classes, rows=rows: check_bits(dtype, V, rows)


def run_checks(cases, report, budget, share):
    """One line a check; a failure is kept and the next one runs. None starts after a share of the budget."""
    for name, check in cases:
        begin, result = time.perf_counter(), "ok"
        try:
            if budget.spent(share):
                result = "not run"
            else:
                check()
        except Exception as problem:
            result = f"{type(problem).__name__}: {problem}"[:600]
        seconds = round(time.perf_counter() - begin, 2)
        report.add("checks", {"check": name, "seconds": seconds, "result": result})
        print(f"{name:60s} {seconds:7.2f} s  {result}", flush=True)


# -- compute-sanitizer -------------------------------------------------------------------------------------------


def run_subset():
    """A few calls of every kernel for a sanitizer, without CuPy's memory pool, which would hide reads out of bounds."""
    cupy.cuda.set_allocator(None)
    for dtype in ("bfloat16", "float32"):
        for rows, classes in ((40, 10), (70, 129), (70, 1025), (3, 8200), (270, 8200)):
            arrays = [to_device(a) for a in inputs(rows, classes, dtype)]
            for function in FUNCTIONS.values():
                to_host(function(*arrays))
    to_host(nl.cross_entropy(arrays[0][:, 1:], arrays[1] % 100, reduction="none"))
    nl.Evaluation().update(*arrays[:2], arrays[2]).result()


def sanitize(report, budget):
    """The subset under each tool of compute-sanitizer, each in a process of its own."""
    program = shutil.which("compute-sanitizer")
    for tool in TOOLS:
        if program is None or budget.spent():
            line = {"tool": tool, "errors": None, "why": "--seconds is used up" if program else "not on PATH"}
        else:
            command = [program, "--tool", tool, sys.executable, __file__, "--subset"]
            try:
                run = subprocess.run(command, capture_output=True, text=True, timeout=300)
                found = re.findall(r"SUMMARY: (\d+) (?:error|hazard)", run.stdout + run.stderr)
                line = {"tool": tool, "errors": int(found[-1]) if found else None, "exit code": run.returncode}
                if line["errors"] != 0 or run.returncode:
                    line["output"] = (run.stdout + run.stderr)[-4000:]
            except subprocess.TimeoutExpired:
                line = {"tool": tool, "errors": None, "why": "more than 300 s"}
        report.add("sanitizer", line)
        print("sanitizer", {key: value for key, value in line.items() if key != "output"}, flush=True)


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


def cupy_formula(x, y):
    """What one would write in CuPy."""
    top = x.max(1)
    return cupy.log(cupy.exp(x - top[:, None]).sum(1)) + top - x[cupy.arange(len(x)), y]


def losses_of(x, y, shape, quick):
    """Contenders for the cross entropy of one input."""
    found = {"numbaloss": lambda: nl.cross_entropy(x, y, reduction="none")}
    found["numbaloss mean"] = lambda: nl.cross_entropy(x, y)
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
    return 3 * rows * classes * np.dtype(DTYPES[dtype]).itemsize + (1 << 30) < free


def time_losses(device, report, shape, dtype, quick):
    """Cross entropy of integer labels."""
    rows, classes = shape
    x, y = random_logits(rows, classes, dtype), to_device(make_labels(rows, classes))
    check_losses(x, y)
    nbytes = x.nbytes + y.nbytes + 4 * rows
    time_case(device, report, f"CE {rows}x{classes} {dtype}", losses_of(x, y, shape, quick), x, nbytes)


def time_others(device, report, shape, dtype):
    """Scores, softmax and log_softmax."""
    rows, classes = shape
    x, y = random_logits(rows, classes, dtype), to_device(make_labels(rows, classes))
    name = f"{rows}x{classes} {dtype}"
    t = None if torch is None else as_torch(x)
    scores = {"numbaloss": lambda: nl.score_tokens(x, y)}
    scores["numbaloss rank, entropy"] = lambda: nl.score_tokens(x, y, rank=True, entropy=True)
    time_case(device, report, f"score_tokens {name}", scores, x, x.nbytes + 24 * rows)
    for function in ("softmax", "log_softmax"):
        contenders = {"numbaloss": lambda f=getattr(nl, function): f(x)}
        if t is not None:
            contenders["torch"] = lambda f=getattr(F, function): f(t, -1, dtype=torch.float32)
        written = 4 * rows * classes
        time_case(device, report, f"{function} {name}", contenders, x, x.nbytes + written, "copy")


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
    from numbaloss.cuda import _launch, totals

    x, y, w, _ = device_inputs(4, 10)
    values = cupy.zeros(4, np.float32)
    kernel, arguments = totals._negate.of(np.float32(0)), (4, np.float32(0), values.data.ptr)
    contenders = {
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
        for _ in range(5):
            call()
            cupy.cuda.Device().synchronize()
            begin = time.perf_counter()
            for _ in range(calls_each // 5):
                call()
            rounds.append((time.perf_counter() - begin) / (calls_each // 5))
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
    for shape, dtype in (((4096, 32000), "bfloat16"), ((4096, 32000), "float32"), ((1 << 20, 10), "float32")):
        case = lambda device, report, s=shape, d=dtype: time_others(device, report, s, d)  # noqa: E731
        yield f"scores and softmax {shape} {dtype}", *shape, dtype, case


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

    def spent(self, share=1.0):
        return time.perf_counter() - self.begin > share * self.seconds


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
        checks = [line["check"] for line in self.content["checks"] if line["result"] not in ("ok", "not run")]
        return checks + [line["tool"] for line in self.content["sanitizer"] if line["errors"]]


def arguments(args=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two dtypes and fewer shapes: under five minutes")
    parser.add_argument("--seconds", type=float, help="start nothing after that long (default 1500, with --quick 270)")
    parser.add_argument("--only", choices=("check", "time"), help="leave the other out")
    parser.add_argument("--sanitize", action="store_true", help="also run a few calls under compute-sanitizer")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file (default perf/results)")
    parser.add_argument("--subset", action="store_true", help=argparse.SUPPRESS)  # what --sanitize starts
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
    if options.subset:
        return run_subset()
    budget, report = Budget(options.seconds), Report(options.out)
    if options.only != "time":
        run_checks(all_checks(options.quick), report, budget, 1.0 if options.only else 0.5)
    if options.sanitize:
        sanitize(report, budget)
    if options.only != "check":
        run_times(all_times(options.quick), report, budget)
    report.content["machine"]["at the end"], report.content["seconds"] = smi(), time.perf_counter() - budget.begin
    report.write()
    failed = report.failed()
    print(f"{report.path}: {len(report.content['checks'])} checks, {len(failed)} failed", *failed, sep="\n  ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
