"""value_and_grad: against 200-bit truths, sums, options, memory. [n]: a line of docs/PITFALLS.md."""

import inspect

import mpmath
import numpy as np
import pytest
from common import BFLOAT16, DTYPES, LAYOUTS, assert_same_bits, make_labels, make_logits

import numbaloss as nl

EPS = {np.dtype(np.float64): 2.0**-52}
ROUNDING = {np.dtype(np.float16): 2.0**-11, np.dtype(BFLOAT16): 2.0**-8}  # of the last step, half a unit


def exact(x, y, slopes):
    """d sum(slopes * loss) / d x by 60 digits, (rows, classes) of mpmath numbers, at most 40 classes."""
    with mpmath.workdps(60):
        result = []
        for row, label, slope in zip(x.astype(np.float64), y, slopes):
            top = max(row)
            terms = [mpmath.exp(mpmath.mpf(float(v)) - mpmath.mpf(float(top))) for v in row]
            total = mpmath.fsum(terms)
            others = mpmath.fsum(t for j, t in enumerate(terms) if j != label)
            entries = [mpmath.mpf(float(slope)) * t / total for t in terms]
            entries[label] = -mpmath.mpf(float(slope)) * others / total
            result.append(entries)
        return result


def assert_close(grad, truth, y, eps, rounding):
    """Within 4 eps of the row's largest entry, the target's within 4 eps of itself; then rounded to 16 bits."""
    for row, wanted, label in zip(grad.astype(np.float64), truth, y):
        largest = float(max(abs(w) for w in wanted))
        for j, (got, want) in enumerate(zip(row, wanted)):
            scale = abs(float(want)) if j == label else largest
            error = abs(float(mpmath.mpf(float(got)) - want))
            tiny = 2.0**-25 if grad.dtype.itemsize == 2 and grad.dtype != BFLOAT16 else 2.0**-150
            assert error <= 4 * eps * scale + rounding * abs(float(want)) + tiny, (j, label, got, want)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("classes", [1, 2, 3, 17, 40])
def test_exact(classes, dtype):
    """[3, 4] Targets that lead and lag by far."""
    x, y = make_logits(8, classes, dtype, seed=classes), make_labels(8, classes)
    for r, lead in enumerate((3, 8, 16, 17, -20, -60)):
        x[r, y[r]] = lead
    x, y, slopes = x[: 6 if classes > 1 else 2], y[: 6 if classes > 1 else 2], np.array([1, -2.5, 3e-3, 7, 1e4, 0.1])
    slopes = slopes[: len(x)]
    value, grad = nl.value_and_grad(nl.cross_entropy)(x, y, reduction="none", upstream=slopes)
    eps, rounding = EPS.get(np.dtype(dtype), 2.0**-23), ROUNDING.get(np.dtype(dtype), 0.0)
    assert grad.dtype == x.dtype and grad.shape == x.shape
    assert_close(grad, exact(x, y, slopes), y, eps, rounding)
    assert_same_bits(value, nl.cross_entropy(x, y, reduction="none"))
    if np.dtype(dtype).itemsize == 2:
        wide = np.empty(x.shape, np.float32)
        assert nl.value_and_grad(nl.cross_entropy)(x, y, reduction="none", upstream=slopes, out=wide)[1] is wide
        assert_close(wide, exact(x, y, slopes), y, eps, 0.0)


@pytest.mark.parametrize("classes, dtype", [(9, np.float16), (9, BFLOAT16), (1063, BFLOAT16)])
def test_rounded_once(classes, dtype):
    """16-bit gradients are those in float32, rounded to nearest even; for bfloat16, what is subnormal is 0."""
    x, y = make_logits(40, classes, dtype), make_labels(40, classes)
    x[:20] *= 12  # far below float32's range
    upstream = np.geomspace(1e-30, 1e3, 40)
    run, wide = nl.value_and_grad(nl.cross_entropy), np.empty(x.shape, np.float32)
    got = run(x, y, reduction="none", upstream=upstream)[1]
    run(x, y, reduction="none", upstream=upstream, out=wide)
    apart = np.zeros((*x.shape, 2), dtype)[..., 0]
    run(x, y, reduction="none", upstream=upstream, out=apart)
    p = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True).astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    others = np.arange(classes) != y[:, None]
    np.testing.assert_allclose(wide[others], (upstream[:, None] * p)[others], rtol=2e-6, atol=2.0**-140)
    small = (np.abs(wide) < 2.0**-125) & (wide != 0) & (dtype == BFLOAT16)
    assert_same_bits(got[~small], wide.astype(dtype)[~small])
    assert_same_bits(got, apart.copy())
    assert dtype != BFLOAT16 or small.sum() > 10
    assert (got[np.abs(wide) < 2.0**-126] == 0).all()


@pytest.mark.parametrize("classes", [3, 130, 1025, 8200, 20_000])
def test_sums_and_central_differences(classes):
    """Rows of a gradient add to 0, and it is the slope of the loss."""
    x, y = make_logits(4, classes, np.float64), make_labels(4, classes)
    weights, by_class = np.array([1, 0.5, 2, 3.0]), np.arange(classes) % 3 + 0.5
    options = {"weights": weights, "class_weights": by_class}
    for reduction in ("mean", "sum"):
        value, grad = nl.value_and_grad(nl.cross_entropy)(x, y, reduction=reduction, **options)
        assert value == nl.cross_entropy(x, y, reduction=reduction, **options)
        assert np.abs(grad.sum(-1)).max() <= 1e-14 * np.abs(grad).max() * classes
        rng = np.random.default_rng(0)
        for r, j in [*zip(range(4), y), *zip(range(4), rng.integers(0, classes, 4))]:
            step, both = 1e-4, []
            for sign in (1, -1):
                moved = x.copy()
                moved[r, j] += sign * step
                both.append(nl.cross_entropy(moved, y, reduction=reduction, **options))
            slope = (both[0] - both[1]) / (2 * step)
            assert abs(slope - grad[r, j]) <= 1e-8 * max(1.0, abs(value))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_rows_that_do_not_count(dtype, reduction):
    """[9] Ignored rows and rows of weight 0 get zeros, whatever they hold; rows without a softmax NaN."""
    x, y = make_logits(8, 130, dtype), make_labels(8, 130)
    weights = np.array([1, 0, 2, 1, 1, 1, 1, 1.0])
    y[2] = -100
    x[1], x[2, 5] = np.nan, np.inf
    x[3, 7], x[4, 9], x[5] = np.nan, np.inf, -np.inf
    value, grad = nl.value_and_grad(nl.cross_entropy)(x, y, weights=weights, reduction=reduction)
    assert_same_bits(value, nl.cross_entropy(x, y, weights=weights, reduction=reduction))
    assert (grad[1:3] == 0).all() and not np.signbit(grad[1:3]).any()
    assert np.isnan(grad[3:6].astype(np.float32)).all()
    assert np.isfinite(grad[6:].astype(np.float32)).all() and np.isfinite(grad[0].astype(np.float32)).all()
    none = nl.value_and_grad(nl.cross_entropy)(x, np.full(8, -100), reduction=reduction)[1]
    assert (none == 0).all()


def test_minus_infinity():
    """[1] A class that is absent; a target that is: -1 at it."""
    x = np.array([[1, -np.inf, 2], [-np.inf, 1, 2], [5, -np.inf, -np.inf]], np.float32)
    grad = nl.value_and_grad(nl.cross_entropy)(x, [0, 0, 0], reduction="sum")[1]
    assert grad[0, 1] == 0 and grad[1, 0] == -1 and (grad[2] == 0).all()
    np.testing.assert_allclose(grad[1, 1:], [0.26894143, 0.7310586], rtol=4 * 2.0**-23)


@pytest.mark.parametrize("shift", [1e3, 1e6, -1.5e6, 1e30])
def test_far(shift):
    """[3] Logits beyond 2^20 keep the bound."""
    x = (make_logits(3, 20) + np.float32(shift)).astype(np.float32)
    y = make_labels(3, 20)
    grad = nl.value_and_grad(nl.cross_entropy)(x, y, reduction="sum")[1]
    assert_close(grad, exact(x, y, np.ones(3)), y, 2.0**-23, 0.0)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "read-only"])
def test_layouts(layout):
    """[12] Views give the bits of a copy; logits are not written unless they are `out`."""
    for rows, classes in ((5, 9), (6, 130), (3, 1030)):
        x, y = make_logits(rows, classes), make_labels(rows, classes)
        given = LAYOUTS[layout](x.copy())
        value, grad = nl.value_and_grad(nl.cross_entropy)(given, y, reduction="sum")
        want = nl.value_and_grad(nl.cross_entropy)(x, y, reduction="sum")
        assert_same_bits((value, grad), want, layout)
        assert_same_bits(np.array(given, np.float32), x)


def test_many_strides():
    """[12] Four row axes in another order: gradients in memory that no two strides describe are not left unwritten."""
    x, y = make_logits(48, 30).reshape(2, 3, 2, 4, 30), make_labels(48, 30).reshape(2, 3, 2, 4)
    want = nl.value_and_grad(nl.cross_entropy)(x, y, reduction="none")
    order = 3, 1, 0, 2
    for logits in (x.transpose(*order, 4), np.asfortranarray(x).transpose(*order, 4)):
        got = nl.value_and_grad(nl.cross_entropy)(logits, y.transpose(order), reduction="none")
        assert_same_bits(got, (want[0].transpose(order), want[1].transpose(*order, 4)))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_in_place(dtype):
    """out=logits: the same bits, no other memory."""
    for rows, classes in ((70, 9), (6, 130), (3, 9001)):
        x, y = make_logits(rows, classes, dtype), make_labels(rows, classes)
        want = nl.value_and_grad(nl.cross_entropy)(x, y)
        value, grad = nl.value_and_grad(nl.cross_entropy)(x, y, out=x)
        assert grad is x
        assert_same_bits((value, grad), want)
    wide = make_logits(6, 10, dtype)
    want = nl.value_and_grad(nl.cross_entropy)(wide[:, 1:9:2], make_labels(6, 4))[1]
    before = wide.copy()
    nl.value_and_grad(nl.cross_entropy)(wide[:, 1:9:2], make_labels(6, 4), out=wide[:, 1:9:2])
    assert_same_bits(wide[:, 1:9:2].copy(), want)
    assert_same_bits(wide[:, ::2].copy(), before[:, ::2].copy())


def test_upstream():
    """[10] Distinct, broadcast and strided values; other axes."""
    x, y = make_logits(12, 20).reshape(3, 4, 20), make_labels(12, 20).reshape(3, 4)
    run = nl.value_and_grad(nl.cross_entropy)
    one = run(x, y, reduction="none")[1]
    g = np.arange(12, dtype=np.float32).reshape(3, 4)
    each = run(x, y, reduction="none", upstream=g)[1]
    for i, j in np.ndindex(3, 4):
        alone = run(x[i, j], y[i, j], reduction="none", upstream=g[i, j])[1]
        assert_same_bits(each[i, j], alone)
    assert_same_bits(run(x, y, reduction="none", upstream=g.T.copy().T)[1], each)
    assert_same_bits(run(x, y, reduction="none", upstream=np.broadcast_to(2.0, (3, 4)))[1], one * 2)
    assert_same_bits(run(x, y, reduction="none", upstream=2)[1], one * 2)
    assert_same_bits(
        run(x, y, reduction="none", upstream=g[:1])[1], run(x, y, reduction="none", upstream=np.tile(g[:1], (3, 1)))[1]
    )
    moved = np.ascontiguousarray(np.moveaxis(x, -1, 1))
    assert_same_bits(np.moveaxis(run(moved, y, reduction="none", upstream=g, axis=1)[1], 1, -1).copy(), each)


def test_tensorflow_name():
    x, y = make_logits(5, 30), make_labels(5, 30)
    value, grad = nl.value_and_grad(nl.sparse_softmax_cross_entropy_with_logits)(y, x)
    assert_same_bits(value, nl.sparse_softmax_cross_entropy_with_logits(y, x))
    assert_same_bits(grad, nl.value_and_grad(nl.cross_entropy)(x, y, reduction="none")[1])


def test_threads_and_batches():
    """[16] A row alone, rows in another order, one thread or several."""
    import numba

    x, y = make_logits(40, 3000), make_labels(40, 3000)
    want = nl.value_and_grad(nl.cross_entropy)(x, y, reduction="none")
    order = np.random.default_rng(0).permutation(40)
    got = nl.value_and_grad(nl.cross_entropy)(x[order], y[order], reduction="none")
    assert_same_bits(got, tuple(a[order] for a in want))
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        assert_same_bits(nl.value_and_grad(nl.cross_entropy)(x, y, reduction="none"), want)
    finally:
        numba.set_num_threads(before)


def test_errors():
    """Bad input raises before anything is written."""
    x, y = make_logits(4, 10), make_labels(4, 10)
    run, before = nl.value_and_grad(nl.cross_entropy), x.copy()
    with pytest.raises(ValueError, match=r"targets: expected values in \[0, 10\), got 10 at position \(3,\)"):
        run(x, np.array([0, 1, 2, 10]), out=x)
    with pytest.raises(ValueError, match=r"out: expected shape \(4, 10\) to match logits, got \(10, 4\)"):
        run(x, y, out=np.empty((10, 4), np.float32))
    with pytest.raises(TypeError, match="out: expected dtype float32"):
        run(x, y, out=np.empty((4, 10)))
    with pytest.raises(ValueError, match=r"upstream: expected a shape that broadcasts to the loss's \(\), got \(4,\)"):
        run(x, y, upstream=np.ones(4), out=x)
    with pytest.raises(ValueError, match="read-only"):
        run(x, y, out=np.broadcast_to(np.float32(0), (4, 10)))
    with pytest.raises(TypeError, match=r"loss: expected one of cross_entropy, .*, got 'logsumexp'"):
        nl.value_and_grad(nl.logsumexp)
    with pytest.raises(ValueError, match="wrt: expected one of 'logits', 'weights', 'targets', got 'labels'"):
        nl.value_and_grad(nl.cross_entropy, wrt="labels")
    assert_same_bits(x, before)
    got = run(x, np.array([0, 1, 2, 10]), reduction="none", check_labels="nan")
    assert np.isnan(got[0][3]) and np.isnan(got[1][3]).all() and np.isfinite(got[1][:3]).all()
    assert run(x[:0], y[:0])[1].shape == (0, 10)


WRONG_CALLS = {
    "nothing": ((), {}),
    "one missing": ((1,), {}),
    "too many": ((1, 2, 3), {}),
    "twice": ((1, 2), {"targets": 3}),
    "unknown": ((1, 2), {"colour": 3}),
    "unknown for a missing one": ((1,), {"colour": 3}),
    "too many for a missing one": ((1, 2, 3), {"colour": 4}),
}


@pytest.mark.parametrize("call", WRONG_CALLS)
@pytest.mark.parametrize("derivative", [nl.value_and_grad, nl.value_grad_hess])
def test_arguments_that_do_not_fit(derivative, call):
    args, options = WRONG_CALLS[call]
    with pytest.raises(TypeError) as expected:
        inspect.signature(nl.cross_entropy).bind(*args, **options)
    with pytest.raises(TypeError) as error:
        derivative(nl.cross_entropy)(*args, **options)
    assert str(error.value) == str(expected.value)


def test_arguments_by_position_and_by_name():
    x, y = make_logits(4, 10), make_labels(4, 10)
    run = nl.value_and_grad(nl.sparse_softmax_cross_entropy_with_logits)
    for other in (run(y, logits=x), run(logits=x, labels=y), run(y, x, None, check_labels="raise")):
        assert_same_bits(run(y, x), other)
