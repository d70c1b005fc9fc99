"""Sigmoid family, no reduction, against `a + b` into a third array and torch: python perf/sigmoid.py [--write]"""

import sys

import numpy as np
from bench import F, add, copy, row, torch, write

import numbaloss as nl

N = 1 << 25


def main():
    table = []
    rng = np.random.default_rng(0)
    x = rng.standard_normal(N, dtype=np.float32) * 4
    z = rng.random(N, dtype=np.float32)
    small = slice(0, 1000)
    wide = x[small].astype(np.float64)
    want = np.maximum(wide, 0) - wide * z[small] + np.log1p(np.exp(-np.abs(wide)))
    np.testing.assert_allclose(nl.sigmoid_cross_entropy_with_logits(z[small], x[small]), want, rtol=2 * 2.0**-23)
    roof = lambda: add(x, z, np.empty_like(x))  # noqa: E731
    contenders = {"numbaloss": lambda: nl.sigmoid_cross_entropy_with_logits(z, x), "add": roof}
    weighted = {"numbaloss": lambda: nl.weighted_cross_entropy_with_logits(z, x, 2.0), "add": roof}
    if torch:
        a, b, q = torch.from_numpy(x), torch.from_numpy(z), torch.tensor(2.0)
        binary = F.binary_cross_entropy_with_logits
        contenders["torch"] = lambda: binary(a, b, reduction="none")
        weighted["torch"] = lambda: binary(a, b, pos_weight=q, reduction="none")
    row(table, "sigmoid CE 2^25 float32", contenders, 3 * x.nbytes)
    row(table, "weighted CE 2^25 float32", weighted, 3 * x.nbytes)
    both, twice, grad = np.concatenate([x, z]), np.empty(2 * N, np.float32), np.empty_like(x)
    focal, roof = nl.sigmoid_focal_cross_entropy_with_logits, lambda: copy(both, twice)
    for loss, name in ((nl.sigmoid_cross_entropy_with_logits, "sigmoid CE"), (focal, "focal loss")):
        run = nl.value_and_grad(loss)
        contenders = {"numbaloss": lambda run=run: run(z, x, out=grad), "copy": roof}
        row(table, f"{name} and its gradient 2^25 float32", contenders, 4 * x.nbytes)
    if "--write" in sys.argv:
        write("sigmoid", table)


if __name__ == "__main__":
    main()
