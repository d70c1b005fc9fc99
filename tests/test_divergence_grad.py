"""Gradients of the divergences: against 40-digit truths and central differences, their sums, options, memory."""

import mpmath
import numpy as np
import pytest
from common import BFLOAT16, EPS, assert_same_bits, make_logits
from test_divergence import BOTH, LOSSES, moved, softmax

import numbaloss as nl

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("logits_p", "logits_q")
LIMIT = 8  # eps of the larger of the two numbers that an entry is the difference of


def exact(loss, x, y):
    """The slopes of a row's divergence by its logits, [(entries, the largest number that one is the difference of)]."""
    p, q = softmax(x), softmax(y)
    if loss is nl.kl_divergence:
        changes = [b - a for a, b in zip(p, q)]
        return [centred(p, [mpmath.log(a / b) for a, b in zip(p, q)]), (changes, max(map(abs, changes)))]
    return [centred(a, [mpmath.log(2 * v / (v + w)) / 2 for v, w in zip(a, b)]) for a, b in ((p, q), (q, p))]


def centred(p, values):
    mean = mpmath.fsum(a * v for a, v in zip(p, values))
    return [a * (v - mean) for a, v in zip(p, values)], max(a * max(abs(v), abs(mean)) for a, v in zip(p, values))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("classes", [1, 2, 7, 100, 1030])
def test_exact(classes, dtype, loss):
    for by in (1, 1e-2, 1e-6):
        p = make_logits(3, classes, dtype, seed=classes)
        q = moved(p, by)
        value, grads = nl.value_and_grad(loss, NAMES)(p, q, reduction="none")
        assert_same_bits(value, loss(p, q, reduction="none"))
        for r in range(3):
            with mpmath.workdps(40):
                truths = exact(loss, p[r], q[r])
            for got, (truth, largest) in zip(grads, truths):
                error = max(abs(float(mpmath.mpf(float(a)) - b)) for a, b in zip(got[r], truth))
                assert error <= LIMIT * EPS[np.dtype(dtype)] * float(largest) + 1e-45, (by, error)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("classes", [3, 1025, 9000])
def test_sums_and_central_differences(classes, loss):
    """Rows of a gradient add to 0, and it is the slope of the reduced loss."""
    arrays = [make_logits(3, classes, np.float64), make_logits(3, classes, np.float64, seed=1)]
    weights = np.array([1, 0.5, 2])
    for reduction in ("mean", "sum"):
        options = {"weights": weights, "reduction": reduction}
        value, grads = nl.value_and_grad(loss, NAMES)(*arrays, **options)
        assert value == loss(*arrays, **options)
        for k, grad in enumerate(grads):
            assert np.abs(grad.sum(-1)).max() <= (classes + 8) * 2.0**-52 * np.abs(grad).max()
            for r, j in ((0, 0), (1, classes - 1), (2, int(np.argmax(arrays[k][2])))):
                both = []
                for step in (1e-4, -1e-4):
                    changed = [a.copy() for a in arrays]
                    changed[k][r, j] += step
                    both.append(loss(*changed, **options))
                assert abs((both[0] - both[1]) / 2e-4 - grad[r, j]) <= 1e-7 * max(1.0, value)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=["float32", "bfloat16"])
def test_memory_and_upstream(dtype, loss):
    """In place, into float32, one name or both: the same numbers."""
    p = make_logits(5, 1100, dtype)
    q = moved(p, 0.5)
    upstream = np.array([1, -2, 0, 0.5, 3])
    options = {"reduction": "none", "upstream": upstream}
    value, (g, h) = nl.value_and_grad(loss, NAMES)(p, q, **options)
    for name, grad in zip(NAMES, (g, h)):
        alone = nl.value_and_grad(loss, name)(p, q, **options)
        assert_same_bits(alone, (value, grad))
    wide = np.empty(p.shape, np.float32)
    nl.value_and_grad(loss, "logits_p")(p, q, out=wide, **options)
    assert_same_bits(wide.astype(dtype), g)
    assert (g[2].astype(np.float32) == 0).all() and not np.signbit(g[2].astype(np.float32)).any()
    x, y = p.copy(), q.copy()
    again, (a, b) = nl.value_and_grad(loss, NAMES)(x, y, out=(x, y), **options)
    assert a is x and b is y
    assert_same_bits((again, a, b), (value, g, h))


def test_rows_without_a_gradient():
    """NaN where the divergence is; by p also where it is infinite. A class that both rule out gets 0."""
    p, q = make_logits(4, 40), make_logits(4, 40, seed=1)
    p[0, 3], q[1, 5] = np.nan, -np.inf
    p[2, 7] = q[2, 7] = p[3, 8] = -np.inf
    value, (g, h) = nl.value_and_grad(nl.kl_divergence, NAMES)(p, q, reduction="none")
    assert np.isnan(value[0]) and value[1] == np.inf
    assert np.isnan(g[:2]).all() and np.isnan(h[0]).all() and np.isfinite(h[1:]).all() and np.isfinite(g[2:]).all()
    assert g[2, 7] == h[2, 7] == g[3, 8] == 0 and h[3, 8] > 0
    _, (g, h) = nl.value_and_grad(nl.js_divergence, NAMES)(p, q, reduction="none")
    assert np.isnan(g[0]).all() and np.isfinite(g[1:]).all() and np.isfinite(h[1:]).all()
