"""value_and_grad of the cross entropy against a copy of the logits and against torch's backward.

python perf/grad.py [--write] [--compile]     --compile adds torch.compile (slow to start)
"""

import sys

import ml_dtypes
import numpy as np
from bench import F, copy, row, torch, write

import numbaloss as nl

SHAPES = [(2048, 50257), (4096, 10000), (32768, 1000), (262144, 100), (1 << 20, 10)]
RUN = nl.value_and_grad(nl.cross_entropy)


def check(x, y):
    """Against float64 on a few rows, before anything is timed."""
    x, y = x[:20], y[:20]
    wide = x.astype(np.float64)
    want = np.exp(wide - wide.max(1, keepdims=True))
    want /= want.sum(1, keepdims=True)
    want[np.arange(len(y)), y] -= 1
    np.testing.assert_allclose(RUN(x, y, reduction="sum")[1], want, atol=5e-7)


def as_torch(a):
    """The same numbers as a tensor that wants a gradient."""
    bits = torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) if a.dtype == ml_dtypes.bfloat16 else None
    return (torch.from_numpy(a) if bits is None else bits).clone().requires_grad_()


def backward(loss, t, y):
    def run():
        t.grad = None
        loss(t, y).backward()

    return run


def main():
    table, rng = [], np.random.default_rng(0)
    compiled = torch.compile(F.cross_entropy, dynamic=False) if torch and "--compile" in sys.argv else None
    for rows, classes in SHAPES:
        x = rng.standard_normal((rows, classes), dtype=np.float32)
        y = rng.integers(0, classes, rows)
        check(x, y)
        for dtype in (np.float32, ml_dtypes.bfloat16):
            if dtype != np.float32 and classes < 10000:
                continue
            a = x.astype(dtype)
            out, target = np.zeros_like(a), np.zeros(a.nbytes // 4, np.float32)
            contenders = {"numbaloss": lambda a=a, y=y, out=out: RUN(a, y, out=out)}
            contenders["numbaloss, a fresh array"] = lambda a=a, y=y: RUN(a, y)
            source = a.reshape(-1)[: target.nbytes // a.itemsize].view(np.float32)
            contenders["copy"] = lambda source=source, target=target: copy(source, target)
            if torch:
                t, labels = as_torch(a), torch.from_numpy(y)
                contenders["torch"] = backward(F.cross_entropy, t, labels)
                if compiled is not None and classes == 50257:
                    contenders["compile"] = backward(compiled, t, labels)
            row(table, f"value and grad {rows}x{classes} {np.dtype(dtype).name}", contenders, 2 * a.nbytes)
    if "--write" in sys.argv:
        write("grad", table)


if __name__ == "__main__":
    main()
