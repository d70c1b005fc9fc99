"""Softmax family: cross entropy, softmax and log_softmax against the roofs of the memory and against torch.

python perf/softmax.py [--write] [--compile]     --compile adds torch.compile (slow to start)
"""

import sys

import ml_dtypes
import numpy as np
from bench import F, copy, roof_read, row, torch, write

import numbaloss as nl

SHAPES = [(2048, 50257), (4096, 10000), (32768, 1000), (262144, 100), (1 << 20, 10), (1 << 22, 2), (1, 262144)]


def check(x, y):
    """Against float64 on a few rows, before anything is timed."""
    x, y = x[:20].astype(np.float64), y[:20]
    d = x - x[np.arange(len(x)), y][:, None]
    want = np.log(np.exp(d).sum(1))
    got = nl.sparse_softmax_cross_entropy_with_logits(y, x)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def main():
    table = []
    rng = np.random.default_rng(0)
    compiled = torch.compile(F.cross_entropy, dynamic=False) if torch and "--compile" in sys.argv else None
    for rows, classes in SHAPES:
        x = rng.standard_normal((rows, classes), dtype=np.float32)
        y = rng.integers(0, classes, rows)
        check(x, y)
        for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
            if dtype != np.float32 and classes < 10000:
                continue
            a = x.astype(dtype)
            contenders = {"numbaloss": lambda a=a, y=y: nl.sparse_softmax_cross_entropy_with_logits(y, a)}
            contenders["read"] = roof_read(a)
            if torch:
                t = torch.from_numpy(a.view(np.uint16).view(np.int16)).view(torch.bfloat16) if a.itemsize == 2 else None
                if dtype == np.float16:
                    t = torch.from_numpy(a)
                t = torch.from_numpy(a) if t is None else t
                labels = torch.from_numpy(y)
                contenders["torch"] = lambda t=t, labels=labels: F.cross_entropy(t, labels, reduction="none")
                if compiled is not None and classes == 50257:
                    contenders["compile"] = lambda t=t, labels=labels: compiled(t, labels, reduction="none")
            row(table, f"sparse CE {rows}x{classes} {np.dtype(dtype).name}", contenders, a.nbytes)
    x = rng.standard_normal((2048, 50257), dtype=np.float32)
    out = np.empty_like(x)
    for name in ("softmax", "log_softmax"):
        contenders = {"numbaloss": lambda f=getattr(nl, name): f(x)}
        contenders["copy"] = lambda: copy(x.reshape(-1), np.empty_like(out).reshape(-1))
        if torch:
            t = torch.from_numpy(x)
            contenders["torch"] = lambda f=getattr(F, name), t=t: f(t, -1)
        row(table, f"{name} 2048x50257 float32", contenders, 2 * x.nbytes)
    y = rng.integers(0, 50257, 2048)
    contenders = {"numbaloss": lambda: nl.score_tokens(x, y), "read": roof_read(x)}
    row(table, "score_tokens 2048x50257 float32", contenders, x.nbytes)
    if "--write" in sys.argv:
        write("softmax", table)


if __name__ == "__main__":
    main()
