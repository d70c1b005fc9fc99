"""Losses against exact arithmetic: at most 4 eps off, relatively (docs/NUMERICS.md, section 7).

[n]: a line of docs/PITFALLS.md.
"""

import mpmath
import numpy as np
import pytest
import reference
from common import (
    BFLOAT16,
    DTYPES,
    assert_losses,
    make_labels,
    make_logits,
    none,
)

pytestmark = pytest.mark.usefixtures("one_thread")

BOTH = [np.float32, np.float64]
INF, NAN = np.inf, np.nan


# -- exact arithmetic ------------------------------------------------------------------------------------------------


def exact_loss(row, label):
    """log(1 + sum of exp(x - x_label) over the others), 200 bits, rounded to float64."""
    with mpmath.workprec(200):
        target = mpmath.mpf(float(row[label]))
        others = [mpmath.exp(mpmath.mpf(float(v)) - target) for j, v in enumerate(row) if j != label and v > -INF]
        return float(mpmath.log1p(mpmath.fsum(others)))


def exact_losses(logits, labels):
    return np.array([exact_loss(row, label) for row, label in zip(logits, labels, strict=True)])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("classes", [2, 3, 10, 100, 1025])
def test_exact_random(classes, dtype, record_property):
    """NUMERICS section 7: 4 eps is the bar, 2 the goal."""
    worst = 0.0
    for scale in (0.25, 4.0, 30.0):
        logits = make_logits(8, classes, dtype, seed=classes, scale=scale)
        labels = make_labels(8, classes)
        labels[::2] = reference.f64(logits[::2]).argmax(1)  # half of the rows are right
        worst = max(worst, assert_losses(none(logits, labels), logits, exact_losses(logits, labels)))
    record_property("worst_eps", worst)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("classes", [2, 5, 100])
def test_exact_confident(classes, dtype, record_property):
    """[3] Losses down to 1e-38, relatively. The target's lead grows by 0.5."""
    lead = np.arange(0.5, 92, 0.5)
    logits = make_logits(len(lead), classes, dtype, scale=0.25)
    labels = make_labels(len(lead), classes)
    logits[np.arange(len(lead)), labels] = lead
    exact = exact_losses(logits, labels)
    assert exact.min() < 1e-37
    record_property("worst_eps", assert_losses(none(logits, labels), logits, exact))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("classes", [3, 40, 300])
def test_exact_shifted(classes, dtype):
    """[3] Shifts of 1e2 ... 1e8; the logits are then what is left of them in their dtype."""
    base = np.linspace(-9, 9, classes)
    with np.errstate(over="ignore"):
        logits = np.array([base + sign * 10.0**e for e in range(2, 9) for sign in (1, -1)]).astype(dtype)
    logits = logits[np.isfinite(logits.astype(np.float64)).all(axis=1)]
    assert len(logits) >= 4
    for label in (0, classes // 2, classes - 1):
        labels = np.full(len(logits), label)
        assert_losses(none(logits, labels), logits, exact_losses(logits, labels), f"label {label}")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_exact_very_wrong(dtype):
    """[4] The target far below the others."""
    logits = make_logits(12, 50, dtype)
    labels = make_labels(12, 50)
    deep = np.array([-1e1, -1e2, -1e3, -6e4] if dtype == np.float16 else [-1e2, -1e3, -1e5, -3e38])
    logits[np.arange(12), labels] = np.tile(deep, 3).astype(dtype)
    assert_losses(none(logits, labels), logits, exact_losses(logits, labels))
    logits[np.arange(12), labels] = -INF
    assert np.all(none(logits, labels) == INF)


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float32, np.float64])
@pytest.mark.parametrize("size", [2.0**19, 2.0**20, 2.0**21, 2.0**40, 3e38])
def test_exact_huge(size, dtype):
    """Beyond 2^20 a sum of powers of two would need more digits of the logits than float32 has."""
    top = np.dtype(dtype).type(size)
    steps = np.array([0, -1, -3, -100, 1]) * np.abs(np.float64(np.spacing(top) if dtype != BFLOAT16 else size * 2**-8))
    for sign in (1, -1):
        with np.errstate(over="ignore"):
            row = (sign * np.float64(top) + steps * (1 if size < 1e38 else -1)).astype(dtype)
        rows = np.array([np.where(np.isfinite(row.astype(np.float64)), row, dtype(0))] * 5)
        rows = np.concatenate([rows, rows, rows], axis=0)
        rows[5:10, 0] = 0
        rows[10:, 3] = -INF
        labels = np.arange(15) % 5
        exact = np.where(rows[np.arange(15), labels] == -INF, INF, 0)
        exact = np.where(
            exact == 0, [exact_loss(r, y) if r[y] > -INF else 0 for r, y in zip(rows, labels, strict=True)], exact
        )
        assert_losses(none(rows, labels), rows, exact, f"{sign} * {size}")


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float32, np.float64])
@pytest.mark.parametrize("classes", [40, 300, 1100, 9000])
def test_late_large_logit(classes, dtype):
    """A reference exponent taken from the first classes would overflow at the last, or lose the others under it."""
    rows, labels = [], []
    for jump in (10, 60, 68, 69, 70, 86, 87, 88, 89, 90, 130, 170, 178, 200, 350, 700, 1500):
        for start in (-600, 0, 600):
            row = np.full(classes, start, dtype)
            row[-1] = start + jump
            rows += [row, row[::-1]]
            labels += [classes // 2, classes // 2]
            rows += [np.where(np.arange(classes) % 1000 == 999, row[-1], row).astype(dtype), row]
            labels += [1, classes - 1]
    rows, labels = np.array(rows), np.array(labels)
    assert_losses(none(rows, labels), rows, reference.sparse_losses(rows, labels))


@pytest.mark.parametrize("classes", [128256, 151936, 262144])
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_large_vocabularies(classes, dtype):
    """[14]"""
    logits = make_logits(3, classes, dtype)
    labels = np.array([0, classes - 1, classes // 2])
    assert_losses(none(logits, labels), logits, reference.sparse_losses(logits, labels))
