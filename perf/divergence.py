"""Divergences of two arrays of logits, against the roof of the memory and a NumPy float64 baseline.

python perf/divergence.py [--write]
"""

import sys

import ml_dtypes
import numpy as np
from bench import read, row, write

import numbaloss as nl
from numbaloss import divergence

SHAPES = [(512, 50257), (8192, 1000)]


def log_softmax(x):
    x = x.astype(np.float64)
    x -= x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def kl(p, q):
    """As people write it: log_softmax of both in float64."""
    a, b = log_softmax(p), log_softmax(q)
    return (np.exp(a) * (a - b)).sum(1)


def js(p, q):
    a, b = log_softmax(p), log_softmax(q)
    m = np.logaddexp(a, b) - np.log(2)
    return (np.exp(a) * (a - m) + np.exp(b) * (b - m)).sum(1) / 2


def main():
    table = []
    rng = np.random.default_rng(0)
    for rows, classes in SHAPES:
        x = rng.standard_normal((rows, classes), dtype=np.float32) * np.float32(3)
        y = x + rng.standard_normal((rows, classes), dtype=np.float32) * np.float32(0.3)
        for dtype in (np.float32, ml_dtypes.bfloat16):
            p, q = x.astype(dtype), y.astype(dtype)
            words = [z.reshape(-1).view(np.float32) for z in (p, q)]
            cases = {
                "kl_divergence": (lambda p=p, q=q: nl.kl_divergence(p, q, reduction="none"), kl),
                "js_divergence": (lambda p=p, q=q: nl.js_divergence(p, q, reduction="none"), js),
                "all three": (lambda p=p, q=q: divergence._divergences(p, q, None, -1, True, True, True), None),
                "value_and_grad of kl": (lambda p=p, q=q: nl.value_and_grad(nl.kl_divergence, "logits_q")(p, q), None),
            }
            for name, (ours, baseline) in cases.items():
                contenders = {"numbaloss": ours, "read": lambda words=words: [read(w) for w in words]}
                if baseline:
                    np.testing.assert_allclose(ours()[:20], baseline(p[:20], q[:20]), rtol=1e-6)
                    contenders["numpy"] = lambda f=baseline, p=p, q=q: f(p, q)
                row(table, f"{name} {rows}x{classes} {np.dtype(dtype).name}", contenders, p.nbytes + q.nbytes)
    if "--write" in sys.argv:
        write("divergence", table)


if __name__ == "__main__":
    main()
