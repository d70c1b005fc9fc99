"""kl_divergence and js_divergence: against 50-digit truths, special values, layouts, options, gradients."""

import mpmath
import numba
import numpy as np
import pytest
from common import BFLOAT16, DTYPES, EPS, assert_close, assert_same_bits, layouts_for, loss_limit, make_logits

import numbaloss as nl
from numbaloss import divergence

pytestmark = pytest.mark.usefixtures("one_thread")

INF, NAN = np.inf, np.nan
BOTH = [np.float32, np.float64]
LOSSES = [nl.kl_divergence, nl.js_divergence]


def three(p, q):
    """(KL(p || q), KL(q || p), Jensen-Shannon) of each row, from one visit."""
    return divergence._divergences(p, q, None, -1, kl=True, reverse=True, js=True)


def softmax(row):
    top = mpmath.mpf(float(max(row)))
    terms = [mpmath.exp(mpmath.mpf(float(v)) - top) for v in row]
    total = mpmath.fsum(terms)
    return [t / total for t in terms]


def part(a, b):
    """a log(a / b) of numbers of mpmath."""
    return mpmath.mpf(0) if a == 0 else a * mpmath.log(a / b) if b else mpmath.inf


def exact(p, q):
    """What three() approximates."""
    with mpmath.workdps(50):
        rows = []
        for x, y in zip(p, q):
            pairs = list(zip(softmax(x), softmax(y)))
            js = mpmath.fsum(part(a, (a + b) / 2) + part(b, (a + b) / 2) for a, b in pairs) / 2
            rows.append((mpmath.fsum(part(a, b) for a, b in pairs), mpmath.fsum(part(b, a) for a, b in pairs), js))
        return np.array([[float(v) for v in row] for row in rows]).reshape(-1, 3).T


def moved(p, by, seed=1):
    """p, each logit moved by a random share of about `by`."""
    noise = np.random.default_rng(seed).standard_normal(p.shape)
    return (p.astype(np.float64) * (1 + by * noise)).astype(p.dtype)


# -- truths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("classes", [1, 2, 3, 17, 100, 1023, 1024, 1025])
def test_exact(classes, dtype):
    """Rows that differ by a factor or by one digit; confident ones; ones far apart."""
    for by in (1, 1e-1, 1e-3, 1e-5, 1e-7):
        p = make_logits(3, classes, dtype, seed=classes)
        p[1, 0] = 30
        q = moved(p, by)
        for got, truth in zip(three(p, q), exact(p, q)):
            assert_close(got, truth, loss_limit(truth, dtype), what=f"moved by {by}")


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("classes", [8191, 8192, 8193, 20_000])
def test_exact_over_chunks(classes, dtype):
    p = make_logits(2, classes, dtype)
    q = np.array([moved(p[0], 1), moved(p[1], 1e-4)])
    for got, truth in zip(three(p, q), exact(p, q)):
        assert_close(got, truth, loss_limit(truth, dtype))


@pytest.mark.parametrize("dtype", BOTH)
def test_shifts(dtype):
    """A shift of one row, exact in its dtype, changes nothing; logits may be of any size."""
    p = np.round(make_logits(3, 300, dtype) * 16) / dtype(16)
    q = np.round(moved(p, 0.1) * 16) / dtype(16)
    whole = three(p, q)
    for shift in (-(2.0**10), 2.0**18, 1e6):
        for got, truth in zip(three(p, q + dtype(shift)), exact(p, q)):
            assert_close(got, truth, loss_limit(truth, dtype))
        for got, truth in zip(three(p, p + dtype(shift)), whole):
            assert (got <= 4 * EPS[np.dtype(dtype)] ** 3).all() and truth.min() > 1e-6
    far = [(x * dtype(1e7)).astype(dtype) for x in (p, q)]
    for got, truth in zip(three(*far), exact(*far)):
        assert_close(got, truth, loss_limit(truth, dtype))


# -- signs and bounds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_equal_rows_give_zero(dtype):
    p = make_logits(20, 333, dtype, scale=20)
    p[3, :300] = -INF
    for got in three(p, p.copy()):
        assert_same_bits(got, np.zeros_like(got))


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("classes", [2, 5, 64])
def test_never_negative_and_symmetric(classes, dtype):
    rng = np.random.default_rng(classes)
    p = make_logits(4000, classes, dtype, scale=8)
    flip = rng.random(p.shape) < 0.3
    q = np.where(flip, np.nextafter(p.astype(np.float32), INF), p).astype(dtype)
    q[::2] = (p[::2].astype(np.float32) + np.float32(rng.choice([-0.5, 0.5, 3]))).astype(dtype)
    kl, reverse, js = three(p, q)
    assert min(kl.min(), reverse.min(), js.min()) >= 0
    again = three(q, p)
    assert_same_bits((again[1], again[0], again[2]), (kl, reverse, js))
    far = three(p, (-p.astype(np.float32) * 9).astype(dtype))[2]
    assert far.max() <= np.float32(np.log(2)) and far.max() > 0.6


# -- special values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("classes", [4, 1030])
def test_minus_infinity(classes, dtype):
    """In p alone: p log p / q is 0. In q alone: KL is +inf. In both: as if the class were absent."""
    p = make_logits(4, classes, dtype)
    q = moved(p, 0.3)
    p[0, 1] = q[1, 2] = p[2, 3] = q[2, 3] = -INF
    p[3, 0], q[3, 0] = -500, -INF
    kl, reverse, js = three(p, q)
    truths = exact(p, q)
    truths[0, 3] = INF
    for got, truth in zip((kl, reverse, js), truths):
        assert_close(got, truth, loss_limit(truth, dtype))
    assert kl[1] == reverse[0] == INF and np.isfinite(js).all()
    kept = np.arange(classes) != 3
    for got, truth in zip(three(p[2:3, kept], q[2:3, kept]), (kl, reverse, js)):
        assert_close(got, truth[2:3], 2 * loss_limit(truth[2:3], dtype))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("classes", [1, 3, 1030, 8200])
def test_rows_without_a_softmax(classes, dtype):
    good = make_logits(1, classes, dtype)[0]
    for value in (NAN, -NAN, INF, None):
        for spot in {0, classes // 2, classes - 1}:
            bad = good.copy()
            bad[slice(None) if value is None else spot] = -INF if value is None else value
            for p, q in ((good, bad), (bad, good), (bad, bad)):
                assert all(np.isnan(x).all() for x in three(p[None], q[None]))


def test_weight_zero_is_not_looked_at():
    p, q = make_logits(3, 50), make_logits(3, 50, seed=1)
    p[1, 3] = q[1, 7] = NAN
    weights = np.array([1, 0, 3.0])
    for loss in LOSSES:
        each = loss(p, q, reduction="none")
        assert np.isnan(each[1]) and np.isfinite(each[[0, 2]]).all()
        weighted = loss(p, q, weights=weights, reduction="none")
        assert_same_bits(weighted, np.array([each[0], 0, np.float64(each[2]) * 3], np.float32))
        total = np.float64(each[0]) + 3 * np.float64(each[2])
        assert loss(p, q, weights=weights, reduction="sum") == np.float32(total)
        assert loss(p, q, weights=weights) == np.float32(total / 4)
        for g in nl.value_and_grad(loss, ("logits_p", "logits_q"))(p, q, weights=weights)[1]:
            assert_same_bits(g[1], np.zeros(50, np.float32))
            assert np.isfinite(g).all() and not np.signbit(g[g == 0]).any()


# -- arrays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_layouts(dtype):
    p = make_logits(6, 1100, dtype)
    q = moved(p, 0.1)
    expected = three(p, q)
    grads = nl.value_and_grad(nl.js_divergence, ("logits_p", "logits_q"))(p, q)
    for name, layout in layouts_for(dtype).items():
        for x, y in ((layout(p), q), (p, layout(q)), (layout(p), layout(q))):
            assert_same_bits(tuple(three(x, y)), tuple(expected), name)
        value, got = nl.value_and_grad(nl.js_divergence, ("logits_p", "logits_q"))(layout(p), layout(q))
        assert_same_bits((value, *got), (grads[0], *grads[1]), name)
    turned = nl.kl_divergence(np.ascontiguousarray(p.T), np.ascontiguousarray(q.T), axis=0, reduction="none")
    assert_same_bits(turned, expected[0])


@pytest.mark.parametrize("narrow", [np.float16, BFLOAT16, np.float32], ids=["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("wide", BOTH)
def test_mixed_dtypes(narrow, wide):
    if narrow is wide:
        pytest.skip("one dtype")
    p, q = make_logits(5, 700, narrow), make_logits(5, 700, wide, seed=3)
    assert_same_bits(tuple(three(p, q)), tuple(three(p.astype(wide), q)))
    assert_same_bits(tuple(three(q, p)), tuple(three(q, p.astype(wide))))
    run = nl.value_and_grad(nl.kl_divergence, ("logits_p", "logits_q"))
    value, (g, h) = run(p, q)
    assert (g.dtype, h.dtype, value.dtype) == (np.dtype(narrow), np.dtype(wide), np.dtype(wide))
    expected, (a, b) = run(p.astype(wide), q)
    assert_same_bits((value, h), (expected, b))
    assert_same_bits(g, a.astype(narrow))


def test_threads():
    p, q = make_logits(40, 9000), make_logits(40, 9000, seed=1)
    expected = tuple(three(p, q))
    numba.set_num_threads(2)
    assert_same_bits(tuple(three(p, q)), expected)
    assert_same_bits(tuple(x[7:8] for x in expected), tuple(three(p[7:8], q[7:8])))


def test_outputs_do_not_depend_on_each_other():
    p, q = make_logits(4, 500), make_logits(4, 500, seed=1)
    kl, reverse, js = three(p, q)
    assert_same_bits(nl.kl_divergence(p, q, reduction="none"), kl)
    assert_same_bits(nl.kl_divergence(q, p, reduction="none"), reverse)
    assert_same_bits(nl.js_divergence(p, q, reduction="none"), js)


@pytest.mark.parametrize("loss", LOSSES)
def test_errors(loss):
    p = make_logits(3, 5)
    for bad, error, text in (
        ((p, p[:2]), ValueError, r"logits_q: expected shape \(3, 5\) to match logits_p, got \(2, 5\)"),
        ((p, p.tolist()), TypeError, "logits_q: expected a NumPy or CuPy array"),
        ((p.astype(int), p), TypeError, "logits_p: expected dtype"),
        ((p[:, :0], p[:, :0]), ValueError, "logits_p: expected at least one class"),
    ):
        with pytest.raises(error, match=text):
            loss(*bad)
    with pytest.raises(ValueError, match=r"weights: expected shape \(3,\) to match logits"):
        loss(p, p, weights=np.ones(2))
    with pytest.raises(ValueError, match="reduction: expected one of"):
        loss(p, p, reduction="average")
    assert loss(p[:0], p[:0], reduction="none").shape == (0,) and np.isnan(loss(p[:0], p[:0]))
    assert loss(p[0], p[1]).shape == loss(p[0], p[1], reduction="none").shape == ()
