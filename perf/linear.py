"""linear_cross_entropy against its matmuls alone, against NumPy's logits as a whole, and against torch; peak memory.

python perf/linear.py [--write]

Each contender of memory runs in a process of its own: what it needs beside its arguments and results.
"""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from bench import F, row, torch, write

import numbaloss as nl

SHAPES = [(1024, 1024, 32000), (2048, 512, 8000)]
NAMES = "hidden", "weight", "bias"
GRAD = nl.value_and_grad(nl.linear_cross_entropy, wrt=NAMES[:2])


def arguments(rows, features, classes):
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((rows, features), dtype=np.float32)
    weight = rng.standard_normal((classes, features), dtype=np.float32) / np.float32(features**0.5)
    return hidden, weight, rng.integers(0, classes, rows)


def whole(hidden, weight, y):
    """With the logits as an array."""
    logits = hidden @ weight.T
    value, grad = nl.value_and_grad(nl.cross_entropy)(logits, y, out=logits)
    return value, (grad @ weight, grad.T @ hidden)


def with_torch(hidden, weight, y):
    hidden, weight = (torch.from_numpy(x).requires_grad_() for x in (hidden, weight))
    loss = F.cross_entropy(F.linear(hidden, weight), torch.from_numpy(y))
    loss.backward()
    return loss.detach().numpy(), (hidden.grad.numpy(), weight.grad.numpy())


RUNS = {"numbaloss": GRAD, "logits as a whole": whole} | ({"torch": with_torch} if torch else {})


def check(hidden, weight, y):
    """Against the logits as a whole, before anything is timed."""
    value, grads = GRAD(hidden, weight, y)
    want, expected = whole(hidden, weight, y)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    for got, exact in zip(grads, expected):
        np.testing.assert_allclose(got, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


def matmuls(hidden, weight, backward):
    """The bare products of 512 rows at a time."""
    step = 512
    logits, by_hidden = np.empty((step, len(weight)), np.float32), np.empty_like(hidden)
    by_weight = np.empty_like(weight)

    def run():
        for i in range(0, len(hidden), step):
            x = hidden[i : i + step]
            np.matmul(x, weight.T, out=logits[: len(x)])
            if backward:
                np.matmul(logits[: len(x)], weight, out=by_hidden[i : i + step])
                np.matmul(logits[: len(x)].T, x, out=by_weight)

    return run


def peak(name, shape):
    """MiB beside the arguments that a run in a fresh process needs."""
    command = [sys.executable, __file__, "--peak", name, *map(str, shape)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(name, *shape):
    given = arguments(*map(int, shape))
    small = arguments(8, 8, 300)
    RUNS[name](*small)  # compiles and starts threads
    Path("/proc/self/clear_refs").write_text("5")  # the high water mark begins anew
    before = high_water()
    RUNS[name](*given)
    print((high_water() - before) / 1024)


def high_water():
    """KiB of memory that the process has had at once, on Linux."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def measure(table, shape):
    hidden, weight, y = given = arguments(*shape)
    check(*given)
    case, nbytes = "x".join(map(str, shape)) + " float32", 4 * shape[0] * shape[2]
    forward = {"numbaloss": lambda: nl.linear_cross_entropy(*given)}
    forward["its matmul alone"] = matmuls(hidden, weight, False)
    if torch:
        x, w, targets = (torch.from_numpy(a) for a in given)
        forward["torch"] = lambda: F.cross_entropy(F.linear(x, w), targets)
    row(table, f"value {case}", forward, nbytes)
    both = {name: lambda run=run: run(*given) for name, run in RUNS.items()}
    both["its matmuls alone"] = matmuls(hidden, weight, True)
    row(table, f"value and grad {case}", both, nbytes)
    table[-1]["peak MiB beside the arguments"] = peaks = {name: round(peak(name, shape)) for name in RUNS}
    print(peaks, flush=True)


def main():
    table = []
    for shape in SHAPES:
        measure(table, shape)
    if "--write" in sys.argv:
        write("linear", table)


if __name__ == "__main__":
    print_peak(*sys.argv[2:]) if "--peak" in sys.argv else main()
